"""The projection and its adjoint as torch operators: torch.compile traces through them, autograd differentiates them.

`trak_fast.project` and `trak_fast.project_adjoint` come here when they are being compiled or recorded; all other calls
go straight to the kernels, without the dispatcher's overhead. A kernel is run by the public function itself, which
checks the real tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import checks

_MATRIX = "str proj_type, SymInt seed, SymInt model_id, SymInt offset"  # seed: its 64 bits as a signed number
_KIND_NAMES = tuple(checks.KINDS)
_library: Any = torch.library.Library("trak_fast", "DEF")  # type: ignore[no-untyped-call]


def define(project_function: Callable[..., Tensor], adjoint_function: Callable[..., Tensor]) -> None:
    """Defines `torch.ops.trak_fast.{project,project_adjoint}` and their forms that add to a tensor."""

    def project(
        grads: list[Tensor],
        proj_dim: int,
        proj_type: str,
        seed: int,
        model_id: int,
        offset: int,
        precision: str | None,
        out: Tensor | None = None,
    ) -> Tensor:
        return project_function(
            [grad.detach() for grad in grads],
            proj_dim,
            proj_type=proj_type,
            seed=seed % 2**64,
            model_id=model_id,
            offset=offset,
            precision=precision,
            out=out,
        )

    def project_into(
        out: Tensor,
        grads: list[Tensor],
        proj_type: str,
        seed: int,
        model_id: int,
        offset: int,
        precision: str | None,
    ) -> None:
        project(grads, out.shape[1], proj_type, seed, model_id, offset, precision, out)

    def adjoint(
        y: Tensor,
        grad_dim: int,
        proj_type: str,
        seed: int,
        model_id: int,
        offset: int,
        out: Tensor | None = None,
    ) -> Tensor:
        return adjoint_function(
            y.detach(), grad_dim, proj_type=proj_type, seed=seed % 2**64, model_id=model_id, offset=offset, out=out
        )

    def adjoint_into(out: Tensor, y: Tensor, proj_type: str, seed: int, model_id: int, offset: int) -> None:
        adjoint(y, out.shape[1], proj_type, seed, model_id, offset, out)

    def project_shape(grads: list[Tensor], proj_dim: int, *settings: Any) -> Tensor:
        return grads[0].new_empty((grads[0].shape[0], proj_dim), dtype=torch.float32)

    def adjoint_shape(y: Tensor, grad_dim: int, *settings: Any) -> Tensor:
        return y.new_empty((y.shape[0], grad_dim), dtype=torch.float32)

    def nothing(*arguments: Any) -> None:
        pass

    # register_fake is called impl_abstract before torch 2.4
    register_fake = getattr(torch.library, "register_fake", None) or torch.library.impl_abstract
    for schema, kernel, fake in (
        (f"project(Tensor[] grads, SymInt proj_dim, {_MATRIX}, str? precision) -> Tensor", project, project_shape),
        (f"project_into(Tensor(a!) out, Tensor[] grads, {_MATRIX}, str? precision) -> ()", project_into, nothing),
        (f"project_adjoint(Tensor y, SymInt grad_dim, {_MATRIX}) -> Tensor", adjoint, adjoint_shape),
        (f"project_adjoint_into(Tensor(a!) out, Tensor y, {_MATRIX}) -> ()", adjoint_into, nothing),
    ):
        name = _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        for device in ("CPU", "CUDA"):
            _library.impl(name, kernel, device)
        register_fake(f"trak_fast::{name}", fake, lib=_library)
    if hasattr(torch.library, "register_autograd"):
        register = torch.library.register_autograd
        register("trak_fast::project", _project_backward, setup_context=_keep_project, lib=_library)
        register("trak_fast::project_adjoint", _adjoint_backward, setup_context=_keep_adjoint, lib=_library)


def project(
    tensors: Sequence[Tensor],
    proj_dim: int,
    kind: int,
    seed: int,
    model_id: int,
    offset: int,
    precision: str | None,
    out: Tensor | None,
    differentiable: bool,
) -> Tensor:
    """The projection by way of the dispatcher, of checked arguments."""
    settings = (_KIND_NAMES[kind], _signed(seed), model_id, offset, precision)
    if not differentiable:
        tensors = [tensor.detach() for tensor in tensors]
    else:
        _require_autograd()
    if out is None:
        result: Tensor = torch.ops.trak_fast.project(tensors, proj_dim, *settings)
        return result
    torch.ops.trak_fast.project_into(out, tensors, *settings)
    return out


def project_adjoint(
    y: Tensor, grad_dim: int, kind: int, seed: int, model_id: int, offset: int, out: Tensor | None, differentiable: bool
) -> Tensor:
    """The adjoint by way of the dispatcher, of checked arguments."""
    settings = (_KIND_NAMES[kind], _signed(seed), model_id, offset)
    if not differentiable:
        y = y.detach()
    else:
        _require_autograd()
    if out is None:
        result: Tensor = torch.ops.trak_fast.project_adjoint(y, grad_dim, *settings)
        return result
    torch.ops.trak_fast.project_adjoint_into(out, y, *settings)
    return out


def _signed(seed: int) -> int:
    return seed if seed < 2**63 else seed - 2**64


def _require_autograd() -> None:
    if not hasattr(torch.library, "register_autograd"):
        raise RuntimeError(f"differentiable=True needs torch 2.4 or newer; this is {torch.__version__}")


def _keep_project(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grads, _, proj_type, seed, model_id, offset, _ = inputs
    ctx.parts = [(tuple(grad.shape), grad.dtype) for grad in grads]
    ctx.matrix = (proj_type, seed, model_id, offset)


def _project_backward(ctx: Any, y: Tensor) -> tuple[Any, ...]:
    widths = [math.prod(shape[1:]) for shape, _ in ctx.parts]
    whole = torch.ops.trak_fast.project_adjoint(y, sum(widths), *ctx.matrix)
    pieces = whole.split(widths, dim=1)
    grads = [piece.reshape(shape).to(dtype) for piece, (shape, dtype) in zip(pieces, ctx.parts, strict=True)]
    return grads, None, None, None, None, None, None


def _keep_adjoint(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, _, proj_type, seed, model_id, offset = inputs
    ctx.proj_dim, ctx.dtype = y.shape[1], y.dtype
    ctx.matrix = (proj_type, seed, model_id, offset)


def _adjoint_backward(ctx: Any, grads: Tensor) -> tuple[Any, ...]:
    y = torch.ops.trak_fast.project([grads], ctx.proj_dim, *ctx.matrix, "highest")
    return y.to(ctx.dtype), None, None, None, None, None
