"""TRAK's driver: gradients, projection, features on disk and scores, with the methods of traker's TRAKer."""

from __future__ import annotations

import itertools
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from .arguments import Indices, choice, integer, row_numbers
from .checkpoint_metrics import CheckpointMetrics
from .checkpoints import load_checkpoint
from .distributed import Ranks
from .features.computers import OptimizerStates, choose_computers, choose_metric
from .features.featurizer import Featurizer
from .features.metric import matrices_of
from .features.rotation import Rotation
from .features.sharded import WholeEntries
from .features.streaming import GradientProjector, OptimizerState
from .gradients import GradientComputer, select_parameters
from .gradients.base import Contents, description_of
from .projection.projector import NoProjection, Projector, ProjectorLike
from .recorder import Recorder
from .scales import beyond_float32
from .scoring.estimator import Estimator, EstimatorSettings, ridge_setting
from .scoring.gram import plain_arithmetic
from .scoring.saver import Saver
from .scoring.scores import ScoreFile, ScoreMatrix, unsaved_scores
from .scoring.top_scores import TopScores, merge_top_scores, top_scores
from .scoring.vectors import write_vectors
from .store.encodings import CODED, STORE_DTYPES
from .store.files import DENIED, read_array, temporary_name
from .store.folder import Store, check_name
from .store.manifest import digest, manifest_of
from .store.rows import Rows, require_same_samples
from .tasks import Batch, Task, batch_tensors, resolve_task

_FIXED = {
    "model": "model",
    "task": "task",
    "train_set_size": "train_set_size",
    "device": "device",
    "gradient_computer": "gradient_computer",
    "projector": "projector",
    "proj_dim": "proj_dim",
    "grad_dim": "grad_wrt",
    "store": "save_dir",
}
"""Attributes of `TRAKer` that a later assignment would not change the features by -> the arguments that do."""


def _setting(name: str) -> property:
    """Makes an attribute of `TRAKer` that is a setting of its estimator."""

    def read(traker: TRAKer) -> object:
        return getattr(traker._estimator.settings, name)

    def change(traker: TRAKer, value: object) -> None:
        if name == "lambda_reg":
            value = ridge_setting(cast("float | str | None", value))
        setattr(traker._estimator.settings, name, value)

    return property(read, change)


MANY_NUMBERS = 16384
"""Numbers of a feature in a metric from which on they are stored in few bits by default."""


def _is_size_of_sjlt(proj_dim: int) -> bool:
    """Tells if features of "sjlt" with its default of four entries a column may have this size."""
    return proj_dim >= 64 and proj_dim & (proj_dim - 1) == 0


def _chosen_store_dtype(store_dtype: str | None, use_half_precision: bool, default: str) -> str:
    """Returns the way to store features.

    Raises:
        ValueError: There is no such way, or `use_half_precision` asks for another one.
    """
    if store_dtype is None:
        return "float16" if use_half_precision else default
    if use_half_precision and store_dtype != "float16":
        raise ValueError(f'store_dtype must be "float16" with use_half_precision=True, not {store_dtype!r}')
    return choice("store_dtype", store_dtype, STORE_DTYPES)


def _chosen_proj_dim(grad_dim: int) -> int:
    """Returns the size of features in few bits: 131,072, or less where gradients are smaller; a power of two."""
    return max(64, min(131072, 1 << (grad_dim - 1).bit_length()))


class TRAKer:
    """Attributes a model's outputs to its training samples (Park et al., "TRAK", ICML 2023, section 3).

    With C checkpoints, τ(z)_i = (1/C Σ_c Q_i) · (1/C Σ_c φ(z) (X'X + λI)⁻¹ φ_i'): Q_i is the task's weighting of
    training sample i (1 − p for classification), φ = P ∇_θ f the projected gradient of the model output, and X has
    the training samples' φ as its rows. A positive score helps the target, a negative one harms it.

    The names of arguments and methods are those of traker 0.3.2, and they are called in its order: for each
    checkpoint `load_checkpoint` and `featurize`; `finalize_features`; for each checkpoint `start_scoring_checkpoint`
    and `score`; `finalize_scores`. A killed run is started again with the same calls: training samples whose
    features are stored are not featurized again.

    Where torchrun started several processes, each does its share of every step; all make the same calls with the same
    batches, and see the same `save_dir`. A process computes the samples in `rows(n)` and passes over the others.

    Attributes:
        proj_dim: Size of a feature, k. This and the next four cannot be assigned: the constructor's arguments set them.
        grad_dim: Size of a gradient, D.
        normalize_factor: √D, by which traker divides features.
        store: The features on disk.
        saver: The features in the arrangement of traker's `saver`, to read (`scoring.saver.Saver`).
        scores: The last result of `finalize_scores`.
        lambda_reg: The ridge, None for "auto"; like the next four, a change holds from the next scores on.
        curvature: See the constructor.
        shrink_weights: See the constructor.
        use_weights: See the constructor.
        normalize: See the constructor.
    """

    lambda_reg = _setting("lambda_reg")
    curvature = _setting("curvature")
    shrink_weights = _setting("shrink_weights")
    use_weights = _setting("use_weights")
    normalize = _setting("normalize")

    def __init__(
        self,
        model: nn.Module,
        task: str | Task | Callable[..., Tensor],
        train_set_size: int,
        save_dir: str | os.PathLike[str] = "./trak_results",
        load_from_save_dir: bool = True,
        device: str | torch.device | None = None,
        gradient_computer: type[GradientComputer] | None = None,
        projector: ProjectorLike | None = None,
        saver: None = None,
        score_computer: None = None,
        proj_dim: int | None = None,
        logging_level: int = logging.INFO,
        use_half_precision: bool = False,
        proj_max_batch_size: int | None = None,
        projector_seed: int = 0,
        grad_wrt: Iterable[str] | None = None,
        lambda_reg: float | str | None = "auto",
        *,
        proj_type: str | None = None,
        nonzeros: int | None = None,
        store_dtype: str | None = None,
        metric: str | None = "auto",
        chunk_size: int | None = None,
        memory_budget: int | None = None,
        sketch: str = "full",
        sketch_side: int | None = None,
        optimizer_state: OptimizerState | Mapping[int, OptimizerState] | None = None,
        distributed: bool | None = None,
        check_samples: bool = True,
        curvature: bool = True,
        shrink_weights: bool = True,
        normalize: bool = False,
        use_weights: bool = True,
    ) -> None:
        """Opens `save_dir`, or makes it.

        Args:
            model: The model. Checkpoints are loaded into it, in place of the weights that it has. It is run in
                evaluation mode; between calls its modules are in the mode that they were in.
            task: A name (see `tasks.TASKS`), a `Task`, or a function `f(model, *sample)` whose value is attributed and
                that is minus the training loss (`FunctionTask` takes another loss).
            train_set_size: Training samples, n.
            save_dir: Folder for features and scores.
            load_from_save_dir: If False, the stored features of a checkpoint are deleted when it is first loaded, and
                other checkpoints in the folder are ignored.
            device: The device to compute on; the model is moved there. By default, the model's.
            gradient_computer: A class with the constructor and methods of `gradients.GradientComputer`, such as
                `HookGradientComputer`, whose gradients are projected whole. By default they are never whole where the
                task computes batches (`get_outputs`, as all named ones do): `GradientProjector` projects each layer's
                as the backward pass makes them. Otherwise it is `gradients.FunctionalGradientComputer`.
            projector: An object with `proj_dim` (0: as many as parameters), `proj_type`, `project(grads, model_id)`
                and `free_memory()`. By default `trak_fast.Projector` with the arguments below.
            saver: Not supported; features are stored by `trak_fast.store`.
            score_computer: Not supported; scores are computed by `trak_fast.scoring`.
            proj_dim: Size of the projection, k; 0 for none. By default 2,048, with a metric 131,072,
                or the next power of two of `grad_dim` if that is less.
            logging_level: Level of the logger "trak_fast".
            use_half_precision: The same as store_dtype="float16".
            proj_max_batch_size: Has no effect: the projector takes any batch.
            projector_seed: Seed of the projection.
            grad_wrt: Names or patterns (`"head.*"`) of the parameters to differentiate, whether or not they require
                gradients; `["*"]` takes all. By default those that require gradients, with a metric the matrices among
                them but those of positions.
            lambda_reg: The ridge λ. "auto", or None: chosen for each checkpoint from its features and from how far
                those of the others differ (`scoring.ridge.auto_ridge`); with a metric, math.inf. 0: plain TRAK, with
                the least-norm solution where X'X is singular. With these, scores do not depend on the scale of P.
                math.inf: scores are inner products of features, divided by the mean squared norm of those of training
                samples. Another number means what it means in traker, whose features are P g/√D: λ is added to X'X/D.
                Its strength depends on k and D.
            proj_type: "rademacher", "normal" or "sjlt", a sparse matrix, by which projecting takes about as long as
                reading the gradients. Features of "sjlt" are multiplied by √(k / nonzeros), to the scale of the others.
            nonzeros: Entries in each column of "sjlt": 1, 2, 4 (the default) or 8; proj_dim / nonzeros must be a power
                of two from 16 on.
                By default "sjlt" with a metric where it has the size, else "rademacher".
            store_dtype: The way in which the numbers of training features are stored; those of targets are float32.
                "float32"; "float16", which changes features by up to 2^-11; "int8"; "1bit", a sign. For the last two
                features are rotated at random before, also in `saver`, which keeps inner products with targets free of
                bias (`store.encodings`). With "1bit" no X'X can be inverted. By default "float32"; with a metric and
                16,384 numbers or more "1bit", or "int8" if `lambda_reg` is a finite number.
            metric: "kfac": gradients are multiplied by the inverse root of their Fisher matrix in K-FAC's
                approximation, which is made of the first batch of each checkpoint or by `fit_metric`. None: gradients
                are as they are. "auto": "kfac" for causal and masked language modelling where the embedding or the
                output layer is among the parameters, gradients are streamed, the model is whole and there is no
                `optimizer_state`.
            chunk_size: Samples to differentiate at a time; by default as many of the batch as fit `memory_budget`.
            memory_budget: Bytes for gradients and for the results that computing them keeps; by default a quarter of
                the memory that is free, or half of it on a CUDA device. One sample is taken at a time where it is less
                than that needs.
            sketch: "two_sided" replaces the gradients of linear layers' weights by sketches made from their factors,
                which takes a fraction of the time of forming and projecting them; "full" does not
                (docs/two-sided.md). With proj_dim=0 features are the sketches as they are.
            sketch_side: Rows and columns of a sketch at most; 64 by default.
            optimizer_state: An Adam or AdamW optimizer's state, or a dict with one for each model_id (an optimizer, its
                state dict, or the path of an `optimizer.pt`). The gradients of training samples' losses are replaced by
                the steps that Adam would make with them, as LESS does (`gradients.adam.AdamMoments`), which have Q in
                them: all weights are 1. Targets keep their gradients.
            distributed: Shares the work with the other processes of torch.distributed; by default if there are any.
            check_samples: Refuses samples that are not those that their rows were stored from, in a run before or at
                another checkpoint; a digest of each is stored. False takes them as they come, with augmentation for
                example.
            curvature: With lambda_reg="auto", weighs the training samples in X'X by the curvature of their loss, where
                the task knows it (`get_loss_curvature`; classification does). X'RX is then the Hessian of the
                linearised model, which the paper's X'X approximates. With another `lambda_reg` it is X'X.
            shrink_weights: With lambda_reg="auto", moves the weights Q of samples, where none is negative, a third of
                the way to their mean (`scoring.ridge.shrunk_weights`). With another `lambda_reg` they stay.
            normalize: Divides each feature, of training samples and targets, by its norm: cosine scores.
            use_weights: Multiplies scores by the weights Q of training samples, as TRAK does. False leaves them out, so
                samples count that the model knows by heart, whose Q is almost 0. `self_influence` always has them.

        Raises:
            ValueError: An argument is out of its range, or `save_dir` holds features made in another way.
            TypeError: An argument has the wrong type.
            PermissionError: `save_dir` is missing, and may not be made.
        """
        if saver is not None or score_computer is not None:
            raise ValueError("saver and score_computer are not supported; leave them None")
        self.train_set_size = integer("train_set_size", train_set_size, 1, 2**48)
        chunk_size = None if chunk_size is None else integer("chunk_size", chunk_size, 1, 2**48)
        memory_budget = None if memory_budget is None else integer("memory_budget", memory_budget, 1, 2**62)
        settings = EstimatorSettings(
            lambda_reg=ridge_setting(lambda_reg),
            curvature=curvature,
            shrink_weights=shrink_weights,
            normalize=normalize,
            use_weights=use_weights,
        )
        self.logger = logging.getLogger("trak_fast")
        self.logger.setLevel(logging_level)

        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
        if gradient_computer is not None and (
            not callable(gradient_computer) or hasattr(type(gradient_computer), "compute_per_sample_grad")
        ):
            raise TypeError(
                f"gradient_computer must be a class, not {gradient_computer!r}; "
                "gradient_computer=trak_fast.HookGradientComputer gives one"
            )
        self.model = model
        self.task = resolve_task(task)
        free = gradient_computer is None and projector is None and proj_dim != 0 and optimizer_state is None
        parameters = select_parameters(model, grad_wrt)
        metric = choose_metric(metric, model, self.task, parameters=parameters, gradients_are_free=free)
        if metric is not None and grad_wrt is None:
            matrices = matrices_of(model, parameters)
            parameters = {name: parameters[name] for name in matrices} or parameters
        if device is not None:
            model.to(device)
        first = next(iter(parameters.values()))
        self.device = first.device
        self.grad_dim = sum(parameter.numel() for parameter in parameters.values())
        every = list(model.parameters())
        if len(parameters) < len(every):
            self.logger.info(
                "gradients of %d of %d parameters, %s of %s numbers%s",
                len(parameters),
                len(every),
                f"{self.grad_dim:,}",
                f"{sum(parameter.numel() for parameter in every):,}",
                ": those that require gradients%s (grad_wrt=['*'] takes all)" % (" and are matrices" if metric else "")
                if grad_wrt is None
                else "",
            )
        is_large = metric is not None and proj_type in (None, "sjlt")
        if proj_dim is None:
            proj_dim = _chosen_proj_dim(self.grad_dim) if is_large else 2048
        if proj_type is None:
            proj_type = "sjlt" if is_large and _is_size_of_sjlt(proj_dim) else "rademacher"
        few_bits = "float32"
        if metric is not None and proj_dim >= MANY_NUMBERS:
            few_bits = "1bit" if settings.lambda_reg in (None, math.inf) else "int8"
        store_dtype = _chosen_store_dtype(store_dtype, use_half_precision, few_bits)
        settings.require_invertible(store_dtype, metric is not None)
        if hasattr(self.task, "draw_labels"):
            self.logger.info(
                "features of %s numbers, stored as %s: proj_type %s, metric %s",
                f"{proj_dim:,}",
                store_dtype,
                proj_type,
                metric or "none",
            )
        if nonzeros is not None and (projector is not None or proj_dim == 0):
            raise ValueError("nonzeros has no influence beside projector or proj_dim=0: leave it out")
        if projector is None and proj_dim == 0:
            projector = NoProjection()
        elif projector is None:
            projector = Projector(
                self.grad_dim,
                proj_dim,
                seed=projector_seed,
                proj_type=proj_type,
                device=self.device,
                nonzeros=nonzeros,
            )
        elif (grad_dim := getattr(projector, "grad_dim", 0)) not in (0, self.grad_dim):
            raise ValueError(f"projector.grad_dim must be {self.grad_dim}, the size of a gradient, not {grad_dim}")
        self.projector = projector
        self._ranks = Ranks(distributed)
        computers = choose_computers(
            model,
            self.task,
            projector,
            parameters=parameters,
            grad_wrt=None if grad_wrt is None and len(parameters) == len(every) else list(parameters),
            gradient_computer=gradient_computer,
            seed=projector_seed,
            sketch=sketch,
            sketch_side=sketch_side,
            memory_budget=memory_budget,
            processes=self._ranks.size,
            metric=metric,
        )
        self._ranks.prepare = computers.prepare
        self._computers = computers
        self.gradient_computer = computers.losses
        self.proj_dim = computers.proj_dim
        self._optimizer_states = OptimizerStates(optimizer_state, computers)

        contents = manifest_of(
            projector,
            self.proj_dim,
            self.task,
            model,
            parameters,
            self.train_set_size,
            store_dtype,
            description_of(self.gradient_computer) | self._optimizer_states.describe(),
        )
        with self._ranks.together():
            self.store = Store(save_dir, contents, self.train_set_size, self.proj_dim)
        if any(self._ranks.gather(self.store.is_growing)):  # a process was killed in `extend`
            self._ranks.first(self.store.grow, self.train_set_size)
        self._estimator = Estimator(
            self.store,
            settings,
            task=self.task,
            grad_dim=self.grad_dim,
            device=self.device,
            has_metric=metric is not None,
        )
        self._rotation = Rotation(self.proj_dim) if store_dtype in CODED else None
        self._saver = Saver(self._estimator)
        featurizer = Featurizer(
            model,
            self.task,
            computer=computers.features,
            gradient_computer=computers.losses,
            proj_dim=self.proj_dim,
            bytes_a_sample=computers.bytes_a_sample,
            bytes_in_all=computers.bytes_in_all,
            device=self.device,
            chunk_size=chunk_size,
            memory_budget=memory_budget,
            rotation=self._rotation,
        )
        self._metrics = CheckpointMetrics(computers.streaming, self.store, featurizer)
        self._recorder = Recorder(
            featurizer, self._estimator, self._ranks, self._metrics, task=self.task, check_samples=check_samples
        )

        self.scores: np.memmap | None = None
        self._resume = load_from_save_dir
        self._check_samples = check_samples
        self._seen: set[int] = set()  # checkpoints loaded by this object
        self._weights: Contents | None = None  # of the loaded checkpoint
        self._loaded: int | None = None  # its number

    def __setattr__(self, name: str, value: object) -> None:
        """Refuses what would have no effect.

        Raises:
            AttributeError: The attribute is set by the constructor alone.
        """
        if name in _FIXED and name in self.__dict__:
            raise AttributeError(
                f"{name} cannot be assigned, which would have no effect; pass {_FIXED[name]} to the constructor: "
                f"TRAKer(..., {_FIXED[name]}=...)"
            )
        super().__setattr__(name, value)

    @property
    def normalize_factor(self) -> float:
        """√D: traker's features are those of trak_fast divided by it."""
        return math.sqrt(self.grad_dim)

    @property
    def saver(self) -> Saver:
        """The stored arrays in the arrangement of traker's `saver`, to read."""
        return self._saver

    def rows(self, total: int | None = None) -> range:
        """Returns the training samples, or the rows of another `total`, that this process computes.

        It passes over the others. Under torchrun a loader of these alone (with `inds` in `featurize`) saves the
        reading of the rest.
        """
        share = self._ranks.rows(self.train_set_size if total is None else total)
        return range(share.start, share.stop)

    def extend(self, train_set_size: int) -> None:
        """Makes room in `save_dir` for training samples that are added to the others, whose features stay.

        The new ones have the numbers from the former `train_set_size` on. Go on by `load_checkpoint` and `featurize` at
        each checkpoint, `finalize_features` and `finalize_scores`; targets need not be scored again. X'X and scores of
        the former samples are deleted. From then on the folder is opened with the new `train_set_size`. If the process
        is killed meanwhile, the folder has the former size or the new one, and opening it with that finishes the call.

        Under torchrun all processes call it.

        Args:
            train_set_size: All training samples, n, the former ones included.

        Raises:
            ValueError: It is less than before, or a file is missing, truncated or corrupt.
            TypeError: It is no integer.
            RuntimeError: Another process writes features or computes with them.
            PermissionError: `save_dir` may be read but not written.
            OSError: The disk has too little space.
        """
        train_set_size = integer("train_set_size", train_set_size, self.train_set_size, 2**48)
        with self._ranks.together():
            self._recorder.close()
            self.store.let_go(self.store.model_ids())
        self._ranks.first(self.store.grow, train_set_size)
        self.store.num_rows = train_set_size
        super().__setattr__("train_set_size", train_set_size)
        self.scores = None  # of fewer samples

    def load_checkpoint(
        self, checkpoint: Mapping[str, Tensor], model_id: int, _allow_featurizing_already_registered: bool = False
    ) -> None:
        """Loads a checkpoint into the model, and opens or makes its features for `featurize`.

        Args:
            checkpoint: A state dict. The model's own, `model.state_dict()`, changes as other checkpoints are loaded.
            model_id: The checkpoint's number, in [0, 2^32); it selects the projection matrix.
            _allow_featurizing_already_registered: Deletes what is stored for `model_id`, to featurize it again.

        Raises:
            ValueError: Features of other weights are stored under `model_id`, or the checkpoint is not this model's;
                nothing is open for `featurize` then.
            TypeError: `checkpoint` is no state dict.
            RuntimeError: The stored features are to be deleted, and another process computes with them.
        """
        model_id = self._load(checkpoint, model_id, is_training=True)
        forget = _allow_featurizing_already_registered or not (self._resume or model_id in self._seen)
        if forget:
            with self._ranks.together():
                self.store.let_go([model_id])
            self._ranks.first(self.store.forget, model_id)
        weights = self._digest()
        with self._ranks.together():
            train = self.store.register(model_id, weights)
            known = self.store.model_ids() if self._resume else self._seen
            others = [self.store.train(i) for i in known if i != model_id]
        self._seen.add(model_id)
        if self._ranks.rank == 0 and (stored := int(train.done.sum())):
            self.logger.info("model_id %d: %d of %d samples are stored already", model_id, stored, len(train.done))
        self._metrics.take(model_id)
        self._recorder.open_training(model_id, train, others)
        self._loaded = model_id
        self._saver.load_current_store(model_id)

    def featurize(self, batch: Batch, inds: Indices | None = None, num_samples: int | None = None) -> None:
        """Stores the features and weightings of a batch of training samples that are not stored yet.

        Args:
            batch: The tensors that the task asks for, (B, ...) each: in its order, or by name (`tasks.NamedBatches`).
            inds: (B,) the samples' numbers in the training set, each once.
            num_samples: B, instead of `inds`: the samples follow those of the previous call.

        Raises:
            RuntimeError: No checkpoint is loaded, or another process is writing one of these samples.
            ValueError: `inds`, `num_samples` or `batch` do not fit, a gradient is not finite or too large, or samples
                are not those that their rows were stored from.
            TypeError: `inds` holds no integers, or `batch` no tensors.
            OSError: The disk is full, for example; the samples stored before are safe.
            PermissionError: `save_dir` may be read but not written.
        """
        self._record(self._recorder.record_training, batch, inds, num_samples)

    def fit_metric(self, batch: Batch, chunk_size: int | None = None) -> None:
        """Makes the metric of the loaded checkpoint, unless it is stored; `featurize` makes it of its first batch.

        The metric is made of few samples, a hundred texts for example, and belongs to the checkpoint's features. Where
        processes are given batches of their own, the first to make it decides: give all of them the same samples here.

        Args:
            batch: Some training samples' tensors, as for `featurize`.
            chunk_size: Samples to differentiate at a time; by default as many as fit into memory.

        Raises:
            ValueError: Features have no metric, or gradients are not finite.
            RuntimeError: No checkpoint is loaded.
            TypeError: As in `featurize`.
            OSError: The disk is full, for example.
        """
        self._require_loaded_weights()
        if self._loaded is None:
            raise RuntimeError("call load_checkpoint before fit_metric")
        if chunk_size is not None:
            chunk_size = integer("chunk_size", chunk_size, 1, 2**48)
        self._metrics.fit(batch_tensors(batch, self.task), self._loaded, chunk_size)

    @plain_arithmetic()
    def finalize_features(self, model_ids: Iterable[int] | None = None, del_grads: bool = False) -> None:
        """Forms X'X of each checkpoint, once all its training samples are featurized.

        Args:
            model_ids: Checkpoints; all by default. Those that are finalized already are passed over.
            del_grads: Has no effect: one (n, k) array is kept for each checkpoint, and scores need it.

        Raises:
            ValueError: A checkpoint was never loaded.
            RuntimeError: A checkpoint has training samples that are not featurized.
        """
        self.projector.free_memory()
        with self._ranks.together():
            self._recorder.save_sum()
        ids = self._model_ids(model_ids)
        missing = self._ranks.gather([i for i in ids if not self.store.is_finalized(i)])[0]
        for model_id in self._progress(missing, "finalizing features"):
            self._finalize(model_id)
        self._recorder.close()

    def _finalize(self, model_id: int) -> None:
        """Forms and stores the Gram matrices of a checkpoint."""
        ranks = self._ranks
        with ExitStack() as locks:
            with ranks.together():
                train = self.store.train(model_id)
                locks.enter_context(train.kept())
                hint = "; under torchrun, each rank is given all batches" if ranks.size > 1 else ""
                train.require_all(f"training samples of model_id {model_id} are not featurized{hint}")
            with ranks.together():
                summand = self._estimator.gram_summand(model_id, train, ranks.rank, ranks.size)
            gram = ranks.sum(summand) if self._estimator.sums_while_featurizing else summand
            ranks.first(lambda: self.store.save_gram(model_id, gram.cpu().numpy()))

    def start_scoring_checkpoint(
        self, exp_name: str, checkpoint: Mapping[str, Tensor], model_id: int, num_targets: int
    ) -> None:
        """Loads a checkpoint into the model, and opens or makes its part of an experiment for `score`.

        Args:
            exp_name: Name of this set of targets; part of file names.
            checkpoint: A state dict, the one that `model_id` was featurized with.
            model_id: The checkpoint's number.
            num_targets: Targets, m.

        Raises:
            RuntimeError: The checkpoint's features are not finalized.
            ValueError: The checkpoint is another one than was featurized, `exp_name` is no file name, or it was used
                with another number of targets (see `delete_experiment`).
            TypeError: `exp_name` is no string.
            PermissionError: `save_dir` may be read but not written.
        """
        model_id = self._load(checkpoint, model_id, is_training=False)
        num_targets = integer("num_targets", num_targets, 1, 2**48)
        weights = self._digest()
        with self._ranks.together():
            self._require_finalized([model_id])
            with self.store.train(model_id).kept():
                self.store.check_weights(model_id, weights)
                targets = self.store.targets(model_id, exp_name, num_targets)
            self._metrics.take(model_id)
            self._recorder.open_targets(model_id, targets)
        self._loaded = model_id
        self._seen.add(model_id)
        self._saver.load_current_store(model_id)

    def score(self, batch: Batch, inds: Indices | None = None, num_samples: int | None = None) -> None:
        """Stores the features of a batch of targets; the scores are computed by `finalize_scores`.

        Features that are stored for these targets are replaced, so that an experiment can be repeated with others.

        Args:
            batch: The tensors that the task asks for, (B, ...) each: in its order, or by name (`tasks.NamedBatches`).
            inds: (B,) the targets' numbers, each once.
            num_samples: B, instead of `inds`: the targets follow those of the previous call.

        Raises:
            RuntimeError: No checkpoint was opened for scoring.
            ValueError: As in `featurize`.
            TypeError: As in `featurize`.
        """
        self._record(self._recorder.record_targets, batch, inds, num_samples)

    @plain_arithmetic()
    def finalize_scores(
        self, exp_name: str, model_ids: Iterable[int] | None = None, allow_skip: bool = False
    ) -> np.memmap:
        """Computes the scores of an experiment, averaged over checkpoints.

        Args:
            exp_name: The experiment.
            model_ids: Checkpoints; all by default.
            allow_skip: Leaves out checkpoints without all of the experiment's targets, with a log message.

        Returns:
            (n, m) float32, a copy-on-write memory map of `save_dir/scores/<exp_name>.npy`, or of a temporary file if
            `save_dir` may not be written (a warning says so).

        Raises:
            ValueError: A checkpoint was never loaded, or has no targets of this experiment, or a target's largest
                score is beyond float32 (the message has a way out).
            RuntimeError: A checkpoint is not finalized or lacks targets, or another process writes targets.
            OSError: The disk has too little space.
        """
        ranks = self._ranks
        with self._score_matrix(exp_name, model_ids, allow_skip) as matrix:
            path = self.store.scores_file(exp_name)
            file = ScoreFile(path, matrix.shape, partial=ranks.gather(temporary_name(path))[0])
            try:
                with ranks.together():
                    begun = ranks.rank != 0 or file.begin()
                if all(ranks.gather(begun)):
                    with ranks.together():
                        file.fill(matrix, ranks.rows(self.train_set_size))
                    matrix.require_float32(ranks.gather(matrix.largest))
                    with ranks.together():
                        self.scores = file.open()
                    ranks.first(file.publish)
                else:
                    self._warn_of_unsaved(path)
                    with ranks.together():
                        self.scores = unsaved_scores(matrix)
            finally:
                if ranks.rank == 0:
                    file.discard()
        self._recorder.rewind()
        return self.scores

    @plain_arithmetic()
    def top_scores(
        self,
        exp_name: str,
        k: int,
        model_ids: Iterable[int] | None = None,
        largest: bool = True,
        allow_skip: bool = False,
    ) -> TopScores:
        """Computes the k highest scores of each target of an experiment, or the lowest, and no matrix of all.

        They are exactly those of `finalize_scores`, in memory O(m · k), and are saved as
        `save_dir/scores/<exp_name>.highest.npz` (`lowest.npz`); `trak_fast.save_table` writes them for other programs.

        Args:
            exp_name: The experiment.
            k: Scores for each target.
            model_ids: Checkpoints; all by default.
            largest: Computes the highest if True, the lowest if False.
            allow_skip: As in `finalize_scores`.

        Raises:
            ValueError: `k` is less than 1, or as in `finalize_scores`.
            RuntimeError: As in `finalize_scores`.
            TypeError: `k` is no integer.
        """
        count = min(integer("k", k, 1, 2**48), self.train_set_size)
        ranks = self._ranks
        with self._score_matrix(exp_name, model_ids, allow_skip) as matrix:
            with ranks.together():
                part = top_scores(matrix, ranks.rows(self.train_set_size), count, largest)
            matrix.require_float32(ranks.gather(matrix.largest))
            result = merge_top_scores(ranks.gather(part), count)
            path = self.store.scores_file(exp_name, ".highest.npz" if largest else ".lowest.npz")
            ranks.first(self._save_top_scores, result, path)
        self._recorder.rewind()
        return result

    def _save_top_scores(self, result: TopScores, path: Path) -> None:
        """Saves a result, or warns that its folder may not be written."""
        try:
            result.save(path)
        except OSError as error:
            if error.errno not in DENIED:
                raise
            self._warn_of_unsaved(path)

    def _warn_of_unsaved(self, path: Path) -> None:
        """Warns, in the first process, that a file of scores is not written."""
        if self._ranks.rank == 0:
            self.logger.warning("%s may not be written: these scores are returned, but not saved", path)

    @plain_arithmetic()
    def export_vectors(
        self, exp_name: str, folder: str | os.PathLike[str], model_ids: Iterable[int] | None = None
    ) -> tuple[np.memmap, np.memmap]:
        """Writes vectors whose inner products are the scores of an experiment, for a vector search or a table.

        The ridge, the weights Q and the mean over checkpoints are in them. Features that are stored in few bits are
        written as the numbers that scores are computed from, rotated on both sides.

        Args:
            exp_name: The experiment.
            folder: Folder for train.npy and targets.npy; it is made if it is missing.
            model_ids: Checkpoints that scores are averaged over, C of them; all by default.

        Returns:
            The vectors of the training samples (n, C·k) and those of the targets (m, C·k), float32, as read-only memory
            maps of the files: `train @ targets.T` are the scores up to rounding.

        Raises:
            ValueError: A number of a vector is beyond float32, or as in `finalize_scores`.
            RuntimeError: As in `finalize_scores`.
            OSError: The disk has too little space, or the folder may not be written.
        """
        paths = [Path(folder).expanduser() / name for name in ("train.npy", "targets.npy")]
        with self._score_matrix(exp_name, model_ids, allow_skip=False) as matrix:
            self._ranks.first(write_vectors, matrix, *paths)
        self._recorder.rewind()
        return read_array(paths[0]), read_array(paths[1])

    def token_scores(
        self,
        exp_name: str,
        target: int,
        batch: Batch,
        inds: Indices,
        model_ids: Iterable[int] | None = None,
    ) -> NDArray[np.float64]:
        """Computes what each token of training samples adds to their scores for a target.

        With y = (X'X + λI)⁻¹ φ(target) and v = P'y, a sample's score is Q v'∇f, and its gradient a sum over its tokens
        of what they make together with the gradients that reach them. Only the target's feature is read from disk; one
        forward and backward pass over the batch makes the rest.

        The model must have the weights of one checkpoint, by `load_checkpoint` or `start_scoring_checkpoint`. The
        result is this checkpoint's part: the sum of the parts of all `model_ids` over the checkpoints and tokens is the
        score of `finalize_scores`. With use_half_precision=True it is that of the features before they were rounded.

        Under torchrun all processes make the call; each computes its own batch.

        Args:
            exp_name: The experiment, with all its targets at all `model_ids`.
            target: The target's number, from 0 on.
            batch: The training samples' tensors, (B, T, ...) the first, (B, ...) the others.
            inds: (B,) their numbers.
            model_ids: Checkpoints that scores are averaged over; all by default.

        Returns:
            (B, T), in the unit of scores. Padding has 0 where the model ignores it.

        Raises:
            ValueError: A number is out of range, samples are others than were featurized, a parameter's gradient is no
                sum over the tokens (`grad_wrt` can leave it out), gradients are not streamed
                (`gradient_computer`, `projector`), or as in `finalize_scores`.
            RuntimeError: No checkpoint is loaded, or it is none of `model_ids`, or as in `finalize_scores`.
            TypeError: As in `featurize`.
        """
        computer = self.gradient_computer
        if not isinstance(computer, GradientProjector):
            raise ValueError(
                "gradient_computer and projector must be left out, and task have get_outputs, for token_scores; "
                f"gradients come from {type(computer).__name__}"
            )
        if self._optimizer_states.describe():
            raise ValueError("optimizer_state must be None for token_scores: a step of Adam is no sum over tokens")
        model_id = self._require_loaded("token_scores")
        batch = batch_tensors(batch, self.task)
        rows, _ = row_numbers(batch, inds, None, 0, self.train_set_size)
        with plain_arithmetic(), self._all_targets(exp_name, model_ids, allow_skip=False) as used:
            target = self._require_target(used, model_id, target)
            self._recorder.require_samples(self.store.train(model_id), batch, rows)
            direction = self._estimator.direction(used, model_id, target)
            if self._rotation is not None:
                direction = self._rotation.revert(direction.unsqueeze(0))[0]
            factors = self._estimator.factors(used, model_id, rows) * computer.projector.dense_scale
        products = computer.token_products(batch, direction, model_id)
        return (products.cpu() * factors.unsqueeze(1)).numpy()

    def rerank(
        self,
        exp_name: str,
        target: int,
        target_batch: Batch,
        batch: Batch,
        inds: Indices,
        model_ids: Iterable[int] | None = None,
    ) -> NDArray[np.float64]:
        """Computes the scores of a target's best training samples again, with gradients that are not projected.

        Scores of features have noise of the size 1/√k, which decides on the order of samples that are almost equal.
        Here the target's gradient is formed as a whole, in the memory of the parameters that are attributed, and its
        products with the candidates' gradients are exact. Scores must be inner products (`lambda_reg=math.inf`, as by
        default with a metric): an inverse is known projected only.

        The model must have the weights of one checkpoint, by `load_checkpoint` or `start_scoring_checkpoint`; the
        result is this checkpoint's part: add up those of all `model_ids`, as for `token_scores`.

        Args:
            exp_name: The experiment, with all its targets at all `model_ids`.
            target: The target's number, from 0 on.
            target_batch: The target's tensors, (1, ...) each.
            batch: The candidates' tensors, (B, ...) each: training samples.
            inds: (B,) their numbers, `top_scores(...).indices[target]` for example.
            model_ids: Checkpoints that scores are averaged over; all by default.

        Returns:
            (B,), in the unit of scores.

        Raises:
            ValueError: A number is out of range, samples are others than were featurized or scored, gradients are not
                streamed or are steps of Adam, scores have an inverse in them, or `normalize` is True.
            RuntimeError: No checkpoint is loaded, or it is none of `model_ids`, or as in `finalize_scores`.
            TypeError: As in `featurize`.
        """
        streaming = self._computers.streaming
        if streaming is None or self._optimizer_states.describe():
            raise ValueError(
                "gradient_computer, projector and optimizer_state must be left out, and task have get_outputs, for "
                "rerank"
            )
        model_id = self._require_loaded("rerank")
        self._estimator.require_exact_scores()
        batch = batch_tensors(batch, self.task)
        target_batch = batch_tensors(target_batch, self.task)
        rows, _ = row_numbers(batch, inds, None, 0, self.train_set_size)
        with plain_arithmetic(), self._all_targets(exp_name, model_ids, allow_skip=False) as used:
            target = self._require_target(used, model_id, target)
            if len(target_batch[0]) != 1:
                raise ValueError(f"target_batch must be one sample, of tensors (1, ...), not {len(target_batch[0])}")
            self._recorder.require_samples(self.store.train(model_id), batch, rows)
            if not self._recorder.are_samples(used[model_id], target_batch, np.array([target])):
                raise ValueError(
                    f"target_batch must be the sample that target {target} of exp_name {exp_name!r} was scored with"
                )
            factors = self._estimator.product_factors(used, model_id, rows)
        products = streaming.exact_products(target_batch, batch).cpu()
        return (products * factors * (1 if streaming.is_unprojected else self.proj_dim)).numpy()

    def _require_loaded(self, caller: str) -> int:
        """Returns the number of the checkpoint whose weights the model has.

        Raises:
            RuntimeError: It has those of none.
        """
        self._require_loaded_weights()
        if self._loaded is None:
            raise RuntimeError(f"call load_checkpoint or start_scoring_checkpoint before {caller}")
        return self._loaded

    def _require_target(self, used: Mapping[int, Rows], model_id: int, target: int) -> int:
        """Returns a target's number, once it is one of those of the loaded checkpoint, and this is among those used.

        Raises:
            RuntimeError: The checkpoint is not among them.
            ValueError: There is no such target.
        """
        if model_id not in used:
            raise RuntimeError(f"model_id {model_id}, which is loaded, must be one of model_ids {list(used)}")
        return integer("target", target, 0, len(used[model_id].done) - 1)

    @contextmanager
    def _score_matrix(self, exp_name: str, model_ids: Iterable[int] | None, allow_skip: bool) -> Iterator[ScoreMatrix]:
        """Describes the scores of an experiment, once all its targets are there."""
        with self._all_targets(exp_name, model_ids, allow_skip) as used:
            with self._ranks.together():
                matrix = self._estimator.score_matrix(used)
            yield matrix

    @contextmanager
    def _all_targets(
        self, exp_name: str, model_ids: Iterable[int] | None, allow_skip: bool
    ) -> Iterator[Mapping[int, Rows]]:
        """Opens the targets of an experiment at each checkpoint, once all are there.

        Other processes cannot replace what scores are computed from during the block.
        """
        ranks = self._ranks
        with ranks.together():  # and until all have written their targets
            check_name(exp_name)
            ids = self._model_ids(model_ids)
            self.store.let_go(ids, exp_name)
        used: dict[int, Rows] = {}
        with ExitStack() as locks:
            with ranks.together():
                for model_id in ids:
                    try:
                        targets = locks.enter_context(self.store.reading(model_id, exp_name))
                        targets.require_all(f"targets of exp_name {exp_name!r} are not scored for model_id {model_id}")
                        used[model_id] = targets
                    except (ValueError, RuntimeError) as error:
                        if not allow_skip:
                            raise
                        self.logger.warning("skipping model_id %d: %s", model_id, error)
            common = set.intersection(*map(set, ranks.gather(list(used))))  # other processes may change what is there
            used = {model_id: targets for model_id, targets in used.items() if model_id in common}
            with ranks.together():
                sizes = {len(targets.done) for targets in used.values()}
                if len(sizes) != 1:
                    raise ValueError(
                        f"exp_name {exp_name!r} has numbers of targets that differ: {sorted(sizes)}"
                        if sizes
                        else f"exp_name {exp_name!r} has no checkpoint with all its targets"
                    )
                self._require_finalized(used)
                if self._check_samples:
                    require_same_samples({i: self.store.train(i) for i in used}, "training samples")
                    require_same_samples(used, f"targets of exp_name {exp_name!r}")
            yield used

    def delete_experiment(self, exp_name: str) -> None:
        """Deletes the targets of an experiment at all checkpoints, and its scores, so that its name is free.

        Under torchrun all processes call it.

        Args:
            exp_name: The experiment.

        Raises:
            ValueError: There is no such experiment; the message lists those that there are.
            TypeError: `exp_name` is no string.
            RuntimeError: Another process writes its targets or computes its scores.
            PermissionError: `save_dir` may be read but not written.
        """
        with self._ranks.together():
            check_name(exp_name)
            self.store.let_go(self.store.model_ids(), exp_name)
        self._ranks.first(self.store.delete_experiment, exp_name)

    @plain_arithmetic()
    def self_influence(self, model_ids: Iterable[int] | None = None) -> NDArray[np.float32]:
        """Computes the score of each training sample for itself; high values point to wrong labels and outliers.

        This is the diagonal of the scores with the training set as targets, without computing the rest, and with the
        weights Q as they are (`use_weights` and `shrink_weights` are for scores): how badly a sample is fitted says
        much about its label.

        Args:
            model_ids: Checkpoints; all by default.

        Returns:
            (n,) float32.

        Raises:
            ValueError: A checkpoint was never loaded, or the largest result is beyond float32.
            RuntimeError: A checkpoint is not finalized, or another process deletes it.
        """
        ids = self._model_ids(model_ids)
        self._require_finalized(ids)
        total = torch.zeros(self.train_set_size, dtype=torch.float64)
        with self._ranks.together(), ExitStack() as locks:
            for model_id in ids:
                locks.enter_context(self.store.train(model_id).kept())
            rho = self._estimator.disagreement(ids)
            share = self._ranks.rows(len(total))
            for model_id in self._progress(ids, "self-influence"):
                total[share] += self._estimator.solver(model_id, len(ids), rho).self_influence(share)
            weights = self._estimator.mean_weights(ids)
        influence = self._ranks.sum(total) / len(ids) * weights
        if beyond_float32(largest := influence.abs().max().item()):
            advice = 'use lambda_reg="auto"' if self.lambda_reg else "multiply the loss by a constant"
            raise ValueError(
                f"the largest self-influence must be 0 or in [1.18e-38, 3.4e+38], not {largest:.3g}; {advice}"
            )
        return influence.float().numpy()

    def _record(
        self,
        record: Callable[[Sequence[Tensor], Indices | None, int | None], None],
        batch: Batch,
        inds: Indices | None,
        num_samples: int | None,
    ) -> None:
        """Records a batch, unless the model has other weights than those of the checkpoint."""
        self._require_loaded_weights()
        try:
            record(batch_tensors(batch, self.task), inds, num_samples)
            self._computers.end_call()
        finally:
            if self._weights is not None:
                self._weights = self._contents()  # embeddings with max_norm change their own

    def _require_loaded_weights(self) -> None:
        if self._weights is not None and not self._weights.same_as(self._contents()):
            raise RuntimeError(
                "the model's weights have changed since its checkpoint was loaded: load it again (two TRAKers need a "
                "model each)"
            )

    def _digest(self) -> str:
        """Returns the digest of the checkpoint: its weights, whole ones in all processes, and its moments."""
        return digest(WholeEntries({**self.model.state_dict(), **self._optimizer_states.marks}))

    def _contents(self) -> Contents:
        """Notes the contents of the model's parameters and buffers."""
        return Contents(itertools.chain(self.model.parameters(), self.model.buffers()))

    def _load(self, checkpoint: Mapping[str, Tensor], model_id: int, *, is_training: bool) -> int:
        """Loads `checkpoint` for featurizing or scoring to begin; returns `model_id` as a Python integer."""
        model_id = integer("model_id", model_id, 0, 2**32 - 1)
        self._ranks.prepare()  # other processes may need the weights that the model has
        self._recorder.close()
        self._weights = None
        self._loaded = None
        load_checkpoint(self.model, checkpoint)
        self.gradient_computer.load_model_params(self.model)
        self._optimizer_states.begin(model_id, is_training=is_training)
        self._weights = self._contents()
        return model_id

    def _progress(self, ids: Iterable[int], description: str) -> Iterable[int]:
        """Shows the progress through some checkpoints, in the first process alone."""
        bar: Iterable[int] = tqdm(ids, desc=description, disable=None if self._ranks.rank == 0 else True)
        return bar

    def _model_ids(self, model_ids: Iterable[int] | None) -> list[int]:
        """Returns the checkpoints to use: those given, or by default those stored.

        With `load_from_save_dir=False` the default is those of them that this object has loaded.
        """
        stored = self.store.model_ids()
        if model_ids is None:
            ids = stored if self._resume else [i for i in stored if i in self._seen]
        elif isinstance(model_ids, str) or not isinstance(model_ids, Iterable):
            raise TypeError(f"model_ids must be integers in a list or another iterable, not {model_ids!r}")
        else:
            ids = list(dict.fromkeys(integer("model_ids", i, 0, 2**32 - 1) for i in model_ids))
        if not ids:
            raise ValueError(f"no checkpoints: none given, or none loaded with load_checkpoint in {self.store.path}")
        if unknown := [i for i in ids if i not in stored]:
            raise ValueError(
                f"model_ids {unknown} were never loaded with load_checkpoint; {self.store.path} has {stored}"
            )
        return ids

    def _require_finalized(self, model_ids: Iterable[int]) -> None:
        if missing := [i for i in self._model_ids(model_ids) if not self.store.is_finalized(i)]:
            raise RuntimeError(f"model_ids {missing} are not finalized; call finalize_features first")
