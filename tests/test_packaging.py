"""What a fresh clone promises: the make targets, their messages, and the direction of the imports."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "zamba2"

# Bottom to top; a module may import its own layer and those before it. The longest matching name counts.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("zamba2.errors", "zamba2.config"),  # facts
    ("zamba2.weights", "zamba2.model", "zamba2._engine"),  # numerics
    ("zamba2.runtime",),  # backends
    ("zamba2.language",),  # language
    ("zamba2", "zamba2.api", "zamba2.hf", "zamba2.train", "zamba2.evaluate", "zamba2.serve"),  # interfaces
    ("zamba2.cli", "zamba2.commands", "zamba2.bench", "zamba2.__main__"),  # commands
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def module_name(path: Path) -> str:
    parts = ("zamba2", *path.relative_to(SOURCE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(SOURCE.rglob("*.py"))}


def layer(module: str) -> int:
    name = module
    while "." in name and name not in LEVEL:
        name = name.rpartition(".")[0]
    assert module == "zamba2" or name != "zamba2", f"{module} belongs to no layer; add it to LAYERS"
    return LEVEL[name]


def imports(module: str, path: Path) -> set[str]:
    """Absolute names of everything a file imports, inside functions and for type checking too."""
    found = set()
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join([*parts[: len(parts) - node.level + 1], *([node.module] if node.module else [])])
            # `from zamba2.runtime import torch` imports a module, `from zamba2.errors import notice` a name in one
            found |= {name if (name := f"{base}.{alias.name}") in MODULES else base for alias in node.names}
    return found


@pytest.mark.parametrize("module", MODULES)
def test_arrows_point_down(module: str) -> None:
    """No module imports one of a layer above its own."""
    for target in imports(module, MODULES[module]):
        if target.partition(".")[0] == "zamba2":
            assert layer(target) <= layer(module), f"{module} imports {target} from a layer above"


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("zamba2.language")])
def test_language_knows_the_waist_alone(module: str) -> None:
    """The language layer imports no PyTorch, no model and nothing of the runtime but its two-method interface."""
    for target in imports(module, MODULES[module]):
        assert target.partition(".")[0] not in ("torch", "transformers"), f"{module} imports {target}"
        assert not target.startswith("zamba2.model"), f"{module} imports {target}"
        if target.startswith("zamba2.runtime"):
            assert target == "zamba2.runtime.backend", f"{module} imports {target}; only runtime.backend is for this layer"


def test_architecture_names_every_module() -> None:
    """The picture of the layers leaves no module out."""
    picture = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("```")[1]
    named, modules = set(re.findall(r"\w+", picture)), {module.rpartition(".")[2] for module in MODULES}
    assert {name for name in modules if not name.startswith("triton_")} <= named


def test_import_is_light() -> None:
    """Importing the package and its language layer prints nothing and leaves PyTorch alone."""
    names = ["zamba2", "zamba2.weights.hub", *(name for name in MODULES if name.startswith("zamba2.language"))]
    code = f"import importlib, sys\nfor name in {names!r}: importlib.import_module(name)\nprint({{'torch'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("set()\n", "")


def test_console_script_and_embedded_model_are_packaged() -> None:
    """The command, the embedded model and the marker of types are part of the package."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'zamba2 = "zamba2.__main__:main"' in text
    assert {path.name for path in (SOURCE / "random").iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert (SOURCE / "py.typed").exists()


def test_readme_names_real_targets() -> None:
    """Every target of make that the README names exists."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    named = set(re.findall(r"(?:^ {4}|`|=\S+ )make ([a-z-]+)", readme(), re.M))
    assert {"run", "test"} <= named <= targets


@pytest.mark.parametrize("page", ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_documentation_names_existing_files(page: str) -> None:
    """Every file that a page links to exists."""
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", (ROOT / page).read_text(encoding="utf-8")):
        assert (ROOT / page).parent.joinpath(link).exists(), link


def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


OLD = 'case "$*" in *sys.exit*) exit 1;; *--version*) echo Python 3.9.2; exit;; esac'
NO_ENSUREPIP = 'case "$*" in *ensurepip*) exit 1;; esac'
NO_HEADERS = 'case "$*" in *Python.h*) exit 1;; esac'


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(
    ("tools", "python", "said"),
    [
        ([], "", "Missing Debian package: g++; install with: apt install g++"),
        (["g++"], NO_ENSUREPIP, "Missing Debian package: python3-venv; install with: apt install python3-venv"),
        (["g++"], NO_HEADERS, "Missing Debian package: python3-dev; install with: apt install python3-dev"),
        (["g++"], None, "Missing Debian package: python3 python3-venv python3-dev; install with: apt install python3 "),
        ([], NO_ENSUREPIP, "Missing Debian package: python3-venv g++; install with: apt install python3-venv g++"),
        (["g++"], OLD, "Python 3.9.2 was found but Python 3.10 or newer is needed"),
    ],
)
@pytest.mark.parametrize("target", ["check-tools", "run", "test"])
def test_make_names_what_is_missing(tmp_path: Path, tools: list[str], python: str | None, said: str, target: str) -> None:
    """``python``: a shell line put before the real interpreter, None for no Python at all. Runs in a copy without .venv."""
    done = make(tmp_path, tools, python, target)
    assert done.returncode != 0 and done.stderr.startswith(said), done.stderr
    assert not (tmp_path / ".venv").exists()


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_is_content_with_what_it_needs(tmp_path: Path) -> None:
    """With a compiler, a new enough Python and its headers make says nothing."""
    done = make(tmp_path, ["g++"], "", "check-tools")
    assert (done.returncode, done.stderr) == (0, "")


def make(tmp_path: Path, tools: list[str], python: str | None, target: str) -> subprocess.CompletedProcess[str]:
    programs = tmp_path / "bin"
    programs.mkdir()
    scripts = {tool: "exit 0" for tool in tools}
    if python is not None:
        scripts["python3"] = f'{python}\nexec "{sys.executable}" "$@"'
    for name, body in scripts.items():
        (programs / name).write_text(f"#!/bin/sh\n{body}\n")
        (programs / name).chmod(0o755)
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHON" and not key.startswith("MAKE")}
    command = [str(shutil.which("make")), target]
    return subprocess.run(
        command, cwd=tmp_path, env=environment | {"PATH": str(programs)}, capture_output=True, text=True, timeout=60
    )


@pytest.mark.timeout(900)  # a minute and a half of one processor, so it is a test beside the others and not a step before them
def test_the_package_is_typed() -> None:
    """mypy, in its strict mode, finds nothing in the package."""
    pytest.importorskip("mypy")
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
