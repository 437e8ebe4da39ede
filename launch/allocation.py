"""How a process gets its memory from the system."""

from __future__ import annotations

import ctypes
import sys

# Parameters of mallopt in glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Lets this process use freed memory again instead of giving it back to the system.

    XLA asks for the temporary memory of a program anew each time it runs on a CPU. Beyond 32 MiB
    glibc returns it in between, and every page has to be mapped and cleared again: a quarter of
    the time of a small training step.

    Returns:
      Whether the system could be told to: not where its C library is another.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1, _M_ARENA_MAX: 1}
    return all([mallopt(name, value) == 1 for name, value in settings.items()])
