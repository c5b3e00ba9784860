"""The modes that torch is put into while a model is differentiated."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def unfused_attention() -> AbstractContextManager[Any]:
    """Selects attention that vmap can batch: fused kernels would fall back to a loop over samples, with a warning."""
    try:
        from torch.nn.attention import SDPBackend, sdpa_kernel
    except ImportError:  # torch 2.2
        return torch.backends.cuda.sdp_kernel(enable_flash=False, enable_mem_efficient=False)
    return sdpa_kernel(SDPBackend.MATH)


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


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Lets autograd record all operations, whatever mode the caller is in, and none of them fused."""
    with ExitStack() as modes:
        modes.enter_context(torch.inference_mode(False))
        modes.enter_context(torch.enable_grad())
        modes.enter_context(unfused_attention())
        modes.enter_context(no_fast_path())
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            # cuDNN has gradients of recurrent layers in training mode only
            modes.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield


@contextmanager
def requiring_grad(parameters: Iterable[Tensor], chosen: Iterable[Tensor]) -> Iterator[None]:
    """Lets the `chosen` ones of some parameters require gradients and no others, and restores all at the end.

    The model's own parameters are changed rather than copies swapped in: activation checkpointing runs parts of the
    model again in the backward pass, after swapped parameters would have left.
    """
    parameters = list(parameters)
    before = [parameter.requires_grad for parameter in parameters]
    wanted = {id(parameter) for parameter in chosen}
    try:
        for parameter in parameters:
            parameter.requires_grad_(id(parameter) in wanted)
        yield
    finally:
        for parameter, required in zip(parameters, before, strict=True):
            parameter.requires_grad_(required)
