"""Safetensors files in little: every dtype, reads that come in parts, descriptors, lengths that do not fit, and Ctrl-C."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest

from zamba2.errors import Zamba2Error
from zamba2.weights.files import TensorFile, replacing, write_tensors
from zamba2.weights.formats import round_bf16

VALUES = np.array([[0.0, -1.5, 3.0], [6e-5, -65504.0, 0.333984375]])


def write(path: Path, dtype: str, data: np.ndarray, shape: tuple[int, ...]) -> TensorFile:
    write_tensors(path, [("x", dtype, shape, lambda: [data.reshape(-1).view(np.uint8).data])], {})
    return TensorFile(path)


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_floats_of_every_dtype(dtype: str, tmp_path: Path) -> None:
    """A tensor of each floating-point dtype comes back as fp32 in its shape, each value the one that the dtype holds."""
    kinds = {"F64": np.float64, "F32": np.float32, "F16": np.float16}
    data = round_bf16(VALUES.astype(np.float32)) if dtype == "BF16" else VALUES.astype(kinds[dtype])
    found = write(tmp_path / "x", dtype, data, VALUES.shape).floats("x")
    expected = (data.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else data.astype(np.float32)
    assert found.dtype == np.float32 and np.array_equal(found, expected)


def test_values_beyond_fp32(tmp_path: Path) -> None:
    """An fp64 value that fp32 cannot hold becomes infinite, for the caller to name in one sentence: numpy's warning is not a second one."""
    found = write(tmp_path / "x", "F64", np.array([1e300, -1e300, 1.0]), (3,)).floats("x")
    assert found.tolist() == [np.inf, -np.inf, 1.0]


def test_a_tensor_comes_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may give fewer bytes than were asked for (it never gives 2 GB at once): the rest is read behind them."""
    data = np.arange(100, dtype=np.int64)
    file = write(tmp_path / "x", "I64", data, (100,))
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: preadv(fd, [buffers[0][:7]], offset))
    assert np.array_equal(np.frombuffer(file.read("x"), np.int64), data)


def test_refused_files_are_closed(tmp_path: Path) -> None:
    """A server that meets many damaged files keeps none of them open."""
    (tmp_path / "bad").write_bytes(bytes(20))
    with pytest.raises(Zamba2Error, match="not JSON"):
        TensorFile(tmp_path / "bad")
    free = os.open(tmp_path / "bad", os.O_RDONLY)
    os.close(free)
    with pytest.raises(Zamba2Error, match="not JSON"):
        TensorFile(tmp_path / "bad")
    again = os.open(tmp_path / "bad", os.O_RDONLY)
    os.close(again)
    assert again == free


def test_files_outlive_their_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is open when Python ends is closed without a word, whatever of the module is still there."""
    write_tensors(tmp_path / "f.safetensors", [], {})
    file = TensorFile(tmp_path / "f.safetensors")
    number = file.fileno()
    monkeypatch.setattr("zamba2.weights.files.os", None)
    del file
    with pytest.raises(OSError):
        os.fstat(number)


def test_a_tensor_of_another_length_is_not_written(tmp_path: Path) -> None:
    """Pieces that are fewer or more bytes than the shape needs are an error, and no file appears."""
    for length in (2, 4):
        wrong = pytest.raises(ValueError, match=f"x has {4 * length} bytes, its shape and dtype need 12")
        with wrong, replacing(tmp_path / "f") as temporary:
            write(temporary, "F32", np.zeros(length, np.float32), (3,))
    assert not list(tmp_path.iterdir())


def test_the_callers_handler_of_ctrl_c_comes_back(tmp_path: Path) -> None:
    """Behind a file that was written, or was not, Ctrl-C does what it did before."""
    before = signal.signal(signal.SIGINT, handler := lambda number, frame: None)
    try:
        with replacing(tmp_path / "f") as temporary:
            temporary.touch()
        assert signal.getsignal(signal.SIGINT) is handler
        with pytest.raises(ValueError, match="full"), replacing(tmp_path / "g"):
            raise ValueError("full")
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)
