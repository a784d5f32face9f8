"""What `metafast eval` measures, for each kind of run: settings, and the lines that they print."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch

from metafast.data import Episodes, omniglot_runs
from metafast.data.center import center
from metafast.data.floors import pixel_floor
from metafast.data.sources import TASKS, Images, Omniglot, Problems, Sine
from metafast.methods import (
    MAML,
    Adaptation,
    ImaginaryData,
    LearnedOptimizer,
    Learner,
    Method,
    SequenceLearner,
)
from metafast.program.config import Config
from metafast.program.evaluate import Estimate, estimate, evaluate, score
from metafast.program.learning_curves import RATES, RIVALS, learned, learning_curves, tune
from metafast.program.train import PRECISION, Precision, autocast_dtype
from metafast.settings import Count, NotNegative, Range, Seed, Settings, Whole, setting

_PROBLEMS_AT_ONCE = 32  # of an optimizer's evaluation
_BENCHMARK_WAYS = 20
_FLOOR = "nearest in raw pixels, by cosine"
WAVE_SHOTS, WAVE_STEPS = (5, 10), (1, 5, 10, 32)

Several = Annotated[int, Range(ge=2)]


@dataclass(frozen=True, kw_only=True)
class Evaluation(Settings, ABC):
    """One kind; ``None``: as trained, or none."""

    name: ClassVar[str]

    @abstractmethod
    def __call__(self, method: Learner, trained: Config, device: str) -> None:
        """Prints what it measures."""


@dataclass(frozen=True, kw_only=True)
class _OfEpisodes(Evaluation):
    precision: Precision | None = setting(None, f"{PRECISION}; else as trained")

    def autocast(self, trained: Config, device: str) -> AbstractContextManager[Any]:
        dtype = autocast_dtype(self.precision or trained.training.precision, device)
        return torch.autocast(device, dtype, enabled=dtype is not None)


@dataclass(frozen=True, kw_only=True)
class OnImages(_OfEpisodes):
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
            for shots, sampler in _samplers(trained.data, self.shots, self, device, **sizes).items():
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
class OnBenchmark(_OfEpisodes):
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


@dataclass(frozen=True, kw_only=True)
class OnWaves(_OfEpisodes):
    """Squared error: a line for each number of points, a column for each number of steps; the same waves."""

    name = "sine waves"

    split: str = setting("test", "of the data")
    seed: Seed = setting(1, "of the episodes")
    episodes: Several = setting(600, "episodes, waves or problems")
    shots: tuple[Count, ...] = setting(WAVE_SHOTS, "support examples of a class, or of a wave")
    queries: Count = setting(100, "query examples of a class, or of a wave")
    inner_steps: tuple[Whole, ...] = setting(WAVE_STEPS, "steps of adaptation; else as trained")

    def __call__(self, method: Adaptation, trained: Config, device: str) -> None:
        samplers = _samplers(
            trained.data, self.shots, self, device, queries=self.queries, tasks=self.episodes
        )
        print(f"Mean squared error of {trained.method} on {self.episodes} waves, after steps of fine-tuning:")
        print("points" + "".join(f"{steps:>17}" for steps in self.inner_steps))
        with self.autocast(trained, device):
            for shots, sampler in samplers.items():
                errors = wave_errors(method, sampler.batch(0), self.inner_steps)
                print(f"{shots:>6}" + "".join(f"{error:>9.3f}" for error in errors))


@dataclass(frozen=True, kw_only=True)
class OnProblems(Evaluation):
    """For each number of steps a line for the learned optimizer and one for each rival: the same problems."""

    name = "problems of l2l"

    split: str = setting("test", "of the data")
    seed: Seed = setting(1, "of the episodes")
    episodes: Several = setting(64, "episodes, waves or problems")
    task: Literal[tuple(TASKS)] | None = setting(
        None, "what an optimizer of l2l is tried on; else as trained"
    )
    batch_size: Count | None = setting(
        None, "examples that a network of the task sees in a step; else as trained"
    )
    inner_steps: tuple[Count, ...] | None = setting(None, "steps of adaptation; else as trained")
    figure: Path | None = setting(None, "draw the learning curves of l2l and of its rivals")

    def __call__(self, method: LearnedOptimizer, trained: Config, device: str) -> None:
        lengths = self.inner_steps or (trained.data.inner_steps,)
        if self.figure is not None and len(lengths) > 1:
            raise ValueError(f"figure: expected one number of inner steps, got {' '.join(map(str, lengths))}")
        tried = self._tried_on(trained.data)
        for steps in lengths:
            batches = self._problems(replace(tried, inner_steps=steps), device)
            curves = self._compare(method, batches, trained.data.name, tried.name, steps)
        if self.figure is not None:
            from metafast.program.figures import draw_learning_curves

            title = f"{self.episodes} new problems: {tried.name}, {self.split}"
            draw_learning_curves(curves, self.figure, title=title)
            print(f"{self.figure}: the learning curves")

    def _tried_on(self, trained: Problems) -> Problems:
        kind = type(trained) if self.task is None else TASKS[self.task]
        known = kind.__dataclass_fields__
        if self.batch_size is not None and "batch_size" not in known:
            having = " or ".join(name for name, task in TASKS.items() if hasattr(task, "batch_size"))
            raise ValueError(f"batch_size: expected only for {having}, got {self.batch_size} for {kind.name}")
        carried = {
            name: getattr(trained, name) for name in ("batch_size", "data_root") if hasattr(trained, name)
        }
        if self.batch_size is not None:
            carried["batch_size"] = self.batch_size
        return kind(**{name: value for name, value in carried.items() if name in known})

    def _problems(self, source: Problems, device: str) -> list[Any]:
        source = replace(source, tasks=min(self.episodes, _PROBLEMS_AT_ONCE))
        sampler = source.sampler(self.split, seed=self.seed, device=device)
        batches = [sampler.batch(index) for index in range(-(-self.episodes // _PROBLEMS_AT_ONCE))]
        batches[-1] = batches[-1].take(slice(self.episodes - sum(map(len, batches[:-1]))))
        return batches

    def _compare(
        self, method: LearnedOptimizer, batches: list[Any], trained: str, tried: str, steps: int
    ) -> dict[str, torch.Tensor]:
        print(
            f"Loss after {steps} steps on {self.episodes} new problems, {tried} {self.split}; the rivals at "
            f"the best of {len(RATES)} rates from {RATES[0]:g} to {RATES[-1]:g}:"
        )
        curves = {f"l2l ({trained})": learning_curves(batches, learned(method.cell))}
        (ours,) = curves.values()
        print(f"  {next(iter(curves)):22} {estimate(ours[-1]):.3g}")
        for name in RIVALS:
            tuned = tune(batches, name)
            curves[name] = tuned.curves
            settings = ", ".join(f"{key} {value:.3g}" for key, value in tuned.settings.items())
            print(
                f"  {name:22} {estimate(tuned.curves[-1]):.3g}   l2l - {name}: "
                f"{estimate(ours[-1] - tuned.curves[-1]):.3g}   ({settings})"
            )
        return curves


EVALUATIONS = (OnImages, OnImagesAdapting, OnBenchmark, OnWaves, OnProblems)


def evaluation_of(method: Learner, trained: Config, *, runs: bool) -> type[Evaluation]:
    """The kind of evaluation that a method, and what it learned from, ask for."""
    if isinstance(method, LearnedOptimizer):
        return OnProblems
    if isinstance(trained.data, Sine):
        return OnWaves
    if runs:
        return OnBenchmark
    return OnImagesAdapting if isinstance(method, Adaptation) else OnImages


def wave_errors(method: Adaptation, waves: Episodes, steps: Sequence[int]) -> list[Estimate]:
    """The mean squared error after each of so many steps of fine-tuning on the support."""
    return [evaluate(method, [waves], partial(method.predict, steps=count)) for count in steps]


def _samplers(
    data: Images | Sine, shots: Sequence[int], asked: OnImages | OnWaves, device: str, **sizes: int
) -> dict[int, Any]:
    """One for each number of shots, all made before one is used: what does not fit is said at once."""
    return {
        count: replace(data, shots=count, **sizes).sampler(asked.split, seed=asked.seed, device=device)
        for count in shots
    }


def _check_ways(name: str, ways: int, method: Method, trained: Config) -> None:
    if isinstance(method, (Adaptation, SequenceLearner)) and ways > trained.data.ways:
        raise ValueError(
            f"{name}: expected at most {trained.data.ways} classes, as {trained.method} was trained, got "
            f"{ways}"
        )


def _sgd_from(method: Adaptation, lr: float) -> Adaptation:
    """Plain gradient descent from where a method's inner loop begins, with as many steps."""
    return MAML(method.network, loss=method.loss_name, lr=lr, steps=method.test_steps)
