"""What must be set before torch is imported."""

import ctypes
import os
import sys
from contextlib import suppress

M_MMAP_THRESHOLD = -3  # of glibc's mallopt


def set_before_torch() -> None:
    """Settings that change speed and memory, and no number; your own come first."""
    # Huge pages for large tensors: 1.4 times faster on a CPU.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # Compiled layers are one graph for all lengths on CUDA too; sums over rows and columns at one time, which this
    # leaves out, would compile a graph more for about every 1,500 tokens.
    os.environ.setdefault("TORCHINDUCTOR_MIX_ORDER_REDUCTION", "0")
    # glibc keeps freed blocks of up to 32 MB for later, and tensors of other lengths do not fit into them: 18 GiB
    # where 10 are used. Blocks of 2 MiB, a huge page, go back at once.
    if sys.platform == "linux" and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        with suppress(AttributeError):  # another C library
            ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**21)
