"""Keep freed memory pages on CPUs: glibc would hand them back, and fetch fresh ones every tick.

Above 128 KiB (a threshold that grows only now and then) glibc's malloc maps each block afresh and
unmaps it when it is freed, so the activations of a tick or a forward over trees cost a page fault
every 4 KiB: 7,300 of them a tick of two tokens in 64 slots, which then took 35 ms instead of 12
(docs/log.md).
"""

import ctypes
import sys
from functools import cache

_TRIM, _MMAP = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of <malloc.h>


@cache
def keep_pages() -> bool:
    """Let blocks up to 1 GiB (else 32 MiB) come from memory that stays; whether that worked."""
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    kept = mallopt(_TRIM, (1 << 31) - 1)
    # older versions of glibc refuse more than 32 MiB
    return bool(kept and (mallopt(_MMAP, 1 << 30) or mallopt(_MMAP, 32 << 20)))
