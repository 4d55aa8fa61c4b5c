"""``zamba2 quantize``: pack a checkpoint for the native engine."""

from __future__ import annotations

import signal
import tempfile
from pathlib import Path

from zamba2.api import checkpoint_in, refuse_standalone
from zamba2.commands import interrupts_raise, read_text
from zamba2.commands.bars import bar
from zamba2.config import Config
from zamba2.errors import Zamba2Error
from zamba2.weights import packed
from zamba2.weights.calibration import Moments
from zamba2.weights.hub import resolve

__all__ = ["main"]


def main(
    source: str, target: Path, format: str, *, embeddings: str | None, calibrate: Path | None, calibrate_tokens: int,
    revision: str | None, offline: bool,
) -> None:  # fmt: skip
    """Pack ``source`` into ``target`` with progress bars on a terminal. Raises Zamba2Error."""
    packing = packed.Packing.named(format, embeddings)
    if calibrate is not None and packing.format.name == "bf16":
        raise Zamba2Error("--calibrate has nothing to do for bf16, which is hardly rounded; leave it out, or take q4 or q8.")
    path = checkpoint_in(resolve(source, revision=revision, offline=offline))
    refuse_standalone(path)
    if packed.is_packed(path):
        raise Zamba2Error(f"{path} is packed already; give the original checkpoint.")
    packed.check_target(target)
    interrupts_raise()  # what is half written is deleted, also where `timeout` or a service manager ends the program
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    moments = None if calibrate is None else moments_of(path, target, packing, calibrate, calibrate_tokens)
    with bar(f"packing {format}") as progress:
        packed.quantize(path, target, packing.format, embeddings=packing.embeddings, moments=moments, progress=progress)
    size = sum(file.stat().st_size for file in target.iterdir())
    finer = "" if packing.embeddings == packing.format else f", embeddings {packing.embeddings.bits}"
    print(f"{target}: {size / 1e9:.3g} GB, {packing.format.bits} bits a weight{finer}")


def moments_of(path: Path, target: Path, packing: packed.Packing, text: Path, tokens: int) -> dict[str, Moments]:
    """What each matrix multiplies while the model, packed beside ``target`` for the time being, reads a text. Raises Zamba2Error."""
    from zamba2.language.tokenizer import Tokenizer
    from zamba2.runtime.calibrate import FEWEST_TOKENS, second_moments
    from zamba2.runtime.native import NativeBackend

    config = Config.from_file(path / "config.json")
    tokenizer = Tokenizer.from_folder(path, config=config)
    if len(ids := tokenizer.encode(read_text(text))[:tokens]) < FEWEST_TOKENS:
        raise Zamba2Error(
            f"there are {len(ids)} tokens of {text} to calibrate on; at least {FEWEST_TOKENS} are needed, and thousands are better."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", suffix=".partial", dir=target.parent) as temporary:
        plain = Path(temporary) / "plain"
        with bar(f"packing {packing.format.name}, to read the text with") as progress:
            packed.quantize(path, plain, packing.format, embeddings=packing.embeddings, progress=progress)
        with bar(f"reading {len(ids)} tokens") as progress:
            moments = second_moments(NativeBackend(plain, config), ids, progress=progress)
    return moments
