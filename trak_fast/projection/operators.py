"""The projection and its adjoint as torch operators: torch.compile traces through them, autograd differentiates them.

`trak_fast.project` and `trak_fast.project_adjoint` come here when they are being compiled or recorded; all other calls
go straight to the kernels, without the dispatcher's overhead. Operators check the real tensors that they are given: a
trace has seen stand-ins only, and anybody can call an operator by hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import checks, kernels

_MATRIX = "str proj_type, SymInt seed, SymInt model_id, SymInt offset"
"""Arguments that name a matrix, in each schema. An operator takes the 64 bits of the seed as a signed number."""

_NONZEROS = "SymInt? nonzeros"
"""The last argument of each schema, None for a dense kind. It has no default: autograd would not see it then."""

_KIND_NAMES = tuple(checks.KINDS)
_library: Any = torch.library.Library("trak_fast", "DEF")  # type: ignore[no-untyped-call]


def project(projection: checks.Projection, out: Tensor | None, differentiable: bool) -> Tensor:
    """Projects by way of the dispatcher."""
    tensors, part = projection.tensors, projection.part
    matrix = (_KIND_NAMES[part.kind], _signed(part.seed), part.model_id, part.offset)
    nonzeros = part.nonzeros or None
    if not differentiable:
        tensors = [tensor.detach() for tensor in tensors]
    if out is None:
        result: Tensor = torch.ops.trak_fast.project(
            tensors, projection.proj_dim, *matrix, projection.precision, nonzeros
        )
        return result
    torch.ops.trak_fast.project_into(out, tensors, *matrix, projection.precision, nonzeros)
    return out


def project_adjoint(adjoint: checks.Adjoint, out: Tensor | None, differentiable: bool) -> Tensor:
    """Computes the adjoint by way of the dispatcher."""
    y, part = adjoint.y, adjoint.part
    matrix = (_KIND_NAMES[part.kind], _signed(part.seed), part.model_id, part.offset)
    nonzeros = part.nonzeros or None
    if not differentiable:
        y = y.detach()
    if out is None:
        result: Tensor = torch.ops.trak_fast.project_adjoint(y, adjoint.grad_dim, *matrix, nonzeros)
        return result
    torch.ops.trak_fast.project_adjoint_into(out, y, *matrix, nonzeros)
    return out


def _project(
    grads: Sequence[Tensor],
    proj_dim: int,
    proj_type: str,
    seed: int,
    model_id: int,
    offset: int,
    precision: str | None,
    nonzeros: int | None,
    out: Tensor | None = None,
) -> Tensor:
    """Checks and projects real tensors: the operator `project`."""
    tensors = checks.gradient_tensors([grad.detach() for grad in grads])
    projection = checks.check_projection(
        tensors,
        checks.count_columns(tensors),
        proj_dim,
        proj_type=proj_type,
        seed=seed % 2**64,
        model_id=model_id,
        offset=offset,
        precision=precision,
        nonzeros=nonzeros,
    )
    if out is not None:
        checks.check_projection_out(out, projection)
    return kernels.project(projection, out)


def _project_into(
    out: Tensor,
    grads: Sequence[Tensor],
    proj_type: str,
    seed: int,
    model_id: int,
    offset: int,
    precision: str | None,
    nonzeros: int | None,
) -> None:
    """Adds a projection of real tensors to `out`: the operator `project_into`."""
    _project(grads, out.shape[1], proj_type, seed, model_id, offset, precision, nonzeros, out)


def _project_adjoint(
    y: Tensor,
    grad_dim: int,
    proj_type: str,
    seed: int,
    model_id: int,
    offset: int,
    nonzeros: int | None,
    out: Tensor | None = None,
) -> Tensor:
    """Checks a real tensor and computes its adjoint: the operator `project_adjoint`."""
    adjoint = checks.check_adjoint(
        y.detach(),
        grad_dim,
        proj_type=proj_type,
        seed=seed % 2**64,
        model_id=model_id,
        offset=offset,
        nonzeros=nonzeros,
    )
    if out is not None:
        checks.check_adjoint_out(out, adjoint)
    return kernels.project_adjoint(adjoint, out)


def _project_adjoint_into(
    out: Tensor, y: Tensor, proj_type: str, seed: int, model_id: int, offset: int, nonzeros: int | None
) -> None:
    """Adds the adjoint of a real tensor to `out`: the operator `project_adjoint_into`."""
    _project_adjoint(y, out.shape[1], proj_type, seed, model_id, offset, nonzeros, out)


def _empty_projection(grads: Sequence[Tensor], proj_dim: int, *settings: Any) -> Tensor:
    """Returns a stand-in for a projection."""
    return grads[0].new_empty((grads[0].shape[0], proj_dim), dtype=torch.float32)


def _empty_adjoint(y: Tensor, grad_dim: int, *settings: Any) -> Tensor:
    """Returns a stand-in for an adjoint."""
    return y.new_empty((y.shape[0], grad_dim), dtype=torch.float32)


def _do_nothing(*arguments: Any) -> None:
    """Stands in for an operator that adds to a tensor."""


def _signed(seed: int) -> int:
    """Returns the signed number that has the 64 bits of a seed."""
    return seed if seed < 2**63 else seed - 2**64


def _keep_project(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grads, _, proj_type, seed, model_id, offset, _, nonzeros = inputs
    ctx.parts = [(tuple(grad.shape), grad.dtype) for grad in grads]
    ctx.matrix = (proj_type, seed, model_id, offset)
    ctx.nonzeros = nonzeros


def _project_backward(ctx: Any, y: Tensor) -> tuple[Any, ...]:
    widths = [math.prod(shape[1:]) for shape, _ in ctx.parts]
    whole = torch.ops.trak_fast.project_adjoint(y, sum(widths), *ctx.matrix, ctx.nonzeros)
    pieces = whole.split(widths, dim=1)
    grads = [piece.reshape(shape).to(dtype) for piece, (shape, dtype) in zip(pieces, ctx.parts, strict=True)]
    return grads, None, None, None, None, None, None, None


def _keep_adjoint(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, _, proj_type, seed, model_id, offset, nonzeros = inputs
    ctx.nonzeros = nonzeros
    ctx.proj_dim = y.shape[1]
    ctx.dtype = y.dtype
    ctx.matrix = (proj_type, seed, model_id, offset)


def _adjoint_backward(ctx: Any, grads: Tensor) -> tuple[Any, ...]:
    y = torch.ops.trak_fast.project([grads], ctx.proj_dim, *ctx.matrix, "highest", ctx.nonzeros)
    return y.to(ctx.dtype), None, None, None, None, None, None


def _define(schema: str, kernel: Callable[..., Tensor | None], fake: Callable[..., Tensor | None]) -> None:
    """Defines an operator for the CPU and CUDA, with the stand-in for its result that traces use."""
    name = _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device in ("CPU", "CUDA"):
        _library.impl(name, kernel, device)
    torch.library.register_fake(f"trak_fast::{name}", fake, lib=_library)


_define(
    f"project(Tensor[] grads, SymInt proj_dim, {_MATRIX}, str? precision, {_NONZEROS}) -> Tensor",
    kernel=_project,
    fake=_empty_projection,
)
_define(
    f"project_into(Tensor(a!) out, Tensor[] grads, {_MATRIX}, str? precision, {_NONZEROS}) -> ()",
    kernel=_project_into,
    fake=_do_nothing,
)
_define(
    f"project_adjoint(Tensor y, SymInt grad_dim, {_MATRIX}, {_NONZEROS}) -> Tensor",
    kernel=_project_adjoint,
    fake=_empty_adjoint,
)
_define(
    f"project_adjoint_into(Tensor(a!) out, Tensor y, {_MATRIX}, {_NONZEROS}) -> ()",
    kernel=_project_adjoint_into,
    fake=_do_nothing,
)
_register = torch.library.register_autograd
_register("trak_fast::project", _project_backward, setup_context=_keep_project, lib=_library)
_register("trak_fast::project_adjoint", _adjoint_backward, setup_context=_keep_adjoint, lib=_library)
