"""Evaluation on images: accuracy over episodes, and on Omniglot's 20 runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from metafast.data import Episodes, ImageClasses, image_folder, omniglot_runs
from metafast.data.center import center
from metafast.data.floors import pixel_floor
from metafast.data.image_folder import image_files, read_image
from metafast.data.sources import Images, Omniglot
from metafast.methods import MAML, Adaptation, Method, SequenceLearner
from metafast.program.config import Config
from metafast.program.evaluate import evaluate, score
from metafast.settings import Count, NotNegative, Seed, Whole, setting

from .base import OfEpisodes, Several, samplers_of

_BENCHMARK_WAYS = 20
_BEST = 5  # classes that an image is said to be of
_CANDIDATES = 21  # episodes, of which one is drawn
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
    identify: Path | None = setting(None, "an image: of which class of --among it is")
    among: Path | None = setting(
        None, "for --identify: a folder of images, each a class by itself, or of folders, each a class"
    )
    figure: Path | None = setting(None, "draw what the method does")

    def __call__(self, method: Method, trained: Config, device: str) -> None:
        if self.identify is not None or self.among is not None:
            self._identify(method, trained, device)
        else:
            self._measure(method, trained, device)

    @torch.no_grad()
    def _identify(self, method: Method, trained: Config, device: str) -> None:
        if self.identify is None or self.among is None:
            raise ValueError("identify: expected an image together with a folder (--among) to look for it in")
        group, image = self.read(trained, self.among), self.read(trained, self.identify)
        counts = [group.images.shape[1]] * len(group) if group.counts is None else group.counts.tolist()
        check_ways("among", len(counts), method, trained)
        support = torch.cat([images[:count] for images, count in zip(group.images, counts, strict=True)])
        labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        query = image.images[:, 0]  # [1, ch, H, W]
        episodes = Episodes(support.unsqueeze(0), labels.unsqueeze(0), query.unsqueeze(0), labels[None, :1])
        with self.autocast(trained, device):
            probabilities = method.predict(episodes.to(device))[0, 0].float().exp()
        print(f"{self.identify}, among {len(counts)} classes of {self.among}:")
        for chance, index in zip(*probabilities.topk(min(_BEST, len(counts))), strict=True):
            print(f"  {100 * float(chance):6.2f} %  {group.names[int(index)]}")

    def read(self, trained: Config, path: Path) -> ImageClasses:
        """A folder of classes, or of images, each a class by itself, or one image; as the run's data are."""
        if not isinstance(trained.data, Images):
            raise ValueError(f"data: expected a run on images to read {path} for, got one on {trained.data}")
        data = trained.data.folder(path)
        files = [path] if path.is_file() else image_files(path, empty=True)
        if not files:
            return data.prepare(image_folder(path, image_size=data.image_size, grayscale=data.grayscale))
        images = [read_image(file, image_size=data.image_size, grayscale=data.grayscale) for file in files]
        return data.prepare(
            ImageClasses(torch.stack(images).unsqueeze(1), tuple(file.name for file in files))
        )

    def _measure(self, method: Method, trained: Config, device: str) -> None:
        ways = self.ways or trained.data.ways
        check_ways("ways", ways, method, trained)
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

        if self.figure is not None:
            self.draw(method, replace(trained.data, ways=ways), device)
            print(f"{self.figure}: what it does")

    def draw(self, method: Method, data: Images, device: str) -> None:
        """A picture of the method, on episodes as ``data`` say: the median of some, by accuracy."""
        from metafast.program.figures import draw_episode

        sizes = {"shots": 1, "queries": 1, "tasks": _CANDIDATES}
        drawn = replace(data, **sizes).sampler(self.split, seed=self.seed, device=device).batch(0)
        middle = score(method, drawn).argsort(stable=True)[_CANDIDATES // 2]
        typical = drawn.take(middle.unsqueeze(0))
        with torch.no_grad():
            log_probs = method.predict(typical)
        title = f"A typical {data.ways}-way 1-shot episode of {data} {self.split}"
        draw_episode(typical, log_probs, self.figure, title=title)

    def _batches(self, sampler: Any) -> Iterator[Episodes]:
        return map(sampler.batch, range(self.episodes))

    def _learners(self, method: Method) -> Iterator[tuple[str, Method, Any]]:
        """What is added to its line, who predicts, and how."""
        yield "", method, method.predict


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
        check_ways("runs", _BENCHMARK_WAYS, method, trained)
        runs = omniglot_runs(getattr(data, "data_root", None), image_size=data.image_size).to(device)
        if data.center:
            runs = replace(runs, support=center(runs.support), query=center(runs.query))
        with self.autocast(trained, device):
            error = 1 - float(score(method, runs).mean())
        floor = 1 - pixel_floor(runs)
        print(f"20-run one-shot benchmark: {100 * error:.2f} % error   ({_FLOOR}: {100 * floor:.2f} %)")


def check_ways(name: str, ways: int, method: Method, trained: Config) -> None:
    if isinstance(method, (Adaptation, SequenceLearner)) and ways > trained.data.ways:
        raise ValueError(
            f"{name}: expected at most {trained.data.ways} classes, as {trained.method} was trained, got "
            f"{ways}"
        )


def _sgd_from(method: Adaptation, lr: float) -> Adaptation:
    """Plain gradient descent from where a method's inner loop begins, with as many steps."""
    return MAML(
        method.network,
        loss=method.loss_name,
        lr=lr,
        steps=method.test_steps,
        transductive=method.transductive,
        path=method.path,
    )
