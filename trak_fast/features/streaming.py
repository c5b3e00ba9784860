"""Projected gradients of large models: each layer's gradients are projected the moment the backward pass makes them.

One forward and one backward pass over a batch serve all its samples. A tap on each layer (taps.py) gives the pieces of
its parameters' per-sample gradients, of which some rows at a time are formed, projected at their own columns of the
matrix, and dropped. Projection is linear, so tied weights, layers that are called several times, and rows of any number
add up to the projection of the whole gradient, which is never there. Batches are checked (checked.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..arguments import checked_batch, choice, integer
from ..gradients.adam import AdamMoments
from ..gradients.experts import experts_rule_of
from ..gradients.modes import lock_of
from ..gradients.parameters import listed, parts_of, placed_columns, same_parts
from ..projection.projector import Projector
from ..scales import exponents_of, split
from ..tasks.base import Task, copy_buffers, copy_tensors, evaluation_mode, restored, weighs_by_outputs
from ..tasks.batches import Batch, batch_tensors
from ..tasks.registry import resolve_task
from . import memory
from .checked import CheckedStream
from .groups import group_by_length
from .metric import DRAWS, Metric, Moments, MomentSums, SquareSums, WhitenedSums, vocabulary_of
from .products import Gradient, GradientSums, ProductSums
from .sketches import Sketches, Sums
from .stages import StagePass, projecting
from .steps import StepSums
from .sums import FeatureSums
from .tokens import TokenShares, TokenSums
from .two_sided import BlockSums, Layout, TwoSidedSums, side_of

SLICE_BYTES = 64 << 20
"""Bytes of per-sample gradients that are formed at a time unless a budget says otherwise."""

OptimizerState = Optimizer | Mapping[str, Any] | str | os.PathLike[str]
"""An optimizer, its state dict, or the path of a file with one."""


class GradientProjector(CheckedStream):
    """Projects the gradients of samples, which never exist as a whole: features of models of any size.

    The result is that of `trak_fast.project` on the per-sample gradients of the task's model output f, flattened in the
    model's order of parameters, up to rounding: for any `nn.Module`, whole or with adapters (LoRA), frozen in part,
    with activation checkpointing, in mixed or half precision.

    Attributes:
        grad_dim: Size of a sample's gradient, D.
        proj_dim: Size of a feature, k.
        columns: The columns of the projection matrix that belong to each parameter, (first, count) by name.
        metric: The metric that gradients are multiplied by the root of; None before it is made, or where there is none.
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
        metric: str | None = None,
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
            metric: "kfac" multiplies gradients by the inverse root of their Fisher matrix in K-FAC's approximation
                before they are projected (features/metric.py), which a task with `draw_labels` is needed for: it is
                made of the first batch, or by `fit_metric`. None takes them as they are.

        Raises:
            ValueError: A number is out of range, `grad_wrt` fits no parameter, `optimizer_state` fits another model or
                is given with "two_sided", `sketch_side` is given for "full", or `per` is "token" without sketches or
                for a task without `get_outputs`; `columns` do not fit the parameters, or are given with sketches; or a
                sharded model is to have what needs it whole; or `metric` is given with `optimizer_state` or for a task
                that draws no labels.
            TypeError: An argument has the wrong type.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
        self.slice_bytes = SLICE_BYTES
        if memory_budget is not None:
            self.slice_bytes = integer("memory_budget", memory_budget, 1, 2**62)
        self._given_columns = columns
        self._side = side_of(sketch, sketch_side)
        self._per_token = choice("per", per, ("sample", "token")) == "token"
        if self._per_token and self._side is None:
            raise ValueError(
                'per must be "sample" with sketch="full", not "token": to form and project a gradient for each token '
                'takes as many times as long as there are tokens; add sketch="two_sided"'
            )
        self.metric: Metric | None = None
        self._fitting: Moments | None = None  # where the moments of a batch go instead of features
        self._measured: dict[str, float] | None = None  # where the squares of gradients go instead of features
        self._collected: Gradient | None = None  # where the gradient of a sample goes instead of features
        self._multiplied: Gradient | None = None  # the gradient whose products with those of samples are computed
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
        self._has_metric = metric is not None and choice("metric", metric, ("kfac",)) == "kfac"
        if self._has_metric:
            self._require_metric()
        self.precondition(optimizer_state)
        self._model_id = 0

    def _require_metric(self) -> None:
        """Refuses a metric where there can be none."""
        if not hasattr(self.task, "draw_labels"):
            raise ValueError(
                f'metric must be None for a task without draw_labels such as {type(self.task).__name__}, not "kfac"'
            )
        if self.is_sharded or self._given_columns is not None:
            raise ValueError('metric must be None for a sharded model or a part of one, not "kfac"')

    @property
    def has_metric(self) -> bool:
        """True where gradients are multiplied by the root of a metric."""
        return self._has_metric

    def fit_metric(self, batch: Batch, chunk_size: int | None = None) -> None:
        """Makes the metric from samples, which takes a pass for each of the labels that the model draws for them.

        Args:
            batch: The tensors that the task asks for, (B, ...) each.
            chunk_size: Samples at a time; all by default.

        Raises:
            ValueError: There is to be no metric, or gradients are not finite.
            RuntimeError: As in `project`.
            TypeError: As in `project`.
        """
        if not self._has_metric:
            raise ValueError('metric must be "kfac" for fit_metric, not None')
        with lock_of(self.model):
            self.metric = self._fitted(batch, chunk_size)

    def _fitted(self, batch: Batch, chunk_size: int | None = None) -> Metric:
        """Computes the metric of samples."""
        task: Any = self.task
        batch = [x.to(self._device) for x in checked_batch(batch_tensors(batch, self.task))]
        stacked = {
            id(parameter)
            for layer in self.model.modules()
            if experts_rule_of(layer) is not None
            for parameter in layer.parameters()
        }
        shapes = {name: _matrix_shape(x, is_stacked=id(x) in stacked) for name, x in self.selected.items()}
        moments = Moments(shapes, vocabulary_of(self.model))
        count = len(batch[0])
        at_a_time = chunk_size or count
        generator = torch.Generator("cpu").manual_seed(0)
        self._take_replaced()
        self._fitting = moments
        try:
            for _ in range(DRAWS):
                uniform = torch.rand(batch[0].shape, generator=generator, device="cpu")

                def add(part: slice, uniform: Tensor = uniform) -> None:
                    some = [x[part] for x in batch]
                    if hasattr(task, "without_spare_padding"):  # of longer samples in other parts
                        some = task.without_spare_padding(some)
                    with self._running(()), torch.no_grad(), restored(self.model):
                        buffers = copy_buffers(self.buffers)
                        drawn = task.draw_labels(self.model, self.parameters, buffers, some, uniform[part])
                    self._compute(drawn)

                with evaluation_mode(self.model):
                    at_a_time = memory.halving_on_oom(count, at_a_time, add)
            self._fitting = None
            metric = moments.metric()
            squares: dict[str, float] = {}
            self.metric, self._measured = metric, squares

            def measure(part: slice) -> None:
                self._compute([x[part] for x in batch])

            with evaluation_mode(self.model):
                memory.halving_on_oom(count, at_a_time, measure)
        finally:
            self.metric = self._fitting = self._measured = None
        return metric.balanced(squares, moments.vocabulary)

    def precondition(self, optimizer_state: OptimizerState | None) -> None:
        """Takes another `optimizer_state`, of another checkpoint for example; None: gradients as they are."""
        self._moments = None
        if optimizer_state is not None:
            self.require_steps()
            self._moments = AdamMoments.from_optimizer_state(optimizer_state, self.model, self.selected)

    def require_steps(self) -> None:
        """Checks that features can be made of Adam's steps.

        Raises:
            ValueError: They cannot.
        """
        if self._has_metric:
            raise ValueError('metric must be None with optimizer_state, not "kfac": steps have a metric of their own')
        if self._layout is not None:
            raise ValueError(
                'optimizer_state must be None with sketch="two_sided": a step of Adam is no product of factors; '
                'sketch="full" takes it'
            )
        if self.is_sharded:
            raise ValueError(
                "optimizer_state must be None for a sharded model, of whose moments processes have parts; give a whole "
                "model"
            )

    @property
    def moments(self) -> AdamMoments | None:
        """Adam's moments of the model's parameters; None where gradients are as they are."""
        return self._moments

    def describe(self) -> dict[str, Any]:
        """Describes the features for their manifest."""
        described: dict[str, Any] = {
            "gradient_computer": "exact",
            "sketch": "full" if self._layout is None else f"two_sided {self._layout.side}",
            "preconditioner": None if self._moments is None else "adam",
        }
        if self._has_metric:
            described.update(metric="kfac")
        if self._blocks:  # which no other entry of the manifest tells
            described.update(seed=self.projector.seed, matrix_definition=self.projector.definition)
        return described

    def compute_loss_grad(self, batch: Sequence[Tensor]) -> Tensor:
        """Computes the weighting Q of each sample, (B,) or (B, 1); 1 with moments, whose steps have Q in them."""
        with lock_of(self.model):
            weightings = super().compute_loss_grad(batch)
        return torch.ones_like(weightings) if self._moments is not None else weightings

    def load_model_params(self, model: nn.Module) -> None:
        """Takes the parameters and buffers of `model`, without copying them."""
        super().load_model_params(model)
        self.metric = None
        self._fitting = None
        if self._side is not None and (self._parallel is not None or self._given_columns is not None):
            raise ValueError(
                'sketch must be "full" for a part of a model, by tensor parallelism or with columns, not "two_sided": '
                "a sketch is made of a layer's whole input and output"
            )
        if self._given_columns is not None:
            self.columns = placed_columns(self.columns, self._given_columns)
        self._layout = None if self._side is None else Layout(model, self.selected, self._side)
        self._parts = parts_of(model)

    @property
    def proj_dim(self) -> int:
        """Size of a feature, k."""
        return self.projector.proj_dim

    @property
    def is_unprojected(self) -> bool:
        """True where features are sketches as they are, with E‖φ‖² = ‖g‖²."""
        return self._blocks

    @property
    def sketched_dim(self) -> int:
        """Numbers that a sample's gradient is made of when it is projected: D, or those of the sketches."""
        return self.grad_dim if self._layout is None else self._layout.dim

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
        products = self._compute_rows(batch, model_id, torch.float64, scaled.mantissas[0].float())
        return products * 2.0 ** int(scaled.exponents[0])

    def exact_products(self, target: Batch, batch: Batch) -> Tensor:
        """Computes inner products of one sample's gradient with those of others, none of which is projected.

        Gradients are multiplied by the metric's root first, where there is one.

        Args:
            target: The tensors of the one sample, (1, ...) each.
            batch: Those of the others, (B, ...) each.

        Returns:
            (B,) float64, on the model's device: the mean of ⟨φ_b, φ_target⟩ / E‖P‖² over all projections.

        Raises:
            ValueError: `target` is not one sample, or features are steps of Adam.
            RuntimeError: As in `project`.
            TypeError: As in `project`.
        """
        if self._moments is not None or self.is_sharded:
            raise ValueError("exact_products needs gradients of a whole model: leave out optimizer_state and sharding")
        if len(batch_tensors(target, self.task)[0]) != 1:
            raise ValueError("target must be one sample, of tensors (1, ...)")
        gradient: Gradient = {}
        with lock_of(self.model):
            try:
                self._collected = gradient
                self._compute_rows(target, 0, torch.float32)
                self._collected, self._multiplied = None, gradient
                return self._compute_rows(batch, 0, torch.float64)[:, 0]
            finally:
                self._collected = self._multiplied = None

    def _require_batches(self, user: str) -> None:
        if not hasattr(self.task, "get_outputs"):
            raise ValueError(
                f"task must have get_outputs for {user}, not be {type(self.task).__name__}, of single samples; "
                "see BatchOutputs"
            )

    def _compute_rows(self, batch: Batch, model_id: int, dtype: torch.dtype, direction: Tensor | None = None) -> Tensor:
        """Computes the numbers of each sample, (B, ...), one thread after the other."""
        with lock_of(self.model):
            self._direction = direction
            try:
                return self._compute_locked(batch, integer("model_id", model_id, 0, 2**32 - 1), dtype)
            finally:
                self._direction = None

    def _compute_locked(self, batch: Batch, model_id: int, dtype: torch.dtype) -> Tensor:
        """Computes the numbers of each sample, (B, ...); of halves of the batch if memory runs out."""
        self._model_id = model_id
        batch = [x.to(self._device) for x in checked_batch(batch_tensors(batch, self.task))]
        count = len(batch[0])
        self._take_replaced()
        if self._has_metric and self.metric is None and count:
            self.metric = self._fitted(batch)
        self.buffers = {name: buffer.detach() for name, buffer in self.model.named_buffers()}
        rows = torch.zeros(count, self._width(batch), dtype=dtype, device=self._device)

        def compute(part: slice) -> None:
            rows[part] = self._compute([x[part] for x in batch])["features"]

        with evaluation_mode(self.model):
            memory.halving_on_oom(count, count, compute)
        self.finish_call()
        return rows

    def _take_replaced(self) -> None:
        """Takes the model's parameters and modules anew if others have come in their places.

        Raises:
            ValueError: Parameters are missing, new or of other shapes, so that features would not be comparable.
        """
        if self.is_sharded or same_parts(self._parts, parts_of(self.model)):  # shards change places in each pass
            return
        now = dict(self.model.named_parameters())
        changed = [name for name, p in self.selected.items() if name not in now or now[name].shape != p.shape]
        changed += [name for name in now if name not in self.parameters]
        if changed:
            raise ValueError(
                f"model must keep the names and shapes of its parameters, not change those of {listed(changed)}; make "
                "another GradientProjector"
            )
        metric = self.metric
        self.load_model_params(self.model)
        self.metric = metric

    def _width(self, batch: Sequence[Tensor]) -> int:
        """Counts the numbers of each sample: k, T · k or T."""
        if self._collected is not None:
            return 0
        if self._multiplied is not None:
            return 1
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
        with lock_of(self.model):
            self._model_id = model_id
            if self._has_metric and self.metric is None:
                raise RuntimeError("call fit_metric before features")
            features = self._compute(samples)["features"]
        return features if self.projector.dense_scale == 1 else features * self.projector.dense_scale

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
        if any(x is not None for x in (self._collected, self._multiplied, self._fitting, self._measured)):
            return False
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
        is_linear = self._moments is None and features.shape[1] > 0
        return (self._rescaled(batch, features) if is_linear else features), outputs

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

    def _new_sums(
        self,
        batch: Sequence[Tensor],
        sketches: Sequence[Sketches] = (),
        is_whole: Callable[[str], bool] = lambda name: True,
    ) -> Sums:
        """Starts the sums that the pieces of a batch's gradients go to."""
        count = len(batch[0])
        if self._fitting is not None:
            return MomentSums(self._fitting, count, slice_bytes=self.slice_bytes, sketches=sketches)
        if self.metric is None:
            return self._new_plain_sums(batch, sketches, is_whole)
        sums = self._new_plain_sums(batch, (), is_whole)
        return WhitenedSums(sums, self.metric, slice_bytes=self.slice_bytes, sketches=sketches)

    def _new_plain_sums(
        self, batch: Sequence[Tensor], sketches: Sequence[Sketches], is_whole: Callable[[str], bool]
    ) -> Sums:
        """Starts sums of gradients as they are, or of steps."""
        count = len(batch[0])
        layout = self._layout
        columns = self.columns if layout is None else layout.columns
        if self._measured is not None:
            return SquareSums(self._measured, count, slice_bytes=self.slice_bytes, is_whole=is_whole)
        if self._collected is not None:
            sizes = {name: parameter.numel() for name, parameter in self.selected.items()}
            return GradientSums(self._collected, sizes, sketches=sketches)
        if self._multiplied is not None:
            return ProductSums(self._multiplied, count, slice_bytes=self.slice_bytes, sketches=sketches)
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
                self.projector, columns, count, model_id=self._model_id, slice_bytes=self.slice_bytes, sketches=()
            )
        return TwoSidedSums(layout, inner, seed=self.projector.seed, **common)

    def _weighted(self, seeds: Tensor, outputs: Tensor, batch: Sequence[Tensor]) -> Tensor:
        """Returns the factors of f that are differentiated, (B,): those of the negative loss for steps and a metric."""
        seeds = super()._weighted(seeds, outputs, batch)
        if self._moments is None and self._fitting is None:
            return seeds
        if weighs_by_outputs(self.task):
            weightings = self.task.get_weightings(outputs.detach(), copy_tensors(batch))
        else:
            weightings = self._own_weightings(batch)
        return seeds * weightings.detach().reshape(-1).to(outputs)


class _Common(TypedDict):
    """The arguments that all sums take."""

    model_id: int
    slice_bytes: int
    sketches: Sequence[Sketches]


def _matrix_shape(parameter: Tensor, *, is_stacked: bool = False) -> tuple[int, int]:
    """Returns height and width of a parameter as a matrix: its first dimension by the others together.

    Args:
        parameter: The parameter.
        is_stacked: True for a stack of matrices, which is as wide as one of them.
    """
    if is_stacked:
        return parameter.numel() // parameter.shape[-1], parameter.shape[-1]
    height = parameter.shape[0] if parameter.ndim > 1 else 1
    return height, parameter.numel() // max(1, height)


def _tokens_of(batch: Sequence[Tensor]) -> int:
    """Counts the tokens of each sample, T: the second dimension of the first tensor."""
    if batch[0].ndim < 2:
        raise ValueError(f"batch[0] must be (B, T, ...) to have tokens, not {tuple(batch[0].shape)}")
    return batch[0].shape[1]
