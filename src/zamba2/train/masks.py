"""From messages to token ids and a mask that says which of them are trained on: what the assistant says and the token that ends it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zamba2.errors import Zamba2Error
from zamba2.language.messages import check_messages
from zamba2.language.tokenizer import CHATML_END, Tokenizer

__all__ = ["Masked", "MaskedPair", "mask_conversation", "mask_pair", "mask_text"]


@dataclass(frozen=True)
class Masked:
    """A tokenized conversation.

    ids: int32 (T,), those of ``Tokenizer.encode_chat``. loss: bool (T,), True where the token is a target. text: the rendered
    conversation. offsets: int32 (T, 2), first character of each token in ``text`` and the one behind its last; the tokens of
    one character's bytes share it.
    """

    ids: NDArray[np.int32]
    loss: NDArray[np.bool_]
    text: str
    offsets: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class MaskedPair:
    """A tokenized preference: the prompt alone as a model is asked (int32 (P,)), and each whole conversation, where the loss is that
    of the last answer alone."""

    prompt: NDArray[np.int32]
    chosen: Masked
    rejected: Masked

    def __len__(self) -> int:
        return max(len(self.chosen), len(self.rejected))


def mask_conversation(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], *, last_only: bool = False) -> Masked:
    """Tokenize a conversation; each assistant message and its end token carry loss, with ``last_only`` those of the last one alone.

    A token that also holds characters from before or behind them carries none. Raises Zamba2Error for malformed messages, and for
    chat templates that render a conversation's beginning otherwise than the whole, change what is said, or write no end token.
    """
    check_messages(messages)
    text = tokenizer.render_chat(messages, add_generation_prompt=False)
    said = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    spans = [_span(tokenizer, messages, i, text) for i in (said[-1:] if last_only else said)]
    return _mask(tokenizer, text, spans)


def mask_text(tokenizer: Tokenizer, text: str) -> Masked:
    """Tokenize plain text as a base model's prompt starts, with the end token behind it; every token carries loss.

    Raises Zamba2Error for a tokenizer without an end token.
    """
    if not tokenizer.eos_token_ids:
        raise Zamba2Error("the tokenizer names no eos_token, so texts would have no end; add it to tokenizer_config.json.")
    start = tokenizer.encode("")
    ids, offsets = tokenizer.encode_with_offsets(text)
    ids = [*start, *ids, tokenizer.eos_token_ids[0]]
    places = [(0, 0)] * len(start) + list(offsets) + [(len(text), len(text))]
    return Masked(np.array(ids, np.int32), np.ones(len(ids), np.bool_), text, np.array(places, np.int32))


def mask_pair(
    tokenizer: Tokenizer, prompt: Sequence[Mapping[str, Any]], chosen: Sequence[Mapping[str, Any]], rejected: Sequence[Mapping[str, Any]]
) -> MaskedPair:
    """Tokenize a preference. ``chosen`` and ``rejected`` hold one assistant message each. Raises Zamba2Error as mask_conversation does."""
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        check_messages(answer)
        if [message["role"] for message in answer] != ["assistant"]:
            raise Zamba2Error(f"{name} holds messages of {', '.join(m['role'] for m in answer)}; one assistant message is needed.")
    asked = np.array(tokenizer.encode_chat(prompt), np.int32)
    whole, other = (mask_conversation(tokenizer, [*prompt, *answer], last_only=True) for answer in (chosen, rejected))
    return MaskedPair(asked, whole, other)


def _span(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], i: int, text: str) -> tuple[int, int]:
    """Where message i and its end token stand in the rendered conversation, in characters."""
    before = tokenizer.render_chat(messages[:i], add_generation_prompt=True) if i else _opening(tokenizer)
    upto = text if i + 1 == len(messages) else tokenizer.render_chat(messages[: i + 1], add_generation_prompt=False)
    if not text.startswith(upto) or not upto.startswith(before):
        raise Zamba2Error("the chat template renders a conversation's beginning otherwise than the whole; a ChatML template is needed.")
    rest, content = upto[len(before) :], str(messages[i]["content"])
    content = content if rest.startswith(content) else content.strip()  # many templates trim
    if not rest.startswith(content):
        raise Zamba2Error("the chat template changes what the assistant says; a ChatML template is needed.")
    rest = rest[len(content) :]
    ends = {CHATML_END, *(tokenizer.decode([token], skip_special_tokens=False) for token in tokenizer.eos_token_ids)}
    end = next((end for end in sorted(ends, key=len, reverse=True) if end and rest.startswith(end)), None)
    if end is None:
        raise Zamba2Error("the chat template writes no end token behind what the assistant says; a ChatML template is needed.")
    return len(before), len(before) + len(content) + len(end)


def _opening(tokenizer: Tokenizer) -> str:
    """What stands before the content of an assistant message that begins a conversation: there is nothing to ask for a prompt with."""
    with_user = [{"role": "user", "content": ""}]
    asked = tokenizer.render_chat(with_user, add_generation_prompt=False)
    return tokenizer.render_chat(with_user, add_generation_prompt=True).removeprefix(asked)


def _mask(tokenizer: Tokenizer, text: str, spans: Sequence[tuple[int, int]]) -> Masked:
    own_ids, own_offsets = tokenizer.encode_with_offsets(text)
    flat = itertools.chain.from_iterable(own_offsets)  # more than twice as fast as np.array of pairs
    ids, offsets = np.array(own_ids, np.int32), np.fromiter(flat, np.int32, 2 * len(own_offsets)).reshape(-1, 2)
    first, behind = offsets.T
    # Some tokenizers leave white space out of a token's offsets (ByteLevel's trim_offsets): what no token covers is the next one's.
    first[1:] = np.where(behind[:-1] < first[1:], behind[:-1], first[1:])
    loss = np.zeros(len(ids), np.bool_)
    for start, end in spans:
        loss |= (first >= start) & (first < behind) & (behind <= end)
    return Masked(ids, loss, text, offsets)
