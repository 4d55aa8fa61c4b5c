# ruff: noqa: E402
"""One of two processes that meet as torchrun's do: a recipe under accelerate with FSDP2, on CPUs.

accelerate keeps FSDP from CPUs: two of them would be plain data parallelism. So its state is told here that
sharding is wanted; everything behind that is accelerate's own, as on GPUs.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")
# What `accelerate launch --use_fsdp --fsdp_version 2 ...` sets.
os.environ |= {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "DecoderLayer,SharedBlock", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false", "FSDP_RESHARD_AFTER_FORWARD": "true",
}  # fmt: skip

import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from torch.distributed.tensor import DTensor

from zamba2.train import run as module
from zamba2.train.recipe import read_recipe

plain = AcceleratorState.__init__


def with_fsdp(self, *arguments, fsdp_plugin=None, **options):
    plain(self, *arguments, fsdp_plugin=fsdp_plugin, **options)
    if self.distributed_type == DistributedType.MULTI_CPU:
        assert fsdp_plugin is not None and fsdp_plugin.fsdp_version == 2
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP


AcceleratorState.__init__ = with_fsdp

facts: dict[str, object] = {"rank": int(os.environ["RANK"])}
export = module.export


def looked_at(recipe, trainer, source):
    """Before the export: which parameters are spread, and how much of them lies in this process."""
    facts["world"] = torch.distributed.get_world_size()
    parameters = dict(trainer.model.named_parameters())
    spread = {name: p for name, p in parameters.items() if isinstance(p, DTensor)}
    facts["parameters"], facts["spread"] = len(parameters), len(spread)
    facts["share"] = sum(p.to_local().numel() for p in spread.values()) / sum(p.numel() for p in parameters.values())
    return export(recipe, trainer, source)


module.export = looked_at
recipe = read_recipe(sys.argv[1])
module.run(recipe)
Path(f"{sys.argv[2]}.{facts['rank']}").write_text(json.dumps(facts))
