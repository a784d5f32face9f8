"""What a run has trained, read again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from metafast.data.sources import Folder, Source
from metafast.methods import Learner
from metafast.program.config import (
    CONFIG,
    Config,
    choose_source,
    read_config,
    rebuild_from,
    sources_of,
)
from metafast.program.settings import stated
from metafast.runs.checkpoint import Checkpoint


def load_method(
    path: Path, device: str = "cpu", *, data: str | None = None, data_root: Path | None = None
) -> tuple[Learner, Config]:
    """The trained method in a checkpoint (a file, or a run's folder), and the configuration of its run.

    Args:
        data: data of the same kind to take the place of the run's.
        data_root: where the data lie, which is no part of a configuration.
    """
    found, checkpoint = Checkpoint.latest(path)
    config, problem = rebuild_from(found, checkpoint.config)
    if found != path and (described := read_config(path)) is not None:
        folders, _ = rebuild_from(path / CONFIG, described)
        if (folders.method, folders.settings) != (config.method, config.settings):
            raise ValueError(
                f"{path / CONFIG}: expected the method and settings that {found.name} was trained with"
            )
        config = folders
    try:
        method = config.learner.from_settings(config.settings, problem)
        checkpoint.restore_model(method)
    except ValueError as error:
        raise ValueError(f"{found}: {error}") from None
    if data is not None:
        config = replace(config, data=_other(config, data))
    if data_root is not None:
        if "data_root" not in stated(type(config.data)):
            having = " or ".join(
                name for name, source in sources_of(config.learner).items() if "data_root" in stated(source)
            )
            raise ValueError(f"data_root: expected only for {having}, got {data_root} for {config.data.name}")
        config = replace(config, data=replace(config.data, data_root=data_root))
    return method.to(device).eval(), config


def _other(config: Config, name: str) -> Source:
    """The data that a name means, with the settings of the run's."""
    source, named = choose_source(config.method, name)
    if source.kind != config.data.kind:
        raise ValueError(f"data: expected {config.data.kind}, which the run has learned, got {name}")
    if source is Folder:
        return config.data.folder(named["path"])
    shared = stated(source).keys() & stated(type(config.data)).keys()
    return source(**{**{name: getattr(config.data, name) for name in shared}, **named})
