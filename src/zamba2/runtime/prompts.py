"""The beginning of a text on a GPU: up to 4,096 tokens read as one CUDA graph, for launching a thousand kernels takes longer than they do.

A graph has one length, so texts are padded to the next of a few: on the right, where no token sees padding and attention needs no mask.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from zamba2.errors import notice
from zamba2.model.model import Zamba2
from zamba2.model.state import KVCache, ModelState
from zamba2.runtime.graphs import captured

__all__ = ["LONGEST", "Prompts"]

LENGTHS = (64, 128, 256, 384, 512, 768, 1024, 1280, 1536, 1792, 2048, 2560, 3072, 3584, 4096)  # a graph for each that is used
LONGEST = LENGTHS[-1]
MOST_GRAPHS = 6  # that are kept, each with its outputs: at 4,096 tokens of the 2.7B close to 1 GB
Outputs = tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]  # hidden states, last scores, conv, ssm, keys and values by layer


class Prompts:
    """Reads texts into new states. On a CPU (tests) the same is computed without a graph."""

    def __init__(self, model: Zamba2) -> None:
        self.model, self.config = model, model.config
        self.device = model.final_layernorm.weight.device
        self.ids = torch.zeros(1, LONGEST, dtype=torch.int64, device=self.device)
        self.count = torch.ones(1, dtype=torch.int64, device=self.device)
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Outputs]] = {}
        self.memory = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None  # of all graphs: one runs at a time
        self.eager = self.device.type != "cuda"

    def read(self, tokens: npt.NDArray[np.int32], wanted: int) -> tuple[ModelState, Tensor]:
        """The state behind a text of 1 to LONGEST tokens, and the scores at its last ``wanted`` places, (wanted, V)."""
        count = len(tokens)
        length = next(length for length in LENGTHS if length >= count)
        self.ids[0, :length] = torch.from_numpy(np.pad(np.asarray(tokens, np.int64), (0, length - count)))
        self.count.fill_(count)
        x, last, conv, ssm, kv = self._outputs(length)
        state = ModelState.empty(self.config)
        state.position = count
        state.conv, state.ssm = list(conv.clone().split(1)), list(ssm.clone().split(1))  # the graph writes to the same place next time
        for position, tensor in enumerate(kv):
            cache = KVCache()
            cache.append(*tensor[:, :, :, :count])
            state.kv[position] = cache
        if wanted > 1:
            return state, self.model.logits(x[:, count - wanted : count])[0]
        return state, last[1 - wanted :].clone()

    def _outputs(self, length: int) -> Outputs:
        if self.eager:
            return self._compute(length)
        if length not in self.graphs:
            try:
                if len(self.graphs) == MOST_GRAPHS:
                    del self.graphs[next(iter(self.graphs))]  # the one that was used longest ago
                self.graphs[length] = captured(partial(self._compute, length), self.device, memory=self.memory)
            except RuntimeError as error:  # what a driver or a version of PyTorch cannot capture, it can still compute
                notice(f"prompts are read without CUDA graphs, which is slower ({str(error).splitlines()[0]}).")
                torch.cuda.synchronize(self.device)
                self.eager = True
                return self._compute(length)
        self.graphs[length] = graph, outputs = self.graphs.pop(length)
        graph.replay()
        return outputs

    def _compute(self, length: int) -> Outputs:
        state = ModelState.empty(self.config)
        x = self.model.hidden_states(self.ids[:, :length], state=state, lengths=self.count)
        conv, ssm, kv = (
            [tensor for tensor in some if tensor is not None] for some in (state.conv, state.ssm, [own.tensor() for own in state.kv])
        )
        return x, self.model.logits(x[0, self.count - 1]), torch.cat(conv), torch.cat(ssm), kv
