"""Drawings move to the middle of their images, whole and unchanged."""

from __future__ import annotations

import torch

from metafast.data import ImageClasses
from metafast.data.center import center


def test_a_drawing_moves_to_the_middle() -> None:
    drawing = torch.rand(2, 3, 5, generator=torch.Generator().manual_seed(0)) + 0.5  # two channels
    expected = torch.zeros(2, 11, 9)
    expected[:, 4:7, 2:7] = drawing
    for row, column in ((0, 0), (8, 4), (3, 1)):
        image = torch.zeros(2, 11, 9)
        image[:, row : row + 3, column : column + 5] = drawing
        moved = center(image.expand(4, 1, 2, 11, 9))
        assert moved.shape == (4, 1, 2, 11, 9)
        # the centre of mass of the drawing is within a pixel of its middle
        ink = moved[0, 0].sum(0)
        place = [(ink.sum(1 - d) * torch.arange(ink.shape[d])).sum() / ink.sum() for d in (0, 1)]
        assert abs(place[0] - 5) <= 0.5
        assert abs(place[1] - 4) <= 0.5
        assert torch.equal(moved[0, 0], expected)


def test_an_image_without_ink_stays_and_ink_is_cut_only_at_the_border() -> None:
    assert torch.equal(center(torch.zeros(1, 4, 4)), torch.zeros(1, 4, 4))
    image = torch.zeros(1, 5, 5)
    image[0, 0, 0] = 9  # drags the middle to itself
    image[0, 4, 4] = 1
    moved = center(image)
    assert moved[0, 2, 2] == 9
    assert moved.sum() == 9


def test_classes_are_centered_example_by_example() -> None:
    images = torch.zeros(2, 3, 1, 7, 7)
    images[..., 0, 6] = 1
    images[1, 2] = 0
    images[1, 2, 0, 5, 1] = 2
    counts = torch.tensor([3, 3])
    centered = ImageClasses(images, ("a", "b"), counts).centered()
    assert torch.equal(centered.images[..., 3, 3], images.sum((-2, -1)))
    assert centered.names == ("a", "b")
    assert centered.counts is counts
