"""What memory this process has used."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

__all__ = ["memory"]


def memory() -> dict[str, int]:
    """Bytes: the peak of this process, pages of mapped files included, and where the system says it, what of it is mapped now."""
    status = Path("/proc/self/status")
    if not status.exists():
        return {"peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)}
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    # not ru_maxrss: that starts with the peak of the process that started this one
    return {name: int(fields[key].split()[0]) * 1024 for name, key in (("peak_rss_bytes", "VmHWM"), ("mapped_rss_bytes", "RssFile"))}
