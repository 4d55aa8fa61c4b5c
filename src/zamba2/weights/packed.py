"""Packed checkpoints, which the native engine maps: quantize a checkpoint into one, open one. Knows no torch.

A packed checkpoint is a folder like any other: config.json, the tokenizer's files, and model.safetensors, whose metadata
say what it is. Its tensors have the model's own names: matrices as U8 bytes in a layout of ``formats``, vectors as F32.
Of each shared block the rows of q, k and v lie in one matrix, split into its left half, for the residual stream, and its
right half, for the embedding.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from zamba2.config import Config
from zamba2.errors import Zamba2Error
from zamba2.weights.calibration import Moments
from zamba2.weights.files import TensorFile, replacing, write_tensors
from zamba2.weights.formats import BLOCK, Format, format_named, pack
from zamba2.weights.hub import SMALL_FILES
from zamba2.weights.hub_files import HubFiles

__all__ = [
    "VERSION", "Packing", "Part", "bytes_per_token", "check_target", "is_packed", "is_random", "open_packed", "parts", "quantize",
    "write_packed",
]  # fmt: skip

VERSION = 2
ALIGNMENT = 64  # of a matrix in the file, and so in memory
ROWS_AT_ONCE = 1024  # of one matrix, so that quantizing needs little memory
MOST_THREADS = 4  # that round; each holds ROWS_AT_ONCE rows several times
Floats = npt.NDArray[np.float32]
Progress = Callable[[int, int], None]  # weights done, weights in all


@dataclass(frozen=True)
class Part:
    """One tensor of the engine: its name, shape ((rows, cols), or (n,) for a vector) and where its values come from.

    sources: parameters of the model whose rows are joined; half: which half of their columns (None for all).
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    half: int | None = None

    @property
    def is_matrix(self) -> bool:
        return len(self.shape) == 2

    @property
    def count(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Packing:
    """The format of each matrix: ``embeddings`` of the embedding table and lm_head, ``format`` of all others."""

    format: Format
    embeddings: Format

    @staticmethod
    def named(format: str, embeddings: str | None = None) -> Packing:
        """By the formats' names; what embeddings are packed in by default. Raises Zamba2Error for an unknown name."""
        return Packing(format_named(format), format_named(embeddings or EMBEDDINGS.get(format, format)))

    def of(self, part: Part) -> Format:
        return self.embeddings if part.name in ("embed_tokens.weight", "lm_head.weight") else self.format

    def nbytes(self, part: Part) -> int:
        """Bytes of a tensor in the file."""
        return self.of(part).nbytes(*part.shape) if part.is_matrix else 4 * part.count


EMBEDDINGS = {"q4": "q8"}  # docs/log.md: KL divergence against bytes


def parts(config: Config) -> list[Part]:
    """All tensors of the engine for a config, in file order: matrices first, so that all of these are aligned."""
    hidden, wide = config.hidden_size, config.attention_hidden_size
    found = [Part("embed_tokens.weight", (config.vocab_size, hidden), ("embed_tokens.weight",))]
    if not config.tie_word_embeddings:
        found.append(Part("lm_head.weight", (config.vocab_size, hidden), ("lm_head.weight",)))

    def add(name: str, *shape: int) -> None:
        found.append(Part(name, shape, (name,)))

    add("final_layernorm.weight", hidden)
    for layer in config.layers:
        name = f"layers.{layer.index}"
        if layer.is_hybrid:
            add(f"{name}.linear.weight", hidden, hidden)
        add(f"{name}.input_layernorm.weight", hidden)
        add(f"{name}.mamba.in_proj.weight", config.in_proj_dim, hidden)
        add(f"{name}.mamba.conv1d.weight", config.conv_dim * config.mamba_d_conv)
        add(f"{name}.mamba.conv1d.bias", config.conv_dim)
        for vector in ("dt_bias", "A_log", "D"):
            add(f"{name}.mamba.{vector}", config.n_mamba_heads)
        add(f"{name}.mamba.norm.weight", config.d_inner)
        add(f"{name}.mamba.out_proj.weight", hidden, config.d_inner)
    for block in range(config.num_shared_blocks):
        name = f"shared_blocks.{block}"
        attention, mlp = f"{name}.self_attn", f"{name}.feed_forward"
        add(f"{name}.input_layernorm.weight", wide)
        add(f"{name}.pre_ff_layernorm.weight", hidden)
        qkv = tuple(f"{attention}.{letter}_proj.weight" for letter in "qkv")
        for half, side in enumerate(("left", "right")):
            found.append(Part(f"{attention}.qkv_proj.{side}.weight", (wide + 2 * config.kv_dim, hidden), qkv, half))
        add(f"{attention}.o_proj.weight", hidden, wide)
        add(f"{mlp}.gate_up_proj.weight", 2 * config.intermediate_size, hidden)
        add(f"{mlp}.down_proj.weight", hidden, config.intermediate_size)
        for layer in config.layers:
            if layer.block != block:
                continue
            for letter in "qkv" if config.use_shared_attention_adapter else "":
                add(f"{attention}.linear_{letter}_adapter_list.{layer.position}.0.weight", config.adapter_rank, wide)
                add(f"{attention}.linear_{letter}_adapter_list.{layer.position}.1.weight", wide, config.adapter_rank)
            add(f"{mlp}.gate_up_proj_adapter_list.{layer.position}.0.weight", config.adapter_rank, hidden)
            add(f"{mlp}.gate_up_proj_adapter_list.{layer.position}.1.weight", 2 * config.intermediate_size, config.adapter_rank)
    return sorted(found, key=lambda part: not part.is_matrix)


def bytes_per_token(config: Config, sizes: Mapping[str, int]) -> int:
    """Bytes of weights that a decoded token reads, from the bytes of each of the engine's tensors: all of them once, a shared
    block's at each of its positions (its embedding half and each position's own adapters once), an untied embedding not at all."""
    total = 0
    for name, size in sizes.items():
        times = 1
        if name.startswith("shared_blocks.") and ".right." not in name and "_adapter_list." not in name:
            times = sum(layer.block == int(name.split(".")[1]) for layer in config.layers)
        if name == "embed_tokens.weight" and not config.tie_word_embeddings:
            times = 0  # one row of it
        total += times * size
    return total


def is_packed(path: Path) -> bool:
    """Whether a folder holds a packed checkpoint. A file that cannot be read is none: who reads it says what is wrong with it."""
    file = path / "model.safetensors"
    try:
        return path.is_dir() and file.exists() and "zamba2" in TensorFile(file).metadata
    except (Zamba2Error, OSError):
        return False


def is_random(path: Path) -> bool:
    """Whether a checkpoint, packed or not, says that its weights are random."""
    file = path / "model.safetensors"
    return path.is_dir() and file.exists() and TensorFile(file).metadata.get("zamba2_random") == "true"


def open_packed(path: Path, config: Config) -> tuple[TensorFile, Packing, list[Part]]:
    """Open a packed checkpoint's file. Raises Zamba2Error unless it is complete and belongs to the config."""
    file = TensorFile(path / "model.safetensors")
    about = file.about("weights")
    if about is None:
        raise Zamba2Error(f"{file.path} is not a packed Zamba2 checkpoint.")
    if about.get("version") != VERSION:
        raise Zamba2Error(f"{file.path} is packed in version {about.get('version')}; this program reads version {VERSION}: quantize again.")
    packing = Packing.named(str(about.get("format")), str(about.get("embeddings")))
    if about.get("config") != config.to_dict():
        raise Zamba2Error(f"{file.path} was packed for another config.json than the one beside it; quantize the checkpoint again.")
    plan = parts(config)
    for part in plan:
        entry = file.entries.get(part.name)
        wanted = _layout(part, packing)
        if entry is None:
            raise Zamba2Error(f"{file.path} has no tensor {part.name}; quantize the checkpoint again.")
        if (entry.dtype, entry.shape) != wanted:
            found = f"{entry.dtype} {list(entry.shape)}"
            raise Zamba2Error(f"{file.path}: tensor {part.name} is {found}; {wanted[0]} {list(wanted[1])} is needed.")
        if part.is_matrix and entry.start % ALIGNMENT:
            raise Zamba2Error(f"{file.path}: tensor {part.name} starts at byte {entry.start}, no multiple of {ALIGNMENT}; quantize again.")
    return file, packing, plan


def check_target(target: Path) -> None:
    """Raises Zamba2Error if there is something at ``target`` that packing would replace."""
    if target.exists() and (not target.is_dir() or os.listdir(target)):
        raise Zamba2Error(f"{target} exists and is not an empty folder; choose another place for the packed checkpoint.")
    if os.path.ismount(target):
        raise Zamba2Error(f"{target} is where a file system is mounted, which cannot be replaced; choose a folder inside of it.")


def quantize(
    source: Path, target: Path, format: Format, *, embeddings: Format | None = None, moments: Mapping[str, Moments] | None = None,
    progress: Progress | None = None,
) -> None:  # fmt: skip
    """Pack the checkpoint folder ``source`` (the Hub's layout) into the new folder ``target``.

    embeddings: format of the embedding table and lm_head (default: see ``Packing``). moments: of the inputs of the
    matrices, by name, that calibration corrects; all others are rounded to the nearest. Holds one weight in fp32 at a
    time. Raises Zamba2Error; the target appears complete or not at all.
    """
    packing = Packing(format, embeddings or Packing.named(format.name).embeddings)
    check_target(target)
    config = Config.from_file(source / "config.json")
    files, plan = HubFiles(source, config), parts(config)
    total, done = sum(part.count for part in plan if part.is_matrix), 0

    def pieces(part: Part) -> Iterator[memoryview]:
        nonlocal done
        if not part.is_matrix:
            yield _values(files, part.sources[0]).reshape(-1).data.cast("B")
            return
        own, rounding = packing.of(part), moments[part.name].rounding() if moments and part.name in moments else None
        carried: npt.NDArray[np.float32] = np.empty((0, part.shape[1]), np.float32)  # rows of q that do not fill a block go with those of k
        for parameter in part.sources:
            values = _values(files, parameter)
            if part.half is not None:
                values = values[:, part.half * part.shape[1] : (part.half + 1) * part.shape[1]]
            rows = np.concatenate([carried, values]) if len(carried) else values
            whole = len(rows) if parameter == part.sources[-1] else len(rows) // BLOCK * BLOCK
            carried = rows[whole:]
            some = [rows[start : min(whole, start + ROWS_AT_ONCE)] for start in range(0, whole, ROWS_AT_ONCE)]
            try:
                for values, packed in zip(some, pool.map(lambda values: pack(values, own, rounding), some), strict=True):
                    yield packed.data
                    done += values.size
                    if progress is not None:
                        progress(done, total)
            except Zamba2Error as error:
                raise Zamba2Error(f"{files.folder}: tensor {files.stored[parameter]}: {error}") from None

    small = [file for pattern in SMALL_FILES for file in source.glob(pattern) if file.is_file()]
    pool = ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1))
    try:
        mark = {"zamba2_random": "true"} if is_random(source) else {}
        write_packed(target, config, packing, lambda part: partial(pieces, part), mark, small, calibrated=moments is not None)
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C need not wait for what is in the queue


def write_packed(
    target: Path, config: Config, packing: Packing, pieces: Callable[[Part], Callable[[], Iterable[memoryview]]],
    metadata: Mapping[str, str], small_files: Iterable[Path] = (), *, calibrated: bool = False,
) -> None:  # fmt: skip
    """Write a packed checkpoint folder, complete or not at all; pieces: what yields a part's bytes. Raises Zamba2Error."""
    entries = [(part.name, *_layout(part, packing), pieces(part)) for part in parts(config)]
    about = {
        "kind": "weights", "version": VERSION, "format": packing.format.name, "embeddings": packing.embeddings.name,
        "calibrated": calibrated, "config": config.to_dict(),
    }  # fmt: skip
    with replacing(target) as temporary:
        temporary.mkdir()
        for file in small_files:
            shutil.copyfile(file, temporary / file.name)
        (temporary / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n", encoding="utf-8")
        write_tensors(temporary / "model.safetensors", entries, {"format": "zamba2", "zamba2": json.dumps(about), **metadata})


def _layout(part: Part, packing: Packing) -> tuple[str, tuple[int, ...]]:
    """dtype and shape of a part in the file."""
    return ("U8", (packing.nbytes(part),)) if part.is_matrix else ("F32", part.shape)


def _values(files: HubFiles, parameter: str) -> Floats:
    values: Floats = files.floats(parameter)
    if not np.isfinite(values).all():
        raise Zamba2Error(f"{files.folder}: tensor {files.stored[parameter]} has NaN or infinite values; download the checkpoint again.")
    return values
