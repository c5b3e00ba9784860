"""From a batch to what is stored of it: features and weightings, of as many samples at a time as fit into memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from numpy import intp
from numpy.typing import NDArray
from torch import Tensor, nn

from ..gradients.base import GradientComputer, LossGradientComputer
from ..gradients.modes import differentiable
from ..projection.projector import ProjectorLike
from ..scales import LARGEST_FEATURE, map_rows
from ..tasks.base import Task, copy_buffers, copy_tensors, evaluation_mode, restored, weighs_by_outputs
from . import memory
from .rotation import Rotation

_LARGEST_FLOAT = torch.finfo(torch.float32).max


class FeatureComputer(Protocol):
    """A way to the features of samples; the model is in evaluation mode meanwhile.

    Attributes:
        is_sharded: True where all processes have to make the same passes over the model.
    """

    @property
    def is_sharded(self) -> bool: ...

    def features(self, samples: Sequence[Tensor], model_id: int) -> Tensor:
        """Computes the projected gradient of each sample's model output, (B, k) floating.

        Args:
            samples: The samples' tensors, (B, ...) each, on the model's device.
            model_id: The checkpoint's number, which selects the projection matrix.
        """

    def turn(self, batch: Sequence[Tensor]) -> AbstractContextManager[None]:
        """Makes room for one pass without gradients over the model in the block, on a batch."""


class ProjectedGradients:
    """Features from whole gradients: (B, D) numbers, in the parameters' dtype, exist at a time."""

    is_sharded = False

    def __init__(self, gradient_computer: GradientComputer, projector: ProjectorLike) -> None:
        self.gradient_computer = gradient_computer
        self.projector = projector

    def turn(self, batch: Sequence[Tensor]) -> AbstractContextManager[None]:
        """Does nothing: this process is alone with its model."""
        return nullcontext()

    def features(self, samples: Sequence[Tensor], model_id: int) -> Tensor:
        """Computes gradients and projects them, (B, k); float64 if a row is beyond what float32 computes with.

        Features have the scale of the dense kinds, E‖φ‖² = k ‖g‖², which a ridge given as a number refers to.
        """
        # the gradients are not bound to a name, which would keep them alive during the next computation
        features = map_rows(
            partial(self.projector.project, model_id=model_id), self.gradient_computer.compute_per_sample_grad(samples)
        )
        scale = getattr(self.projector, "dense_scale", 1.0)
        return features if scale == 1 else features * scale


@dataclass(frozen=True)
class Part:
    """The results for some samples of a batch, on the CPU.

    Attributes:
        rows: (B,) the samples' numbers.
        features: (B, k) float32 or float64.
        weights: (B,) float32, the weightings Q; None where they were not asked for.
    """

    rows: NDArray[intp]
    features: Tensor
    weights: Tensor | None


@dataclass(frozen=True)
class Evaluation:
    """The task's results for some samples, each evaluated alone, on the CPU.

    Attributes:
        outputs: f, (P,) float64.
        weightings: Q, (P,) float64.
    """

    outputs: Tensor
    weightings: Tensor


class Featurizer:
    """Computes features and weightings within a memory budget."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        *,
        computer: FeatureComputer,
        gradient_computer: LossGradientComputer,
        proj_dim: int,
        bytes_a_sample: int,
        bytes_in_all: int = 0,
        device: torch.device,
        chunk_size: int | None = None,
        memory_budget: int | None = None,
        rotation: Rotation | None = None,
    ) -> None:
        """Takes the parts.

        Args:
            model: The model, on `device`.
            task: The task.
            computer: Computes features.
            gradient_computer: Computes weightings.
            proj_dim: Size of a feature, k.
            bytes_a_sample: Bytes that the gradient of one sample takes as a whole.
            bytes_in_all: Bytes that gradients take however many samples there are.
            device: The device to compute on.
            chunk_size: Samples at a time; by default what fits `memory_budget`.
            memory_budget: Bytes; by default a quarter of the memory that is free, or half of it on a CUDA device.
            rotation: Rotates features, which are to be stored in few bits; None: they stay.
        """
        self.model = model
        self.task = task
        self.computer = computer
        self.gradient_computer = gradient_computer
        self.proj_dim = proj_dim
        self.bytes_a_sample = bytes_a_sample
        self.bytes_in_all = bytes_in_all
        self.device = device
        self.chunk_size = chunk_size
        self.memory_budget = memory_budget
        self.rotation = rotation
        self.dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        self._samples_at_a_time: dict[tuple[torch.Size, ...], int] = {}  # by the shapes of one sample's tensors

    def compute(
        self,
        batch: Sequence[Tensor],
        *,
        positions: NDArray[intp],
        rows: NDArray[intp],
        model_id: int,
        weighted: bool,
        write: Callable[[Part], None],
    ) -> None:
        """Computes some samples of a batch, part by part.

        Args:
            batch: Tensors (B, ...).
            positions: The positions of these samples in the batch.
            rows: Their numbers, for `write` and for messages.
            model_id: The checkpoint's number.
            weighted: Computes their weightings too.
            write: Takes each part. Where memory runs out in it, the part is computed again in halves.

        Raises:
            ValueError: A result has another shape, or is not finite.
        """
        if not len(positions):
            return
        shapes = tuple(x.shape[1:] for x in batch)
        self.count_at_a_time(batch)
        self._samples_at_a_time[shapes] = memory.halving_on_oom(
            len(positions),
            self._samples_at_a_time[shapes],
            lambda part: write(self._part(batch, positions[part], rows[part], model_id, weighted)),
        )

    def count_at_a_time(self, batch: Sequence[Tensor]) -> int:
        """Counts the samples of a batch (B, ...) that are computed at a time."""
        shapes = tuple(x.shape[1:] for x in batch)
        if shapes not in self._samples_at_a_time and (count := self._count_of_larger(shapes)) >= len(batch[0]):
            self._samples_at_a_time[shapes] = count
        if shapes not in self._samples_at_a_time:
            # not even one pass may be made without the other processes of a sharded model
            self._samples_at_a_time[shapes] = self.chunk_size or (
                2**48 if self.computer.is_sharded else self._fitting_samples([x[0] for x in batch])
            )
        return self._samples_at_a_time[shapes]

    def _count_of_larger(self, shapes: tuple[torch.Size, ...]) -> int:
        """Counts the samples of these shapes that fit where as many elements of larger ones do; 0 where none are known.

        Batches of texts, the longest first, need no trial of each length so.
        """
        counts = [
            count * max(1, math.prod(larger[0])) // max(1, math.prod(shapes[0]))
            for larger, count in self._samples_at_a_time.items()
            if shapes and _are_larger(larger, shapes)
        ]
        return max(counts, default=0)

    def evaluate(self, batch: Sequence[Tensor]) -> Evaluation:
        """Computes f and Q of samples, (P, ...) each, by the task alone and without gradients."""
        weights: dict[str, Tensor] = dict(self.model.named_parameters())
        if not self.computer.is_sharded:  # shards are known by what they are
            weights = {name: parameter.detach() for name, parameter in weights.items()}
        buffers = dict(self.model.named_buffers())
        outputs: list[Tensor] = []
        weightings: list[Tensor] = []
        with evaluation_mode(self.model), differentiable(self.model):
            for i in range(len(batch[0])):
                single = [x[i : i + 1].to(self.device, copy=True) for x in batch]
                sample = [x[0].clone() for x in single]
                with restored(self.model), self.computer.turn(single):
                    output = self.task.get_output(self.model, weights, copy_buffers(buffers), *sample).detach()
                outputs.append(output)
                if weighs_by_outputs(self.task):
                    weightings.append(self.task.get_weightings(output.reshape(1), single))
                else:
                    with restored(self.model), self.computer.turn(single):
                        own = self.task.get_out_to_loss_grad(self.model, weights, copy_buffers(buffers), single)
                    weightings.append(own)
        return Evaluation(outputs=_flattened(outputs), weightings=_flattened(weightings))

    def _fitting_samples(self, sample: Sequence[Tensor]) -> int:
        """Counts the samples like this one whose gradients fit into the memory budget: at least one."""
        budget = self.memory_budget
        if budget is None:
            budget = memory.free_bytes(self.device) // (2 if self.device.type == "cuda" else 4)
        sample = copy_tensors([x.to(self.device) for x in sample])
        weights = dict(self.model.named_parameters())
        buffers = copy_buffers(dict(self.model.named_buffers()))

        def forward() -> None:
            with evaluation_mode(self.model), differentiable(self.model), torch.no_grad(), restored(self.model):
                self.task.get_output(self.model, weights, buffers, *sample)

        return max(1, (budget - self.bytes_in_all) // memory.sample_bytes(forward, self.bytes_a_sample))

    def _part(
        self, batch: Sequence[Tensor], positions: NDArray[intp], rows: NDArray[intp], model_id: int, weighted: bool
    ) -> Part:
        samples = [x[torch.from_numpy(positions).to(x.device)].to(self.device) for x in batch]
        weights = None
        with evaluation_mode(self.model):
            features = self.computer.features(samples, model_id)
            if self.rotation is not None:
                features = self.rotation.apply(features)
            if weighted:
                weights = self.gradient_computer.compute_loss_grad(samples).reshape(-1)
        features = _checked("features", features, rows, (self.proj_dim,), LARGEST_FEATURE, "the model output f")
        if weights is not None:
            weights = _checked("weights", weights, rows, (), _LARGEST_FLOAT, "the loss").float()
        return Part(rows=rows, features=features, weights=weights)


def _are_larger(larger: Sequence[torch.Size], shapes: Sequence[torch.Size]) -> bool:
    """Tells if shapes have the dimensions of others, none of which is smaller."""
    if [len(x) for x in larger] != [len(x) for x in shapes]:
        return False
    return all(b >= a for x, y in zip(larger, shapes, strict=True) for b, a in zip(x, y, strict=True))


def _flattened(values: Sequence[Tensor]) -> Tensor:
    """Returns one number of each tensor, in float64 on the CPU."""
    return torch.cat([value.detach().reshape(1).to(device="cpu", dtype=torch.float64) for value in values])


def _checked(
    name: str, value: Tensor, rows: NDArray[intp], shape: tuple[int, ...], limit: float, origin: str
) -> Tensor:
    """Returns a result on the CPU, float32 unless it is float64, once its shape is right and it is finite.

    Args:
        name: The result's name.
        value: The result.
        rows: (B,) the samples' numbers.
        shape: The shape that one sample's result must have.
        limit: The largest magnitude that is taken.
        origin: The thing that the result is proportional to.
    """
    value = value.detach().cpu()
    if value.dtype != torch.float64:
        value = value.float()
    expected = (len(rows), *shape)
    if value.shape != expected:
        raise ValueError(f"{name} must have shape {expected}, not {tuple(value.shape)}")
    # one row that is not finite would spoil all scores, through X'X
    if not (finite := value.isfinite().reshape(len(rows), -1).all(1)).all():
        raise ValueError(f"the {name} of samples {rows[~finite].tolist()[:5]} are not finite")
    if not (small := (value.abs() <= limit).reshape(len(rows), -1).all(1)).all():
        raise ValueError(
            f"the {name} of samples {rows[~small].tolist()[:5]} must be at most {limit:.3g} in magnitude, "
            f"not {value.abs().max().item():.3g}; multiply {origin} by a constant"
        )
    return value
