"""What a kernel does before those in front of it have ended (programmatic dependent launch, Hopper and later)."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["prefetch", "wait"]


@triton.jit
def wait(EARLY: tl.constexpr):
    """Until the kernels before this one have ended; the one behind it may begin."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def prefetch(pointers, there, count, COUNT: tl.constexpr):
    """Ask for ``count`` bytes behind each pointer (COUNT,) that is there; they come to the L2 cache, and nothing waits for them.

    count: int32, a multiple of 16, as the addresses are. What is there must be no more than the card caches (50 MB on Hopper). COUNT is a
    power of two, at most the program's threads: thread i asks for the i-th.
    """
    tl.inline_asm_elementwise(
        """
        {
            .reg .u32 thread;
            .reg .pred mine;
            mov.u32 thread, %tid.x;
            setp.lt.u32 mine, thread, $4;
            setp.ne.and.u32 mine, $2, 0, mine;
            @mine cp.async.bulk.prefetch.L2.global [$1], $3;
            mov.u32 $0, 0;
        }
        """,
        "=r,l,r,r,r", [pointers.to(tl.int64), there.to(tl.int32), count, COUNT], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
