"""Several documents in one row, and batches that say where each begins.

A state-space model reads across whatever stands in a row: a document is only safe from its neighbour when the convolution, the SSM
state and the attention all start again at its first token. ``zamba2.hf`` does that wherever ``seq_idx`` changes; here it is made.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["IGNORED", "collate_packed", "pack"]

IGNORED = -100  # a label that is no target, in torch's cross-entropy, transformers and trl
WINDOW = 4096  # documents that are packed together; more would fill rows no better


def pack(documents: Iterable[Mapping[str, Sequence[int]]], size: int, *, window: int = WINDOW) -> Iterator[dict[str, list[int]]]:
    """Rows of at most ``size`` tokens, each whole documents side by side; none is cut, and all come out once.

    documents: {"input_ids", "labels"} of equal length. Yields {"input_ids", "labels", "lengths"}; the first label of every document is
    IGNORED, as no token of its own stands before it. Best fit, longest first, within windows of ``window`` documents, so that the
    order stays that of the stream but for a window's width. Raises ValueError for a document longer than ``size``.
    """
    held: list[Mapping[str, Sequence[int]]] = []
    for document in documents:
        if len(document["input_ids"]) > size:
            raise ValueError(f"a document has {len(document['input_ids'])} tokens and a row {size}; drop it or lengthen the rows")
        held.append(document)
        if len(held) == window:
            yield from _packed(held, size)
            held = []
    yield from _packed(held, size)


def _packed(documents: Sequence[Mapping[str, Sequence[int]]], size: int) -> Iterator[dict[str, list[int]]]:
    order = sorted(range(len(documents)), key=lambda i: (-len(documents[i]["input_ids"]), i))
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # free tokens and row, ascending
    for i in order:
        length = len(documents[i]["input_ids"])
        at = bisect.bisect_left(room, (length, -1))
        if at == len(room):
            rows.append([i])
            left, row = size - length, len(rows) - 1
        else:
            left, row = room.pop(at)
            rows[row].append(i)
            left -= length
        if left:
            bisect.insort(room, (left, row))
    for members in sorted(map(sorted, rows)):
        out: dict[str, list[int]] = {"input_ids": [], "labels": [], "lengths": []}
        for i in members:
            out["input_ids"] += documents[i]["input_ids"]
            out["labels"] += [IGNORED, *documents[i]["labels"][1:]]
            out["lengths"].append(len(documents[i]["input_ids"]))
        yield out


def collate_packed(rows: Sequence[Mapping[str, Any]], *, padding: int, size: int | None = None) -> dict[str, Tensor]:
    """A batch (b, size) of rows from ``pack``: input_ids, labels, attention_mask, and seq_idx, the document of each token.

    size: of all batches; None for the longest row's. The right is padded with a document of its own.
    """
    size = max(len(row["input_ids"]) for row in rows) if size is None else size
    batch = {
        "input_ids": torch.full((len(rows), size), padding),
        "labels": torch.full((len(rows), size), IGNORED),
        "attention_mask": torch.zeros(len(rows), size, dtype=torch.long),
        "seq_idx": torch.empty(len(rows), size, dtype=torch.int32),
    }
    for i, row in enumerate(rows):
        length, lengths = len(row["input_ids"]), torch.as_tensor(row["lengths"])
        batch["input_ids"][i, :length] = torch.as_tensor(row["input_ids"])
        batch["labels"][i, :length] = torch.as_tensor(row["labels"])
        batch["attention_mask"][i, :length] = 1
        batch["seq_idx"][i, :length] = torch.repeat_interleave(torch.arange(len(lengths), dtype=torch.int32), lengths)
        batch["seq_idx"][i, length:] = len(lengths)
    return batch
