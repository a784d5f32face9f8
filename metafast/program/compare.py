"""`metafast compare`: several runs on the same episodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from metafast.data.sources import Images, Sine
from metafast.methods import Adaptation, Method
from metafast.program.config import Config
from metafast.program.evaluate import Estimate, estimate, score
from metafast.program.evaluations import Several
from metafast.program.load import load_method
from metafast.program.train import autocast_dtype
from metafast.settings import Count, Seed, Settings, setting


@dataclass(frozen=True, kw_only=True)
class Comparison(Settings):
    """What the runs are compared on."""

    split: str = setting("test", "of the data")
    seed: Seed = setting(1, "of the episodes")
    episodes: Several = setting(600, "episodes, or waves")
    ways: Count = setting(5, "classes of a task")
    shots: Count | None = setting(None, "support examples of a class (else 1), or of a wave (else 10)")
    queries: Count | None = setting(None, "query examples of a class (else 5), or of a wave (else 100)")
    figure: Path = setting(Path("compare.png"), "the picture of the table")


@dataclass(frozen=True, eq=False)
class Row:
    """A run in the table.

    Attributes:
        scores: of each episode, [E].
        paper: what the method's paper reports, ``None`` where it has no such figure.
    """

    run: str
    method: str
    scores: Tensor
    paper: float | None

    @property
    def mean(self) -> Estimate:
        return estimate(self.scores)


def compare(
    runs: Sequence[Path],
    asked: Comparison,
    device: str,
    *,
    data: str | None = None,
    data_root: Path | None = None,
) -> None:
    """A table, and a picture of it: each run's score with its interval, its difference from the best, paired
    by episode, and the paper's figure.

    Args:
        data, data_root: as in :func:`load_method`.

    Raises:
        ValueError: the runs have not learned from the same data.
    """
    loaded = [(run, *load_method(run, device, data=data, data_root=data_root)) for run in runs]
    kinds = {type(config.data): str(run) for run, _, config in loaded}
    if len(kinds) > 1:
        said = " and ".join(f"{kind.name} ({run})" for kind, run in kinds.items())
        raise ValueError(f"runs: expected runs on the same data, or --data for all, got {said}")
    if not issubclass(next(iter(kinds)), (Images, Sine)):
        raise ValueError("runs: expected runs on images or sine waves; l2l is compared by `metafast eval`")
    rows = [_row(run, method, config, asked, device) for run, method, config in loaded]
    first = loaded[0][2].data
    of_images = isinstance(first, Images)
    best = max(rows, key=lambda row: row.mean.mean if of_images else -row.mean.mean)
    title = f"{_task(first, asked)}, {asked.episodes} episodes of {first} {asked.split}"
    _print(rows, best, title, of_images)

    from metafast.program.figures import draw_comparison

    draw_comparison(
        [(f"{row.run}\n{row.method}", row.mean, row.paper) for row in rows],
        asked.figure,
        title=title,
        axis="accuracy" if of_images else "mean squared error",
    )
    print(f"{asked.figure}: the table as a picture")


def _row(run: Path, method: Method, config: Config, asked: Comparison, device: str) -> Row:
    data = config.data
    sizes = {"shots": asked.shots or (1 if isinstance(data, Images) else 10)}
    sizes["queries"] = asked.queries or (5 if isinstance(data, Images) else 100)
    if isinstance(data, Images):
        sizes["ways"] = asked.ways
        if isinstance(method, Adaptation) and asked.ways > data.ways:
            raise ValueError(f"ways: expected at most {data.ways}, as {run} was trained, got {asked.ways}")
    sampler = replace(data, tasks=1, **sizes).sampler(asked.split, seed=asked.seed, device=device)
    dtype = autocast_dtype(config.training.precision, device)
    with torch.autocast(device, dtype, enabled=dtype is not None):
        scores = torch.cat([score(method, sampler.batch(step)) for step in range(asked.episodes)])
    reported = config.learner.reported.get((data.name, asked.ways, sizes["shots"]))
    return Row(str(run), config.method, scores, reported)


def _task(data: Images | Sine, asked: Comparison) -> str:
    if isinstance(data, Images):
        return f"{asked.ways}-way {asked.shots or 1}-shot"
    return f"{asked.shots or 10} points"


def _print(rows: Sequence[Row], best: Row, title: str, of_images: bool) -> None:
    spec = ".2%" if of_images else ".3f"
    lines = [("run", "method", "accuracy" if of_images else "mse", "behind the best", "the paper")]
    for row in rows:
        behind = (best.scores - row.scores) if of_images else (row.scores - best.scores)
        lines.append(
            (
                row.run,
                row.method,
                format(row.mean, spec),
                "" if row is best else format(estimate(behind), spec),
                "" if row.paper is None else f"{100 * row.paper:.1f} %" if of_images else f"{row.paper:.2f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print(f"{title}; ± half of the 95 % interval, of a difference that of the pairs:")
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
