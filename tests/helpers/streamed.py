"""A gradient computer that gives whole what `GradientProjector` projects piece by piece."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trak_fast import GradientProjector
from trak_fast.features.sums import FeatureSums
from trak_fast.tasks import Task


class WholeSums(FeatureSums):
    """Adds up the rows of pieces themselves, in float64."""

    def add_rows(self, name: str, rows: Tensor, column: int, start: int) -> None:
        first = self._columns[name].first + column
        values = rows.reshape(len(rows), -1).double()
        self._whole[start : start + len(rows), first : first + values.shape[1]] += values

    def result(self, device: torch.device) -> Tensor:
        return self._whole


class StreamedGradients(GradientProjector):
    """Gradients as `GradientComputer`s give them, by the taps of `GradientProjector`."""

    def __init__(self, model: nn.Module, task: Task, grad_wrt: Iterable[str] | None = None, **options: Any) -> None:
        super().__init__(model, task, 1, grad_wrt=grad_wrt, memory_budget=256)

    def _new_sums(self, count: int, *arguments: Any) -> FeatureSums:
        sums = super()._new_sums(count, *arguments)
        sums.__class__ = WholeSums
        sums._whole = torch.zeros(count, self.grad_dim, dtype=torch.float64)
        return sums

    def compute_per_sample_grad(self, batch: Sequence[Tensor]) -> dict[str, Tensor]:
        if not len(batch[0]):
            return {name: p.detach().new_zeros(0, *p.shape) for name, p in self.selected.items()}
        whole = self._compute(batch)["features"]
        parts = whole.split([columns.count for columns in self.columns.values()], dim=1)
        return {
            name: part.reshape(len(part), *self.selected[name].shape).to(self.selected[name].dtype)
            for name, part in zip(self.columns, parts, strict=True)
        }
