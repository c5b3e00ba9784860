"""The modes that a model is put into while it is differentiated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn


def unfused_attention() -> AbstractContextManager[Any]:
    """Selects attention that vmap can batch: fused kernels would fall back to a loop over samples, with a warning."""
    try:
        from torch.nn.attention import SDPBackend, sdpa_kernel
    except ImportError:  # torch 2.2
        return torch.backends.cuda.sdp_kernel(enable_flash=False, enable_mem_efficient=False)
    return sdpa_kernel(SDPBackend.MATH)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Puts `model` into evaluation mode, and each of its modules back into its own mode at the end."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def no_fast_path() -> Iterator[None]:
    """Keeps transformer layers from their fused inference, which calls no submodules."""
    mha = torch.backends.mha
    before = mha.get_fastpath_enabled()
    mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        mha.set_fastpath_enabled(before)
