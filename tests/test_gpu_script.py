"""scripts/gpu.py, whose minutes on a lent GPU are few: whatever goes wrong in a section, what was found before is kept."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import gpu


def section(program: str, limit: float) -> gpu.Result:
    """What comes of a section whose process is this program."""
    one = gpu.Child.__new__(gpu.Child)
    one.own, one.over, one.log = None, False, tempfile.TemporaryFile("w+")  # noqa: SIM115 (as the script's own)
    one.process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=one.log, text=True, start_new_session=True
    )
    with one.log, one.process:
        return one.run(limit, lambda _: None)


def test_section_that_is_ended_keeps_its_results() -> None:
    """Results from before the end are kept, one that was cut off is none, and the run goes on."""
    found = section("""print('{"decode": 1}\\n{"prefill": [2, ', end="", flush=True); import time; time.sleep(100)""", 3)
    assert found.pop("duration_seconds") < 60
    assert found == {"decode": 1, "error": "\nended after 3 seconds"}


def test_notice_is_a_failure() -> None:
    """What ran in another way than the one to be measured, and says so, has failed."""
    found = section("""import sys; print('{"failures": ["one"]}'); print("zamba2: without graphs\\nother", file=sys.stderr)""", 60)
    assert gpu.failures(found) == [": one", ": zamba2: without graphs"]
    assert "error" not in found


def test_file_is_whole_at_any_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is stopped while results are written has those from before."""
    run = gpu.Run(argparse.Namespace(device="cpu", tiny=True, mamba=None, only=["machine"], budget=60.0, out=tmp_path, kernels=tmp_path))
    run.keep("machine", {"name": "one"})
    write = Path.write_text

    def stopped(path: Path, text: str) -> None:
        write(path, text[: len(text) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", stopped)
    with pytest.raises(KeyboardInterrupt):
        run.keep("machine", {"name": "other"})
    assert json.loads((tmp_path / "gpu.json").read_text())["machine"] == {"name": "one"}


def test_the_prompt_beside_its_rival_comes_first() -> None:
    """Of what is measured the figure that the script was written for is there before the rest may use the time up."""
    measured = [name for name, one in gpu.SECTIONS.items() if not one.check]
    assert measured[:3] == ["machine", "generate", "rival_kernels"]
