"""The loss of labelled tokens, in little memory beside the logits.

Logits (B, T, V) are the largest tensor of a language model, V being in the hundred thousands. Autograd's own operations
make several of their size in float32. Here one chunk of rows exists at a time, and in the backward pass one gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import within

IGNORED = -100
"""Label of positions that are not predicted."""

CHUNK_BYTES = 2**24
"""The largest size of what is computed at a time, unless a single row is larger."""

SOFTPLUS_THRESHOLD = 40.0
"""The number from which on log(1 + exp(x)) is x, as exp(−40)/40 is below the precision of float64."""


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Computes −log p of each labelled token, p by softmax over the vocabulary.

    p itself is never formed. With m, the label's logit minus the logsumexp of the others, the loss is log(1 + exp(−m))
    and 1 − p is σ(−m): both, and with them the gradient, keep their relative accuracy where p rounds to 0 or to 1. The
    arithmetic is that of float32, or of float64 for such logits; the gradient has the logits' dtype. There is no second
    derivative.

    Args:
        logits: (B, T, V), floating point, V ≥ 2.
        labels: (B, T), integers in [0, V), or `IGNORED` where nothing is predicted.

    Returns:
        (B, T), float32, or float64 where `logits` is; 0 where nothing is predicted.

    Raises:
        ValueError: `logits` or `labels` has another shape, or a label is out of range, also under vmap.
        TypeError: `labels` holds no integers, or `logits` no floating-point numbers.
    """
    if not logits.is_floating_point():
        raise TypeError(f"logits must be a tensor of floating-point numbers, not {logits.dtype}")
    if logits.ndim != 3 or logits.shape[2] < 2:
        raise ValueError(f"the model must return logits of shape (B, T, V) with V >= 2, not {tuple(logits.shape)}")
    if labels.shape != logits.shape[:2]:
        raise ValueError(
            f"labels must have shape (B, T), one for each row of logits, not {tuple(labels.shape)} for logits of shape "
            f"{tuple(logits.shape)}"
        )
    classes = logits.shape[2]
    counted = labels != IGNORED
    known = within("labels", torch.where(counted, labels, 0), 0, classes - 1, f"as the model has {classes} classes")
    labels = torch.where(counted, known, IGNORED)
    losses: Tensor = _TokenLosses.apply(logits.flatten(0, 1), labels.flatten())[0]  # type: ignore[no-untyped-call]
    return losses.view(labels.shape)


class _TokenLosses(torch.autograd.Function):
    """The losses of rows (N, V) with labels (N,); for the backward pass also (N,) logsumexp of the others, and 1 − p.

    Samples of vmap become more rows, so that `forward` sees all of them and makes the chunks.
    """

    @staticmethod
    def forward(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Computes the three, 0 where nothing is predicted."""
        losses = logits.new_zeros(len(labels), dtype=_wide(logits))
        others = torch.zeros_like(losses)
        missed = torch.zeros_like(losses)
        for rows in _chunks(logits, labels):
            others[rows], lack = _compare(logits, labels, rows)
            losses[rows] = F.softplus(lack, threshold=SOFTPLUS_THRESHOLD)
            missed[rows] = torch.sigmoid(lack)
        return losses, others, missed

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor, Tensor]) -> None:
        """Keeps the logits as they are, and numbers for each row."""
        _, others, missed = output
        ctx.mark_non_differentiable(others, missed)
        ctx.save_for_backward(*inputs, others, missed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Computes the gradient of the logits from that of the losses, the first of `grads`."""
        return _Slopes.apply(grads[0], *ctx.saved_tensors), None  # type: ignore[no-untyped-call]

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, int | None], logits: Tensor, labels: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[int, int, int]]:
        """Computes the losses of all samples' rows at once."""
        count = info.batch_size
        rows = _rows_of_all(count, in_dims, logits, labels)
        results = _TokenLosses.apply(*rows)  # type: ignore[no-untyped-call]
        return tuple(result.view(count, -1) for result in results), (0, 0, 0)


class _Slopes(torch.autograd.Function):
    """The gradient (N, V) of `_TokenLosses`, a function of its own so that vmap treats it alike."""

    @staticmethod
    def forward(grads: Tensor, logits: Tensor, labels: Tensor, others: Tensor, missed: Tensor) -> Tensor:
        """Computes grad · (1 − p) · (q − onehot), q the softmax over the others; rows without labels get 0."""
        slopes = logits.new_zeros(logits.shape)
        factors = (grads * missed).unsqueeze(1)
        shifts = _finite(others).unsqueeze(1)
        for rows in _chunks(logits, labels):
            slopes.index_copy_(0, rows, _slopes(logits, labels, rows, shifts[rows], factors[rows]))
        return slopes

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Keeps nothing, as there is no second derivative."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        """Refuses to differentiate again.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError(
            "f of a language model must be differentiated once, not twice; a function of your own as the task, by "
            "torch.nn.functional.cross_entropy for example, has second derivatives"
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *tensors: Tensor) -> tuple[Tensor, int]:
        """Computes the gradient of all samples' rows at once."""
        count = info.batch_size
        slopes: Tensor = _Slopes.apply(*_rows_of_all(count, in_dims, *tensors))  # type: ignore[no-untyped-call]
        return slopes.view(count, -1, slopes.shape[1]), 0


# Functions, as the variables of a loop would keep one chunk while the next is made.


def _compare(logits: Tensor, labels: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Computes for some rows the logsumexp of all logits but the label's, and by how much it exceeds the label's."""
    chunk = logits.index_select(0, rows).to(_wide(logits))
    index = labels[rows].unsqueeze(1)
    own = chunk.gather(1, index).squeeze(1)
    chunk.scatter_(1, index, -torch.inf)
    largest = _finite(chunk.amax(1))
    others = chunk.sub_(largest.unsqueeze(1)).exp_().sum(1).log_().add_(largest)
    return others, others - own


def _slopes(logits: Tensor, labels: Tensor, rows: Tensor, shifts: Tensor, factors: Tensor) -> Tensor:
    """Computes the gradient of some rows in the logits' dtype: factor · (exp(logit − shift) − onehot)."""
    chunk = logits.index_select(0, rows).to(factors.dtype)
    chunk.sub_(shifts).exp_().mul_(factors)
    chunk.scatter_(1, labels[rows].unsqueeze(1), -factors)
    return chunk.to(logits.dtype)


def _rows_of_all(count: int, in_dims: tuple[int | None, ...], *tensors: Tensor) -> list[Tensor]:
    """Returns tensors (N, ...) of `count` samples, whose dimensions of samples are given, as (count · N, ...)."""
    return [
        (x.expand(count, *x.shape) if place is None else x.movedim(place, 0)).flatten(0, 1)
        for place, x in zip(in_dims, tensors, strict=True)
    ]


def _wide(logits: Tensor) -> torch.dtype:
    """Returns the dtype to compute in."""
    return torch.promote_types(logits.dtype, torch.float32)


def _chunks(logits: Tensor, labels: Tensor) -> Iterator[Tensor]:
    """Yields the numbers of labelled rows, as many at a time as fit into `CHUNK_BYTES` with their copies."""
    wide = _wide(logits)
    row_bytes = logits.shape[1] * (wide.itemsize + (logits.element_size() if logits.dtype != wide else 0))
    rows = (labels != IGNORED).nonzero().squeeze(1)
    size = max(1, CHUNK_BYTES // row_bytes)
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _finite(shifts: Tensor) -> Tensor:
    """Returns numbers to subtract before exp, 0 where infinite: ∞ − ∞ is not a number, but exp(±∞) is right."""
    return shifts.masked_fill(shifts.isinf(), 0)
