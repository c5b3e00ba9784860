"""From a batch to what is stored of it: gradients, projected features and weightings, within a memory budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..gradients.modes import evaluation_mode
from ..tasks.base import Task
from . import memory


class Featurizer:
    """Computes features and weightings, of as many samples at a time as fit into memory."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        gradient_computer: Any,
        projector: Any,
        gradient_bytes: int,
        device: torch.device,
        chunk_size: int | None = None,
        memory_budget: int | None = None,
    ) -> None:
        """Takes the parts.

        Args:
            model: The model, on `device`.
            task: The task.
            gradient_computer: Of the model and task.
            projector: Of its gradients.
            gradient_bytes: Size of one sample's gradient.
            device: Where to compute.
            chunk_size: Samples at a time; by default what fits `memory_budget`.
            memory_budget: Bytes; by default a quarter of the memory that is free, or half of it on a CUDA device.
        """
        self.model, self.task, self.device = model, task, device
        self.gradient_computer, self.projector, self.gradient_bytes = gradient_computer, projector, gradient_bytes
        self.chunk_size, self.memory_budget = chunk_size, memory_budget
        self._fitting: dict[tuple[torch.Size, ...], int] = {}  # samples at a time, by the shapes of one

    def compute(
        self,
        batch: Sequence[Tensor],
        positions: NDArray[np.intp],
        rows: NDArray[np.intp],
        shapes: Mapping[str, tuple[int, ...]],
        model_id: int,
        store: Callable[[NDArray[np.intp], dict[str, Tensor]], None],
    ) -> None:
        """Computes some samples of a batch, part by part.

        Args:
            batch: Tensors (B, ...).
            positions: Which samples of the batch.
            rows: Their numbers, for `store` and messages.
            shapes: Of one row of what is to be computed: "features" and perhaps "weights".
            model_id: Selects the projection.
            store: Called with the numbers and the values, float32 on the CPU, of each part.

        Raises:
            ValueError: A result has another shape, or is not finite.
        """
        if not len(positions):
            return
        kind = tuple(x.shape[1:] for x in batch)
        if kind not in self._fitting:
            self._fitting[kind] = self.chunk_size or self._samples_at_a_time([x[0] for x in batch])
        self._fitting[kind] = memory.in_parts(
            len(positions),
            self._fitting[kind],
            lambda part: store(rows[part], self._part(batch, positions[part], rows[part], shapes, model_id)),
        )

    def _samples_at_a_time(self, sample: Sequence[Tensor]) -> int:
        """Samples like this whose gradients fit into the memory budget, at least one."""
        budget = self.memory_budget
        if budget is None:
            budget = memory.free_bytes(self.device) // (2 if self.device.type == "cuda" else 4)
        sample = [x.to(self.device) for x in sample]
        weights, buffers = dict(self.model.named_parameters()), dict(self.model.named_buffers())

        def forward() -> None:
            with evaluation_mode(self.model):
                self.task.get_output(self.model, weights, buffers, *sample)

        return max(1, budget // memory.sample_bytes(forward, self.gradient_bytes))

    def _part(
        self,
        batch: Sequence[Tensor],
        positions: NDArray[np.intp],
        rows: NDArray[np.intp],
        shapes: Mapping[str, tuple[int, ...]],
        model_id: int,
    ) -> dict[str, Tensor]:
        samples = [x[torch.from_numpy(positions).to(x.device)].to(self.device) for x in batch]
        values = {}
        with evaluation_mode(self.model):
            # handed over without a name, so that no gradients are kept while the next are computed
            values["features"] = self.projector.project(
                self.gradient_computer.compute_per_sample_grad(samples), model_id=model_id
            )
            if "weights" in shapes:
                values["weights"] = self.gradient_computer.compute_loss_grad(samples).reshape(-1)
        for name, value in values.items():
            values[name] = value.detach().to(device="cpu", dtype=torch.float32)
            expected = (len(rows), *shapes[name])
            if value.shape != expected:
                raise ValueError(f"{name} must have shape {expected}, not {tuple(value.shape)}")
            # one row that is not finite would spoil all scores, through X'X
            if not (finite := values[name].isfinite().reshape(len(rows), -1).all(1)).all():
                raise ValueError(f"the {name} of samples {rows[~finite].tolist()[:5]} are not finite")
        return values
