"""The configuration of a run: what was trained on what, and how. It rebuilds the run, or its method."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import metafast
from metafast.data.sources import Folder, Source
from metafast.methods import METHODS, Learner
from metafast.program.settings import build, check_names, read, said, stated, write
from metafast.program.train import Pace, TrainingSettings
from metafast.settings import Settings

CONFIG = "config.json"
_SECTIONS = ("settings", "data", "training", "pace")
_LIST = re.compile(r"\[[^\[\]{}]*\]")  # of numbers: on one line
_KEYS = ("method", *_SECTIONS, "problem", "digest", "versions")


@dataclass(frozen=True)
class Config:
    """A run's configuration.

    Attributes:
        method: its name in ``METHODS``.
        settings: of the method, its ``Settings``.
        data: what it learns from.
        training: all else that the trained weights depend on.
        pace: how often the run writes.
    """

    method: str
    settings: Settings
    data: Source
    training: TrainingSettings
    pace: Pace

    @property
    def learner(self) -> type[Learner]:
        return METHODS[self.method]

    def described(self, problem: Any, digest: str | None) -> dict[str, Any]:
        """What a run's configuration file and its checkpoints keep.

        Args:
            problem: of the data, which the method was built for.
            digest: of the data, where nothing else keeps them as they are.
        """
        data = {"name": "folder" if isinstance(self.data, Folder) else self.data.name, **write(self.data)}
        return {
            "method": self.method,
            "settings": write(self.settings),
            "data": data,
            "training": write(self.training),
            "pace": write(self.pace),
            "problem": {
                name: list(value) if isinstance(value, tuple) else value
                for name, value in vars(problem).items()
            },
            "digest": digest,
            "versions": versions(),
        }


def versions() -> dict[str, str]:
    """What computed a run."""
    return {
        "metafast": metafast.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def sources_of(learner: type[Learner]) -> dict[str, type[Source]]:
    """What a method can learn from, the default first."""
    return {name: source for name, source in learner.sources.items() if source.kind in learner.recipes}


def choose_source(method: str, name: str | None) -> tuple[type[Source], dict[str, Any]]:
    """The data that an option names, and what its name says of them.

    Raises:
        ValueError: there are no such data, or the method cannot learn from them.
    """
    learner = METHODS[method]
    known = sources_of(learner)
    name = next(iter(known)) if name is None else name
    if name in known and known[name] is not Folder:
        return known[name], {}
    if name not in learner.sources and Folder in known.values() and name and Path(name).is_dir():
        return Folder, {"path": Path(name).absolute()}
    *first, last = known
    expected = f"{', '.join(first)} or {last}" if first else last
    raise ValueError(f"{learner.source}: expected {expected}, which {method} learns from, got {said(name)}")


def compose(method: str, given: Mapping[str, Any], base: Mapping[str, Any] | None = None) -> Config:
    """The configuration that options describe.

    Args:
        given: name of a setting -> its value, of all sections; ``learner.source`` names the data.
        base: what is taken where an option is not given, instead of the recipe: of a configuration file.
    """
    learner = METHODS[method]
    given = dict(given)
    name = given.pop(learner.source, None)
    if base is not None and name is None:
        source, path = _named(method, base["data"])
    else:
        source, path = choose_source(method, name)
    sections = {"settings": learner.Settings, "data": source, "training": TrainingSettings, "pace": Pace}
    known = {name: field for name, field in stated(*sections.values()).items() if field.metadata["option"]}
    owners = sources_of(learner)
    for option, value in given.items():
        if option not in known and any(option in stated(owner) for owner in owners.values()):
            having = " or ".join(name for name, owner in owners.items() if option in stated(owner))
            raise ValueError(f"{option}: expected only for {having}, got {said(value)} for {source.name}")
    check_names(given, known)
    settings = {}
    recipe = learner.recipe(source, given.get("backbone"))
    recipe = {name: value for name, value in recipe.items() if name not in source.own}
    for section, cls in sections.items():
        defaults = recipe | (base[section] if base is not None else {}) | path
        ours = stated(cls)
        settings[section] = read(
            cls,
            {name: value for name, value in given.items() if name in ours},
            {name: value for name, value in defaults.items() if name in ours},
        )
    if base is None:
        settings["data"] = settings["data"].fitted(given)
    return Config(method, **settings)


def _named(method: str, data: Mapping[str, Any]) -> tuple[type[Source], dict[str, Any]]:
    if data["name"] == "folder":
        return Folder, {"path": Path(data["path"])}
    return choose_source(method, data["name"])


def rebuild(described: Any) -> tuple[Config, Any]:
    """The configuration, and the problem of the data, that :meth:`Config.described` gave.

    Raises:
        ValueError: a name is unknown, missing or of something else; a value is out of range.
    """
    if not isinstance(described, dict):
        raise ValueError(f"expected an object with {', '.join(_KEYS)}")
    check_names(described, _KEYS)
    for key in _KEYS:
        if key not in described:
            raise ValueError(f"{key}: missing")
    method = described["method"]
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    for key in (*_SECTIONS, "problem", "versions"):
        if not isinstance(described[key], dict):
            raise ValueError(f"{key}: expected an object, got {described[key]!r}")
    learner = METHODS[method]
    data = dict(described["data"])
    names = {"folder" if source is Folder else name: source for name, source in learner.sources.items()}
    name = data.pop("name", None)
    if name not in names:
        raise ValueError(f"data.name: expected one of {', '.join(names)}, got {name!r}")
    sections = {"settings": learner.Settings, "data": names[name], "training": TrainingSettings, "pace": Pace}
    settings = {}
    for section, cls in sections.items():
        try:
            settings[section] = read(cls, data if section == "data" else described[section])
        except ValueError as error:
            raise ValueError(f"{section}.{error}") from None
    try:
        problem = build(names[name].problem, described["problem"])
    except ValueError as error:
        raise ValueError(f"problem.{error}") from None
    return Config(method, **settings), problem


def rebuild_from(path: Path, described: Any) -> tuple[Config, Any]:
    """:func:`rebuild` of what was found at ``path``, which its errors name."""
    try:
        return rebuild(described)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def defaults_of(learner: type[Learner]) -> dict[str, dict[str, Any]]:
    """Kind of data -> setting -> its default, of all sections, for the help.

    Data with a backbone of their own are a kind of their own.
    """
    found = {}
    for source in sources_of(learner).values():
        kind = source.name if source.name in learner.backbone_on else source.kind
        recipe = learner.recipe(source)
        own = stated(learner.Settings, source, TrainingSettings, Pace)
        defaults = {name: recipe.get(name, field.default) for name, field in own.items()}
        found[kind] = defaults | found.get(kind, {})  # of the first of a kind, if they differ
    return found


def read_config(folder: Path) -> dict[str, Any] | None:
    """What a run's configuration file says; ``None`` where there is none."""
    path = folder / CONFIG
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON ({error})") from None


def write_config(folder: Path, described: Mapping[str, Any]) -> None:
    """Writes it whole or not at all, where it is not there already."""
    path = folder / CONFIG
    text = json.dumps(described, indent=2)
    text = _LIST.sub(lambda found: " ".join(found[0].split()).replace("[ ", "[").replace(" ]", "]"), text)
    written = f"{text}\n".encode()
    if path.exists() and path.read_bytes() == written:
        return
    partial = path.with_suffix(".partial")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(written)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"{path}: cannot be written ({error})") from error
