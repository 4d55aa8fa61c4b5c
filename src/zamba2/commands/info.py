"""``zamba2 info``: what a model is and costs, from its config and file headers alone."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from zamba2.api import MODEL_FILES, backend_for, checkpoint_in, default_format, read_config
from zamba2.config import PRESETS, Config
from zamba2.errors import Zamba2Error
from zamba2.weights.hub import resolve
from zamba2.weights.packed import Packing, bytes_per_token, is_packed, open_packed, parts

__all__ = ["main"]

MIB = 1 << 20
LINE = 27  # layers in one line of the drawing


def main(model: str, *, revision: str | None, offline: bool, as_json: bool) -> None:
    """Print the description of a shape or a checkpoint. Raises Zamba2Error."""
    path: Path | None = None
    if model.lower() in PRESETS and revision is None and not Path(model).exists():
        config = PRESETS[model.lower()]
    else:
        path = resolve(model, revision=revision, offline=offline, weights=False)
        with suppress(Zamba2Error):  # a repository's weights are not here
            path = checkpoint_in(path)
        config = read_config(path)
    data = describe(config)
    if path is not None:
        files = files_of(path)
        data["checkpoint"] = {"path": str(path), "files": sorted(f.name for f in files), "bytes": sum(f.stat().st_size for f in files)}
    data["machine"] = machine()
    data["runs"] = runs(config, path)
    if as_json:
        print(json.dumps(data))
        return
    print_tables(model, config, data)


def files_of(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return [file for file in path.glob("*.safetensors") if file.is_file()] + [f for f in [path / MODEL_FILES[1]] if f.exists()]


def describe(config: Config) -> dict[str, Any]:
    """Config, sizes and costs as one document; bytes and counts are whole numbers."""
    return {
        "config": config.to_dict(),
        "parameters": config.num_parameters,
        "weights_per_token": config.weights_per_token(hoisted=False),
        "weights_per_token_hoisted": config.weights_per_token(),
        "weight_bytes_per_token_bfloat16": 2 * config.weights_per_token(),
        "kv_bytes_per_token_bfloat16": config.kv_bytes_per_token(),
        "ssm_state_bytes": config.ssm_state_bytes,
        "conv_state_bytes_float32": config.conv_state_bytes(),
        "layers": [{"index": layer.index, "position": layer.position, "block": layer.block} for layer in config.layers],
    }


def machine() -> dict[str, Any]:
    """What the native engine finds here: instruction sets (the best last, and the one it takes), threads."""
    from zamba2.runtime.processors import default_threads

    try:
        from zamba2 import _engine
    except ImportError as error:
        return {"native_engine": f"not installed ({error})", "instruction_sets": [], "instruction_set": None, "threads": default_threads()}
    try:
        chosen = _engine.chosen()
    except RuntimeError as error:
        raise Zamba2Error(f"{error}.") from None
    return {
        "native_engine": "installed", "instruction_sets": _engine.available(), "instruction_set": chosen, "threads": default_threads(),
    }  # fmt: skip


def runs(config: Config, path: Path | None) -> dict[str, Any]:
    """What ``generate`` and ``chat`` run the model with if nothing is asked for; bytes of weights for each decoded token."""
    backend = backend_for(path)
    if backend == "torch":
        return {"backend": backend, "format": None, "weight_bytes_per_token": None}
    if path is not None and is_packed(path):
        file, packing, plan = open_packed(path, config)
        sizes = {part.name: file.entries[part.name].nbytes for part in plan}
    else:
        packing, plan = Packing.named(default_format(config)), parts(config)
        sizes = {part.name: packing.nbytes(part) for part in plan}
    return {"backend": backend, "format": packing.format.name, "weight_bytes_per_token": bytes_per_token(config, sizes)}


def print_tables(model: str, config: Config, data: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    attention = f"{config.num_attention_heads} heads x {config.attention_head_dim}"
    if config.num_key_value_heads != config.num_attention_heads:
        attention += f" ({config.num_key_value_heads} for keys and values)"
    rope = "none" if not config.use_mem_rope else f"rotary, base {config.rope_base:.6g}"
    rows = [
        ("layers", f"{config.num_hidden_layers}, {len(config.hybrid_layer_ids)} of them hybrid"),
        ("hidden size", f"{config.hidden_size}"),
        ("vocabulary", f"{config.vocab_size}"),
        ("Mamba2", f"{config.n_mamba_heads} heads x {config.mamba_headdim}, state {config.mamba_d_state}, {config.mamba_ngroups} group(s)"),
        ("shared blocks", f"{config.num_shared_blocks}, used in turn"),
        ("attention", attention),
        ("positions", rope),
        ("MLP", f"{config.intermediate_size}, adapters of rank {config.adapter_rank}"),
        ("q/k/v adapters", "yes" if config.use_shared_attention_adapter else "no"),
        ("trained context", f"{config.max_position_embeddings} tokens"),
        ("", ""),
        ("parameters", f"{config.num_parameters:,}"),
        ("weights per decoded token", f"{config.weights_per_token() / 1e9:.4g} G ({data['weights_per_token'] / 1e9:.4g} G without reuse)"),
        ("weights in bfloat16", f"{2 * config.num_parameters / 1e9:.3g} GB"),
        ("read per token in bfloat16", f"{data['weight_bytes_per_token_bfloat16'] / 1e9:.3g} GB"),
        ("SSM state", f"{config.ssm_state_bytes / MIB:.3g} MiB per sequence"),
        ("convolution state", f"{config.conv_state_bytes() / MIB:.3g} MiB per sequence"),
        ("keys and values in bfloat16", f"{config.kv_bytes_per_token() / 1024:.0f} KiB per token"),
    ]
    if "checkpoint" in data:
        rows.append(("checkpoint", f"{data['checkpoint']['path']} ({data['checkpoint']['bytes'] / 1e9:.3g} GB)"))
    here, run = data["machine"], data["runs"]
    rows += [("", ""), ("runs with", run_line(run))]
    if run["weight_bytes_per_token"] is not None:
        rows.append((f"read per token in {run['format']}", f"{run['weight_bytes_per_token'] / 1e9:.3g} GB"))
    sets = f"{here['instruction_set']} (here: {', '.join(here['instruction_sets'])})"
    rows += [("instruction set", sets if here["instruction_sets"] else here["native_engine"]), ("threads", str(here["threads"]))]
    table = Table(box=box.SIMPLE, show_header=False, title=f"Zamba2 {model}", title_justify="left")
    for name, value in rows:
        table.add_row(name, value)
    console.print(table)
    console.print(draw(config), highlight=False)


def run_line(run: dict[str, Any]) -> str:
    return "PyTorch" if run["backend"] == "torch" else f"the native engine, {run['format']}"


def draw(config: Config) -> str:
    """The layer plan: a dot for a Mamba2 layer, a letter for a hybrid one, naming the shared block it uses."""
    marks = ["·" if layer.block is None else chr(ord("A") + layer.block % 26) for layer in config.layers]
    lines = []
    for start in range(0, len(marks), LINE):
        lines.append(f"  {start:4d}  " + " ".join(marks[start : start + LINE]))
    blocks = ", ".join(chr(ord("A") + b % 26) for b in range(config.num_shared_blocks))
    lines.append("        · Mamba2 layer" + (f"   {blocks} one with that shared transformer block before it" if blocks else ""))
    return "\n".join(lines)
