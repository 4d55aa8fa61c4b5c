"""This machine: its processors, how many threads a computation should have and on which of them, free memory, and what is installed."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from zamba2.errors import Zamba2Error

__all__ = ["MOST_THREADS", "cores", "default_threads", "free_memory", "machine", "processors_for", "quota", "versions"]

MOST_THREADS = 1024
SYSTEM = Path("/sys")
CGROUPS = Path("/proc/self/cgroup")
MEMORY, CPUS = Path("/proc/meminfo"), Path("/proc/cpuinfo")


def machine() -> str:
    """What this is, in a few words, for figures that depend on it; cores are those that this process may use."""
    parts = [line.partition(":") for line in _text(CPUS).splitlines()]
    found = {key.strip(): value.strip() for key, _, value in reversed(parts)}  # of the first processor
    name = found.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in found:  # three generations call themselves "AMD EPYC" in virtual machines
        name += f" (family {found['cpu family']}, model {found.get('model')})"
    return f"{name}, {len(cores())} cores, {platform.system()}"


def versions(*names: str) -> dict[str, str]:
    """Of those of the named distributions that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def default_threads() -> int:
    """ZAMBA2_THREADS, else one thread for each physical core this process may use, within its container's CPU quota.

    Two hyper-threads of a core share its multipliers and its way to memory, so a second one only waits. A quota that is no
    whole number is rounded to the nearest: with 1.5 processors two threads are held back a quarter of the time, but one
    thread would leave a third of the quota unused. Raises Zamba2Error for a ZAMBA2_THREADS that is no count.
    """
    wanted = os.environ.get("ZAMBA2_THREADS")
    if wanted:
        if not (wanted.isascii() and wanted.isdecimal() and 0 < int(wanted) <= MOST_THREADS):
            raise Zamba2Error(f"ZAMBA2_THREADS is {wanted!r}; a whole number from 1 to {MOST_THREADS} is needed.")
        return int(wanted)
    limit = quota()
    count = len(cores())
    return min(MOST_THREADS, count if limit is None else max(1, min(count, int(limit + 0.5))))


def processors_for(threads: int) -> list[int]:
    """One processor for each thread to be pinned to: a hyper-thread of each core first. Raises Zamba2Error."""
    if not hasattr(os, "sched_getaffinity"):
        raise Zamba2Error(f"threads cannot be pinned on {platform.system()}; leave the option out: this is possible on Linux only.")
    by_core = cores()
    order = [group[i] for i in range(max(map(len, by_core))) for group in by_core if i < len(group)]
    if threads > len(order):
        raise Zamba2Error(f"{threads} threads cannot be pinned to the {len(order)} processors of this process; take fewer threads.")
    return order[:threads]


def cores() -> list[list[int]]:
    """The processors this process may use, grouped by physical core."""
    if not hasattr(os, "sched_getaffinity"):
        return [[i] for i in range(os.cpu_count() or 1)]  # Apple's processors have one thread a core
    groups: dict[str, list[int]] = {}
    for processor in sorted(os.sched_getaffinity(0)):
        siblings = SYSTEM / f"devices/system/cpu/cpu{processor}/topology/thread_siblings_list"
        groups.setdefault(_text(siblings) or str(processor), []).append(processor)
    return list(groups.values())


def quota() -> float | None:
    """Processors that this process's control groups (version 1 or 2, each with those around it) let it keep busy; None for no limit."""
    found = [quota / period for quota, period in _limits() if quota > 0 and period > 0]
    return min(found, default=None)


def free_memory() -> float:
    """Bytes that the system and every control group around this process still have, or hold as files' pages; infinite where none says."""
    lines = _text(MEMORY).splitlines()
    found = [int(line.split()[1]) * 1024.0 for line in lines if line.startswith("MemAvailable")]
    for folder in _groups("memory"):
        limit = _text(folder / "memory.max") or _text(folder / "memory.limit_in_bytes")
        used = _text(folder / "memory.current") or _text(folder / "memory.usage_in_bytes")
        if limit.isdecimal() and used.isdecimal():
            kinds = {name: int(value) for name, value in map(str.split, _text(folder / "memory.stat").splitlines())}
            pages = sum(kinds.get(f"total_{kind}", kinds.get(kind, 0)) for kind in ("active_file", "inactive_file"))
            found.append(float(int(limit) - int(used) + pages))
    return min(found, default=math.inf)


def _limits() -> Iterator[tuple[int, int]]:
    """(quota, period) in microseconds of every group of this process."""
    for folder in _groups("cpu"):
        text = _text(folder / "cpu.max") or f"{_text(folder / 'cpu.cfs_quota_us')} {_text(folder / 'cpu.cfs_period_us')}"
        numbers = text.split()
        if len(numbers) == 2 and all(number.isdecimal() for number in numbers):  # not "max", not -1: no limit
            yield int(numbers[0]), int(numbers[1])


def _groups(controller: str) -> Iterator[Path]:
    """Folders of every group that holds this process and can be seen from inside its container."""
    mounted = SYSTEM / "fs" / "cgroup"
    for line in _text(CGROUPS).splitlines():
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if number == "0" and not controllers:
            root = mounted
        elif controller in controllers.split(","):
            root = next((root for root in (mounted / controllers, mounted / controller) if root.is_dir()), mounted)
        else:
            continue
        inner = root / group.strip("/")
        # A container may show the host's path, which does not exist inside; its own group is then the root.
        for folder in (inner, *inner.parents):
            if not folder.is_relative_to(root):
                break
            yield folder


def _text(path: Path) -> str:
    """A small file of the system's, without the line's end; "" where there is none."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""
