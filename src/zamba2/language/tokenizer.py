"""A checkpoint's tokenizer: text to ids and back, whole or token by token, and its chat template.

Every id is read from the checkpoint's files. Instruct checkpoints rename ids, early uploads used others.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.pre_tokenizers import ByteLevel

from zamba2.config import Config, read_json
from zamba2.errors import Zamba2Error
from zamba2.language.messages import CHATML, check_messages

__all__ = ["IncrementalDecoder", "TokenTexts", "Tokenizer"]

CHATML_END = "<|im_end|>"
LONG = 4096  # characters or ids, from which on the library is called so that it lets other threads run
BYTE_PIECE = re.compile("<0x[0-9A-Fa-f]{2}>")  # one byte of a character that the vocabulary lacks


class Tokenizer:
    """Attributes, all read from the files:

    vocab_size: highest id + 1. bos_token, eos_token: strings, or None where the checkpoint names none; bos_token_id, pad_token_id: ids or
    None. eos_token_ids: every id that ends an answer. chat_template: the checkpoint's Jinja text, ChatML where it has none.
    """

    def __init__(self, folder: Path, backend: tokenizers.Tokenizer, config: Config | None = None) -> None:
        """Use ``from_folder``. ``backend``: the parsed tokenizer.json of ``folder``."""
        settings, generation = _optional(folder / "tokenizer_config.json"), _optional(folder / "generation_config.json")
        names = _optional(folder / "special_tokens_map.json") | settings
        # Settings of the training run: they would cut and fill prompts silently.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        if config is not None and self.vocab_size > config.vocab_size:
            token = max(vocabulary, key=vocabulary.__getitem__)
            raise Zamba2Error(
                f"{folder}: token {token!r} has id {vocabulary[token]}, but config.json says vocab_size {config.vocab_size}; "
                f"use the tokenizer and the config of one checkpoint."
            )
        added = backend.get_added_tokens_decoder()
        self._special = {token.content for token in added.values() if token.special}
        self._byte_level = backend.decoder is not None and b'"ByteLevel"' in backend.decoder.__getstate__()

        self.bos_token, self.bos_token_id = self._named("bos", names, generation, config, folder)
        self.eos_token, eos_id = self._named("eos", names, generation, config, folder)
        _, self.pad_token_id = self._named("pad", names, generation, config, folder)
        others = {f"{kind}_token": names.get(f"{kind}_token") for kind in ("unk", "pad")}  # which templates may name, as in transformers
        texts = {name: token.get("content") if isinstance(token, Mapping) else token for name, token in others.items()}
        self._other_tokens = {name: text for name, text in texts.items() if isinstance(text, str)}
        stops = [eos_id, *_ids(generation, "eos_token_id", folder), *(config.eos_token_ids if config else ())]
        if CHATML_END in self._special:
            stops.append(vocabulary[CHATML_END])
        limit = config.vocab_size if config else self.vocab_size
        self.eos_token_ids: tuple[int, ...] = tuple(dict.fromkeys(i for i in stops if i is not None))
        if any(i >= limit for i in self.eos_token_ids):
            raise Zamba2Error(f"{folder}: eos_token_id {max(self.eos_token_ids)} is outside the vocabulary of {limit} tokens; correct it.")
        # transformers prepends bos for its Llama tokenizers unless told otherwise.
        self._add_bos = bool(settings.get("add_bos_token", str(settings.get("tokenizer_class")).startswith("Llama")))
        self.chat_template = _chat_template(folder, settings)

    @classmethod
    def from_folder(cls, folder: Path, *, config: Config | None = None) -> Tokenizer:
        """Read tokenizer.json and, where present, the JSON files and the chat template beside it.

        ``config``: the model's, to check that its embeddings cover every token. Raises Zamba2Error when there is no tokenizer.json,
        a file is not what it should be, or two files contradict each other.
        """
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise Zamba2Error(f"{folder} has no tokenizer.json: this checkpoint has no tokenizer; copy the file from the model's Hub page.")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more precise
            raise Zamba2Error(f"{path} is not a tokenizer that the tokenizers library reads ({error}); download the file again.") from None
        return cls(Path(folder), backend, config)

    def _encoding(self, text: str, add_special_tokens: bool) -> Any:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            found = f"half a surrogate pair, or a byte that is not UTF-8 (U+{ord(text[error.start]):04X} at character {error.start})"
            raise Zamba2Error(f"the text holds {found}; valid Unicode text is needed.") from None
        if len(text) > LONG:
            return self._backend.encode_batch([text], add_special_tokens=add_special_tokens)[0]
        return self._backend.encode(text, add_special_tokens=add_special_tokens)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text; special tokens written in it are recognized.

        ``add_special_tokens``: what a base model's prompt starts with, bos exactly once even where the text begins with it.
        Raises Zamba2Error for lone surrogates, which no UTF-8 text holds.
        """
        ids: list[int] = self._encoding(text, add_special_tokens).ids
        bos = self.bos_token_id
        if not add_special_tokens or bos is None:
            return ids
        if ids[:2] == [bos, bos]:  # the text's own and the post-processor's
            return ids[1:]
        return [bos, *ids] if self._add_bos and ids[:1] != [bos] else ids

    def render_chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """The conversation as the text the model reads. Raises Zamba2Error for malformed messages and failing templates."""
        from zamba2.language.template import render  # jinja2 is slow to import, and plain texts need none

        check_messages(messages)
        return render(
            self.chat_template,
            messages,
            add_generation_prompt=add_generation_prompt,
            bos_token=self.bos_token,
            eos_token=self.eos_token,
            **self._other_tokens,
        )

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a text as it stands, special tokens recognized and none added, and for each the first character and the one behind its
        last. Raises Zamba2Error as ``encode`` does."""
        encoding = self._encoding(text, False)
        return encoding.ids, encoding.offsets

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> list[int]:
        """Ids of ``render_chat``; the template writes bos itself, so none is added."""
        return self.encode(self.render_chat(messages, add_generation_prompt), add_special_tokens=False)

    def special_ids(self, texts: Iterable[str]) -> dict[int, str]:
        """Those of the texts that are special tokens, by id."""
        return {id: text for text in texts if text in self._special and (id := self._backend.token_to_id(text)) is not None}

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of the ids. Ids without a token give nothing; bytes that are no UTF-8 give U+FFFD. Raises Zamba2Error for ids below 0."""
        ids = [int(i) for i in ids]
        try:
            if len(ids) > LONG:
                text: str = self._backend.decode_batch([ids], skip_special_tokens=skip_special_tokens)[0]
            else:
                text = self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
        except OverflowError:
            raise Zamba2Error(f"token id {min(ids) if min(ids) < 0 else max(ids)} cannot be decoded; ids from 0 are needed.") from None
        return text

    def incremental(self, skip_special_tokens: bool = True, *, after: Sequence[int] = ()) -> IncrementalDecoder:
        """A decoder for one stream of tokens; behind the tokens ``after``, a first word keeps the space before it."""
        return IncrementalDecoder(self, skip_special_tokens, after)

    def _named(
        self, kind: str, names: Mapping[str, Any], generation: Mapping[str, Any], config: Config | None, folder: Path
    ) -> tuple[str | None, int | None]:
        """Token and id of a special token: by the name the tokenizer's files give it, else by the id other files give."""
        token = names.get(f"{kind}_token")
        if isinstance(token, Mapping):
            token = token.get("content")
        if token is not None:
            if not isinstance(token, str):
                raise Zamba2Error(f"{folder}: {kind}_token is {token!r}; the token's text is needed.")
            found: int | None = self._backend.token_to_id(token)
            if found is not None:
                return token, found
            if kind != "pad":  # nothing here depends on padding
                raise Zamba2Error(f"{folder}: {kind}_token {token!r} is not in tokenizer.json; take both files from one checkpoint.")
        configured: Any = getattr(config, f"{kind}_token_id", None)
        candidates = [*_ids(generation, f"{kind}_token_id", folder), *(configured if isinstance(configured, tuple) else (configured,))]
        for i in candidates:
            if i is not None and (token := self._backend.id_to_token(i)) is not None:
                return token, i
        return None, None


class IncrementalDecoder:
    """Turns a stream of tokens into text whose pieces, joined, equal ``Tokenizer.decode`` of all tokens.

    A piece never ends inside a character. A run of byte tokens is held until it ends, since one wrong byte turns the whole run to
    U+FFFD. Each token is decoded twice at most, beside the last token before it: that one takes the place of the sequence's
    start, where decoders strip a space.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True, after: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._context: list[int] = []  # the last visible token whose text is out
        self._context_length = 0  # characters it decodes to, alone
        self._tail: list[int] = []  # tokens whose text is held
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        word = next((token for token in reversed(after) if self._is_word(token)), None)
        if word is not None:
            self._set_context(word)

    def push(self, token: int) -> str:
        """The text that this token completes; often "" inside a character."""
        piece = self._tokenizer._backend.id_to_token(token) if token >= 0 else None
        if piece is None or (self._skip and piece in self._tokenizer._special):
            return ""  # invisible: decode passes over it, byte runs included
        self._tail.append(token)
        return "" if self._is_open(piece) else self.flush()

    def flush(self) -> str:
        """The text still held; call it when the stream ends."""
        if not self._tail:
            return ""
        text = self._tokenizer.decode(self._context + self._tail, skip_special_tokens=self._skip)[self._context_length :]
        self._set_context(self._tail[-1])
        self._tail = []
        return text

    def _set_context(self, token: int) -> None:
        self._context = [token]
        self._context_length = len(self._tokenizer.decode(self._context, skip_special_tokens=self._skip))

    def _is_word(self, token: int) -> bool:
        """Whether a token's text never depends on its neighbours: no special token, no bytes."""
        piece = self._tokenizer._backend.id_to_token(token)
        if piece is None or piece in self._tokenizer._special or BYTE_PIECE.fullmatch(piece):
            return False
        return not self._tokenizer._byte_level or "\ufffd" not in self._tokenizer.decode([token])

    def _is_open(self, piece: str) -> bool:
        """Whether text of the tail may still change: it ends in a run of byte tokens, or in part of a UTF-8 sequence."""
        if not self._tokenizer._byte_level:
            return BYTE_PIECE.fullmatch(piece) is not None
        self._utf8.decode(_piece_bytes(piece))
        return self._utf8.getstate()[0] != b""


class TokenTexts:
    """Texts of single tokens as they stand behind a word, so that they join to the text, and their bytes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._word = tokenizer.encode("a", add_special_tokens=False)[-1:]
        self._skip = len(tokenizer.decode(self._word, skip_special_tokens=False))
        self._known: dict[int, tuple[str, bytes]] = {}

    def is_special(self, token: int) -> bool:
        """Whether a reply's text leaves it out."""
        return self._tokenizer._backend.id_to_token(token) in self._tokenizer._special

    def __call__(self, token: int) -> tuple[str, bytes]:
        r"""Text and bytes; a token that is part of a character alone is written \xe2."""
        if token not in self._known:
            data = self._bytes(token)
            try:
                self._known[token] = data.decode(), data
            except UnicodeDecodeError:
                self._known[token] = "".join(f"\\x{byte:02x}" for byte in data), data
        return self._known[token]

    def _bytes(self, token: int) -> bytes:
        piece = self._tokenizer._backend.id_to_token(token)
        if piece is None:
            return b""
        if not self._tokenizer._byte_level and BYTE_PIECE.fullmatch(piece):
            return bytes([int(piece[3:5], 16)])
        if self._tokenizer._byte_level and not self.is_special(token):
            return _piece_bytes(piece)
        return self._tokenizer.decode([*self._word, token], skip_special_tokens=False)[self._skip :].encode()


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE's stand-in characters: printable Latin-1 for itself, the other bytes in order from U+0100 (GPT-2)."""
    stand_ins = set(ByteLevel.alphabet())
    others = iter(sorted(c for c in stand_ins if ord(c) > 255))
    return {(chr(b) if chr(b) in stand_ins else next(others)): b for b in range(256)}


BYTE_ALPHABET = _byte_alphabet()


def _piece_bytes(piece: str) -> bytes:
    try:
        return bytes(BYTE_ALPHABET[c] for c in piece)
    except KeyError:  # an added token stands for itself
        return piece.encode()


def _optional(path: Path) -> dict[str, Any]:
    """A JSON object from a file that a checkpoint may lack."""
    data = read_json(path) if path.exists() else {}
    if not isinstance(data, dict):
        raise Zamba2Error(f"{path} holds a JSON {type(data).__name__}; an object is needed: download the file again.")
    return data


def _ids(settings: Mapping[str, Any], key: str, folder: Path) -> list[int]:
    """The token ids under a key that may be absent, null, one id or a list."""
    value = settings.get(key)
    values = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < 1 << 32 for i in values):
        raise Zamba2Error(f"{folder}/generation_config.json: {key} is {value!r}; a token id, a whole number from 0, or a list is needed.")
    return values


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str:
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise Zamba2Error(f"{path} cannot be read ({error}); a text file in UTF-8 is needed.") from None
    template = settings.get("chat_template")
    if isinstance(template, list):  # several by name; "default" is the one for plain chat
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, Mapping)}
        template = named.get("default", next(iter(named.values()), None))
    if template is None:
        return CHATML
    if not isinstance(template, str):
        raise Zamba2Error(f"{folder}/tokenizer_config.json: chat_template is a {type(template).__name__}; a Jinja text is needed.")
    return template
