"""The digits, from the file and from scikit-learn."""

from __future__ import annotations

import sys

import pytest
import torch

from metafast.data import EpisodeSampler, digits

COUNTS = [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]  # of the classes 0..9, as the data set states


def check(classes):
    assert classes.names == tuple("0123456789")
    assert classes.counts.tolist() == COUNTS
    assert classes.images.shape == (10, 183, 1, 8, 8)
    assert classes.images.min() == 0
    assert classes.images.max() == 1
    assert classes.images[0, 0, 0, 0].tolist() == [0, 0, 5 / 16, 13 / 16, 9 / 16, 1 / 16, 0, 0]
    assert not classes.images[8, 174:].any(), "padding must be zero"


def test_digits_come_out_of_scikit_learn(tmp_path):
    pytest.importorskip("sklearn", reason="needs the extra 'digits'")
    check(digits(tmp_path))


def test_digits_come_out_of_the_file(data_folder):
    check(digits(data_folder))


def test_file_and_package_agree(data_folder, tmp_path):
    pytest.importorskip("sklearn", reason="needs the extra 'digits'")
    assert torch.equal(digits(data_folder).images, digits(tmp_path).images)


def test_without_file_and_package_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'metafast\[digits\]'"):
        digits(tmp_path)


def test_nearest_class_mean_scores_as_measured(data_folder):
    """Raw pixels, nearest class mean, 15 queries a class: 73.6 % in 5-way 1-shot, 83.6 % in 10-way 5-shot."""
    for ways, shots, measured in ((5, 1, 0.736), (10, 5, 0.836)):
        sampler = EpisodeSampler(digits(data_folder), ways=ways, shots=shots, queries=15, tasks=600)
        batch = sampler.batch(0)
        means = batch.support.view(600, ways, shots, 64).mean(2)
        right = torch.cdist(batch.query.flatten(2), means).argmin(-1) == batch.query_labels
        accuracy = right.double().mean(-1)
        # Two samples of 600 episodes differ by less than four standard errors of their difference.
        assert abs(float(accuracy.mean()) - measured) < 4 * 2**0.5 * float(accuracy.std()) / 600**0.5
