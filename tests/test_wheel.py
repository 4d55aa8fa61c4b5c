"""The wheel of ``make wheel``: it installs where there is no compiler and no PyTorch, stays small, and converses there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MOST_BYTES = 150_000_000  # of the package and everything it needs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(sys.platform != "linux", reason="make wheel makes wheels for Linux; the release path makes those for macOS"),
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(["make", "wheel", f"DIST={folder}", f"PYTHON={sys.executable}"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    (made,) = folder.glob("*.whl")
    return made


def test_name_promises_a_manylinux(wheel: Path) -> None:
    """The wheel is for this Python and for any Linux with glibc of some version on, which its name says."""
    version = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    assert re.fullmatch(rf"zamba2-[\d.]+-{version}-{version}-(manylinux_2_\d+_\w+\.?)+\.whl", wheel.name), wheel.name


def test_installs_and_converses(wheel: Path, tmp_path: Path) -> None:
    """In a fresh environment, no other programs to be found, the package installs, is small, and ``zamba2 chat`` answers twice."""
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    alone = {"PATH": str(environment / "bin"), "HOME": str(tmp_path), "LANG": "C.UTF-8"}
    pip = {name: value for name, value in os.environ.items() if name.startswith("PIP_") or name.lower().endswith("_proxy")}
    python = environment / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--only-binary", ":all:", wheel], env=alone | pip, cwd=tmp_path, check=True)
    (site,) = environment.glob("lib/python3*/site-packages")
    assert not (site / "torch").exists()
    own = [path for path in site.iterdir() if not path.name.startswith(("pip", "setuptools", "pkg_resources", "_distutils_hack"))]
    size = sum(file.stat().st_size for path in own for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, {size / 1e6:.1f} MB installed with all it needs")
    assert size <= MOST_BYTES, size
    command = [environment / "bin" / "zamba2", "chat", "--max-tokens", "5"]
    done = subprocess.run(
        command, env=alone, cwd=tmp_path, input="hello\n/history\nand then?\n", capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    said = done.stderr.splitlines()
    assert len(done.stdout.splitlines()) == 2 and sum("first after" in line for line in said) == 2, (done.stdout, said)
    assert any(line.startswith("user: hello") for line in said)
    native = "import zamba2; print(type(zamba2.load('random').backend).__name__)"
    shown = subprocess.run([python, "-c", native], env=alone, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert shown == "NativeBackend\n"
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "venv") == [], "something was written into the home folder"
