"""Capturing CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

__all__ = ["captured"]

T = TypeVar("T")


def captured(
    compute: Callable[[], T], device: torch.device, *, runs: int = 1, before: Callable[[], None] | None = None,
    memory: Any = None,
) -> tuple[torch.cuda.CUDAGraph, T]:  # fmt: skip
    """A graph of ``compute``, and what it returns: tensors that each replay fills again.

    runs: made first, on a stream of their own, for what is compiled or chosen when it first runs. before: called in front of each run
    and of the capture. memory: torch.cuda's handle of a pool that graphs share which never run at the same time. Raises RuntimeError
    where something on the way waits for the device, or cannot be captured.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(runs):
            if before is not None:
                before()
            compute()
    torch.cuda.current_stream(device).wait_stream(stream)
    if before is not None:
        before()
    graph = torch.cuda.CUDAGraph()
    here = torch.cuda.stream(torch.cuda.current_stream(device))  # a capture that fails leaves its own stream the current one
    with here, torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):  # other threads fetch saved states meanwhile
        outputs = compute()
    return graph, outputs
