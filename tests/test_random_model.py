"""The tiny model inside the package: reproducible, in the Hub's format, and read by transformers as it is."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
from safetensors import safe_open
from tokenizers import Tokenizer

from zamba2.config import Config
from zamba2.weights.hub import RANDOM

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "make_random_model.py"
TEXTS = [
    "Once upon a time, there was a flower.",
    "",
    " two  blanks ",
    "naïve café — 日本語 🙂\n\ttab 2024",
    "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n",
]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_random_model", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rebuilding_gives_the_same_bytes(script: ModuleType, tmp_path: Path) -> None:
    """The script that made the embedded random model makes the same bytes again."""
    script.write_model(tmp_path)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (RANDOM / path.name).read_bytes(), f"{path.name}: run scripts/make_random_model.py"
    assert len(list(tmp_path.iterdir())) == 3


def test_small() -> None:
    """The embedded random model takes at most 1.5 MB."""
    assert sum(path.stat().st_size for path in RANDOM.iterdir()) < 1_500_000


def test_config_counts_its_weights() -> None:
    """The config's own count of weights is that of the file's tensors, which are bf16."""
    config = Config.from_file(RANDOM / "config.json")
    assert config.num_shared_blocks == 2
    with safe_open(RANDOM / "model.safetensors", "np") as file:
        names = list(file.keys())
        shapes = [file.get_slice(name).get_shape() for name in names]
        assert file.metadata() == {"format": "pt", "zamba2_random": "true"}
        assert {file.get_slice(name).get_dtype() for name in names} == {"BF16"}
    total = 0
    for shape in shapes:
        size = 1
        for extent in shape:
            size *= extent
        total += size
    assert total == config.num_parameters


def test_bfloat16_rounds_to_nearest_even(script: ModuleType) -> None:
    """The script's bf16 are PyTorch's to the bit, ties, denormals and large numbers included."""
    import numpy as np
    import torch

    values = np.concatenate(
        [
            np.random.default_rng(0).standard_normal(10_000).astype(np.float32),
            np.array([0.0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, 1e-40, 3e38], np.float32),
        ]
    )
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().tobytes()
    assert script.bfloat16(values) == expected


def test_transformers_finds_every_tensor() -> None:
    """transformers loads the model without a tensor missing, unexpected or of another shape, and with the same values."""
    pytest.importorskip("transformers", reason="it is what is compared")
    from transformers import Zamba2ForCausalLM

    model, report = Zamba2ForCausalLM.from_pretrained(RANDOM, output_loading_info=True)
    assert not any(report.values()), report
    assert model.config.hybrid_layer_ids == [2, 4, 6]
    with safe_open(RANDOM / "model.safetensors", "pt") as file:
        state = model.state_dict()
        for name in file.keys():  # noqa: SIM118 (no mapping)
            assert file.get_tensor(name).equal(state[name]), name


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_reads_the_same_everywhere(text: str) -> None:
    """The tokenizer's file gives transformers the same ids and texts as the tokenizers library."""
    pytest.importorskip("transformers", reason="it is what is compared")
    from transformers import AutoTokenizer

    ours, theirs = Tokenizer.from_file(str(RANDOM / "tokenizer.json")), AutoTokenizer.from_pretrained(RANDOM)
    for special in (False, True):
        ids = ours.encode(text, add_special_tokens=special).ids
        assert ids == theirs(text, add_special_tokens=special)["input_ids"]
        assert ids[:1] == [1] if special else True
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)
    ids = ours.encode(text, add_special_tokens=False).ids
    if "<|" not in text:
        assert ours.decode(ids) == text


def test_tokenizer_is_built_like_the_published_one() -> None:
    """Special tokens, their ids, the chat template and bytes as tokens are those of the published tokenizer."""
    pytest.importorskip("transformers", reason="its chat template is compared")
    from transformers import AutoTokenizer

    tokenizer = Tokenizer.from_file(str(RANDOM / "tokenizer.json"))
    config = Config.from_file(RANDOM / "config.json")
    assert tokenizer.get_vocab_size() == config.vocab_size
    assert [tokenizer.id_to_token(i) for i in (0, 1, 2, 3, 258)] == ["[PAD]", "<|im_start|>", "<|im_end|>", "<0x00>", "<0xFF>"]
    theirs = AutoTokenizer.from_pretrained(RANDOM)
    assert (theirs.pad_token_id, theirs.bos_token_id, theirs.eos_token_id) == (0, 1, 2)
    messages = json.loads((SCRIPT.parent.parent / "examples" / "card_conversation.json").read_text(encoding="utf-8"))
    chat = theirs.apply_chat_template(messages, tokenize=False)
    assert chat == "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    assert theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == chat + "<|im_start|>assistant\n"
    # Words are pieces: English takes clearly fewer tokens than characters.
    assert len(tokenizer.encode(messages[1]["content"]).ids) < 0.5 * len(messages[1]["content"])
