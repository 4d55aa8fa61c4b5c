"""Laws of the tokenizer: ids come from the files, streamed text is the whole text, bos comes once."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from zamba2.config import PRESETS, Config
from zamba2.errors import Zamba2Error
from zamba2.language.messages import CHATML
from zamba2.language.tokenizer import Tokenizer

SHARED = Path(__file__).parents[2] / "shared" / "data"
MISTRAL = SHARED / "tokenizer" / "mistral_v1_tokenizer.json"
CHAT = [{"role": "user", "content": "hi there"}, {"role": "assistant", "content": "Hello 😀"}]
TEXTS = [
    "",
    " ",
    "  two  spaces ",
    "The quick brown fox.\n\n\tTabs\r\n",
    "naïve café — “quotes” …",
    "日本語のテキスト、한국어 텍스트 和中文。",
    "👩‍👩‍👧‍👦 family 🇫🇷 flags 😀😀😀",
    "ខ្មែរ မြန်မာ ᚠᚢᚦ 𐍈𝔘",
    "a\ufffdb \ufffd\ufffd",
    "\x00\x01\u200b\u00a0x",
]


def spm_tokenizer() -> tokenizers.Tokenizer:
    """A small tokenizer in Mistral's manner: '▁' for spaces, byte fallback, one leading space stripped."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "b", "▁a", "▁▁", "é", "\ufffd", "😀", "\n"]
    model = models.BPE({p: i for i, p in enumerate(pieces)}, [("▁", "a"), ("▁", "▁")], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return tokenizer


def metaspace_tokenizer() -> tokenizers.Tokenizer:
    """The same vocabulary with the Metaspace pre-tokenizer and decoder of newer conversions."""
    tokenizer = spm_tokenizer()
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return tokenizer


def byte_level_tokenizer() -> tokenizers.Tokenizer:
    """A small byte-level BPE (GPT-2's manner) with merges that cut characters in two and tokens outside its alphabet."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "a"), ("ð", "Ł"), ("ðŁ", "ĺ"), ("Ģ", "a")]
    vocab = {p: i for i, p in enumerate([*alphabet, *(a + b for a, b in merges)])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.add_tokens([AddedToken("日本 x"), AddedToken("\ufffd")])
    return tokenizer


BUILT = {"spm": spm_tokenizer, "metaspace": metaspace_tokenizer, "byte level": byte_level_tokenizer}


def write(folder: Path, tokenizer: tokenizers.Tokenizer | str, **files: Any) -> Path:
    """A checkpoint folder; keyword ``name=data`` becomes ``name.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    text = tokenizer if isinstance(tokenizer, str) else tokenizer.to_str()
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    for name, data in files.items():
        (folder / f"{name}.json").write_text(json.dumps(data), encoding="utf-8")
    return folder


def instruct_json() -> str:
    """Mistral's file with ids 1 and 2 renamed, as Zamba2's instruct checkpoints have them."""
    data = json.loads(MISTRAL.read_text(encoding="utf-8"))
    for old, new in (("<s>", "<|im_start|>"), ("</s>", "<|im_end|>")):
        data["model"]["vocab"][new] = data["model"]["vocab"].pop(old)
        next(token for token in data["added_tokens"] if token["content"] == old)["content"] = new
    return json.dumps(data)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One folder per kind of tokenizer; those of Mistral's vocabulary where the shared data is present."""
    root = tmp_path_factory.mktemp("tokenizers")
    made = {name: Tokenizer.from_folder(write(root / name, build())) for name, build in BUILT.items()}
    if MISTRAL.exists():
        made["mistral"] = Tokenizer.from_folder(write(root / "mistral", MISTRAL.read_text(encoding="utf-8")))
        names = {"bos_token": {"content": "<|im_start|>"}, "eos_token": "<|im_end|>", "add_bos_token": True}
        made["instruct"] = Tokenizer.from_folder(write(root / "instruct", instruct_json(), tokenizer_config=names))
    return made


KINDS = [*BUILT, "mistral", "instruct"]


def pick(folders, kind: str) -> Tokenizer:
    if kind not in folders:
        pytest.skip(f"{MISTRAL} is not here")
    return folders[kind]


def stream(tokenizer: Tokenizer, ids: list[int], skip: bool) -> list[str]:
    decoder = tokenizer.incremental(skip_special_tokens=skip)
    return [*(decoder.push(i) for i in ids), decoder.flush()]


@pytest.mark.parametrize("kind", KINDS)
@given(st.data())
@settings(max_examples=150, deadline=None)
def test_streamed_text_is_the_whole_text(folders, kind, data):
    """For any ids - bytes, spaces, special tokens, U+FFFD, ids without a token - the pieces join to decode(all)."""
    tokenizer = pick(folders, kind)
    anywhere = st.integers(0, tokenizer.vocab_size + 3)
    telling = st.integers(0, 270)  # special tokens, bytes, spaces and the small vocabularies' pieces
    emoji = st.sampled_from(TEXTS).map(lambda text: tokenizer.encode(text, add_special_tokens=False))
    parts = data.draw(st.lists(st.one_of(anywhere.map(lambda i: [i]), telling.map(lambda i: [i]), emoji, emoji.map(lambda x: x[:-1]))))
    ids, skip = [i for part in parts for i in part], data.draw(st.booleans())
    assert "".join(stream(tokenizer, ids, skip)) == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_and_no_piece_splits_a_character(folders, kind, text):
    """Encoded text streams back unchanged and no piece shows the U+FFFD of half a character."""
    tokenizer = pick(folders, kind)
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = stream(tokenizer, ids, True)
    kept = text.removeprefix(" ") if kind == "metaspace" else text  # Metaspace itself takes a first space for its own
    assert "".join(pieces) == tokenizer.decode(ids) == kept
    assert sum(piece.count("\ufffd") for piece in pieces) == text.count("\ufffd")


def test_words_appear_as_they_come(folders):
    """Only bytes of unfinished characters are held: an ordinary token's text, space included, comes out at once."""
    tokenizer = folders["spm"]
    ids = [tokenizer._backend.token_to_id(piece) for piece in ("▁a", "▁a", "▁", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "b", "▁", "a")]
    assert stream(tokenizer, ids, True) == ["a", " a", " ", "", "", "", "", "😀b", " ", "a", ""]
    tokenizer = folders["byte level"]
    assert stream(tokenizer, tokenizer.encode("a😀b"), True) == ["a", "", "😀", "b", ""]


@pytest.mark.skipif(not (SHARED / "text").exists(), reason="shared/data/text is not here")
@pytest.mark.parametrize("kind", KINDS)
def test_books_stream_in_linear_time(folders, kind):
    """100,000 characters of real books stream exactly, at a cost per token that does not grow with the length."""
    tokenizer = pick(folders, kind)
    for name in ("pg11_alice.txt", "tinyshakespeare.txt"):
        text = (SHARED / "text" / name).read_text(encoding="utf-8")[:50_000]
        ids = tokenizer.encode(text, add_special_tokens=False)
        start = time.thread_time()
        assert "".join(stream(tokenizer, ids, True)) == tokenizer.decode(ids) == text
        assert (time.thread_time() - start) / len(ids) < 200e-6


@pytest.mark.parametrize("kind", ["spm", "byte level"])
def test_long_runs_without_text_stay_cheap(folders, kind):
    """20,000 bytes that never make a character cost no quadratic time."""
    tokenizer = folders[kind]
    byte = tokenizer._backend.token_to_id("<0xF0>" if kind == "spm" else "ð")
    start = time.thread_time()
    assert "".join(stream(tokenizer, [byte] * 20_000, True)) == "\ufffd" * 20_000
    assert time.thread_time() - start < 4


def test_bare_tokenizer(tmp_path):
    """tokenizer.json alone is enough: no special tokens are guessed, ChatML is the template."""
    tokenizer = Tokenizer.from_folder(write(tmp_path, spm_tokenizer()))
    assert (tokenizer.bos_token, tokenizer.bos_token_id, tokenizer.eos_token_ids, tokenizer.pad_token_id) == (None, None, (), None)
    assert tokenizer.chat_template == CHATML and tokenizer.vocab_size == 268
    assert tokenizer.encode("a") == tokenizer.encode("a", add_special_tokens=False)
    assert tokenizer.decode(tokenizer.encode_chat(CHAT)) == tokenizer.render_chat(CHAT)


def small_config(**values: Any) -> Config:
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "hybrid_layer_ids": (), "num_mem_blocks": 1, "mamba_d_state": 8, "n_mamba_heads": 2}
    return Config(**shape | {"num_attention_heads": 1, "num_key_value_heads": 1, "intermediate_size": 8, "vocab_size": 300} | values)


def test_ids_come_from_the_files(tmp_path):
    """Names by tokenizer_config, then special_tokens_map; stop ids are the union of all files; no id is assumed."""
    built = spm_tokenizer()
    built.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    folder = write(
        tmp_path,
        built,
        tokenizer_config={"eos_token": {"content": "</s>"}, "pad_token": "[PAD]"},
        special_tokens_map={"bos_token": {"content": "<|im_start|>"}, "eos_token": "b"},
        generation_config={"eos_token_id": [5, 2], "pad_token_id": 0},
    )
    tokenizer = Tokenizer.from_folder(folder, config=small_config(eos_token_id=(7, 5)))
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("<|im_start|>", 268)
    assert (tokenizer.eos_token, tokenizer.eos_token_ids) == ("</s>", (2, 5, 7, 269))
    assert tokenizer.pad_token_id == 0
    plain = Tokenizer.from_folder(write(tmp_path / "plain", spm_tokenizer()), config=small_config(bos_token_id=1, eos_token_id=2))
    assert (plain.bos_token, plain.eos_token, plain.eos_token_ids) == ("<s>", "</s>", (2,))


def with_post_processor() -> tokenizers.Tokenizer:
    tokenizer = spm_tokenizer()
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    return tokenizer


@pytest.mark.parametrize("build", [spm_tokenizer, with_post_processor])
@pytest.mark.parametrize("settings", [{"add_bos_token": True}, {"tokenizer_class": "LlamaTokenizer"}])
@pytest.mark.parametrize("text", ["", "a", " a", "<s>", "<s>a b", "<s> <s>a"])
def test_bos_comes_exactly_once(tmp_path, build, settings, text):
    """Whoever adds bos - text, post-processor or setting - one stands at the start, and none is added for chat."""
    tokenizer = Tokenizer.from_folder(write(tmp_path, build(), tokenizer_config={"bos_token": "<s>", **settings}))
    ids, plain = tokenizer.encode(text), tokenizer.encode(text, add_special_tokens=False)
    assert ids == (plain if text.startswith("<s>") else [1, *plain])
    assert plain.count(1) == text.count("<s>")
    assert tokenizer.encode_chat(CHAT).count(1) == 0


def test_no_bos_where_nobody_asks(tmp_path):
    """add_bos_token false and no post-processor: the text alone."""
    folder = write(tmp_path, spm_tokenizer(), tokenizer_config={"bos_token": "<s>", "add_bos_token": False})
    assert 1 not in Tokenizer.from_folder(folder).encode("a")


def test_saved_truncation_and_padding_are_ignored(tmp_path):
    """A tokenizer.json that remembers training settings neither cuts nor fills prompts."""
    built = spm_tokenizer()
    built.enable_truncation(4)
    built.enable_padding(length=16)
    assert len(Tokenizer.from_folder(write(tmp_path, built)).encode("b" * 10)) == 11


def test_instruct_chat_is_the_documented_text(folders):
    """The instruct vocabulary reads ChatML as ids 1 and 2, each once per turn, and stops at <|im_end|>."""
    tokenizer = pick(folders, "instruct")
    text = "<|im_start|>user\nhi there<|im_end|>\n<|im_start|>assistant\nHello 😀<|im_end|>\n"
    assert tokenizer.render_chat(CHAT, add_generation_prompt=False) == text
    assert tokenizer.render_chat(CHAT) == text + "<|im_start|>assistant\n"
    ids = tokenizer.encode_chat(CHAT)
    assert ids[0] == 1 and ids[1] != 1 and ids.count(1) == 3 and ids.count(2) == 2
    assert ids == tokenizer.encode(tokenizer.render_chat(CHAT))  # bos stands in the text: even here no second one
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (1, (2,))


@pytest.mark.skipif(not MISTRAL.exists(), reason=f"{MISTRAL} is not here")
def test_same_ids_as_transformers(tmp_path, folders):
    """Text and chat give the ids that transformers gives with the same files."""
    hf = pytest.importorskip("transformers")
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "chat_template": CHATML, "tokenizer_class": "PreTrainedTokenizerFast"}
    folder = write(tmp_path, instruct_json(), tokenizer_config=names)
    ours, theirs = Tokenizer.from_folder(folder, config=PRESETS["2.7b"]), hf.PreTrainedTokenizerFast.from_pretrained(folder)
    for text in TEXTS:
        assert ours.encode(text) == theirs(text)["input_ids"]
    for prompt in (False, True):
        assert ours.render_chat(CHAT, prompt) == theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=prompt)
        theirs_ids = theirs.apply_chat_template(CHAT, add_generation_prompt=prompt, return_dict=True)["input_ids"]
        assert ours.encode_chat(CHAT, add_generation_prompt=prompt) == theirs_ids


def test_chat_template_sources(tmp_path):
    """chat_template.jinja wins over tokenizer_config; of several templates the default is taken."""
    folder = write(tmp_path, spm_tokenizer(), tokenizer_config={"chat_template": "text"})
    assert Tokenizer.from_folder(folder).chat_template == "text"
    several = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    write(tmp_path, spm_tokenizer(), tokenizer_config={"chat_template": several})
    assert Tokenizer.from_folder(folder).render_chat(CHAT) == "plain"
    write(tmp_path, spm_tokenizer(), tokenizer_config={"chat_template": several[:1]})
    assert Tokenizer.from_folder(folder).chat_template == "tools"
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}é", encoding="utf-8")
    assert Tokenizer.from_folder(folder).render_chat(CHAT) == "hi thereé"


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ({}, "has no tokenizer.json"),
        ({"tokenizer.json": "{"}, "is not a tokenizer that the tokenizers library reads"),
        ({"tokenizer.json": "{}"}, "is not a tokenizer that the tokenizers library reads"),
        ({"tokenizer.json": b"\xff\xfe"}, "is not a tokenizer that the tokenizers library reads"),
        ({"tokenizer_config.json": "nope"}, "not valid JSON"),
        ({"tokenizer_config.json": "[]"}, "holds a JSON list"),
        ({"special_tokens_map.json": "{"}, "not valid JSON"),
        ({"generation_config.json": '{"eos_token_id": "2"}'}, "eos_token_id is '2'"),
        ({"generation_config.json": '{"eos_token_id": [-1]}'}, "eos_token_id is"),
        ({"generation_config.json": '{"eos_token_id": 32001}'}, "eos_token_id 32001 is outside the vocabulary of 268"),
        ({"tokenizer_config.json": '{"bos_token": "<nowhere>"}'}, "bos_token '<nowhere>' is not in tokenizer.json"),
        ({"tokenizer_config.json": '{"eos_token": 2}'}, "eos_token is 2"),
        ({"tokenizer_config.json": '{"chat_template": 3}'}, "chat_template is a int"),
        ({"chat_template.jinja": b"\xff"}, "chat_template.jinja cannot be read"),
    ],
)
def test_broken_folders_are_explained(tmp_path, files, match):
    """A missing, corrupt or contradictory file is one sentence naming it."""
    if files:
        write(tmp_path, spm_tokenizer())
    for name, content in files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(Zamba2Error, match=match) as error:
        Tokenizer.from_folder(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_tokens_beyond_the_embeddings(tmp_path):
    """A token whose id has no embedding is named."""
    built = spm_tokenizer()
    built.add_special_tokens(["<|im_end|>"])
    with pytest.raises(Zamba2Error, match=r"token '<\|im_end\|>' has id 268, but config.json says vocab_size 268"):
        Tokenizer.from_folder(write(tmp_path, built), config=small_config(vocab_size=268))


def test_bad_text_and_ids(folders):
    """Lone surrogates, malformed messages and ids that are none are errors, not crashes."""
    tokenizer = folders["spm"]
    with pytest.raises(Zamba2Error, match=r"U\+D800 at character 1"):
        tokenizer.encode("a\ud800")
    with pytest.raises(Zamba2Error, match="surrogate"):
        tokenizer.encode_chat([{"role": "user", "content": "\udfff"}])
    with pytest.raises(Zamba2Error, match=r"messages\[0\]"):
        tokenizer.encode_chat([{"role": "user"}])
    for i in (-1, 1 << 40):
        with pytest.raises(Zamba2Error, match=f"token id {i} cannot be decoded"):
            tokenizer.decode([1, i])


@given(text=st.text(max_size=60), special=st.booleans())
def test_long_texts_are_read_as_short_ones(text: str, special: bool) -> None:
    """Long texts and ids go to the library in another way, in which other threads run meanwhile, with the same result."""
    from zamba2.language import tokenizer as module
    from zamba2.weights.hub import RANDOM

    tokenizer = Tokenizer.from_folder(RANDOM)
    found = []
    for limit in (0, 10**6):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "LONG", limit)
            ids = tokenizer.encode(text, add_special_tokens=special)
            shown = tokenizer.decode(ids), tokenizer.decode(ids, skip_special_tokens=False)
            found.append((ids, shown, tokenizer.encode_with_offsets(text)))
    assert found[0] == found[1]


def test_templates_may_name_the_other_tokens(tmp_path: Path) -> None:
    """A template sees unk_token and pad_token where the tokenizer's files name them, as in transformers, and nothing where they do not."""
    from zamba2.weights.hub import RANDOM

    for name in ("tokenizer.json", "config.json", "generation_config.json"):
        (tmp_path / name).write_bytes((RANDOM / name).read_bytes())
    named = {"pad_token": "[PAD]", "unk_token": {"content": "<unk>"}, "chat_template": "{{ unk_token }}|{{ pad_token }}|{{ sep_token }}"}
    for own, wanted in ((named, "<unk>|[PAD]|"), ({"chat_template": named["chat_template"]}, "||")):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(own))
        assert Tokenizer.from_folder(tmp_path).render_chat([{"role": "user", "content": "hi"}]) == wanted
