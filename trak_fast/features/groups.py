"""Groups of samples of like lengths, so that little padding is computed."""

from __future__ import annotations

import torch
from torch import Tensor

SHARE_OF_PADDING = 0.5
"""Share of a batch's positions that may be padding. Smaller groups would compute less, but each of them generates the
projection matrix anew."""


def group_by_length(lengths: Tensor) -> list[Tensor]:
    """Splits samples into groups, as long as that saves more than half of the positions that are computed.

    Args:
        lengths: (B,) integers, the positions of each sample without padding.

    Returns:
        The numbers of the samples in each group, in increasing order; all samples in one group where they are of like
        lengths.
    """
    order = lengths.argsort(descending=True, stable=True)
    return [group.sort().values for group in _split(order, lengths[order])]


def _split(order: Tensor, lengths: Tensor) -> list[Tensor]:
    """Splits samples in the order of decreasing lengths at the best place, and the parts again."""
    count = len(order)
    positions = count * int(lengths[0]) if count else 0
    if count < 2 or positions - int(lengths.sum()) <= SHARE_OF_PADDING * positions:
        return [order]
    sizes = torch.arange(1, count)
    computed = sizes * lengths[0] + (count - sizes) * lengths[1:]
    first = int(computed.argmin()) + 1
    return [*_split(order[:first], lengths[:first]), *_split(order[first:], lengths[first:])]
