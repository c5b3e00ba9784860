"""The choice of the way to features: layer by layer where that is possible, else from whole gradients."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from ..arguments import integer
from ..gradients.base import GradientComputer, LossGradientComputer
from ..gradients.functional import FunctionalGradientComputer
from ..projection.projector import NoProjection, Projector, ProjectorLike
from ..tasks.base import Task
from .featurizer import FeatureComputer, ProjectedGradients
from .metric import vocabulary_of
from .sharded import shards_of
from .streaming import SLICE_BYTES, GradientProjector, OptimizerState
from .two_sided import side_of

logger = logging.getLogger("trak_fast")


def _do_nothing() -> None:
    """Does nothing."""


@dataclass(frozen=True)
class Computers:
    """The way to features.

    Attributes:
        features: Computes features.
        losses: Computes weightings, from the same forward pass where it can.
        proj_dim: Size of a feature, k.
        bytes_a_sample: Bytes that the gradient of one sample takes as a whole; 0 where it is never whole.
        bytes_in_all: Bytes that slices of gradients take, however many samples there are.
        end_call: Ends a call that processes with parts of the model make together.
        prepare: Makes the passes that such processes wait for before they do something else together.
    """

    features: FeatureComputer
    losses: LossGradientComputer
    proj_dim: int
    bytes_a_sample: int = 0
    bytes_in_all: int = 0
    end_call: Callable[[], None] = _do_nothing
    prepare: Callable[[], None] = _do_nothing

    @property
    def streaming(self) -> GradientProjector | None:
        """The projector that streams gradients; None where they are whole."""
        return self.losses if isinstance(self.losses, GradientProjector) else None


def choose_metric(
    metric: str | None,
    model: nn.Module,
    task: Task,
    *,
    parameters: Mapping[str, Tensor],
    gradients_are_free: bool,
) -> str | None:
    """Chooses the metric of features where it is "auto": K-FAC's for a whole model whose task draws labels.

    It is for models whose vocabulary is among the parameters, such as those that are trained as a whole. Adapters alone
    have none.

    Args:
        metric: "auto", "kfac" or None.
        model: The model.
        task: The task.
        parameters: The parameters that gradients are taken with respect to.
        gradients_are_free: True where nothing else decides on gradients: a class of the user's, a projector, no
            projection, or Adam's moments.

    Raises:
        ValueError: `metric` is something else.
    """
    if metric not in ("auto", "kfac", None):
        raise ValueError(f'metric must be "auto", "kfac" or None, not {metric!r}')
    if metric != "auto":
        return metric
    whole = not shards_of(model) and not any(hasattr(parameter, "placements") for parameter in model.parameters())
    has_vocabulary = any(p.ndim > 1 and p.shape[0] == vocabulary_of(model) for p in parameters.values())
    return "kfac" if gradients_are_free and whole and has_vocabulary and hasattr(task, "draw_labels") else None


def choose_computers(
    model: nn.Module,
    task: Task,
    projector: ProjectorLike,
    *,
    parameters: Mapping[str, Tensor],
    grad_wrt: list[str] | None,
    gradient_computer: type[GradientComputer] | None,
    seed: int,
    sketch: str,
    sketch_side: int | None,
    memory_budget: int | None,
    processes: int,
    metric: str | None = None,
) -> Computers:
    """Chooses the way to the features of a model.

    Args:
        model: The model.
        task: The task; one with `get_outputs` has its batches streamed.
        projector: The projection.
        parameters: The parameters that gradients are taken with respect to.
        grad_wrt: Their names; None for all of the model's.
        gradient_computer: A class whose gradients are projected whole; None: the choice is free.
        seed: Seed of sketches that are not projected.
        sketch: "full" or "two_sided".
        sketch_side: See `GradientProjector`.
        memory_budget: Bytes for all that computing takes, or None.
        processes: The processes that share the work.
        metric: See `GradientProjector`.

    Raises:
        ValueError: Arguments exclude each other, or the model is shared out in a way that is not supported.
    """
    two_sided = side_of(sketch, sketch_side) is not None
    if two_sided and (gradient_computer is not None or type(projector) not in (Projector, NoProjection)):
        own = "gradient_computer" if gradient_computer is not None else "projector"
        raise ValueError(f'{own} must be left out with sketch="two_sided", not given; set proj_dim and proj_type')
    sharded = _is_sharded(model, parameters, projector, gradient_computer, processes)
    by_layers = gradient_computer is None and type(projector) is Projector and hasattr(task, "get_outputs")
    grad_dim = sum(parameter.numel() for parameter in parameters.values())
    if not (two_sided or sharded or by_layers):
        if metric is not None:
            raise ValueError(
                f"metric must be None, not {metric!r}, unless gradients are projected layer by layer: leave out "
                "gradient_computer and projector, give a task with get_outputs, and proj_dim of 1 or more"
            )
        first = next(iter(parameters.values()))
        whole = (gradient_computer or FunctionalGradientComputer)(
            model=model, task=task, grad_dim=grad_dim, dtype=first.dtype, device=first.device, grad_wrt=grad_wrt
        )
        return Computers(
            features=ProjectedGradients(whole, projector),
            losses=whole,
            proj_dim=integer("projector.proj_dim", projector.proj_dim or 0, 0, 2**48) or grad_dim,
            bytes_a_sample=sum(parameter.numel() * parameter.element_size() for parameter in parameters.values()),
        )
    slice_bytes = SLICE_BYTES if memory_budget is None else max(1, min(SLICE_BYTES, memory_budget // 4))
    projected = projector if isinstance(projector, Projector) else None
    streaming = GradientProjector(
        model,
        task,
        projected.proj_dim if projected else 0,
        proj_type=projected.proj_type if projected else "rademacher",
        seed=projected.seed if projected else seed,
        nonzeros=projected.nonzeros if projected else None,
        precision=projected.precision if projected else None,
        grad_wrt=grad_wrt,
        memory_budget=slice_bytes,
        sketch=sketch,
        sketch_side=sketch_side,
        metric=metric,
    )
    logger.info(
        "gradients are projected layer by layer, as the backward pass makes them, and compared with autograd's for "
        "one sample in 32"
    )
    return Computers(
        features=streaming,
        losses=streaming,
        proj_dim=streaming.proj_dim,
        bytes_in_all=slice_bytes,
        end_call=streaming.finish_call,
        prepare=streaming.finish,
    )


def _is_sharded(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    projector: ProjectorLike,
    gradient_computer: object,
    processes: int,
) -> bool:
    """Tells if the model is sharded (FSDP2), and refuses what sharded models are not supported with.

    Raises:
        ValueError: It is split by tensor parallelism, gradients are to be computed in another way than layer by
            layer, or processes of the model would not share the work.
    """
    if not shards_of(model):
        if any(hasattr(parameter, "placements") for parameter in parameters.values()):
            raise ValueError(
                "model must be whole or sharded by FSDP2, not split by tensor parallelism, where processes have "
                "the same samples; GradientProjector takes such models"
            )
        return False
    if gradient_computer is not None or type(projector) is not Projector:
        raise ValueError(
            "a sharded model must have its gradients projected layer by layer: leave out gradient_computer and "
            "projector, and give proj_dim of 1 or more"
        )
    sizes = {p.device_mesh.size() for p in model.parameters() if hasattr(p, "device_mesh")}
    if sizes != {processes}:
        raise ValueError(
            f"model must be sharded over all {processes} processes that share the work, not over "
            f"{', '.join(map(str, sorted(sizes)))}; distributed=False shares none"
        )
    return True


class OptimizerStates:
    """The optimizer states of checkpoints, by which the gradients of training samples become steps.

    Attributes:
        marks: The digest of the moments of the checkpoint that is loaded; nothing without moments.
    """

    def __init__(self, given: OptimizerState | Mapping[int, OptimizerState] | None, computers: Computers) -> None:
        """Takes one state for all checkpoints, or one for each by its number.

        Raises:
            ValueError: Features cannot be made of steps.
        """
        self.marks: dict[str, str] = {}
        self._streaming = computers.streaming
        self._is_given = given is not None
        by_number = isinstance(given, Mapping) and len(given) > 0 and all(isinstance(key, int) for key in given)
        self._by_number = cast("Mapping[int, OptimizerState]", given) if by_number else None
        self._for_all = None if by_number else cast("OptimizerState | None", given)
        if self._is_given and self._streaming is None:
            raise ValueError(
                "optimizer_state must be None unless gradients are projected layer by layer: leave out "
                "gradient_computer and projector, give a task with get_outputs, and proj_dim of 1 or more"
            )
        if self._is_given and self._streaming is not None:
            self._streaming.require_steps()

    def describe(self) -> dict[str, str]:
        """Describes the features for their manifest."""
        return {"preconditioner": "adam"} if self._is_given else {}

    def begin(self, model_id: int, *, is_training: bool) -> None:
        """Has the gradients of training samples at a checkpoint turned into steps; those of targets stay.

        Raises:
            ValueError: There is no state for this checkpoint, or the one given fits another model.
        """
        self.marks = {}
        if not self._is_given or self._streaming is None:
            return
        if self._by_number is not None and model_id not in self._by_number:
            known = ", ".join(map(str, self._by_number))
            raise ValueError(f"optimizer_state must have a state for model_id {model_id}, not only for {known}")
        state = self._for_all if self._by_number is None else self._by_number[model_id]
        self._streaming.precondition(state)
        if self._streaming.moments is not None:
            self.marks = {"optimizer_state": self._streaming.moments.digest()}
        if not is_training:
            self._streaming.precondition(None)
