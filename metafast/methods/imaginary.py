"""Learning from imaginary data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from metafast._dispatch.arguments import check_count, check_instance
from metafast.data import Episodes, Problem
from metafast.reference.labels import IGNORED
from metafast.settings import Count, Whole, setting

from .backbones import BackboneSettings
from .matching import MatchingNet
from .method import Method, Recipes
from .metric import MetricLearner
from .protonet import ProtoNet
from .siamese import Siamese


class Hallucinator(nn.Module):
    """Imagines another example of an example's class, in the space of embeddings: G(x, z).

    A network of three layers (Wang et al. 2018, section 5.2). It adds to the example, and begins by adding
    nothing: the paper begins at the identity as well.

    Args:
        features: D.
        noise: size of z; default: D.
        hidden: units of the two layers between; default: D.
    """

    def __init__(self, features: int, *, noise: int | None = None, hidden: int | None = None) -> None:
        super().__init__()
        self.noise = features if noise is None else noise
        hidden = features if hidden is None else hidden
        check_count(1, features=features, noise=self.noise, hidden=hidden)
        self.layers = nn.Sequential(
            nn.Linear(features + self.noise, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, features),
        )
        for zero in self.layers[-1].parameters():
            nn.init.zeros_(zero)

    def forward(self, seeds: Tensor, z: Tensor) -> Tensor:
        """seeds [..., D], z [..., noise] -> [..., D]."""
        return seeds + self.layers(torch.cat([seeds, z], -1))


@dataclass(frozen=True, kw_only=True)
class ImaginaryDataSettings(BackboneSettings):
    learner: Literal["protonet", "matching", "siamese"] = setting("protonet", "what learns from the data")
    imagined: Whole = setting(5, "examples of each class that are imagined")
    noise: Count = setting(16, "size of what is drawn for each of them")
    hallucinator_hidden: Count = setting(64, "units of the hallucinator's layers")


class ImaginaryData(Method):
    """Low-shot learning from imaginary data (Wang, Girshick, Hebert, Hariharan 2018).

    Every class of the support gets examples that a hallucinator imagines from its real ones; the learner
    classifies the queries by both. All is trained together, by the learner's own loss on real queries: what
    is imagined need not look real, it has to help.

    Args:
        learner: any method that compares embeddings.
        hallucinator: seeds [T, M, D], z [T, M, ``hallucinator.noise``] -> [T, M, D].
        imagined: examples of each class that are imagined.
    """

    paper = "Wang, Girshick, Hebert, Hariharan 2018"
    Settings = ImaginaryDataSettings
    recipes: ClassVar[Recipes] = {
        "images": ProtoNet.recipes["images"],
        "gaussians": {
            "tasks": 32,
            "steps": 600,
            "lr": 3e-3,
            "schedule": "cosine",
            "log_every": 20,
            "checkpoint_every": 200,
        },
    }

    def __init__(self, learner: MetricLearner, hallucinator: Hallucinator, *, imagined: int = 5) -> None:
        super().__init__()
        check_instance(MetricLearner, learner=learner)
        check_instance(nn.Module, hallucinator=hallucinator)
        check_count(0, imagined=imagined)
        self.learner = learner
        self.hallucinator = hallucinator
        self.imagined = imagined

    def imagine(self, support: Tensor, support_labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
        """Imagined examples of each class, [T, N ``imagined``, D], and their labels.

        The seeds are drawn among the class's examples. In evaluation seeds and noise are the same in every
        call: a prediction is a function of its episode. What is imagined of a class that a task does not have
        is labelled -100.
        """
        generator = None if self.training else torch.Generator(support.device).manual_seed(0)
        classes = torch.arange(num_classes, device=support.device)
        of_class = support_labels.unsqueeze(-2) == classes.unsqueeze(-1)  # [T, N, S]
        present = of_class.any(-1, keepdim=True)  # [T, N, 1]
        chosen = torch.multinomial(
            (of_class | ~present).flatten(0, 1).float(), self.imagined, replacement=True, generator=generator
        ).view(len(support), -1)  # [T, N imagined]
        seeds = support.gather(1, chosen.unsqueeze(-1).expand(-1, -1, support.shape[-1]))
        z = torch.randn(
            *chosen.shape,
            self.hallucinator.noise,
            generator=generator,
            device=seeds.device,
            dtype=seeds.dtype,
        )
        labels = classes.unsqueeze(-1).masked_fill(~present, IGNORED)
        labels = labels.expand(-1, -1, self.imagined).flatten(1)
        return self.hallucinator(seeds, z), labels

    def augment(self, support: Tensor, support_labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
        """The support's embeddings and labels with the imagined ones behind them."""
        if self.imagined == 0:
            return support, support_labels
        more, labels = self.imagine(support, support_labels, num_classes)
        return torch.cat([support, more], 1), torch.cat([support_labels, labels], 1)

    def loss(self, episodes: Episodes) -> Tensor:
        """The learner's loss on the queries, by real and imagined support: a scalar."""
        support, query = self.learner.embed(episodes)
        augmented = self.augment(support, episodes.support_labels, episodes.num_classes)
        of_query = query, episodes.query_labels
        return self.learner.compare(*augmented, *of_query, episodes.num_classes, episodes.ways)

    def predict(self, episodes: Episodes) -> Tensor:
        """log p(class | query): [T, Q, N]."""
        support, query = self.learner.embed(episodes)
        augmented = self.augment(support, episodes.support_labels, episodes.num_classes)
        return self.learner.classify(*augmented, query, episodes.num_classes, episodes.ways)

    @classmethod
    def from_settings(cls, settings: ImaginaryDataSettings, problem: Problem) -> ImaginaryData:
        backbone, (features,) = settings.build(problem)
        learners = {
            "protonet": lambda: ProtoNet(backbone),
            "matching": lambda: MatchingNet(backbone),
            "siamese": lambda: Siamese(backbone, features),
        }
        hallucinator = Hallucinator(features, noise=settings.noise, hidden=settings.hallucinator_hidden)
        return cls(learners[settings.learner](), hallucinator, imagined=settings.imagined)
