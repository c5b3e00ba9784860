"""Tells the errors apart that a computation may end with."""

from __future__ import annotations

import errno

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Recognises failed allocations of Python, NumPy, the system, CUDA, and of C++ that has no type for them."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    texts = (
        "DefaultCPUAllocator: can't allocate memory",
        "DefaultCPUAllocator: not enough memory",
        "std::bad_alloc",
        "CUDA error: out of memory",
        "CUBLAS_STATUS_ALLOC_FAILED",
        "Cannot allocate memory",
    )
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
