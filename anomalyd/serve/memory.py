"""What a burst took goes back to the system, so that memory says how much is in use.

By itself glibc raises its bounds with the largest block that it has seen freed, and then keeps up
to 64 MiB a thread: one large body, and a daemon seems to have grown by half.

Reference: mallopt(3)
"""

from __future__ import annotations

import ctypes

__all__ = ["give_back"]

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
LARGE = 1 << 20  # bytes of a block that has pages of its own, given back the moment it is free
KEPT = 4 << 20  # bytes that may stay free at the end of a heap


def give_back() -> None:
    """Fix the bounds of glibc's allocator; nothing under another one."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(MMAP_THRESHOLD, LARGE)
    mallopt(TRIM_THRESHOLD, KEPT)
