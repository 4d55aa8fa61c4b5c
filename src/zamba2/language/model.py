"""A backend and a tokenizer together: text in, text out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, overload

from zamba2.errors import Zamba2Error
from zamba2.language.conversations import Conversation
from zamba2.language.generate import Generation, Piece, Progress, Request, collect, run
from zamba2.language.sampling import Sampling
from zamba2.language.tokenizer import Tokenizer
from zamba2.runtime.backend import Backend

__all__ = ["LanguageModel"]

Prompt = str | Sequence[int]


class LanguageModel:
    """What ``zamba2.load`` returns. ``backend`` is the loaded model; ``tokenizer`` is None for a checkpoint without one.

    Generation options, the same everywhere: max_tokens=256, stop (a text or several), logprobs (number of alternatives),
    ignore_eos, and the fields of ``Sampling``: temperature (0 = greedy, the default), top_k, top_p, min_p,
    repetition_penalty, frequency_penalty, presence_penalty, logit_bias, seed. constraint: a ``generate.Constraint``, for one reply.
    """

    def __init__(self, backend: Backend, tokenizer: Tokenizer | None, *, name: str = "zamba2", is_random: bool = False) -> None:
        self.backend, self._tokenizer, self.name = backend, tokenizer, name
        self.is_random = is_random  # random weights: the words are noise

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer. Raises Zamba2Error if it has none."""
        if self._tokenizer is None:
            raise Zamba2Error(f"{self.name} has no tokenizer.json, which text needs; add the file, or give token ids instead of text.")
        return self._tokenizer

    @overload
    def generate(self, prompt: str, **options: Any) -> Generation: ...
    @overload
    def generate(self, prompt: Sequence[int], **options: Any) -> Generation: ...
    @overload
    def generate(self, prompt: Sequence[str] | Sequence[Sequence[int]], **options: Any) -> list[Generation]: ...

    def generate(self, prompt: Any, *, progress: Progress | None = None, **options: Any) -> Generation | list[Generation]:
        """Continue a prompt (text or token ids), or several together; a prompt's answer does not depend on the others."""
        if isinstance(prompt, str) or not any(isinstance(item, (str, Sequence)) for item in prompt):
            return collect(self.backend, [self.request(prompt, **options)], self._tokenizer, progress=progress)[0]
        return collect(self.backend, [self.request(p, **options) for p in prompt], self._tokenizer, progress=progress)

    def stream(self, prompt: Prompt, *, progress: Progress | None = None, **options: Any) -> Iterator[Piece]:
        """Continue a prompt piece by piece; the pieces' texts joined are the text of ``generate``."""
        return run(self.backend, [self.request(prompt, **options)], self._tokenizer, progress=progress)

    def chat(self, messages: Sequence[Mapping[str, Any]], *, progress: Progress | None = None, **options: Any) -> Generation:
        """The assistant's reply to a list of {"role", "content"} messages, through the checkpoint's chat template."""
        tokens = self.tokenizer.encode_chat(messages, add_generation_prompt=True)
        return collect(self.backend, [self.request(tokens, **options)], self._tokenizer, progress=progress)[0]

    def conversation(self, system: str | None = None) -> Conversation:
        """A chat that remembers its state, so that each turn reads only what is new."""
        return Conversation(self.backend, self.tokenizer, system=system)

    def request(self, prompt: Prompt, **options: Any) -> Request:
        """Tokenize a prompt and check the options. Raises Zamba2Error naming what is wrong."""
        if isinstance(prompt, str):
            prompt = self.tokenizer.encode(prompt)
        return make_request(prompt, options)


def make_request(tokens: Sequence[int], options: Mapping[str, Any]) -> Request:
    """A request from generation options by name. Raises Zamba2Error for an unknown one."""
    own = {"max_tokens", "stop", "logprobs", "ignore_eos", "state", "adapter", "constraint", "history"}
    sampling = {name: value for name, value in options.items() if name not in own}
    unknown = sorted(set(sampling) - set(Sampling.__dataclass_fields__))
    if unknown:
        raise Zamba2Error(f"there is no option {unknown[0]!r}; there are {', '.join(sorted(own | set(Sampling.__dataclass_fields__)))}.")
    chosen = {name: value for name, value in options.items() if name in own}
    stop = chosen.get("stop")
    chosen["stop"] = tuple(stop) if isinstance(stop, (list, tuple)) else () if stop is None else (stop,)
    return Request(tokens, Sampling(**sampling), **chosen)
