"""Learned optimizers written for speed, in PyTorch: in place, without autograd, in chunks that fit a cache.

A layer is one addmm: its inputs and its h lie in one matrix, as do its weights. Tensors are written here
with coordinates last, [rows, n]. Where they lie so in memory too, each gate of all units is one piece of it;
with `coordinates_first` they lie as [n, rows], as most people have them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.learned_optimizer.peers.pytorch import TINY, log_sign
from bench.learned_optimizer.workloads import P_LOG_SIGN, SCALE, Call, Problem, Read


@dataclass(frozen=True)
class Layer:
    """Gates in the order i f o g: the sigmoids lie together."""

    weight: Tensor  # [4H, I + H]
    bias: Tensor  # [4H, 1]

    def in_torch_order(self, grad: Tensor, grad_bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-> of weight_ih, weight_hh and bias"""
        units = self.weight.shape[0] // 4
        grad, grad_bias = _swap_last(grad), _swap_last(grad_bias)
        return grad[:, :-units], grad[:, -units:], grad_bias[:, 0]


def _swap_last(rows: Tensor) -> Tensor:
    """i f g o -> i f o g, and back."""
    i, f, g, o = rows.chunk(4)
    return torch.cat((i, f, o, g))


def layers_of(problem: Problem) -> list[Layer]:
    of = problem.weights[:-2]
    return [
        Layer(_swap_last(torch.cat((weight_ih, weight_hh), 1)), _swap_last(bias.unsqueeze(1)))
        for weight_ih, weight_hh, bias in zip(of[::3], of[1::3], of[2::3], strict=True)
    ]


def _chunks(problem: Problem, size: int | None) -> list[slice]:
    size = size or problem.params.numel()
    return [slice(start, start + size) for start in range(0, problem.params.numel(), size)]


# --- one step, in place -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chunk:
    """n coordinates."""

    theta: Tensor  # [n]
    grad: Tensor  # [n]
    rows: Tensor  # [I + LH, n]: the inputs, and h of each layer
    cell: Tensor  # [L, H, n]
    gates: Tensor  # [2, n], of the meta-LSTM


def _make_chunk(problem: Problem, of: slice, coordinates_first: bool) -> Chunk:
    h, c = (t[:, of].mT.contiguous() for t in (problem.hidden, problem.cell))
    grad = problem.grads[0, of]
    inputs = grad.new_zeros(problem.weights[0].shape[1], grad.numel())
    if problem.is_meta:
        inputs[2:] = log_sign(problem.losses[0]).unsqueeze(1)
    rows = [torch.cat((inputs, h.flatten(0, 1))), c, problem.gates[of].T]
    clone = functools.partial(torch.clone, memory_format=torch.contiguous_format)
    rows = [clone(t.mT).mT if coordinates_first else clone(t) for t in rows]
    return Chunk(problem.params[of].clone(), grad, *rows)


def _advance(
    layers: Sequence[Layer],
    head: Tensor,
    head_bias: Tensor,
    chunk: Chunk,
    buffer: Tensor,
) -> None:
    """buffer [5H, n]"""
    rows, grad, units = chunk.rows, chunk.grad, buffer.shape[0] // 5
    torch.abs(grad, out=rows[0]).log_().div_(P_LOG_SIGN).clamp_(min=-1)
    torch.div(grad, TINY, out=rows[1]).clamp_(-1, 1)
    begin, end = 0, rows.shape[0] - len(layers) * units
    products, tanh_c = buffer[: 4 * units], buffer[4 * units :]
    for layer, c in zip(layers, chunk.cell, strict=True):
        torch.addmm(layer.bias, layer.weight, rows[begin : end + units], out=products)
        products[: 3 * units].sigmoid_()
        products[3 * units :].tanh_()
        i, f, o, g = products.chunk(4)
        torch.tanh(c.mul_(f).addcmul_(i, g), out=tanh_c)
        begin, end = end, end + units
        torch.mul(o, tanh_c, out=rows[begin:end])
    h, theta = rows[begin:], chunk.theta
    if len(chunk.gates) == 0:
        theta.unsqueeze(0).addmm_(head, h, alpha=SCALE).add_(head_bias, alpha=SCALE)
        return
    gates = chunk.gates
    gates.mul_(head[:, -1:]).add_(head_bias.unsqueeze(1)).addmm_(head[:, :-2], h)
    gates.addcmul_(head[:, -2:-1], theta).sigmoid_()
    theta.mul_(gates[1]).addcmul_(gates[0], grad, value=-1)


def step_in_place(problem: Problem, chunk: int | None = None, coordinates_first: bool = False) -> Call:
    chunks = [_make_chunk(problem, of, coordinates_first) for of in _chunks(problem, chunk)]
    layers, rows = layers_of(problem), 5 * problem.units
    largest = chunks[0].theta.new_empty(rows * chunks[0].theta.numel())
    buffers = []  # of each chunk, all in the same memory
    for size in (c.theta.numel() for c in chunks):
        flat = largest[: rows * size]
        buffers.append(flat.view(size, rows).T if coordinates_first else flat.view(rows, size))

    def read() -> Sequence[Tensor]:
        h = torch.cat([c.rows[-problem.layers * problem.units :] for c in chunks], 1)
        h = h.unflatten(0, (problem.layers, -1))
        cell, gates = (torch.cat(t, -1) for t in ([c.cell for c in chunks], [c.gates for c in chunks]))
        theta = torch.cat([c.theta for c in chunks])
        return (theta, h.mT, cell.mT, *([gates.T] if problem.is_meta else []))

    @torch.no_grad()
    def call() -> Read:
        for c, buffer in zip(chunks, buffers, strict=True):
            _advance(layers, *problem.weights[-2:], c, buffer)
        return read

    return call


# --- an unroll, backward by hand --------------------------------------------------------------------------


def _layer_forward(weight: Tensor, bias: Tensor, rows: Tensor, c: Tensor) -> tuple[Tensor, ...]:
    """rows [I + H, n], c [H, n] -> gates [4H, n] i f o g, c, tanh c, h"""
    gates = torch.addmm(bias, weight, rows)
    units = c.shape[0]
    gates[: 3 * units].sigmoid_()
    gates[3 * units :].tanh_()
    i, f, o, g = gates.chunk(4)
    c = torch.addcmul(f * c, i, g)
    tanh_c = c.tanh()
    return gates, c, tanh_c, o * tanh_c


def _layer_backward(
    gates: Tensor, c_before: Tensor, tanh_c: Tensor, grad_h: Tensor, grad_c: Tensor
) -> tuple[Tensor, Tensor]:
    """-> the gradients before the nonlinearities [4H, n], and of c before"""
    i, f, o, g = gates.chunk(4)
    total = grad_c + grad_h * o * (1 - tanh_c * tanh_c)
    of_gates = (
        total * g * i * (1 - i),
        total * c_before * f * (1 - f),
        grad_h * tanh_c * o * (1 - o),
        total * i * (1 - g * g),
    )
    return torch.cat(of_gates), total * f


class _Head:
    """What the last layer's h does to theta, and the sums of the gradients of its weights."""

    def __init__(self, problem: Problem) -> None:
        self.weight, self.bias = problem.weights[-2:]
        self.grads = [torch.zeros_like(w) for w in problem.weights[-2:]]

    def start(self, gates: Tensor) -> None:
        self.gates, self.kept, self.grad_gates = gates, [], torch.zeros_like(gates)

    def forward(self, h: Tensor, theta: Tensor, grad: Tensor) -> Tensor:
        self.kept.append((h,))
        return torch.addmm(theta.unsqueeze(0), self.weight, h, alpha=SCALE)[0].add_(self.bias, alpha=SCALE)

    def backward(self, grad_theta: Tensor) -> tuple[Tensor, Tensor]:
        """theta's gradient -> of h, and of theta before"""
        (h,) = self.kept.pop()
        scaled = grad_theta.unsqueeze(0) * SCALE
        self.grads[0].addmm_(scaled, h.T)
        self.grads[1] += scaled.sum()
        return self.weight.T * scaled, grad_theta


class _GatesHead(_Head):
    def forward(self, h: Tensor, theta: Tensor, grad: Tensor) -> Tensor:
        before = self.gates
        known = torch.addmm(self.bias.unsqueeze(1), self.weight[:, :-2], h)
        known.addcmul_(self.weight[:, -1:], before).addcmul_(self.weight[:, -2:-1], theta)
        self.gates = known.sigmoid_()
        self.kept.append((h, theta, grad, before, self.gates))
        return self.gates[1] * theta - self.gates[0] * grad

    def backward(self, grad_theta: Tensor) -> tuple[Tensor, Tensor]:
        h, theta, grad, before, gates = self.kept.pop()
        total = self.grad_gates + grad_theta * torch.stack((-grad, theta))
        total *= gates * (1 - gates)
        of_weight = (total @ h.T, total @ theta.unsqueeze(1), (total * before).sum(1, keepdim=True))
        self.grads[0] += torch.cat(of_weight, 1)
        self.grads[1] += total.sum(1)
        self.grad_gates = total * self.weight[:, -1:]
        of_theta = grad_theta * gates[1] + self.weight[:, -2] @ total
        return self.weight[:, :-2].T @ total, of_theta


def unroll(problem: Problem, chunk: int | None = None, compiled: bool = False) -> Call:
    """Coordinates need each other nowhere, so that each chunk goes through all steps and back."""
    layers, losses, units = layers_of(problem), problem.losses, problem.units
    compile_ = functools.partial(torch.compile, dynamic=False)
    forward, backward = (compile_(f) if compiled else f for f in (_layer_forward, _layer_backward))

    def one_chunk(of: slice, head: _Head, sums: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        theta, grads, grad_out = problem.params[of], problem.grads[:, of], problem.grad_out[:, of]
        h, c = ([t[of].T.contiguous() for t in of_layers] for of_layers in (problem.hidden, problem.cell))
        head.start(problem.gates[of].T)
        thetas, kept = [], []
        for k, grad in enumerate(grads):
            x = log_sign(grad).T
            if losses is not None:
                x = torch.cat((x, log_sign(losses[k]).unsqueeze(1).expand_as(x)))
            for index, layer in enumerate(layers):
                rows = torch.cat((x, h[index]))
                gates, c_new, tanh_c, x = forward(layer.weight, layer.bias, rows, c[index])
                kept.append((rows, gates, c[index], tanh_c))
                h[index], c[index] = x, c_new
            theta = head.forward(x, theta, grad)
            thetas.append(theta)
        grad_h, grad_c = ([torch.zeros_like(c[0]) for _ in layers] for _ in range(2))
        grad_theta = torch.zeros_like(theta)
        for of_theta in reversed(grad_out):
            below, grad_theta = head.backward(grad_theta + of_theta)
            for index in reversed(range(len(layers))):
                rows, gates, c_before, tanh_c = kept.pop()
                of_gates, grad_c[index] = backward(
                    gates, c_before, tanh_c, grad_h[index] + below, grad_c[index]
                )
                sums[index][0].addmm_(of_gates, rows.T)
                sums[index][1].add_(of_gates.sum(1, keepdim=True))
                of_rows = layers[index].weight.T @ of_gates
                below, grad_h[index] = of_rows[:-units], of_rows[-units:]
        return torch.stack(thetas)

    @torch.no_grad()
    def call() -> Read:
        head = (_GatesHead if problem.is_meta else _Head)(problem)
        sums = [(torch.zeros_like(layer.weight), torch.zeros_like(layer.bias)) for layer in layers]
        thetas = [one_chunk(of, head, sums) for of in _chunks(problem, chunk)]

        def read() -> Sequence[Tensor]:
            of_layers = zip(layers, sums, strict=True)
            grads = [g for layer, of in of_layers for g in layer.in_torch_order(*of)]
            return torch.cat(thetas, 1), *grads, *head.grads

        return read

    return call
