"""What the documentation repeats is generated."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_generated_documentation_is_up_to_date() -> None:
    """docs/commands.md equals the command line's own help, the tables the committed measurements."""
    done = subprocess.run([sys.executable, ROOT / "scripts" / "update_docs.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
