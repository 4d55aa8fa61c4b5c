"""``zamba2 generate`` from a fresh interpreter to its first token, with the time of each step; a child of ``zamba2 bench --startup``.

    python -m zamba2.bench.startup STARTED ARGUMENTS...      # STARTED: time.monotonic() before this process was started

The last line of standard output is one JSON document.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

BEGUN = time.monotonic()


def main(started: float, arguments: list[str]) -> None:
    """Run the command itself, with one call observed: where it loads the model."""
    import zamba2
    from zamba2.cli import run

    load, marks = zamba2.load, {}

    def timed(*values: Any, **options: Any) -> Any:
        import zamba2.api
        import zamba2.runtime.native  # noqa: F401 - what loading imports counts as imports

        marks["imported"] = time.monotonic()
        model = load(*values, **options)
        marks["loaded"] = time.monotonic()
        return model

    zamba2.load = timed
    code = run(["generate", "--json", "--max-tokens", "1", *arguments])
    if code:
        sys.exit(code)
    end = time.monotonic()
    steps = {"interpreter": BEGUN - started, "imports": marks["imported"] - BEGUN, "load": marks["loaded"] - marks["imported"]}
    print(json.dumps(steps | {"prompt": end - marks["loaded"], "total": end - started}))


if __name__ == "__main__":
    main(float(sys.argv[1]), sys.argv[2:])
