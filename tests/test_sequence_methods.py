"""Methods that read an episode as a sequence."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from test_methods import episodes
from test_metric_methods import fewer_classes
from torch import nn

from metafast.data import Episodes
from metafast.methods import MANN, RNN, SNAIL
from metafast.methods.sequence import RecurrentLearner, SequenceLearner
from metafast.methods.snail import CausalAttention, CausalConvolutions

D = 7


def backbone() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(256, D))


METHODS: dict[str, Callable[[], SequenceLearner]] = {
    "rnn": lambda: RNN(backbone(), D, 4, hidden=20),
    "mann": lambda: MANN(backbone(), D, 4, hidden=20, rows=16, width=8, heads=2),
    "snail": lambda: SNAIL(backbone(), D, 4, 9, filters=4),
}
RECURRENT = ["rnn", "mann"]


@pytest.mark.parametrize("name", METHODS)
def test_learns_episodes_by_heart(name: str) -> None:
    torch.manual_seed(0)
    method, drawn = METHODS[name](), episodes()
    optimizer = torch.optim.Adam(method.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = method.loss(drawn)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("name", METHODS)
def test_a_prediction_is_a_function_of_its_query_and_support(name: str) -> None:
    torch.manual_seed(0)
    method, drawn = METHODS[name]().eval(), episodes()
    log_probs = method.predict(drawn)
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(3, 12))
    first = Episodes(drawn.support, drawn.support_labels, drawn.query[:, :1], drawn.query_labels[:, :1])
    torch.testing.assert_close(method.predict(first), log_probs[:, :1])
    other = Episodes(drawn.support, drawn.support_labels.flip(1), drawn.query, drawn.query_labels)
    assert not torch.allclose(method.predict(other), log_probs)


@pytest.mark.parametrize("name", METHODS)
def test_a_task_with_fewer_classes_is_as_by_itself(name: str) -> None:
    torch.manual_seed(0)
    method, (drawn, alone) = METHODS[name](), fewer_classes(episodes())
    loss = method.loss(drawn)
    for gradient in [loss, *torch.autograd.grad(loss, list(method.parameters()))]:
        assert gradient.isfinite().all()
    log_probs = method.eval().predict(drawn)
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(3, 12))
    assert (log_probs[1, :, 2:] == -torch.inf).all()
    assert log_probs[[0, 2]].isfinite().all()
    of_query = drawn.query_labels[1] >= 0
    torch.testing.assert_close(log_probs[1:2, of_query, :2], method.predict(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_padding_is_not_read_wherever_it_stands(name: str) -> None:
    torch.manual_seed(0)
    method, drawn = METHODS[name]().eval(), episodes()
    padded = Episodes(
        torch.cat([9 * torch.rand(3, 2, 1, 16, 16), drawn.support, torch.rand(3, 1, 1, 16, 16)], 1),
        F.pad(drawn.support_labels, (2, 1), value=-100),
        drawn.query,
        drawn.query_labels,
    )
    torch.testing.assert_close(method.predict(padded), method.predict(drawn))


def test_snails_loss_counts_the_classes_that_a_task_has() -> None:
    torch.manual_seed(0)
    method, (drawn, alone) = METHODS["snail"]().eval(), fewer_classes(episodes())
    torch.testing.assert_close(method.loss(drawn.take(slice(1, 2))), method.loss(alone))


@pytest.mark.parametrize("name", RECURRENT)
def test_a_recurrent_loss_counts_the_examples_and_classes_that_a_task_has(name: str) -> None:
    torch.manual_seed(0)
    method, (drawn, _) = METHODS[name](), fewer_classes(episodes())
    with torch.no_grad():
        for parameter in method.out.parameters():
            parameter.zero_()
    few, all_of_them = drawn.take(slice(1, 2)), drawn.take(slice(0, 1))
    torch.testing.assert_close(method.loss(few), torch.tensor(2.0).log())
    torch.testing.assert_close(method.loss(all_of_them), torch.tensor(4.0).log())
    assert torch.equal(method.accuracy_by_instance(few).isfinite(), torch.ones(1, 5).bool())


@pytest.mark.parametrize("name", METHODS)
def test_labels_beyond_the_outputs_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"labels: expected classes in \[0, 4\) or -100 \(ignored\), got 4"):
        METHODS[name]().loss(episodes(ways=5))


@pytest.mark.parametrize("name", RECURRENT)
def test_an_output_sees_no_label_of_its_own_or_later(name: str) -> None:
    torch.manual_seed(0)
    method: RecurrentLearner = METHODS[name]().eval()
    examples, labels = torch.rand(2, 6, 256), torch.randint(4, (2, 6))
    before = method.outputs(examples, labels)
    changed = labels.clone()
    changed[:, 3] = (labels[:, 3] + 1) % 4
    after = method.outputs(examples, changed)
    torch.testing.assert_close(after[:, :4], before[:, :4], rtol=0, atol=0)
    assert not torch.allclose(after[:, 4:], before[:, 4:])


@pytest.mark.parametrize("name", RECURRENT)
def test_a_sequence_goes_on_from_its_state(name: str) -> None:
    torch.manual_seed(0)
    method: RecurrentLearner = METHODS[name]()
    inputs = torch.rand(2, 6, D + 4)
    whole, _ = method.run(inputs)
    first, state = method.run(inputs[:, :4])
    second, _ = method.run(inputs[:, 4:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_learners_read_embeddings_without_what_all_have_in_common(name: str) -> None:
    torch.manual_seed(0)
    method: RecurrentLearner = METHODS[name]()
    examples = 100 + 9 * torch.rand(5, 6, 256)
    embedded = method.embed(examples).flatten(0, 1)
    torch.testing.assert_close(embedded.mean(0), torch.zeros(D), rtol=0, atol=1e-4)
    torch.testing.assert_close(embedded.var(0, correction=0), torch.ones(D), rtol=1e-2, atol=0)


def test_accuracy_by_instance_counts_a_class_as_it_comes() -> None:
    class Oracle(RecurrentLearner):
        """Right from a class's second instance on: it looks the example up among those that it has seen."""

        def outputs(self, examples, labels):
            known = labels.unsqueeze(1) == labels.unsqueeze(2)
            earlier = torch.ones(known.shape[-1], known.shape[-1]).tril(-1).bool()
            seen = (known & earlier).any(-1)
            return F.one_hot(torch.where(seen, labels, (labels + 1) % 4), 4).float()

        def run(self, inputs, state=None): ...

        @classmethod
        def from_settings(cls, settings, problem): ...

    by_instance = Oracle(backbone(), D, 4).accuracy_by_instance(episodes())
    assert by_instance.shape == (3, 5)
    assert by_instance.mean(0).tolist() == [0, 1, 1, 1, 1]


def test_mann_writes_to_its_least_used_rows() -> None:
    torch.manual_seed(0)
    method = MANN(nn.Identity(), 3, 2, hidden=5, rows=6, width=4, heads=1)
    with torch.no_grad():
        method.interface.weight.zero_()
        # The key, its strength, and the gate: never where it read.
        method.interface.bias.copy_(torch.tensor([1.0, 2, 3, 4, 50, -50]))
    inputs = torch.rand(1, 4, 5)
    _, (_, _, memory, *_) = method.run(inputs)
    assert (memory[0].abs().sum(-1) > 0.1).sum() == 4  # a row of its own for each step


def test_mann_looks_up_what_was_there_before_its_write() -> None:
    torch.manual_seed(0)
    method = MANN(nn.Identity(), 3, 2, hidden=5, rows=6, width=4, heads=1)
    with torch.no_grad():
        method.interface.weight.zero_()
        method.interface.bias.copy_(torch.tensor([3.0, -3, 3, -3, 50, -50]))
    inputs = torch.rand(1, 2, 5)
    _, (*_, read, _, _) = method.run(inputs[:, :1])
    torch.testing.assert_close(read, torch.full((1, 1, 6), 1 / 6))  # of a memory where nothing was
    _, (_, _, memory, read, _, _) = method.run(inputs)
    written = memory[0].abs().sum(-1) > 0.1
    assert written.sum() == 2
    torch.testing.assert_close(read[0, 0].max(), torch.tensor(1.0))  # the row of the first step
    assert written[read[0, 0].argmax()]


def test_every_head_of_mann_empties_the_row_that_it_writes_to() -> None:
    torch.manual_seed(0)
    method = MANN(nn.Identity(), 3, 2, hidden=5, rows=4, width=3, heads=2)
    with torch.no_grad():
        method.interface.weight.zero_()
        method.interface.bias.copy_(torch.tensor([1.0, 2, 3, 10, -50, 3, -2, 1, 10, -50]))
    _, (_, _, memory, *_) = method.run(torch.rand(1, 9, 5))
    keys = torch.tensor([[1.0, 2, 3], [3, -2, 1]]).tanh()
    distance = torch.cdist(memory[0], keys).amin(1)  # each row holds one key, not a sum of many
    torch.testing.assert_close(distance, torch.zeros(4), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "method",
    [
        lambda: RNN(nn.Identity(), 8, 2, hidden=64),
        lambda: MANN(nn.Identity(), 8, 2, hidden=64, rows=16, width=16, heads=2),
    ],
    ids=RECURRENT,
)
def test_learns_to_bind_labels_to_what_it_has_not_seen_before(method: Callable[[], RecurrentLearner]) -> None:
    def draw(tasks: int) -> Episodes:
        """Two classes, new in every task, with six examples each."""
        centres = torch.randn(tasks, 2, 1, 8)
        labels = torch.arange(2).repeat_interleave(3).repeat(tasks, 1)
        support, query = ((centres + 0.1 * torch.randn(tasks, 2, 3, 8)).flatten(1, 2) for _ in range(2))
        return Episodes(support, labels, query, labels)

    torch.manual_seed(0)
    learner = method()
    optimizer = torch.optim.Adam(learner.parameters(), lr=1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        learner.loss(draw(32)).backward()
        optimizer.step()
    first, *later = learner.accuracy_by_instance(draw(256)).mean(0).tolist()
    assert first < 0.8 < 0.9 < min(later)


@pytest.mark.parametrize(
    "block", [CausalConvolutions(5, 6, 3), CausalAttention(5, 4, 3)], ids=["tc", "attention"]
)
def test_snails_blocks_are_causal_and_reach_back(block: nn.Module) -> None:
    torch.manual_seed(0)
    x, lengths = torch.rand(2, 6, 5), torch.tensor([5, 5])
    jacobian = torch.autograd.functional.jacobian(lambda x: block(x, lengths).sum((0, 2)), x)  # [6, 2, 6, 5]
    reach = jacobian.abs().sum((1, 3)) > 0
    assert torch.equal(reach, torch.ones(6, 6).tril().bool())
