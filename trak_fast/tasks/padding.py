"""Padding of texts, which has no part in a sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def leading(padding: Tensor) -> Tensor:
    """Counts the positions of each sequence before its first that is no padding.

    Args:
        padding: (B, T), True where a position is padding.

    Returns:
        (B,) int64; 0 where all of a sequence is padding.
    """
    count = (~padding).cumsum(1).eq(0).sum(1)
    return torch.where(count < padding.shape[1], count, 0)


def lengths_of(padding: Tensor) -> Tensor:
    """Counts the positions of each sequence up to its last that is no padding.

    Args:
        padding: (B, T), True where a position is padding.

    Returns:
        (B,) int64.
    """
    places = torch.arange(1, padding.shape[1] + 1, device=padding.device)
    return torch.where(padding, 0, places).amax(1)


def moved_to_front(values: Tensor, count: Tensor) -> Tensor:
    """Rolls sequences so that the first positions come last: models count a token's position from the front.

    Args:
        values: (B, T).
        count: (B,) the number of positions to move, in [0, T].

    Returns:
        (B, T); the values do not decide what is computed, so that vmap takes it.
    """
    length = values.shape[1]
    places = torch.arange(length, device=values.device) + count.unsqueeze(1)
    return values.gather(1, torch.where(places < length, places, places - length))


def without_padding(batch: Sequence[Tensor], mask: Tensor) -> list[Tensor]:
    """Moves what `mask` (B, T) keeps to the front, and sets the rest to 0, in each tensor of its shape."""
    kept = mask.bool()
    order = torch.argsort((~kept).to(torch.uint8), dim=1, stable=True)
    return [torch.where(kept, x, torch.zeros_like(x)).gather(1, order) if x.shape == mask.shape else x for x in batch]
