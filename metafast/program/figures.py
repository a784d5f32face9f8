"""Pictures of what a few-shot learner does."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from torch import Tensor

from metafast.data import Episodes
from metafast.program.evaluate import ErrorRates, Estimate

_RIGHT, _WRONG, _OTHER, _TEXT = "#0072b2", "#d55e00", "#7f7f7f", "#222222"  # told apart by the colour-blind
_RIVALS = ("#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_GAP = 0.35  # between the drawings and the table, in cells
_CELL, _LARGEST_CELL, _EDGE, _HEADER, _FOOTER, _NARROWEST = 0.42, 0.6, 0.35, 0.95, 0.55, 7.6  # inches
_PANEL = 4.0  # inches
_FIGURES = {
    "accuracy": "accuracy",
    "mse": "mean squared error",
    "final_loss": "loss after the last inner step",
}


def draw_episode(episodes: Episodes, log_probs: Tensor, path: str | os.PathLike[str], *, title: str) -> None:
    """Draws the first episode: a column per support example, a row per query, shaded by probability.

    Args:
        episodes: images [T, S, ch, H, W] and [T, Q, ch, H, W], of which the first channel is drawn; one
            support example per class, in the order of the classes.
        log_probs: [T, Q, N], as :meth:`metafast.methods.Method.predict` gives them.
        path: the file to write, of a kind that matplotlib knows; its folder is made if it is absent.
        title: the first line of the picture.
    """
    probabilities = log_probs[0].float().exp().cpu()  # [Q, N]
    labels = episodes.query_labels[0].tolist()
    predicted = probabilities.argmax(-1).tolist()
    queries, ways = probabilities.shape

    axes = _table(ways, queries)
    for column in range(ways):
        _drawing(axes, episodes.support[0, column, 0], column, -1 - _GAP, _OTHER, width=0.8)
    for row, (label, guess) in enumerate(zip(labels, predicted, strict=True)):
        colour = _RIGHT if guess == label else _WRONG
        _drawing(axes, episodes.query[0, row, 0], -1 - _GAP, row, colour, width=2.0)
        for column in range(ways):
            _cell(axes, float(probabilities[row, column]), column, row, colour if column == guess else _OTHER)
        if guess != label:
            axes.add_patch(_box(label, row, edgecolor=_TEXT, linewidth=1.4, linestyle=(0, (2, 1.5))))

    right = sum(guess == label for label, guess in zip(labels, predicted, strict=True))
    figure = axes.figure
    _, top = figure.get_size_inches()
    inches = {"transform": figure.dpi_scale_trans, "color": _TEXT, "va": "top"}
    figure.text(_EDGE, top - 0.25, title, fontsize=14, fontweight="bold", **inches)
    figure.text(
        _EDGE,
        top - 0.58,
        f"{right} of {queries} queries right.  Columns: the labelled example of each class.  Rows: queries.  "
        "Figures: p(class | query) in %.",
        fontsize=9,
        **inches,
    )
    missed = Patch(facecolor="white", edgecolor=_TEXT, linestyle="--", label="the right class, where missed")
    figure.legend(
        handles=[Patch(color=_RIGHT, label="right"), Patch(color=_WRONG, label="wrong"), missed],
        loc="lower left",
        bbox_to_anchor=(_EDGE - 0.1, 0.1),
        bbox_transform=figure.dpi_scale_trans,
        ncols=3,
        frameon=False,
        fontsize=9,
    )
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)


def draw_training(records: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> None:
    """Draws the records of a log: a panel for the loss, and one for the figure beside it.

    Args:
        records: as :mod:`metafast.runs.log` has them, with a gap where a number was not finite.
        path, title: as in :func:`draw_episode`.
    """
    steps = [record["step"] for record in records]
    names = [name for name in ("loss", *_FIGURES) if name in records[0]]
    figure = Figure(figsize=(_PANEL * len(names) + 1, 3.6), facecolor="white", layout="constrained")
    figure.suptitle(title, fontsize=12)
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        values = [math.nan if record[name] is None else record[name] for record in records]
        axes.plot(steps, values, color=_RIGHT, linewidth=1.4)
        axes.set_xlabel("step")
        axes.set_ylabel(_FIGURES.get(name, name))
        if name != "accuracy" and min(values) > 0:
            axes.set_yscale("log")
        axes.grid(color="#e5e5e5")
    figure.savefig(path, dpi=120)


def draw_comparison(
    rows: Sequence[tuple[str, Estimate, float | None]], path: Path, *, title: str, axis: str
) -> None:
    """Draws a point with its interval for each run, and a mark at what its paper reports.

    Args:
        rows: the name of each, its score, and the paper's.
        axis: what the score is; an ``"accuracy"`` is in %.
    """
    scale = 100 if axis == "accuracy" else 1
    figure = Figure(figsize=(7.5, 1.4 + 0.55 * len(rows)), facecolor="white", layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))
    means = [scale * mean.mean for _, mean, _ in rows]
    halves = [scale * mean.half_width for _, mean, _ in rows]
    axes.errorbar(means, places, xerr=halves, fmt="o", color=_RIGHT, capsize=3, label="95 % interval")
    papers = [(scale * paper, place) for place, (_, _, paper) in enumerate(rows) if paper is not None]
    if papers:
        axes.plot(*zip(*papers, strict=True), "D", markerfacecolor="none", color=_WRONG, label="the paper")
    axes.set_yticks(places, [name for name, _, _ in rows])
    axes.invert_yaxis()
    axes.set_xlabel(f"{axis} in %" if axis == "accuracy" else axis)
    axes.set_title(title, fontsize=11)
    axes.grid(axis="x", color="#e5e5e5")
    axes.legend(frameon=False, fontsize=9)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)


def draw_waves(
    waves: Episodes,
    predictions: Mapping[str, Mapping[int, Tensor]],
    path: str | os.PathLike[str],
    *,
    title: str,
) -> None:
    """Draws the first wave: a panel per method, with its curve after each number of steps.

    Args:
        waves: a regression from one number to one number, with queries enough to draw the wave by.
        predictions: method -> steps of fine-tuning on the support -> [T, Q, 1], as
            :meth:`metafast.methods.Adaptation.predict` gives them.
        path, title: as in :func:`draw_episode`.
    """
    x = waves.query[0, :, 0].cpu()
    order = x.argsort()
    truth = waves.query_labels[0, :, 0].cpu()
    figure = Figure(figsize=(_PANEL * len(predictions) + 0.6, 4.3), facecolor="white", layout="constrained")
    panels = figure.subplots(1, len(predictions), sharex=True, sharey=True, squeeze=False)[0]
    for panel, (method, curves) in zip(panels, predictions.items(), strict=True):
        panel.plot(
            x[order], truth[order], color=_TEXT, linewidth=1.2, linestyle=(0, (1, 1.5)), label="the wave"
        )
        for rank, (steps, curve) in enumerate(curves.items()):
            curve = curve[0, :, 0].cpu()
            error = float((curve - truth).square().mean())
            after = "before" if steps == 0 else f"after {steps} step{'s' if steps > 1 else ''}"
            panel.plot(
                x[order],
                curve[order],
                color=_OTHER if steps == 0 else _RIGHT,
                alpha=0.8 if steps == 0 else (rank + 1) / len(curves),
                linewidth=1.4 if steps == 0 else 1.2 + 0.5 * rank,
                label=f"{after}: {error:.2f}",
            )
        panel.plot(
            waves.support[0, :, 0].cpu(),
            waves.support_labels[0, :, 0].cpu(),
            linestyle="none",
            marker="o",
            markersize=7,
            color=_WRONG,
            markeredgecolor="white",
            zorder=5,
            label="what it learns from",
        )
        panel.set_title(method, fontsize=11, color=_TEXT)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(colors=_OTHER, labelsize=8)
        panel.legend(
            loc="upper center",
            bbox_to_anchor=(0.5, -0.08),
            ncols=2,
            frameon=False,
            fontsize=8,
            handlelength=1.6,
        )
    low, high = float(truth.min()), float(truth.max())
    margin = 0.6 * max(high - low, 1e-6)
    panels[0].set_ylim(low - margin, high + margin)
    figure.suptitle(title, x=0.02, ha="left", fontsize=14, fontweight="bold", color=_TEXT)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)


def draw_pairs(
    images: Tensor,
    others: Mapping[str, tuple[Tensor, Tensor]],
    rates: ErrorRates,
    path: str | os.PathLike[str],
    *,
    title: str,
) -> None:
    """Draws pairs of images with their scores, and the error rates of all thresholds beside them.

    Args:
        images: [B, ch, H, W], of which the first channel is drawn.
        others: "same" or "different" -> what each is paired with [B, ch, H, W], and the scores [B].
        rates: of many such pairs.
        path, title: as in :func:`draw_episode`.
    """
    figure = Figure(figsize=(11, 4.6), facecolor="white", layout="constrained")
    figure.suptitle(title, x=0.02, ha="left", fontsize=13, fontweight="bold", color=_TEXT)
    left, right = figure.subfigures(1, 2, width_ratios=(1.5, 1))
    grid = left.subplots(2 * len(others), len(images), squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for row, (kind, (paired, scores)) in enumerate(others.items()):
        for column, image in enumerate(images):
            for part, drawn in enumerate((image, paired[column])):
                grid[2 * row + part, column].imshow(1 - drawn[0].numpy(), cmap="gray", vmin=0, vmax=1)
            score = float(scores[column])
            colour = _RIGHT if (score >= 0.5) == (kind == "same") else _WRONG
            grid[2 * row, column].set_title(f"{score:.2f}", fontsize=9, color=colour)
        grid[2 * row, 0].text(-0.2, -0.1, kind, transform=grid[2 * row, 0].transAxes, ha="right", fontsize=9)
    axes = right.subplots()
    threshold, error = rates.equal
    axes.plot(100 * rates.false_accepts, 100 - 100 * rates.false_rejects, color=_RIGHT, linewidth=2)
    axes.plot([0, 100], [100, 0], color=_OTHER, linewidth=0.8, linestyle="--")
    axes.plot(
        100 * error, 100 - 100 * error, "o", color=_WRONG, label=f"equal error rate {100 * error:.1f} %"
    )
    axes.set_xlabel("different pairs taken for same, %")
    axes.set_ylabel("same pairs taken for same, %")
    axes.set_title(f"All thresholds; the point is at p = {threshold:.2f}", fontsize=10)
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)


def draw_by_instance(
    accuracy: Sequence[Estimate], chance: float, path: str | os.PathLike[str], *, title: str
) -> None:
    """Draws the accuracy at the first, second, ... example of a class in a sequence.

    Args:
        accuracy: of each.
        chance: what guessing gives.
        path, title: as in :func:`draw_episode`.
    """
    figure = Figure(figsize=(6.4, 4), facecolor="white", layout="constrained")
    axes = figure.subplots()
    instances = range(1, len(accuracy) + 1)
    halves = [100 * mean.half_width for mean in accuracy]
    means = [100 * mean.mean for mean in accuracy]
    axes.errorbar(instances, means, yerr=halves, fmt="o-", color=_RIGHT, capsize=3, label="95 % interval")
    axes.axhline(100 * chance, color=_OTHER, linestyle="--", linewidth=1, label="chance")
    axes.set_xticks(instances)
    axes.set_ylim(0, 100)
    axes.set_xlabel("example of its class in the sequence")
    axes.set_ylabel("accuracy, %")
    axes.set_title(title, fontsize=11)
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)


def draw_imagined(
    examples: Mapping[str, tuple[Tensor, Tensor]], path: str | os.PathLike[str], *, title: str
) -> None:
    """Draws embeddings in their two principal components: a colour for each class, a mark for each kind.

    Args:
        examples: "support", "imagined" and "query" -> embeddings [B, D], D >= 2, and classes [B].
        path, title: as in :func:`draw_episode`.
    """
    everything = torch.cat([points for points, _ in examples.values()]).float()
    centre = everything.mean(0)
    _, _, components = torch.linalg.svd(everything - centre, full_matrices=False)
    figure = Figure(figsize=(6.4, 5), facecolor="white", layout="constrained")
    axes = figure.subplots()
    colours = (_RIGHT, *_RIVALS)
    for (kind, (points, classes)), (mark, size) in zip(
        examples.items(), (("o", 110), ("x", 40), (".", 40)), strict=True
    ):
        plane = (points.float() - centre) @ components[:2].T
        axes.scatter(
            *plane.T, s=size, marker=mark, c=[colours[c % len(colours)] for c in classes.tolist()], label=kind
        )
    axes.set_xlabel("first principal component")
    axes.set_ylabel("second principal component")
    axes.set_title(title, fontsize=11)
    axes.legend(frameon=False, fontsize=9)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)


def draw_learning_curves(curves: Mapping[str, Tensor], path: str | os.PathLike[str], *, title: str) -> None:
    """Draws the mean loss over the steps of each optimizer, and its 95 % interval as a band.

    Args:
        curves: optimizer -> [K + 1, T], T >= 2, losses of T problems before and after each of K steps; the
            first is drawn to stand out.
        path, title: as in :func:`draw_episode`.
    """
    figure = Figure(figsize=(7.2, 4.6), facecolor="white", layout="constrained")
    axes = figure.subplots()
    for rank, (name, losses) in enumerate(curves.items()):
        losses = losses.double().cpu()
        mean = losses.mean(1)
        half_width = 1.96 * losses.std(1) / losses.shape[1] ** 0.5
        colour, style = (_RIGHT, "-") if rank == 0 else (_RIVALS[rank % len(_RIVALS)], "--")
        steps = range(len(mean))
        axes.plot(
            steps,
            mean,
            style,
            color=colour,
            linewidth=2.4 if rank == 0 else 1.4,
            label=f"{name}: {float(mean[-1]):.3g}",
            zorder=len(curves) - rank,
        )
        low = (mean - half_width).clamp(min=float(mean.min()) / 2)  # the axis is logarithmic
        axes.fill_between(steps, low, mean + half_width, color=colour, alpha=0.15, linewidth=0)
    axes.set_yscale("log")
    axes.set_xlabel("step", color=_TEXT)
    axes.set_ylabel("loss", color=_TEXT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_OTHER, labelsize=8, which="both")
    axes.legend(frameon=False, fontsize=9)
    figure.suptitle(title, x=0.02, ha="left", fontsize=13, fontweight="bold", color=_TEXT)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)


def _table(ways: int, queries: int) -> Axes:
    """Axes whose unit is a cell; row and column -1 - _GAP hold the drawings."""
    columns, rows = ways + 1 + _GAP, queries + 1 + _GAP
    cell = min(max((_NARROWEST - 2 * _EDGE) / columns, _CELL), _LARGEST_CELL)
    width = max(cell * columns + 2 * _EDGE, _NARROWEST)
    height = _HEADER + cell * rows + _FOOTER
    figure = Figure(figsize=(width, height), facecolor="white")
    axes = figure.add_axes(
        (_EDGE / width, _FOOTER / height, cell * columns / width, cell * rows / height),
        xlim=(-1 - _GAP, ways),
        ylim=(queries, -1 - _GAP),
    )
    axes.axis("off")
    return axes


def _box(column: float, row: float, **style: object) -> Rectangle:
    return Rectangle((column + 0.04, row + 0.04), 0.92, 0.92, **{"facecolor": "none", **style})


def _drawing(axes: Axes, image: Tensor, column: float, row: float, colour: str, *, width: float) -> None:
    """image [H, W], ink = 1, in the cell at (column, row)."""
    axes.imshow(
        1 - image.cpu().numpy(),
        cmap="gray",
        vmin=0,
        vmax=1,
        aspect="auto",
        extent=(column + 0.04, column + 0.96, row + 0.96, row + 0.04),
        interpolation="bilinear",
    )
    axes.add_patch(_box(column, row, edgecolor=colour, linewidth=width))


def _cell(axes: Axes, probability: float, column: float, row: float, colour: str) -> None:
    """A square whose shade is the probability, with the figure in it from half a per cent on."""
    shade = tuple(1 - probability * (1 - channel) * 0.92 - 0.03 for channel in to_rgb(colour))
    axes.add_patch(_box(column, row, facecolor=shade, edgecolor="none"))
    if probability >= 0.005:
        ink = "white" if probability > 0.5 else _TEXT
        axes.text(
            column + 0.5,
            row + 0.52,
            f"{100 * probability:.0f}",
            fontsize=6.5,
            color=ink,
            ha="center",
            va="center",
        )
