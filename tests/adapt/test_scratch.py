"""The caller's module is no scratch space: threads, interrupts, attributes and hooks leave it as it was."""

from __future__ import annotations

import copy
import functools
import pickle
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adapt_problems import STEPS, make, plain
from torch import Tensor, nn

import metafast

PATHS = ["torch.func", "loop"]


def problem() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 32), nn.GELU(), nn.Linear(32, 4))
    return module, torch.randn(3, 6, 5), torch.randint(0, 4, (3, 6))


def adapted(module: nn.Module, x: Tensor, y: Tensor, path: str) -> Tensor:
    return metafast.adapt(module, x, y, loss="cross_entropy", lr=0.1, steps=3, path=path)(x)


@pytest.mark.parametrize("path", PATHS)
def test_threads_share_a_module(path: str) -> None:
    module, x, y = problem()
    before = list(module.parameters())
    expected = adapted(module, x, y, path)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: adapted(module, x, y, path), range(32)))
    assert all(torch.equal(one, expected) for one in found)
    assert all(one is other for one, other in zip(module.parameters(), before, strict=True))


@pytest.mark.parametrize("path", PATHS)
def test_interrupts(path: str) -> None:
    """Wherever a call is interrupted, the module keeps its tensors."""
    module, x, y = problem()
    before = list(module.parameters())

    class Interrupt(BaseException):
        pass

    def interrupt(*_: Any) -> None:
        raise Interrupt

    old = signal.signal(signal.SIGALRM, interrupt)
    try:
        for i in range(40):
            with suppress(Interrupt):
                try:
                    signal.setitimer(signal.ITIMER_REAL, 1e-4 * (1 + i))
                    adapted(module, x, y, path)
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            assert all(one is other for one, other in zip(module.parameters(), before, strict=True))
            assert torch._C._len_torch_function_stack() == 0
            assert torch.is_grad_enabled()
    finally:
        signal.signal(signal.SIGALRM, old)
    assert type(module[0].weight) is nn.Parameter


class Keeps(nn.Module):
    """Keeps what it has seen: as an attribute, in a list, and in a buffer that it sets anew."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 4)
        self.seen: list[Tensor] = []
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.features = torch.tanh(self.layer(x))
        self.seen.append(self.features)
        self.calls = self.calls + 1
        return self.features


@pytest.mark.parametrize("path", PATHS)
def test_what_a_forward_keeps(path: str) -> None:
    module, (_, x, y) = Keeps(), problem()
    module.layer.register_forward_hook(lambda layer, args, out: setattr(layer, "out", out))
    result = metafast.adapt(module, x, y, loss="cross_entropy", lr=0.1, steps=3, path=path)
    result(x)
    assert not hasattr(module, "features")
    assert not hasattr(module.layer, "out")
    assert module.seen == []
    assert module.calls == 0
    assert result.buffers["calls"].tolist() == [3] * 3
    module.layer._forward_hooks.clear()
    copied = pickle.loads(pickle.dumps(copy.deepcopy(module)))
    assert torch.equal(copied.layer.weight, module.layer.weight)


def own_forward(module: nn.Module) -> None:
    inner = module[0].forward
    module[0].forward = lambda x: 2 * inner(x)


def bound_elsewhere(module: nn.Module) -> None:
    module[1].forward = functools.partial(F.linear, weight=torch.eye(6, dtype=torch.float64) * 2)


def hook_that_knows_a_layer(module: nn.Module) -> None:
    layer = module[0]
    module.register_forward_hook(lambda part, args, out: out + layer.weight.sum())


def list_of_layers(module: nn.Module) -> None:
    layers = list(module)

    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module, self.order = module, layers

        def forward(self, x: Tensor) -> Tensor:
            return functools.reduce(lambda x, layer: layer(x), self.order, x)

    return Listed()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "change",
    [own_forward, bound_elsewhere, hook_that_knows_a_layer, list_of_layers],
    ids=lambda f: f.__name__,
)
def test_whatever_refers_to_a_layer_refers_to_the_tasks_own(change: Any, path: str) -> None:
    module, (x, y, query_x, _) = make("mlp", "mse")
    module = change(module) or module
    result = metafast.adapt(module, x, y, loss="mse", lr=0.1, steps=STEPS, path=path)
    expected, _ = plain(module, x, y, query_x, loss=F.mse_loss, lr=[0.1] * 6)
    torch.testing.assert_close(result(query_x), expected)


def test_a_parameter_that_comes_from_elsewhere_is_refused() -> None:
    class Holder:
        def __init__(self, layer: nn.Linear) -> None:
            self.layer = layer

    class Elsewhere(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 4)
            self.holder = Holder(self.layer)

        def forward(self, x: Tensor) -> Tensor:
            return self.holder.layer(x)

    _, x, y = problem()
    for path in PATHS:
        with pytest.raises(ValueError, match=r"module: expected that it uses layer.weight by its name alone"):
            adapted(Elsewhere(), x, y, path)


def test_two_threads_and_two_modules_with_attention() -> None:
    """The choice of attention's kernel is the process's: none is set for a call."""
    flags = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()
    seen: list[bool] = []
    module, (x, y, query_x, _) = make("attention", "mse")

    def watch(*_: Any) -> None:
        seen.append(torch.backends.cuda.flash_sdp_enabled())

    module.head.register_forward_hook(watch)
    thread = threading.Thread(
        target=lambda: metafast.adapt(module, x, y, loss="mse", lr=0.1, steps=1)(query_x)
    )
    thread.start()
    thread.join()
    assert seen
    assert all(flag == flags[0] for flag in seen)
