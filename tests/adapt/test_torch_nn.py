"""Every module class of torch.nn through adapt, on both general paths, beside a plain float64 loop.

`LAYERS` and `LOSSES` say with which options, and which of them torch.func does not take; `OTHERS`, which
classes are not run alone. A class that a new torch adds is in none of them, and fails the first test.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import metafast

SHOTS = 3


@dataclass(frozen=True)
class Layer:
    kind: str
    shape: tuple[int, ...]  # of an example
    args: tuple[Any, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()
    classes: int = 0  # of examples that are integers
    random: bool = False  # in training
    refused: str = ""  # by torch.func: in "training" or "always"
    once: bool = False  # torch has no second derivative of it: first order alone

    def make(self) -> nn.Module:
        return getattr(nn, self.kind)(*self.args, **dict(self.options))

    def __str__(self) -> str:
        return f"{self.kind}({', '.join([*map(str, self.args), *(f'{k}={v}' for k, v in self.options)])})"


def layer(
    kind: str,
    shape: tuple[int, ...],
    *args: Any,
    classes: int = 0,
    random: bool = False,
    refused: str = "",
    once: bool = False,
    **options: Any,
) -> Layer:
    return Layer(kind, shape, args, tuple(options.items()), classes, random, refused, once)


POINTWISE = (
    *("CELU", "ELU", "GELU", "Hardshrink", "Hardswish", "Hardtanh", "Identity", "LeakyReLU", "LogSigmoid"),
    *("LogSoftmax", "Mish", "PReLU", "ReLU", "ReLU6", "SELU", "SiLU", "Sigmoid", "Softmax", "Softmin"),
    *("Softplus", "Softshrink", "Softsign", "Tanh", "Tanhshrink"),
)
CONVOLUTION = {"1d": (2, 6), "2d": (2, 5, 4), "3d": (2, 4, 3, 3)}

LAYERS = [
    *(layer(kind, (4,), **({"dim": 1} if "oftm" in kind else {})) for kind in POINTWISE),
    layer("Hardsigmoid", (4,), once=True),
    layer("Threshold", (4,), 0.1, 0.5),
    layer("GELU", (4,), approximate="tanh"),
    layer("Softmax2d", (4, 2, 2)),
    layer("GLU", (4,)),
    layer("RReLU", (4,), refused="always", random=True),
    layer("Flatten", (2, 3)),
    layer("Unflatten", (4,), 1, (2, 2)),
    layer("Fold", (8, 4), (3, 3), (2, 2)),
    layer("Unfold", (2, 3, 3), 2),
    layer("ChannelShuffle", (4, 2, 2), 2),
    layer("PixelShuffle", (4, 2, 2), 2),
    layer("PixelUnshuffle", (1, 4, 4), 2),
    layer("Upsample", (1, 2, 2), scale_factor=2),
    layer("Upsample", (1, 2, 2), scale_factor=2, mode="bilinear"),
    layer("Upsample", (1, 3), size=5, mode="linear", align_corners=True),
    layer("UpsamplingNearest2d", (1, 2, 2), scale_factor=2),
    layer("UpsamplingBilinear2d", (1, 2, 2), scale_factor=2),
    layer("ZeroPad1d", (1, 3), 1),
    layer("ZeroPad2d", (1, 2, 2), 1),
    layer("ZeroPad3d", (1, 2, 2, 2), 1),
    *(
        layer(f"{kind}Pad{d}", (1, 3, 3, 3)[: int(d[0]) + 1], 1, *([0.5] if kind == "Constant" else []))
        for kind in ("Constant", "Reflection", "Replication", "Circular")
        for d in ("1d", "2d", "3d")
    ),
    *(
        layer(f"{kind}Pool{d}", shape, 2)
        for kind in ("Max", "Avg", "AdaptiveAvg", "AdaptiveMax")
        for d, shape in CONVOLUTION.items()
    ),
    layer("MaxPool2d", (1, 5, 5), 3, stride=1, padding=1, dilation=1, ceil_mode=True),
    layer("AvgPool2d", (1, 5, 5), 3, padding=1, count_include_pad=False),
    *(layer(f"LPPool{d}", shape, 2, 2) for d, shape in CONVOLUTION.items()),
    layer("FractionalMaxPool2d", (1, 5, 5), 2, output_size=2, random=True),
    layer("FractionalMaxPool3d", (1, 5, 5, 5), 2, output_size=2, random=True),
    *(
        layer(f"Dropout{d}", (4, 2, 2, 2)[: 1 + int((d or "0")[0])], random=True)
        for d in ("", "1d", "2d", "3d")
    ),
    layer("AlphaDropout", (4,), random=True),
    layer("FeatureAlphaDropout", (4, 2), random=True),
    *(
        layer(f"Conv{d}", shape, 2, 4, 2, **options)
        for d, shape in CONVOLUTION.items()
        for options in ({}, {"groups": 2, "bias": False, "padding": 1, "padding_mode": "circular"})
    ),
    layer("Conv2d", (2, 5, 4), 2, 3, 2, stride=2, padding=1, dilation=2),
    layer("Conv2d", (2, 5, 4), 2, 3, (3, 2), stride=(2, 1), padding=(2, 1)),
    layer("Conv2d", (2, 5, 4), 2, 3, 2, padding="valid"),
    layer("Conv2d", (2, 5, 4), 2, 3, 2, padding="same", bias=False),
    *(
        layer(f"ConvTranspose{d}", shape, 2, 4, 2, **options)
        for d, shape in CONVOLUTION.items()
        for options in ({}, {"groups": 2, "stride": 2, "output_padding": 1})
    ),
    layer("Linear", (4,), 4, 3),
    layer("Linear", (2, 4), 4, 3, bias=False),
    *(
        layer(f"BatchNorm{d}", shape, 2, **options)
        for d, shape in CONVOLUTION.items()
        for options in ({}, {"affine": False}, {"track_running_stats": False})
    ),
    layer("BatchNorm1d", (4,), 4, momentum=None, refused="training"),
    *(
        layer(f"InstanceNorm{d}", shape, 2, **options)
        for d, shape in CONVOLUTION.items()
        for options in ({}, {"affine": True, "track_running_stats": True})
    ),
    layer("LayerNorm", (2, 4), (2, 4)),
    layer("LayerNorm", (2, 4), 4, elementwise_affine=False),
    layer("LayerNorm", (4,), 4, bias=False),
    layer("RMSNorm", (4,), 4),
    layer("GroupNorm", (4, 2), 2, 4),
    layer("GroupNorm", (4, 2), 2, 4, affine=False),
    layer("LocalResponseNorm", (4, 3, 3), 2),
    layer("CrossMapLRN2d", (4, 3, 3), 2, refused="always", once=True),
    layer("Embedding", (2,), 5, 3, classes=5),
    layer("Embedding", (2,), 5, 3, padding_idx=0, classes=5),
    layer("Embedding", (2,), 5, 3, padding_idx=-1, classes=5),
    layer("EmbeddingBag", (2,), 5, 3, mode="mean", classes=5, once=True),
    layer("EmbeddingBag", (2,), 5, 3, mode="sum", padding_idx=1, classes=5, once=True),
    *(layer(kind, (3, 4), 4, 3, batch_first=True) for kind in ("RNN", "GRU", "LSTM")),
    layer("LSTM", (3, 4), 4, 3, batch_first=True, num_layers=2, bidirectional=True),
    layer("LSTM", (3, 4), 4, 3, batch_first=True, proj_size=2),
    layer("RNN", (3, 4), 4, 3, batch_first=True, nonlinearity="relu", bias=False),
    *(layer(kind, (4,), 4, 3) for kind in ("RNNCell", "GRUCell", "LSTMCell")),
    layer("TransformerEncoderLayer", (3, 4), 4, 2, 5, dropout=0.0, batch_first=True),
    layer("TransformerEncoderLayer", (3, 4), 4, 2, 5, dropout=0.0, batch_first=True, norm_first=True),
]

Target = Callable[[Tensor], Tensor]
like: Target = lambda out: torch.randn_like(out)  # noqa: E731
labels: Target = lambda out: torch.randint(0, 4, out.shape[:1])  # noqa: E731
signs: Target = lambda out: torch.randint(0, 2, out.shape) * 2.0 - 1  # noqa: E731
bits: Target = lambda out: torch.randint(0, 2, out.shape).to(out)  # noqa: E731
LOSSES: dict[str, tuple[Target, dict[str, Any]]] = {
    "L1Loss": (like, {}),
    "MSELoss": (like, {}),
    "SmoothL1Loss": (like, {}),
    "HuberLoss": (like, {}),
    "CrossEntropyLoss": (labels, {"label_smoothing": 0.1}),
    "NLLLoss": (labels, {}),
    "BCEWithLogitsLoss": (bits, {}),
    "SoftMarginLoss": (signs, {}),
    "MultiLabelSoftMarginLoss": (bits, {}),
    "HingeEmbeddingLoss": (signs, {}),
    "KLDivLoss": (lambda out: torch.rand_like(out) + 0.1, {"reduction": "batchmean"}),
    "PoissonNLLLoss": (lambda out: torch.rand_like(out), {}),
}
ONCE: dict[str, tuple[Target, dict[str, Any]]] = {"MultiMarginLoss": (labels, {})}  # no second derivative
OTHERS = {
    "no layers": "Module Sequential ModuleList ModuleDict ParameterList ParameterDict Container",
    "layers, once they have seen an input": "LazyLinear LazyConv1d LazyConv2d LazyConv3d LazyConvTranspose1d "
    "LazyConvTranspose2d LazyConvTranspose3d LazyBatchNorm1d LazyBatchNorm2d LazyBatchNorm3d "
    "LazyInstanceNorm1d LazyInstanceNorm2d LazyInstanceNorm3d",
    "made of those above": "Transformer TransformerEncoder TransformerDecoder TransformerDecoderLayer "
    "RNNBase RNNCellBase MultiheadAttention",
    "of several inputs": "Bilinear CosineSimilarity PairwiseDistance MaxUnpool1d MaxUnpool2d MaxUnpool3d "
    "CosineEmbeddingLoss CTCLoss GaussianNLLLoss MarginRankingLoss TripletMarginLoss "
    "TripletMarginWithDistanceLoss AdaptiveLogSoftmaxWithLoss",
    "of probabilities, or of other labels": "BCELoss MultiLabelMarginLoss NLLLoss2d LinearCrossEntropyLoss",
    "of many devices": "SyncBatchNorm DataParallel",
}


def test_every_class_is_listed() -> None:
    listed = (
        {case.kind for case in LAYERS}
        | set(LOSSES)
        | set(ONCE)
        | {n for names in OTHERS.values() for n in names.split()}
    )
    classes = {n for n, c in vars(nn).items() if inspect.isclass(c) and issubclass(c, nn.Module)}
    assert classes - listed == set()


class Net(nn.Module):
    """The layer, behind a parameter that makes its input depend on what adapts."""

    def __init__(self, case: Layer) -> None:
        super().__init__()
        self.layer, self.gain = case.make(), nn.Parameter(torch.tensor(1.3))
        self.integers = case.classes > 0

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x if self.integers else x * self.gain)
        out = out[0] if isinstance(out, tuple) else out
        return out.flatten(1) * self.gain


def squares(out: Tensor, y: Tensor) -> Tensor:
    return (out + 0.3).square().mean()


def results_of(outputs: Tensor, module: nn.Module) -> list[Tensor]:
    found = torch.autograd.grad(
        squares(outputs, outputs), list(module.parameters()), allow_unused=True, materialize_grads=True
    )
    return [outputs, *found]


def plain(
    module: nn.Module, x: Tensor, loss: Callable[[Tensor, Tensor], Tensor], y: Tensor, once: bool
) -> list[Tensor]:
    """One step for each task, by torch.autograd.grad, then the outputs."""
    outputs = []
    for t in range(len(x)):
        theta = dict(module.named_parameters())
        buffers = {n: b.clone() for n, b in module.named_buffers()}
        with sdpa_kernel(SDPBackend.MATH):
            value = loss(torch.func.functional_call(module, {**theta, **buffers}, (x[t],)), y[t])
            grads = torch.autograd.grad(
                value, list(theta.values()), create_graph=not once, allow_unused=True, materialize_grads=True
            )
            theta = {n: p - 0.1 * g for (n, p), g in zip(theta.items(), grads, strict=True)}
            outputs.append(torch.func.functional_call(module, {**theta, **buffers}, (x[t],)))
    return results_of(torch.stack(outputs), module)


@pytest.mark.parametrize("mode", ["training", "evaluation"])
@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_layers(case: Layer, mode: str) -> None:
    refused = case.refused in ("always", mode)
    for tasks in (1, 3):
        torch.manual_seed(0)
        module = Net(case).double().train(mode == "training")
        shape = (tasks, SHOTS, *case.shape)
        x = (
            torch.randint(0, case.classes, shape)
            if case.classes
            else torch.randn(*shape, dtype=torch.float64)
        )
        y = torch.zeros(tasks, SHOTS)
        random = case.random and (mode == "training" or "Fractional" in case.kind)

        def run(path: str, module: nn.Module = module, x: Tensor = x, y: Tensor = y) -> list[Tensor]:
            torch.manual_seed(1)
            return results_of(
                metafast.adapt(module, x, y, loss=squares, lr=0.1, steps=1, path=path, first_order=case.once)(
                    x
                ),
                module,
            )

        torch.manual_seed(1)
        expected = plain(module, x, squares, y, case.once)
        found = run("loop")
        if not random or tasks == 1:  # tasks draw in another order
            torch.testing.assert_close(found, expected)
        if refused:
            with pytest.raises(
                ValueError, match=f"path: 'torch.func' does not take (layer 'layer' .{case.kind}|what)"
            ):
                run("torch.func")
        elif random:
            run("torch.func")
        else:
            torch.testing.assert_close(run("torch.func"), expected)


@pytest.mark.parametrize("kind", [*LOSSES, *ONCE])
def test_losses(kind: str) -> None:
    torch.manual_seed(0)
    module, (target, options) = (
        nn.Sequential(nn.Linear(3, 4), nn.LogSoftmax(1)).double(),
        (LOSSES | ONCE)[kind],
    )
    x = torch.randn(3, SHOTS, 3, dtype=torch.float64)
    y = torch.stack([target(module(task).detach()) for task in x])
    loss, once = getattr(nn, kind)(**options), kind in ONCE
    expected = plain(module, x, loss, y, once)
    for path in ("torch.func", "loop"):
        adapted = metafast.adapt(module, x, y, loss=loss, lr=0.1, steps=1, path=path, first_order=once)
        torch.testing.assert_close(results_of(adapted(x), module), expected)
