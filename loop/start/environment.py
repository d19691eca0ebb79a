"""The process around the training: what must be set before torch is imported, and its memory."""

import ctypes
import os
import sys
from contextlib import suppress


def set_before_torch() -> None:
    """Settings that change speed and memory, and no number; your own come first."""
    # Huge pages for large tensors: 1.4 times faster on a CPU.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # Threads that wait for each other spin before they sleep. Beside other work on the machine that takes the core from
    # the one that is waited for: beside two busy processes a short spin trains `tiny` 1.6 times as fast, and alone as
    # fast as a long one (benchmarks/RESULTS.md). libgomp, and Intel's, in ms.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
        os.environ.setdefault("KMP_BLOCKTIME", "1")
    # Compiled layers are one graph for all lengths on CUDA too; sums over rows and columns at one time, which this
    # leaves out, would compile a graph more for about every 1,500 tokens.
    os.environ.setdefault("TORCHINDUCTOR_MIX_ORDER_REDUCTION", "0")


def return_freed_memory() -> None:
    """glibc keeps freed blocks of up to 32 MB for later, and tensors of another length do not fit into them: after ten
    steps a model of 0.5 billion parameters held 18 GiB where 10 are used. Takes some 0.05 s. (Smaller blocks at
    which memory goes back at once cost a quarter of the speed.)"""
    if sys.platform == "linux":
        with suppress(AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)
