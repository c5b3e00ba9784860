"""Projected gradients of large models: each layer's gradients are projected the moment the backward pass makes them.

One forward and one backward pass over a batch serve all its samples. A tap on each layer (taps.py) gives the pieces of
its parameters' per-sample gradients, of which some rows at a time are formed, projected at their own columns of the
matrix, and dropped. Projection is linear, so tied weights, layers that are called several times, and rows of any number
add up to the projection of the whole gradient, which is never there.

Batches are checked. Of the first batch, and of one sample in 32 from then on, the streamed gradients are compared with
those that autograd gives for the sample alone, by the unaltered model. Parameters that fail, and those of the model
itself, are differentiated sample by sample, each in a forward and a backward pass of its own, streamed as well.
"""

from __future__ import annotations

import enum
import logging
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..arguments import checked_batch, choice, integer
from ..gradients.adam import AdamMoments
from ..gradients.base import ParameterGradients, singles_of
from ..gradients.errors import is_out_of_memory
from ..gradients.experts import experts_rule_of
from ..gradients.layers import Rule, rule_of
from ..gradients.modes import checkpointing, differentiable, no_key_caches, requiring_grad, uncompiled
from ..gradients.parameters import columns_of, layers_of, listed, placed_columns
from ..gradients.pieces import Piece, Whole
from ..gradients.repeatable import GRADIENT_ROUNDINGS, RANDOM, RandomOutputsError, differ, tolerance_of
from ..projection.projector import Projector
from ..scales import exponents_of, split
from ..tasks.base import Task, copy_tensors, evaluation_mode, restored, weighs_by_outputs
from ..tasks.batches import Batch, batch_tensors
from ..tasks.registry import resolve_task
from . import memory
from .check import NEGLIGIBLE_ROUNDINGS, Sketches, Sums, differing
from .groups import group_by_length
from .sharded import Kind, Lockstep, shards_of
from .stages import StagePass, projecting
from .steps import StepSums
from .sums import FeatureSums
from .taps import Split, TappedLayer, Taps
from .tensor_parallel import TensorParallel
from .tokens import NoTokensError, TokenShares, TokenSums
from .two_sided import BlockSums, Layout, TwoSidedSums, side_of

logger = logging.getLogger("trak_fast")

SLICE_BYTES = 64 << 20
"""Bytes of per-sample gradients that are formed at a time unless a budget says otherwise."""

SAMPLES_A_CHECK = 32
"""Samples for each one that is differentiated alone, to compare with."""

OptimizerState = Optimizer | Mapping[str, Any] | str | os.PathLike[str]
"""An optimizer, its state dict, or the path of a file with one."""

FORWARD: Kind = ("forward",)
"""The kind of a pass without gradients."""

_ANY = Rule(lambda layer, inputs, output_grads: {})
"""A rule of no parameters, to tap a layer as one with a rule."""

COUPLED = "samples of a batch change each other's results (by statistics of the batch, for example)"


class PaddingError(RuntimeError):
    """The outputs of a model depend on how far its inputs are padded."""


class GradientProjector(ParameterGradients):
    """Projects the gradients of samples, which never exist as a whole: features of models of any size.

    The result is that of `trak_fast.project` on the per-sample gradients of the task's model output f, flattened in the
    model's order of parameters, up to rounding: for any `nn.Module`, whole or with adapters (LoRA), frozen in part,
    with activation checkpointing, in mixed or half precision.

    Attributes:
        grad_dim: Size of a sample's gradient, D.
        proj_dim: Size of a feature, k.
        columns: The columns of the projection matrix that belong to each parameter, (first, count) by name.
    """

    def __init__(
        self,
        model: nn.Module,
        task: str | Task | Callable[..., Tensor],
        proj_dim: int,
        *,
        proj_type: str = "rademacher",
        seed: int = 0,
        nonzeros: int | None = None,
        grad_wrt: Iterable[str] | None = None,
        memory_budget: int | None = None,
        precision: str | None = None,
        optimizer_state: OptimizerState | None = None,
        sketch: str = "full",
        sketch_side: int | None = None,
        per: str = "sample",
        columns: Mapping[str, tuple[int, int]] | None = None,
    ) -> None:
        """Prepares the projection of a model's gradients.

        Args:
            model: The model. It is run in evaluation mode, with the weights that it has at each call.
            task: A name (see `tasks.TASKS`), a `Task`, or a function; with `get_outputs` (`BatchOutputs`) a batch takes
                one pass, without it one a sample.
            proj_dim: Size of a feature, k.
            proj_type: See `trak_fast.project`.
            seed: See `trak_fast.project`.
            nonzeros: See `trak_fast.project`.
            grad_wrt: Names or patterns of the parameters to differentiate with respect to; None: those that require
                gradients, which of a model with adapters (PEFT) are these alone.
            memory_budget: Bytes for gradients beside the model and its activations: rows of a layer's gradients are
                formed as many at a time as it takes. By default 64 MiB.
            precision: See `trak_fast.project`.
            optimizer_state: An Adam or AdamW optimizer, its state dict, or the path of an `optimizer.pt` of
                transformers' Trainer. The gradient of each sample's loss is replaced by the step that Adam would make
                with it, as LESS does (`gradients.adam.AdamMoments`).
            sketch: "full": gradients are projected as they are. "two_sided": those of linear layers' weights are
                replaced by sketches made from their factors, of at most `sketch_side`² numbers each, which takes a
                fraction of the time and changes inner products by more (docs/two-sided.md). `proj_dim` may be 0 then:
                features are the sketches as they are, one after the other, with E‖φ‖² = ‖g‖².
            sketch_side: Rows and columns of a sketch at most; 64 by default.
            per: "sample", or "token" for a feature of each token, which add up to the sample's. "token" needs
                sketch="two_sided", and batches whose first tensor is (B, T, ...), padded at the end.
            columns: The columns of the projection matrix that belong to each parameter, (first, count) by name, of a
                model that is a part of a larger one: those that the larger one's projector has as `columns`, under the
                names that parameters have here. By default they follow each other.

        Raises:
            ValueError: A number is out of range, `grad_wrt` fits no parameter, `optimizer_state` fits another model or
                is given with "two_sided", `sketch_side` is given for "full", or `per` is "token" without sketches or
                for a task without `get_outputs`; `columns` do not fit the parameters, or are given with sketches; or a
                sharded model is to have what needs it whole.
            TypeError: An argument has the wrong type.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
        self.slice_bytes = SLICE_BYTES
        if memory_budget is not None:
            self.slice_bytes = integer("memory_budget", memory_budget, 1, 2**62)
        self._given_columns = columns
        self._ways: dict[str, _Way] = {}  # to the gradients of parameters whose first way was wrong
        self._side = side_of(sketch, sketch_side)
        self._per_token = choice("per", per, ("sample", "token")) == "token"
        if self._per_token and self._side is None:
            raise ValueError(
                'per must be "sample" with sketch="full", not "token": to form and project a gradient for each token '
                'takes as many times as long as there are tokens; add sketch="two_sided"'
            )
        self._direction: Tensor | None = None  # the vector that features are multiplied by, token by token
        super().__init__(model, resolve_task(task), grad_wrt=grad_wrt)
        self._blocks = self._side is not None and integer("proj_dim", proj_dim, 0) == 0
        self.projector = Projector(
            self.grad_dim,
            self.sketched_dim if self._blocks else proj_dim,
            seed=seed,
            proj_type="rademacher" if self._blocks else proj_type,
            precision=precision,
            nonzeros=nonzeros,
        )
        if self._per_token:
            self._require_batches("per")
        self._moments: AdamMoments | None = None
        self.precondition(optimizer_state)
        self._is_alone = False  # True once samples of a batch have changed each other
        self._adds = False  # True once a layer's output was changed in place
        self._splits: set[Split] = set()  # those that batches were checked with
        self._compared_all = False  # True once all samples of a batch were compared with their outputs alone
        self._model_id = 0

    @classmethod
    def with_projector(
        cls,
        model: nn.Module,
        task: Task,
        projector: Projector,
        grad_wrt: Iterable[str] | None,
        *,
        sketch: str = "full",
        sketch_side: int | None = None,
    ) -> GradientProjector:
        """Prepares the projection by the matrix that a `Projector` stands for."""
        return cls(
            model,
            task,
            projector.proj_dim,
            proj_type=projector.proj_type,
            seed=projector.seed,
            nonzeros=projector.nonzeros,
            grad_wrt=grad_wrt,
            precision=projector.precision,
            sketch=sketch,
            sketch_side=sketch_side,
        )

    def precondition(self, optimizer_state: OptimizerState | None) -> None:
        """Takes another `optimizer_state`, of another checkpoint for example; None: gradients as they are."""
        self._moments = None
        if optimizer_state is not None and self._layout is not None:
            raise ValueError(
                'optimizer_state must be None with sketch="two_sided": a step of Adam is no product of factors; '
                'sketch="full" takes it'
            )
        if optimizer_state is not None and self.is_sharded:
            raise ValueError(
                "optimizer_state must be None for a sharded model, of whose moments processes have parts; give a whole "
                "model"
            )
        if optimizer_state is not None:
            self._moments = AdamMoments.from_optimizer_state(optimizer_state, self.model, self.selected)

    def describe(self) -> dict[str, Any]:
        """Describes the features for their manifest."""
        described: dict[str, Any] = {
            "gradient_computer": "exact",
            "sketch": "full" if self._layout is None else f"two_sided {self._layout.side}",
            "preconditioner": None if self._moments is None else "adam",
        }
        if self._blocks:  # which no other entry of the manifest tells
            described.update(seed=self.projector.seed, matrix_definition=self.projector.definition)
        return described

    def compute_loss_grad(self, batch: Sequence[Tensor]) -> Tensor:
        """Computes the weighting Q of each sample, (B,) or (B, 1); 1 with moments, whose steps have Q in them."""
        weightings = super().compute_loss_grad(batch)
        return torch.ones_like(weightings) if self._moments is not None else weightings

    def load_model_params(self, model: nn.Module) -> None:
        """Takes the parameters and buffers of `model`, without copying them."""
        super().load_model_params(model)
        self._lockstep = Lockstep(model, self.parameters, self._imitate) if shards_of(model) else None
        self._parallel = TensorParallel.of(model, self.parameters)
        self.columns = columns_of(self.selected)
        if self._side is not None and (self._parallel is not None or self._given_columns is not None):
            raise ValueError(
                'sketch must be "full" for a part of a model, by tensor parallelism or with columns, not "two_sided": '
                "a sketch is made of a layer's whole input and output"
            )
        if self._given_columns is not None:
            self.columns = placed_columns(self.columns, self._given_columns)
        self.grad_dim = sum(columns.count for columns in self.columns.values())
        self._layout = None if self._side is None else Layout(model, self.selected, self._side)
        self._unchecked = SAMPLES_A_CHECK
        self._assign_layers()

    def _assign_layers(self) -> None:
        """Chooses the layer to tap for each parameter: the one that it belongs to, or the one around it."""
        paths = {module: path for path, module in self.model.named_modules()}
        self._layers: list[TappedLayer] = []
        around: dict[nn.Module, dict[str, str]] = {}
        for layer, names in layers_of(self.model, self.selected).items():
            rule = rule_of(layer) or experts_rule_of(layer)
            ways = {
                own: self._ways.get(name, _Way.RULE if rule is not None else _Way.LAYER) for own, name in names.items()
            }
            if by_rule := {own: name for own, name in names.items() if ways[own] is _Way.RULE}:
                self._layers.append(TappedLayer(layer, rule=rule, names=by_rule))
            parent_path, _, own_path = paths[layer].rpartition(".")
            for own, name in names.items():
                if ways[own] is _Way.LAYER:
                    around.setdefault(layer, {})[own] = name
                elif ways[own] is _Way.AROUND:
                    around.setdefault(self.model.get_submodule(parent_path), {})[f"{own_path}.{own}"] = name
        # the whole model by itself is no faster than its samples alone
        self._layers += [
            TappedLayer(layer, rule=None, names=names)
            for layer, names in around.items()
            # and a module that gathers its weights cannot be called again while its own are in use
            if layer is not self.model and not shards_of(layer) and not self._is_split(layer)
        ]
        tapped = {name for known in self._layers for name in known.names.values()}
        self._untapped = frozenset(self.selected) - tapped

    @property
    def _stripping(self) -> object:
        """The task, which takes the padding off single samples; processes with parts of sequences need their length."""
        return None if self._parallel is not None else self.task

    def _is_split(self, layer: nn.Module) -> bool:
        """Tells if other processes have parts of a layer, without whom it cannot be differentiated by itself."""
        return self._parallel is not None and self._parallel.covers(layer)

    @property
    def proj_dim(self) -> int:
        """Size of a feature, k."""
        return self.projector.proj_dim

    @property
    def sketched_dim(self) -> int:
        """Numbers that a sample's gradient is made of when it is projected: D, or those of the sketches."""
        return self.grad_dim if self._layout is None else self._layout.dim

    @property
    def singly(self) -> frozenset[str]:
        """Names of the parameters that are differentiated sample by sample."""
        everything = self._is_alone or not hasattr(self.task, "get_outputs")
        return frozenset(self.selected) if everything else self._untapped

    def project(self, batch: Batch, model_id: int = 0) -> Tensor:
        """Computes the projected gradient of each sample's model output.

        Args:
            batch: The tensors that the task asks for, (B, ...) each, in its order or by name (a dict, a BatchEncoding).
                If memory runs out, halves of it are computed. Texts of very different lengths are computed in groups.
                Of a model that is sharded by FSDP2, each process has samples of its own, any number; of one that is
                split by tensor parallelism, the same (padded to a multiple of the processes if they split sequences
                too). All processes make each call.
            model_id: The checkpoint's number, 0 to 2^32 − 1, which selects the projection matrix.

        Returns:
            (B, k) float32, on the model's device; (B, T, k) with per="token". The same batch gives the same bits each
            time.

        Raises:
            RuntimeError: The model cannot be differentiated, its outputs are random or depend on padding, or memory ran
                out in a pass over a sharded one.
            ValueError: The batch is not what the task takes, or with per="token" the gradient of a parameter is no sum
                over the tokens.
            TypeError: The batch is no sequence of tensors.
        """
        features = self._compute_rows(batch, model_id, torch.float32)
        if not self._per_token:
            return features
        return features.view(len(features), features.shape[1] // self.proj_dim, self.proj_dim)

    def token_products(self, batch: Batch, direction: Tensor, model_id: int = 0) -> Tensor:
        """Computes what each token adds to the product of its sample's feature with a vector.

        With v = P'y, the product y'P g = v'g is a sum over tokens, as g is. Slices of v are made as layers need them,
        in one forward and backward pass; v is never there.

        Args:
            batch: The tensors that the task asks for, (B, T, ...) the first, (B, ...) the others.
            direction: The vector y, (k,).
            model_id: As in `project`.

        Returns:
            (B, T) float64, on the model's device; sums over T are `project(batch, model_id) @ direction`, up to
            rounding.

        Raises:
            RuntimeError: As in `project`.
            ValueError: As in `project`, the vector is not (k,), the gradient of a parameter is no sum over the tokens,
                or the task has no `get_outputs`.
            TypeError: As in `project`.
        """
        self._require_batches("token_products")
        if self._moments is not None:
            raise ValueError("optimizer_state must be None for token_products: a step of Adam is no sum over tokens")
        if direction.shape != (self.proj_dim,):
            raise ValueError(f"direction must be ({self.proj_dim},), not {tuple(direction.shape)}")
        scaled = split(direction.detach().double().cpu().unsqueeze(0), 1)
        self._direction = scaled.mantissas[0].float()
        try:
            products = self._compute_rows(batch, model_id, torch.float64)
        finally:
            self._direction = None
        return products * 2.0 ** int(scaled.exponents[0])

    def _require_batches(self, user: str) -> None:
        if not hasattr(self.task, "get_outputs"):
            raise ValueError(
                f"task must have get_outputs for {user}, not be {type(self.task).__name__}, of single samples; "
                "see BatchOutputs"
            )

    def _compute_rows(self, batch: Batch, model_id: int, dtype: torch.dtype) -> Tensor:
        """Computes the numbers of each sample, (B, ...); of halves of the batch if memory runs out."""
        self._model_id = integer("model_id", model_id, 0, 2**32 - 1)
        batch = [x.to(self._device) for x in checked_batch(batch_tensors(batch, self.task))]
        count = len(batch[0])
        self.buffers = {name: buffer.detach() for name, buffer in self.model.named_buffers()}
        rows = torch.zeros(count, self._width(batch), dtype=dtype, device=self._device)

        def compute(part: slice) -> None:
            rows[part] = self._compute([x[part] for x in batch])["features"]

        with evaluation_mode(self.model):
            memory.halving_on_oom(count, count, compute)
        self.finish_call()
        return rows

    def _width(self, batch: Sequence[Tensor]) -> int:
        """Counts the numbers of each sample: k, T · k or T."""
        if self._direction is not None:
            return _tokens_of(batch)
        return self.proj_dim * _tokens_of(batch) if self._per_token else self.proj_dim

    def stage(self, batch_size: int, micro_batches: int = 1, model_id: int = 0) -> AbstractContextManager[StagePass]:
        """Projects the gradients of this model, a stage of a pipeline, in passes that the block makes.

        The block runs the model forward and backward over one batch, as a schedule of torch.distributed.pipelining
        does; the last stage's loss is the sum of f over the samples of a micro-batch. The features are those of the
        returned object, (B, k), after the block; the sum over all stages is that of the whole model, whose columns
        `GradientProjector(columns=...)` places this one's parameters in.

        Args:
            batch_size: Samples of the batch, B.
            micro_batches: Calls of the model, each with as many of the samples, in order.
            model_id: See `project`.

        Raises:
            ValueError: A number is out of range.
            RuntimeError: Parameters belong to no layer, or the block made other passes (at its end); gradients do not
                follow from layers' inputs and outputs, or samples change each other.
        """
        self._model_id = integer("model_id", model_id, 0, 2**32 - 1)
        return projecting(self, batch_size, micro_batches)

    def features(self, samples: Sequence[Tensor], model_id: int) -> Tensor:
        """Computes features with the scale of the dense kinds, E‖φ‖² = k ‖g‖², which a given ridge refers to.

        Returns:
            (B, k); float64 on the CPU if a row is beyond what float32 computes with.
        """
        if not len(samples[0]):
            return torch.zeros(0, self.proj_dim)
        self._model_id = model_id
        features = self._compute(samples)["features"]
        return features if self.projector.dense_scale == 1 else features * self.projector.dense_scale

    @property
    def is_sharded(self) -> bool:
        """True where all processes have to make the same passes over the model (FSDP2, tensor parallelism)."""
        return self._lockstep is not None or self._parallel is not None

    @contextmanager
    def turn(self, batch: Sequence[Tensor], kind: Kind = FORWARD) -> Iterator[None]:
        """Makes room for one pass over the model in the block: all processes that a model is sharded over make it.

        Args:
            batch: The samples, (B, ...) each.
            kind: The kind of the pass; weights require no gradients unless it says so.
        """
        if self._lockstep is None:
            yield
            return
        with self._lockstep.turn(kind, batch), requiring_grad(self.parameters.values(), ()):
            yield

    def finish_call(self) -> None:
        """Makes the passes over a sharded model that other processes have to make, until all have ended this call."""
        if self._lockstep is not None:
            with evaluation_mode(self.model), differentiable(self.model, fused=True):
                self._lockstep.finish_call()

    def finish(self) -> None:
        """Makes the passes that other processes have to make in this and more calls, until all have called this."""
        if self._lockstep is not None:
            with evaluation_mode(self.model), differentiable(self.model, fused=True):
                self._lockstep.finish()

    def _imitate(self, kind: Kind, sample: Sequence[Tensor]) -> None:
        """Makes a pass of a kind that another process has to make, on a batch of one, and drops its result."""
        assert isinstance(kind, tuple)
        details: list[Any]
        name, *details = kind
        sample = [x.to(self._device) for x in sample]
        with torch.enable_grad():
            if name == "stream":
                layers = [
                    TappedLayer(self.model.get_submodule(path), rule=_ANY if has_rule else None, names={})
                    for path, has_rule in details[0]
                ]
                with self._running(()), Taps(layers, 1, self._device, add=True).attached():
                    outputs = self._outputs(sample)
                    if outputs.requires_grad:  # taps show nothing unless they were given a place for it
                        torch.autograd.backward(outputs, torch.zeros_like(outputs))
            elif name == "alone":
                chosen = {own: self.selected[own] for own in details[0]}
                self._pass_alone(sample, torch.zeros(1), chosen, lambda own, gradient: None)
            elif name == "weightings":
                super()._ask_for_weightings([x.expand(details[0], *x.shape[1:]) for x in sample])
            else:
                with self._running(()), torch.no_grad():
                    self._outputs(sample)

    def _ask_for_weightings(self, batch: Sequence[Tensor]) -> Tensor:
        with self.turn(batch, ("weightings", len(batch[0]))):
            return super()._ask_for_weightings(batch)

    @property
    def _dtypes(self) -> set[torch.dtype]:
        return super()._dtypes if self._lockstep is None else super()._dtypes | self._lockstep.dtypes

    def _constants(self) -> dict[str, Tensor]:
        # shards are known by what they are, and require no gradients in a turn
        return super()._constants() if self._lockstep is None else dict(self.parameters)

    def _outputs_alone(self, batch: Sequence[Tensor]) -> Tensor:
        return torch.cat([self._forward(sample) for sample in singles_of(batch, self._stripping)])

    def _forward(self, batch: Sequence[Tensor]) -> Tensor:
        """Computes f of samples, (B,), by one pass without gradients."""
        with self.turn(batch), self._running(()), torch.no_grad():
            return self._outputs(batch).detach()

    def _compute(self, batch: Sequence[Tensor]) -> dict[str, Tensor]:
        if not self.is_sharded:
            return super()._compute(batch)
        try:
            return super()._compute(batch)
        except Exception as error:
            if is_out_of_memory(error):
                raise RuntimeError(
                    f"memory ran out in a pass over {len(batch[0])} samples, which the other processes of a sharded "
                    "model are in too, so that it cannot be made again in halves; give smaller batches, or a smaller "
                    "memory_budget"
                ) from error
            raise

    def _differentiate(self, batch: Sequence[Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """Computes the features of a batch, (B, k), and f of each sample, (B,), detached."""
        task: Any = self.task
        if self._tells_tokens:
            self._require_padding_at_end(batch)
        if self._tells_tokens or self._parallel is not None or not hasattr(task, "text_lengths"):
            features, outputs = self._differentiate_group(batch)
            return {"features": features}, outputs
        groups = group_by_length(task.text_lengths(batch).cpu())
        results = []
        for rows in groups:
            group = [x[rows.to(x.device)] for x in batch]
            results.append(self._differentiate_group(task.without_spare_padding(group)))
        order = torch.cat(groups).argsort()
        features = torch.cat([features for features, _ in results])
        outputs = torch.cat([outputs for _, outputs in results])
        return {"features": features[order.to(features.device)]}, outputs[order.to(outputs.device)]

    @property
    def _tells_tokens(self) -> bool:
        """True where each token has numbers of its own."""
        return self._per_token or self._direction is not None

    def _require_padding_at_end(self, batch: Sequence[Tensor]) -> None:
        """Refuses texts that are padded at the front, whose tokens models see in other places."""
        task: Any = self.task
        if not hasattr(task, "without_spare_padding"):
            return
        moved = task.without_spare_padding(batch)
        if not all(torch.equal(x[:, : y.shape[1]] if x.ndim > 1 else x, y) for x, y in zip(batch, moved, strict=True)):
            raise ValueError("batch must be padded at the end, not at the front, for its tokens to be told apart")

    def _differentiate_group(self, batch: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Computes the features of some samples of a batch, (B, k), and f of each, (B,), detached."""
        features, outputs = self._differentiate_with(batch, torch.ones(len(batch[0])))
        return (features if self._moments is not None else self._rescaled(batch, features)), outputs

    def _rescaled(self, batch: Sequence[Tensor], features: Tensor) -> Tensor:
        """Computes rows again that are beyond what float32 computes with, from multiples of f by powers of two."""
        largest = features.detach().abs().amax(1).double().cpu().numpy()
        chosen = np.flatnonzero(~((largest >= 2.0**-60) & (largest <= 2.0**100)))
        if not len(chosen):
            return features
        exponents = exponents_of(largest[chosen]).astype(np.int64)
        exponents[largest[chosen] == 0] = -100
        exponents[~np.isfinite(largest[chosen])] = 100
        some = [x[torch.from_numpy(chosen).to(x.device)] for x in batch]
        again, _ = self._differentiate_with(some, torch.from_numpy(np.ldexp(1.0, -exponents)))
        again = again.detach().double().cpu()
        wide = features.detach().double().cpu()
        good = again.isfinite().all(1) & again.any(1)
        if not good.any():
            return features
        rows = torch.from_numpy(chosen)[good]
        wide[rows] = again[good] * torch.from_numpy(np.ldexp(1.0, exponents))[good].unsqueeze(1)
        return wide

    def _differentiate_with(self, batch: Sequence[Tensor], seeds: Tensor) -> tuple[Tensor, Tensor]:
        """Computes the features of Σ_b seeds_b f_b, (B, k), and f of each sample, (B,), detached."""
        check: _Check | None = None
        if self._parallel is not None and not self._parallel.is_compared:
            self._parallel.compare(self._sketched_alone(batch, seeds, 0, list(self.selected))[0].values)
        while not self.singly >= set(self.selected):
            try:
                if check is None and self._is_due(len(batch[0])):
                    check = self._begin_check(batch, seeds)
                streamed = self._stream(batch, seeds, check)
            except Exception as error:
                known = (RandomOutputsError, PaddingError, NoTokensError)
                if self.is_sharded or is_out_of_memory(error) or isinstance(error, known):
                    raise
                if not self._adds and "modified inplace" in str(error):
                    self._adds = True
                    continue
                return self._after_failure(batch, seeds, error)
            if streamed is not None:
                return streamed
        if self._tells_tokens and self._is_alone:
            raise NoTokensError(f"batch must be one whose tokens can be told apart, but {COUPLED}")
        sums = self._new_sums(batch)
        outputs = self._add_alone(batch, list(self.selected), seeds, sums.add_whole)
        return sums.result(self._device), outputs

    def _stream(self, batch: Sequence[Tensor], seeds: Tensor, check: _Check | None) -> tuple[Tensor, Tensor] | None:
        """Computes features and outputs by one pass over the batch; returns None once it must be repeated."""
        count = len(batch[0])
        singly = self.singly
        streamed = [name for name in self.selected if name not in singly]
        sketches = None
        if check is not None:
            sketches = Sketches(self.columns, check.sample, streamed, check.expected.exponents)
        layers = [known for known in self._layers if not singly.issuperset(known.names.values())]
        # modules that gather their weights take no views as their outputs
        taps = Taps(
            layers,
            count,
            self._device,
            omitted=singly,
            add=self._adds or self._lockstep is not None,
            known_as_shared={split.name for split in self._splits if split.is_shared},
            parallel=self._parallel,
        )
        sums = self._new_sums(batch, sketches, taps.is_whole)
        with self.turn(batch, self._kind_of(layers)), self._running(()), taps.attached():
            outputs = self._outputs(batch)
            taps.run_backward(outputs, self._weighted(seeds, outputs, batch), sums.add)
        sums.flush()
        outputs = outputs.detach()
        if unexplained := self._union(taps.unexplained - singly):
            self._fall_back(unexplained)
            return None
        if check is None and count > 1 and not taps.splits <= self._splits:
            self._unchecked = SAMPLES_A_CHECK  # a batch of another shape may be one that a rule does not know
            return None
        if check is not None and sketches is not None:
            if not self._agree(batch, check, outputs):
                self._stay_alone()
                return None
            if failed := self._union(self._differing(sketches, check.expected)):
                self._fall_back(failed)
                return None
            self._unchecked = 0
            if count > 1:  # a sample in a batch of its own says nothing about those of others
                self._splits |= taps.splits
                self._compared_all = True
        self._unchecked += count
        if singly:
            alone = self._add_alone(batch, [name for name in self.selected if name in singly], seeds, sums.add_whole)
            if differ(alone, outputs, self._output_tolerance):
                self._stay_alone()
                return None
            outputs = alone
        return sums.result(self._device), outputs

    def _kind_of(self, layers: Iterable[TappedLayer]) -> Kind:
        """Names a pass with taps on some layers."""
        if self._lockstep is None:
            return ()
        paths = {module: path for path, module in self.model.named_modules()}
        return "stream", tuple((paths[known.layer], known.rule is not None) for known in layers)

    @contextmanager
    def _running(self, chosen: Iterable[Tensor]) -> Iterator[None]:
        """Has the model run as it is written, and `chosen` parameters alone require gradients."""
        with ExitStack() as modes:
            modes.enter_context(restored(self.model))
            modes.enter_context(uncompiled(self.model))
            modes.enter_context(no_key_caches(self.model))
            modes.enter_context(checkpointing(self.model))
            modes.enter_context(requiring_grad(self.parameters.values(), chosen))
            yield

    def _new_sums(
        self,
        batch: Sequence[Tensor],
        sketches: Sketches | None = None,
        is_whole: Callable[[str], bool] = lambda name: True,
    ) -> Sums:
        """Starts the sums that the pieces of a batch's gradients go to."""
        count = len(batch[0])
        layout = self._layout
        columns = self.columns if layout is None else layout.columns
        common = _Common(model_id=self._model_id, slice_bytes=self.slice_bytes, sketches=sketches)
        if self._direction is not None:
            return TokenShares(
                self.projector,
                columns,
                layout,
                self._direction,
                count,
                _tokens_of(batch),
                is_projected=not self._blocks,
                **common,
            )
        if layout is None:
            sums = FeatureSums(self.projector, columns, count, parallel=self._parallel, **common)
            if self._moments is None:
                return sums
            shapes = {name: parameter.shape for name, parameter in self.selected.items()}
            return StepSums(sums, self._moments, shapes, count, self._device, is_whole)
        if self._per_token:
            return TokenSums(self.projector, layout, count, _tokens_of(batch), is_projected=not self._blocks, **common)
        inner: Sums
        if self._blocks:
            inner = BlockSums(columns, count, layout.dim, self.slice_bytes)
        else:
            # which sees sketches, and no gradients to check
            inner = FeatureSums(
                self.projector, columns, count, model_id=self._model_id, slice_bytes=self.slice_bytes, sketches=None
            )
        return TwoSidedSums(layout, inner, seed=self.projector.seed, **common)

    def _weighted(self, seeds: Tensor, outputs: Tensor, batch: Sequence[Tensor]) -> Tensor:
        """Returns the factors of f that are differentiated, (B,): with moments, those of the negative loss."""
        seeds = seeds.to(outputs)
        if self._moments is None:
            return seeds
        if weighs_by_outputs(self.task):
            weightings = self.task.get_weightings(outputs.detach(), copy_tensors(batch))
        else:
            weightings = self._own_weightings(batch)
        return seeds * weightings.detach().reshape(-1).to(outputs)

    def _union(self, names: Collection[str]) -> Collection[str]:
        """Adds the names that other processes have which have parts of the model."""
        return names if self._parallel is None else self._parallel.union(names)

    def _add_alone(
        self, batch: Sequence[Tensor], names: Sequence[str], seeds: Tensor, take: Callable[[str, Piece, int], None]
    ) -> Tensor:
        """Differentiates with respect to some parameters by a forward and a backward pass for each sample.

        Args:
            batch: The samples' tensors, (B, ...) each.
            names: The parameters.
            seeds: Factors of f, (B,).
            take: Takes each gradient, which is freed then.

        Returns:
            f of each sample, (B,), detached.
        """
        outputs: list[Tensor] = []
        chosen = {name: self.selected[name] for name in names}
        for sample, single in enumerate(singles_of(batch, self._stripping)):

            def take_gradient(name: str, gradient: Tensor, sample: int = sample) -> None:
                if self._parallel is not None:
                    gradient = self._parallel.local_gradient(name, gradient)
                dense = gradient if gradient.layout == torch.strided else gradient.to_dense()
                if dense.numel():  # or this process has no part of it
                    take(name, Whole(dense.unsqueeze(0)), sample)

            with self.turn(single, ("alone", tuple(names))):
                outputs.append(self._pass_alone(single, seeds[sample : sample + 1], chosen, take_gradient))
        return torch.cat(outputs)

    def _pass_alone(
        self,
        single: Sequence[Tensor],
        seed: Tensor,
        chosen: Mapping[str, Tensor],
        take: Callable[[str, Tensor], None],
        evaluate: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """Differentiates one sample with respect to some parameters.

        Args:
            single: The sample's tensors, (1, ...) each.
            seed: The factor of f, (1,), or the gradient of what `evaluate` returns.
            chosen: The parameters, by name.
            take: Takes each gradient, which is freed then.
            evaluate: Computes something else than f of the sample.

        Returns:
            f, (1,), or the other thing, detached.
        """
        before = {name: parameter.grad for name, parameter in chosen.items()}
        handles: dict[Tensor, Any] = {}

        def hook(name: str, parameter: Tensor) -> None:
            """Has the gradient of a parameter taken; of one that is sharded, that of what is gathered for it."""

            @torch.no_grad()
            def take_gradient(parameter: Tensor) -> None:
                gradient = parameter.grad
                parameter.grad = None
                assert gradient is not None
                take(name, gradient)

            if parameter not in handles:
                handles[parameter] = parameter.register_post_accumulate_grad_hook(take_gradient)  # type: ignore[no-untyped-call]

        with ExitStack() as modes:
            modes.enter_context(self._running(chosen.values()))
            if self._lockstep is not None:
                modes.enter_context(self._lockstep.gathered(chosen, hook))
            try:
                for name, parameter in chosen.items():
                    parameter.grad = None
                    hook(name, parameter)
                output = self._outputs(single) if evaluate is None else evaluate()
                if output.requires_grad:
                    weighted = self._weighted(seed, output, single) if evaluate is None else seed.to(output)
                    torch.autograd.backward(output, weighted)
            finally:
                for handle in handles.values():
                    handle.remove()
                for name, parameter in chosen.items():
                    parameter.grad = before[name]
        return output.detach()

    def _evaluate(self, batch: Sequence[Tensor]) -> Tensor:
        if self._is_alone or not hasattr(self.task, "get_outputs"):
            return self._outputs_alone(batch)
        return self._forward(batch)

    def _is_due(self, count: int) -> bool:
        """Tells if a batch of so many samples is to be checked."""
        return self._unchecked + count > SAMPLES_A_CHECK

    def _begin_check(self, batch: Sequence[Tensor], seeds: Tensor) -> _Check:
        """Differentiates one sample of a batch alone; of the first batch, evaluates all samples alone."""
        count = len(batch[0])
        sample = int(torch.randint(count, (), generator=self._choices, device="cpu"))
        streamed = [name for name in self.selected if name not in self.singly]
        expected, outputs = self._sketched_alone(batch, seeds, sample, streamed)
        if self._parallel is not None:
            self._parallel.compare(expected.values)
        if not self._compared_all and count > 1:
            outputs = self._outputs_alone(batch)
        return _Check(sample, outputs, expected)

    def _sketched_alone(
        self, batch: Sequence[Tensor], seeds: Tensor, sample: int, names: list[str]
    ) -> tuple[Sketches, Tensor]:
        """Differentiates one sample of a batch alone; returns sketches of its gradients, and its f, (1,)."""
        sketches = Sketches(self.columns, sample, names, {})
        outputs = self._add_alone(
            [x[sample : sample + 1] for x in batch],
            names,
            seeds[sample : sample + 1],
            lambda name, piece, start: sketches.add(name, piece, sample + start),
        )
        return sketches, outputs

    def _agree(self, batch: Sequence[Tensor], check: _Check, outputs: Tensor) -> bool:
        """Compares f of samples in a batch with f of them alone.

        Raises:
            RandomOutputsError: f of a sample alone is random.
        """
        expected = outputs.clone()
        if len(check.outputs) == len(outputs):
            expected = check.outputs
        else:
            expected[check.sample] = check.outputs[0]
        if not differ(expected, outputs, self._output_tolerance):
            return True
        worst = int((expected.double() - outputs.double()).abs().nan_to_num(torch.inf).argmax())
        single = [x[worst : worst + 1] for x in batch]
        first = self._outputs_alone(single)
        second = self._outputs_alone(single)
        if differ(first, second, self._output_tolerance) or differ(
            first, expected[worst : worst + 1], self._output_tolerance
        ):
            raise RandomOutputsError(RANDOM)
        self._refuse_padding(single, first, outputs[worst : worst + 1])
        return False

    def _refuse_padding(self, single: Sequence[Tensor], alone: Tensor, in_batch: Tensor) -> None:
        """Refuses a model whose f of a sample depends on how far the sample is padded.

        Raises:
            PaddingError: So it is; the message says what may help.
        """
        if not hasattr(self.task, "without_spare_padding"):
            return
        padded = self._forward(single)
        if differ(alone, padded, self._output_tolerance) and not differ(in_batch, padded, self._output_tolerance):
            used = getattr(getattr(self.model, "config", None), "_attn_implementation", None)
            other = "sdpa" if used == "eager" else "eager"
            raise PaddingError(
                f"padding changes the model's outputs: f of a sample is {alone.item():.6g} alone and "
                f"{padded.item():.6g} padded to {single[0].shape[1]} positions; load the model with "
                f"attn_implementation={other!r} (it has {used!r}), or give batches of texts of one length"
            )

    def _differing(self, found: Sketches, expected: Sketches) -> Collection[str]:
        """Returns the names of the parameters whose gradients differ by more than rounding explains."""
        if not all(math.isfinite(norm) for norm in expected.norms.values()):
            return []
        dtypes = {*self._dtypes, torch.float32}  # in which sketches are computed
        return differing(
            found,
            expected,
            tolerance=tolerance_of(GRADIENT_ROUNDINGS, dtypes),
            negligible=tolerance_of(NEGLIGIBLE_ROUNDINGS, dtypes),
        )

    def _after_failure(self, batch: Sequence[Tensor], seeds: Tensor, error: Exception) -> tuple[Tensor, Tensor]:
        """Differentiates samples alone from now on, if that works where a batch has failed."""
        sums = self._new_sums(batch)
        try:
            outputs = self._add_alone(batch, list(self.selected), seeds, sums.add_whole)
        except (ValueError, TypeError) as of_one:
            if type(error) is type(of_one):
                raise error from None  # it speaks of the whole batch
            raise
        self._stay_alone(f"layers cannot be differentiated in a batch ({(str(error) or repr(error)).splitlines()[0]})")
        return sums.result(self._device), outputs

    def _stay_alone(self, reason: str = COUPLED) -> None:
        """Has samples computed alone from now on, and says so."""
        before = ""
        if reason is COUPLED and self._compared_all:
            before = (
                ". Samples that came before in batches may be wrong: featurize them again, by TRAKer(chunk_size=1) and "
                "load_checkpoint(..., _allow_featurizing_already_registered=True)"
            )
        logger.warning(
            "%s; each sample is computed alone from here on, in a forward and a backward pass of its own%s",
            reason,
            before,
        )
        self._is_alone = True

    def _fall_back(self, failed: Collection[str]) -> None:
        """Has the gradients of parameters computed in the next way from now on; says so if that is sample by sample."""
        before = self.singly
        ruled = {name for known in self._layers if known.rule is not None for name in known.names.values()}
        for name in failed:
            now = self._ways.get(name, _Way.RULE if name in ruled else _Way.LAYER)
            self._ways[name] = _Way(now.value + 1)
        self._assign_layers()
        singly = self.singly - before
        logger.debug("gradients of %s do not follow by the layer's rule", listed(list(failed)))
        if not singly:
            return
        layers: dict[str, None] = {}
        for name in self.selected:
            if name in singly:
                path = name.rpartition(".")[0]
                layers[f"{path or 'the model itself'} ({type(self.model.get_submodule(path)).__name__})"] = None
        share = sum(self.columns[name].count for name in singly) / self.grad_dim
        logger.warning(
            "gradients of %s do not follow from the layer's inputs and outputs in a batch; these %.2g%% of the "
            "gradient are computed sample by sample from here on, by a forward and a backward pass for each, which "
            "takes about twice as long in all",
            listed(list(layers)),
            100 * share,
        )


class _Common(TypedDict):
    """The arguments that all sums take."""

    model_id: int
    slice_bytes: int
    sketches: Sketches | None


def _tokens_of(batch: Sequence[Tensor]) -> int:
    """Counts the tokens of each sample, T: the second dimension of the first tensor."""
    if batch[0].ndim < 2:
        raise ValueError(f"batch[0] must be (B, T, ...) to have tokens, not {tuple(batch[0].shape)}")
    return batch[0].shape[1]


class _Way(enum.Enum):
    """The ways to the gradient of a parameter, each tried where the one before it fails the check."""

    RULE = 0
    """By the rule of its layer."""

    LAYER = 1
    """By differentiating its layer by itself."""

    AROUND = 2
    """By differentiating the layer around its own, which may compute with it directly."""

    ALONE = 3
    """By differentiating the whole model, sample by sample."""


class _Check:
    """The gradients of one sample alone, which those of its batch are compared with.

    Attributes:
        sample: The sample's place in the batch.
        outputs: f of this sample alone, or of all samples of the first batch, (B,) or (1,).
        expected: Its gradients.
    """

    def __init__(self, sample: int, outputs: Tensor, expected: Sketches) -> None:
        self.sample = sample
        self.outputs = outputs
        self.expected = expected
