"""Who answers: one of our models, a transformers checkpoint (``hf:ID``), or a chat endpoint (``openai:URL#MODEL``)."""

# transformers is typed in parts.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from zamba2.errors import Zamba2Error, install
from zamba2.language.generate import run
from zamba2.language.model import LanguageModel

if TYPE_CHECKING:
    from zamba2.evaluate.judge import Endpoint

__all__ = ["Answers", "Chat", "Ours", "Transformers", "decisive", "open_answers"]

Messages = Sequence[Mapping[str, str]]
# What of ``about`` decides an answer: a run goes on only with answers for which these are the same.
DECISIVE = ("format", "kv_format", "backend", "adapter_sha256", "url", "revision", "sha256")
TIMEOUT = 600.0  # seconds for an answer of another server's, which may take a laptop minutes; as long as our own server goes on with one
TOGETHER = 8  # conversations read and answered in one call of the engine


class Answers(Protocol):
    """Anything that answers conversations. ``about``: what a result has to say of it."""

    name: str
    about: dict[str, Any]

    def answer(
        self, conversations: Sequence[Messages], *, max_tokens: int, temperature: float = 0.0, seed: int | None = None
    ) -> Iterator[tuple[int, str]]:
        """(index, text) of each conversation's next message as it is finished, in any order. Raises Zamba2Error.

        seed: the same for each, so that an answer is the same in a run that was interrupted.
        """


@dataclass
class Ours:
    """A model of ours on any of our backends. An answer depends on its conversation and the seed alone, not on its company."""

    model: LanguageModel
    name: str
    about: dict[str, Any]

    def answer(
        self, conversations: Sequence[Messages], *, max_tokens: int, temperature: float = 0.0, seed: int | None = None
    ) -> Iterator[tuple[int, str]]:
        tokenizer = self.model.tokenizer
        for start in range(0, len(conversations), TOGETHER):
            requests = [
                self.model.request(
                    tokenizer.encode_chat(messages, add_generation_prompt=True), max_tokens=max_tokens, temperature=temperature,
                    seed=seed,
                )
                for messages in conversations[start : start + TOGETHER]
            ]  # fmt: skip
            texts = [""] * len(requests)
            for piece in run(self.model.backend, requests, tokenizer):
                texts[piece.index] += piece.text
                if piece.finish_reason is not None:
                    yield start + piece.index, texts[piece.index]


@dataclass
class Transformers:
    """A checkpoint of any architecture through transformers: the card's rivals."""

    model: Any
    tokenizer: Any
    name: str
    about: dict[str, Any]

    def answer(
        self, conversations: Sequence[Messages], *, max_tokens: int, temperature: float = 0.0, seed: int | None = None
    ) -> Iterator[tuple[int, str]]:
        import torch

        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {"do_sample": False}
        for index, messages in enumerate(conversations):
            if seed is not None:
                torch.manual_seed(seed)
            try:
                read = self.tokenizer.apply_chat_template(
                    [dict(message) for message in messages], add_generation_prompt=True, return_tensors="pt", return_dict=True
                ).to(self.model.device)
            except Exception as error:  # a template's own refusal, or no template
                raise Zamba2Error(f"{self.name} cannot render this conversation: {' '.join(str(error).split())[:200]}.") from error
            with torch.no_grad():
                out = self.model.generate(**read, max_new_tokens=max_tokens, **sampling)
            yield index, self.tokenizer.decode(out[0, read["input_ids"].shape[1] :], skip_special_tokens=True)


@dataclass
class Chat:
    """A chat endpoint as OpenAI's clients know it; its key is in OPENAI_API_KEY."""

    endpoint: Endpoint
    name: str
    about: dict[str, Any]

    def answer(
        self, conversations: Sequence[Messages], *, max_tokens: int, temperature: float = 0.0, seed: int | None = None
    ) -> Iterator[tuple[int, str]]:
        yield from self.endpoint.replies(conversations, max_tokens=max_tokens, temperature=temperature, seed=seed)


def open_answers(model: str, **options: Any) -> Answers:
    """``model``: what ``zamba2.load`` takes, with its options; or hf:ID; or openai:URL#MODEL. Raises Zamba2Error."""
    kind, _, rest = model.partition(":")
    if kind == "hf" and rest:
        return open_transformers(rest, **options)
    if kind == "openai" and rest:
        return open_chat(rest, **options)
    from zamba2.api import load

    loaded = load(model, **options)
    loaded.tokenizer  # noqa: B018 (complains here if there is none)
    return Ours(loaded, loaded.name, about_ours(loaded, options))


def decisive(answers: Answers) -> dict[str, Any]:
    """What decides answers beside prompts and settings, as far as it is known: stands beside each answer that is kept."""
    return {name: answers.about[name] for name in DECISIVE if answers.about.get(name)}


def open_chat(address: str, **options: Any) -> Chat:
    """A model at a chat endpoint, URL#MODEL. Raises Zamba2Error."""
    from zamba2.evaluate.judge import Endpoint

    for name, value in options.items():
        if value:
            raise Zamba2Error(f"{name} is {value!r}, but openai:{address} runs elsewhere; leave it out.")
    url, _, name = address.partition("#")
    if not name:
        raise Zamba2Error(f"openai:{address} names no model; openai:URL#MODEL is needed, as in openai:http://localhost:8000/v1#zamba2.")
    endpoint = Endpoint(name, url, what="the endpoint", timeout=TIMEOUT, may_be_empty=True)
    return Chat(endpoint, name, {"model": name, "backend": "openai", "url": endpoint.url})


def about_ours(model: LanguageModel, options: Mapping[str, Any]) -> dict[str, Any]:
    """Name, hash of the weights, parameters, backend, formats, and the adapter with a hash of its own."""
    from zamba2.api import read_config
    from zamba2.weights.hub import resolve

    path = resolve(model.name, revision=options.get("revision"), offline=True)
    backend: Any = model.backend
    packed, kv, adapter = (getattr(backend, name, None) for name in ("format", "kv", "default_adapter"))
    about = {
        "model": model.name, "sha256": hash_of(path), "parameters": read_config(path).num_parameters, "backend": type(backend).__name__,
        "format": packed.name if packed is not None else str(getattr(backend, "dtype", "")).replace("torch.", ""),
    }  # fmt: skip
    if kv is not None:
        about["kv_format"] = kv.name
    if adapter is not None:
        about |= {"adapter": adapter, "adapter_sha256": backend.identity(adapter).rpartition("+")[2]}
    return about


def hash_of(path: Path) -> str:
    """SHA-256 over a checkpoint's weight files in the order of their names."""
    total = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(path.glob("*.safetensors")):
        with file.open("rb") as stream:
            while piece := stream.read(1 << 20):
                total.update(piece)
    return total.hexdigest()


def open_transformers(source: str, *, device: str | None = None, dtype: str | None = None, revision: str | None = None,
                      offline: bool = False, **options: Any) -> Transformers:  # fmt: skip
    """A causal language model of transformers with its tokenizer. Raises Zamba2Error."""
    for name, value in options.items():
        if value is not None:
            raise Zamba2Error(f"{name} is {value!r}, but hf:{source} runs in transformers; leave it out.")
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise Zamba2Error(f"hf:{source} needs transformers and torch ({error}); {install('hf')}.") from None
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    shared: dict[str, Any] = {"revision": revision, "local_files_only": offline}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **shared)
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype or "auto", **shared)
        model = model.to(place).eval()
    except Exception as error:  # the library lets errors of many others through
        raise Zamba2Error(f"transformers cannot load {source}: {' '.join(str(error).split())[:200]}.") from error
    about = {
        "model": source, "revision": revision or getattr(model.config, "_commit_hash", None), "backend": "transformers",
        "parameters": sum(p.numel() for p in model.parameters()), "format": str(model.dtype).replace("torch.", ""),
    }  # fmt: skip
    if Path(source).is_dir():
        about["sha256"] = hash_of(Path(source))
    return Transformers(model, tokenizer, f"hf:{source}", about)
