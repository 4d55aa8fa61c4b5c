"""The six operations as Triton kernels: those of ``triton_conv``, ``triton_norms`` and ``triton_scan`` under one name."""

from __future__ import annotations

from zamba2.model.ops.triton_conv import causal_conv
from zamba2.model.ops.triton_norms import add_hoisted, concat_rms_norm, geglu, rms_norm
from zamba2.model.ops.triton_scan import ssd_scan

__all__ = ["add_hoisted", "causal_conv", "concat_rms_norm", "geglu", "rms_norm", "ssd_scan"]
