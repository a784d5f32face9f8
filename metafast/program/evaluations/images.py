"""Evaluation on images: accuracy over episodes, and on Omniglot's 20 runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from metafast.data import Episodes, omniglot_runs
from metafast.data.center import center
from metafast.data.floors import pixel_floor
from metafast.data.sources import Omniglot
from metafast.methods import MAML, Adaptation, ImaginaryData, Method, SequenceLearner
from metafast.program.config import Config
from metafast.program.evaluate import evaluate, score
from metafast.settings import Count, NotNegative, Seed, Whole, setting

from .base import OfEpisodes, Several, samplers_of

_BENCHMARK_WAYS = 20
_FLOOR = "nearest in raw pixels, by cosine"


@dataclass(frozen=True, kw_only=True)
class OnImages(OfEpisodes):
    """Accuracy over episodes."""

    name = "images"

    split: str = setting("test", "of the data")
    seed: Seed = setting(1, "of the episodes")
    episodes: Several = setting(600, "episodes, waves or problems")
    ways: Count | None = setting(5, "classes of a task; with an inner loop else as trained")
    shots: tuple[Count, ...] = setting((1,), "support examples of a class, or of a wave")
    queries: Count = setting(5, "query examples of a class, or of a wave")

    def __call__(self, method: Method, trained: Config, device: str) -> None:
        ways = self.ways or trained.data.ways
        _check_ways("ways", ways, method, trained)
        sizes = {"queries": self.queries, "ways": ways, "tasks": 1}
        with self.autocast(trained, device):
            for shots, sampler in samplers_of(
                trained.data, self.shots, self.split, self.seed, device, **sizes
            ).items():
                floor = sum(map(pixel_floor, self._batches(sampler))) / self.episodes
                for said, learner, predict in self._learners(method):
                    accuracy = evaluate(learner, self._batches(sampler), predict)
                    print(
                        f"{ways}-way {shots}-shot, {self.episodes} episodes of {trained.data} {self.split}"
                        f"{said}: {accuracy:.2%}   ({_FLOOR}: {100 * floor:.2f} %)"
                    )

    def _batches(self, sampler: Any) -> Iterator[Episodes]:
        return map(sampler.batch, range(self.episodes))

    def _learners(self, method: Method) -> Iterator[tuple[str, Method, Any]]:
        """What is added to its line, who predicts, and how."""
        yield "", method, method.predict
        if isinstance(method, ImaginaryData):
            yield ", without imagined data", method.learner, method.learner.predict


@dataclass(frozen=True, kw_only=True)
class OnImagesAdapting(OnImages):
    """Accuracy over episodes, after steps of an inner loop."""

    name = "images with an inner loop"

    ways: Count | None = setting(None, "classes of a task; with an inner loop else as trained")
    inner_steps: tuple[Whole, ...] | None = setting(None, "steps of adaptation; else as trained")
    sgd: tuple[NotNegative, ...] = setting(
        (), "also the same steps of plain SGD at these learning rates, from the same initialisation"
    )

    def _learners(self, method: Adaptation) -> Iterator[tuple[str, Adaptation, Any]]:
        for steps in self.inner_steps or [None]:
            after = "" if steps is None else f", {steps} inner steps"
            for rate in [None, *self.sgd]:
                learner = method if rate is None else _sgd_from(method, rate)
                by = "" if rate is None else f", by SGD at {rate:g}"
                predict = learner.predict if steps is None else partial(learner.predict, steps=steps)
                yield after + by, learner, predict


@dataclass(frozen=True, kw_only=True)
class OnBenchmark(OfEpisodes):
    """Omniglot's 20-run one-shot benchmark."""

    name = "the 20-run benchmark"

    def __call__(self, method: Method, trained: Config, device: str) -> None:
        data = trained.data
        if isinstance(data, Omniglot) and data.protocol == "vinyals":
            raise ValueError(
                "runs: the vinyals split trains on characters of the benchmark; train with --protocol "
                "background"
            )
        _check_ways("runs", _BENCHMARK_WAYS, method, trained)
        runs = omniglot_runs(getattr(data, "data_root", None), image_size=data.image_size).to(device)
        if data.center:
            runs = replace(runs, support=center(runs.support), query=center(runs.query))
        with self.autocast(trained, device):
            error = 1 - float(score(method, runs).mean())
        floor = 1 - pixel_floor(runs)
        print(f"20-run one-shot benchmark: {100 * error:.2f} % error   ({_FLOOR}: {100 * floor:.2f} %)")


def _check_ways(name: str, ways: int, method: Method, trained: Config) -> None:
    if isinstance(method, (Adaptation, SequenceLearner)) and ways > trained.data.ways:
        raise ValueError(
            f"{name}: expected at most {trained.data.ways} classes, as {trained.method} was trained, got "
            f"{ways}"
        )


def _sgd_from(method: Adaptation, lr: float) -> Adaptation:
    """Plain gradient descent from where a method's inner loop begins, with as many steps."""
    return MAML(method.network, loss=method.loss_name, lr=lr, steps=method.test_steps)
