"""What a run finds: a table that is printed and kept as text, and the same as JSON, written as it goes."""

from __future__ import annotations

import argparse
import datetime
import json
import os
from dataclasses import dataclass, field

from bench.common.machine import describe


@dataclass
class Report:
    """`--out NAME.json`, and NAME.txt beside it."""

    name: str
    options: argparse.Namespace
    content: dict[str, object] = field(default_factory=dict)
    results: list[dict[str, object]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    def __enter__(self) -> Report:
        self.machine = {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            **describe(self.options.device, self.options.threads),
            "quick": self.options.quick,
            "load_average_start": os.getloadavg()[0],
        }
        versions = ", ".join(f"{name} {v}" for name, v in self.machine["versions"].items() if v)
        m = self.machine
        place = m["gpu"] or f"{m['cpu']}, {m['threads']} threads, {m['isa']}"
        self.say(f"{self.name} on {place}\n{versions}, commit {m['commit']}")
        self.say(f"load average at the start {m['load_average_start']:.2f}")
        self.machine["complete"] = False
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.machine["load_average_end"] = os.getloadavg()[0]
        self.machine["complete"] = kind is None
        if kind is not None:
            self.say(f"\ncut off by {kind.__name__}")
        self.say(f"\nload average at the end {self.machine['load_average_end']:.2f}")
        self.write()
        if self.options.out:
            print(f"written to {self.options.out}")

    def say(self, text: str) -> None:
        print(text, flush=True)
        self.lines.append(text)

    def add(self, result: dict[str, object]) -> None:
        self.results.append(result)
        self.write()

    def write(self) -> None:
        """All so far: a run that is cut off leaves what it measured."""
        if not self.options.out:
            return
        content = {"benchmark": self.name, "machine": self.machine, **self.content, "results": self.results}
        texts = {".json": json.dumps(content, indent=1), ".txt": "\n".join(self.lines)}
        self.options.out.parent.mkdir(parents=True, exist_ok=True)
        for suffix, text in texts.items():
            path = self.options.out.with_suffix(suffix)
            half_written = path.with_suffix(f"{suffix}.part")
            half_written.write_text(text + "\n")
            half_written.replace(path)
