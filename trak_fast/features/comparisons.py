"""The ways in which gradients are split by samples, and the samples that each was compared for with autograd's.

A split can be right for a sample by luck: where the parameter's gradient is 0, for example, or where a wrong part of it
is. So each is relied on once it was right for several samples that have a gradient, whatever batches they come in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from .sketches import Sketches
from .taps import Split

SAMPLES_OF_A_SPLIT = 4
"""Samples with a gradient for which a split must be right."""

SAMPLES_IN_VAIN = 8
"""Samples that said nothing new of a split, though they were to, after which it is compared for no more of them."""


class Comparisons:
    """Counts the samples for which splits of batches, and of batches of one, were right."""

    def __init__(self, needed: int) -> None:
        """Starts with none.

        Args:
            needed: Samples for which a split must be right to be relied on.
        """
        self.needed = needed
        # by split, and True for batches of one: norms of the gradients that were right, as equal samples count once
        self._right: dict[tuple[Split, bool], set[float]] = {}
        self._in_vain: Counter[tuple[Split, bool]] = Counter()

    def is_settled(self, split: Split, of_one: bool) -> bool:
        """Tells if a split, of a batch of one or of more samples, can be relied on."""
        # a split that is right for batches is right for one sample
        keys = [(split, False)] + [_key(split, of_one=True)] * of_one
        return any(len(self._right.get(k, ())) >= self.needed or self._in_vain[k] >= SAMPLES_IN_VAIN for k in keys)

    def unsettled_names(self, names: Collection[str], of_one: bool) -> set[str]:
        """Returns those of some parameters that have no split that can be relied on."""
        kinds = {False, of_one}
        return set(names) - {
            split.name for split, kind in self._right if kind in kinds and self.is_settled(split, kind)
        }

    def add(
        self, splits: Iterable[Split], sketches: Sketches | None, *, of_one: bool, watched: Mapping[str, Tensor]
    ) -> None:
        """Counts a sample for which splits were right.

        Args:
            splits: The splits of its batch.
            sketches: Its gradients; None: whatever they are.
            of_one: True where it was a batch of one.
            watched: The samples that seem to have a gradient of a parameter, (B,) bool, where that is known.
        """
        if sketches is not None and not sketches.is_telling:
            return
        for key in {_key(split, of_one) for split in splits}:
            name = key[0].name
            known = self._right.get(key, set())
            norm = float(len(known)) if sketches is None else sketches.norms.get(name, 0.0)
            if norm not in known and (sketches is None or norm):
                self._right[key] = known | {norm}
            elif sketches is not None and name in watched and watched[name][sketches.sample]:
                self._in_vain[key] += 1

    def forget(self, names: Collection[str]) -> None:
        """Forgets all about the splits of some parameters."""
        self._right = {key: norms for key, norms in self._right.items() if key[0].name not in names}
        self._in_vain = Counter({key: count for key, count in self._in_vain.items() if key[0].name not in names})

    def choose(
        self,
        unsettled: Sequence[Split],
        order: Tensor,
        compared: Collection[int],
        of_one: bool,
        watched: Mapping[str, Tensor],
    ) -> list[int]:
        """Chooses samples to compare next: those that have a gradient by most of some splits.

        Args:
            unsettled: The splits of a batch that cannot be relied on.
            order: The samples, (B,), the first of which are preferred among equals.
            compared: Samples that were compared already.
            of_one: True where it is a batch of one.
            watched: See `add`.

        Returns:
            As many samples as splits need; fewer, or none, where no others have a gradient.
        """
        all_samples = torch.ones(len(order), dtype=torch.bool)
        scores = torch.stack([watched.get(split.name, all_samples) for split in unsettled]).sum(0)
        scores[list(compared)] = 0
        count = self.needed - min(len(self._right.get(_key(split, of_one), ())) for split in unsettled)
        ranked = order[scores[order].argsort(descending=True, stable=True)]
        return [sample for sample in ranked[:count].tolist() if scores[sample]]


def _key(split: Split, of_one: bool) -> tuple[Split, bool]:
    """Returns the split that samples are counted for: all rows are the sample's own in a batch of one."""
    return (split._replace(rows=()) if of_one else split), of_one
