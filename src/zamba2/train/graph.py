"""Forward and backward pass of a training step as one CUDA graph: a step is thousands of kernels, and launching them takes a host
longer than they take a GPU.

What is captured runs again on other numbers, so shapes stay, and nothing on the way may wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zamba2.runtime.graphs import captured

__all__ = ["GraphedStep"]

WARM_UP = 3  # passes before the capture: they compile kernels and let libraries choose theirs


@dataclass
class Captured:
    """A graph, where it reads its inputs, and where it leaves the loss and the gradients."""

    graph: torch.cuda.CUDAGraph
    inputs: dict[str, Tensor]
    loss: Tensor
    gradients: list[Tensor | None]


class GraphedStep:
    """Call it with the loss's tensors: it returns the loss and adds to the parameters' gradients, as ``loss(...).backward()`` would.

    Each set of shapes is captured when it first comes. Gradients lie in the graph's own memory; with ``zero_grad(set_to_none=True)``
    between two calls they cost nothing more, and are added up where they are kept. On a CPU (tests) the same runs without a graph.
    """

    def __init__(self, loss: Callable[..., Tensor], parameters: Iterable[nn.Parameter]) -> None:
        self.loss, self.parameters = loss, [parameter for parameter in parameters if parameter.requires_grad]
        self.captured: dict[tuple[object, ...], Captured] = {}

    def __call__(self, **inputs: Tensor) -> Tensor:
        if all(tensor.device.type == "cpu" for tensor in inputs.values()):
            loss = self.loss(**inputs)
            loss.backward()
            return loss.detach()
        key = tuple((name, tensor.shape, tensor.dtype) for name, tensor in sorted(inputs.items()))
        if key not in self.captured:
            self.captured[key] = self._capture(inputs)
        own = self.captured[key]
        for name, tensor in inputs.items():
            own.inputs[name].copy_(tensor, non_blocking=True)
        pairs = zip(self.parameters, own.gradients, strict=True)
        before = [p.grad.clone() if p.grad is not None and p.grad is g else p.grad for p, g in pairs]  # the graph overwrites its own
        own.graph.replay()
        for parameter, gradient, earlier in zip(self.parameters, own.gradients, before, strict=True):
            if gradient is not None:
                parameter.grad = gradient if earlier is None else earlier.add_(gradient)
        return own.loss.detach().clone()

    def _capture(self, inputs: dict[str, Tensor]) -> Captured:
        held = [parameter.grad for parameter in self.parameters]
        own = {name: tensor.clone() for name, tensor in inputs.items()}

        def both() -> Tensor:
            loss = self.loss(**own)
            loss.backward()
            return loss

        graph, loss = captured(both, next(iter(own.values())).device, runs=WARM_UP, before=self._forget)
        gradients = [parameter.grad for parameter in self.parameters]
        for parameter, gradient in zip(self.parameters, held, strict=True):
            parameter.grad = gradient
        return Captured(graph, own, loss, gradients)

    def _forget(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None
