"""TRAK, the driver: gradients, projection, features on disk and scores, with the methods of traker's TRAKer."""

from __future__ import annotations

import logging
import math
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from .gradients import FunctionalGradientComputer, evaluation_mode, select_parameters
from .projection import Projector
from .solver import Solver, auto_ridge, curvature_weights, gram_matrix
from .store import Rows, Store, describe
from .tasks import Task, resolve_task

Indices = Sequence[int] | NDArray[np.integer] | Tensor


class _NoProjection:
    """What proj_dim=0 asks for: the gradients themselves, in one row a sample."""

    proj_dim = 0
    proj_type = "none"

    def project(self, grads: Mapping[str, Tensor], model_id: int) -> Tensor:
        return torch.cat([g.flatten(1) if g.ndim > 1 else g.unsqueeze(1) for g in grads.values()], dim=1)

    def free_memory(self) -> None:
        pass


class TRAKer:
    """Attributes a model's outputs to its training samples (Park et al., "TRAK", ICML 2023, section 3).

    With C checkpoints, τ(z)_i = (1/C Σ_c Q_i) · (1/C Σ_c φ(z) (X'X + λI)⁻¹ φ_i'): Q_i is the task's weighting of
    training sample i (1 − p for classification), φ = P ∇_θ f the projected gradient of the model output, and X has
    the training samples' φ as its rows. A positive score helps the target, a negative one harms it.

    The names of arguments and methods are those of traker 0.3.2, and they are called in its order: for each
    checkpoint `load_checkpoint` and `featurize`; `finalize_features`; for each checkpoint `start_scoring_checkpoint`
    and `score`; `finalize_scores`. A killed run is started again with the same calls: training samples whose
    features are stored are not featurized again.

    Attributes:
        proj_dim: Size of a feature, k.
        grad_dim: Parameters that gradients are taken of, D.
        store: The features on disk.
        scores: What `finalize_scores` returned last.
    """

    def __init__(
        self,
        model: nn.Module,
        task: str | Task,
        train_set_size: int,
        save_dir: str | os.PathLike[str] = "./trak_results",
        load_from_save_dir: bool = True,
        device: str | torch.device | None = None,
        gradient_computer: type[Any] = FunctionalGradientComputer,
        projector: Any = None,
        saver: None = None,
        score_computer: None = None,
        proj_dim: int = 2048,
        logging_level: int = logging.INFO,
        use_half_precision: bool = False,
        proj_max_batch_size: int | None = None,
        projector_seed: int = 0,
        grad_wrt: Iterable[str] | None = None,
        lambda_reg: float | str | None = "auto",
        *,
        proj_type: str = "rademacher",
        chunk_size: int | None = None,
        curvature: bool = True,
        normalize: bool = False,
    ) -> None:
        """Opens `save_dir`, or makes it.

        Args:
            model: The model. Checkpoints are loaded into it. It is run in evaluation mode; between calls its modules
                are in the mode that they were in.
            task: "image_classification", "text_classification", or a `Task`.
            train_set_size: Training samples, n.
            save_dir: Folder for features and scores.
            load_from_save_dir: If False, what is stored for a checkpoint is deleted when it is first loaded, and
                other checkpoints in the folder are ignored.
            device: Where to compute; the model is moved there. By default, where the model is.
            gradient_computer: A class with the constructor and methods of `FunctionalGradientComputer`.
            projector: An object with `proj_dim` (0: as many as parameters), `proj_type`, `project(grads, model_id)`
                and `free_memory()`. By default `trak_fast.Projector` with the arguments below.
            saver: Not supported; features are stored by `trak_fast.store`.
            score_computer: Not supported; scores are computed by `trak_fast.solver`.
            proj_dim: Size of the projection, k; 0 for none.
            logging_level: Of the logger "trak_fast".
            use_half_precision: Has no effect: features are stored in float32, X'X is summed and solved in float64.
            proj_max_batch_size: Has no effect: the projector takes any batch.
            projector_seed: Seed of the projection.
            grad_wrt: Names of the parameters to differentiate; all of them by default.
            lambda_reg: The ridge λ. "auto", or None: chosen for each checkpoint from its features
                (`solver.auto_ridge`). 0: plain TRAK, with the least-norm solution where X'X is singular. With these,
                scores do not depend on the scale of P. Another number means what it means in traker, whose features
                are P g/√D: λ is added to X'X/D. Its strength depends on k and D.
            proj_type: "rademacher" or "normal".
            chunk_size: Samples to differentiate at a time, which bounds the memory for gradients; default the batch.
            curvature: With lambda_reg="auto", whether the training samples weigh in X'X by the curvature of their
                loss, where the task says it (`get_loss_curvature`; classification does). X'RX is then the Hessian of
                the linearised model, which the paper's X'X approximates. With another `lambda_reg` it is X'X.
            normalize: Divides each feature, of training samples and targets, by its norm: cosine scores.

        Raises:
            ValueError: An argument is out of its range, or `save_dir` holds features made in another way.
            TypeError: An argument has the wrong type.
        """
        if saver is not None or score_computer is not None:
            raise ValueError("saver and score_computer are not supported; leave them None")
        self.train_set_size = _integer("train_set_size", train_set_size)
        self.chunk_size = None if chunk_size is None else _integer("chunk_size", chunk_size)
        self.lambda_reg = _ridge(lambda_reg)
        self.curvature, self.normalize = curvature, normalize
        self.logger = logging.getLogger("trak_fast")
        self.logger.setLevel(logging_level)

        self.model, self.task = model, resolve_task(task)
        parameters = select_parameters(model, grad_wrt)
        if device is not None:
            model.to(device)
        first = next(iter(parameters.values()))
        self.device = first.device
        self.grad_dim = sum(parameter.numel() for parameter in parameters.values())
        self.gradient_computer = gradient_computer(
            model=model, task=self.task, grad_dim=self.grad_dim, dtype=first.dtype, device=self.device,
            grad_wrt=None if grad_wrt is None else list(parameters),
        )  # fmt: skip

        if projector is None:
            projector = _NoProjection() if proj_dim == 0 else Projector(
                self.grad_dim, proj_dim, seed=projector_seed, proj_type=proj_type, device=self.device)  # fmt: skip
        elif getattr(projector, "grad_dim", 0) not in (0, self.grad_dim):
            raise ValueError(f"projector.grad_dim is {projector.grad_dim}, gradients have {self.grad_dim} elements")
        self.projector = projector
        self.proj_dim = projector.proj_dim or self.grad_dim
        contents = describe(projector, self.proj_dim, self.task, parameters, self.train_set_size)
        self.store = Store(save_dir, contents, self.train_set_size, self.proj_dim)

        self.scores: np.memmap | None = None
        self._resume = load_from_save_dir
        self._seen: set[int] = set()  # checkpoints loaded by this object
        self._model_id = 0
        self._train: Rows | None = None
        self._targets: Rows | None = None
        self._next = 0  # row that num_samples continues from

    def load_checkpoint(
        self, checkpoint: Mapping[str, Tensor], model_id: int, _allow_featurizing_already_registered: bool = False
    ) -> None:
        """Loads a checkpoint into the model, and opens or makes its features for `featurize`.

        Args:
            checkpoint: A state dict.
            model_id: The checkpoint's number, in [0, 2^32); it selects the projection matrix.
            _allow_featurizing_already_registered: Deletes what is stored for `model_id`, to featurize it again.

        Raises:
            ValueError: Features of other weights are stored under `model_id`.
        """
        model_id = self._load(checkpoint, model_id)
        if _allow_featurizing_already_registered or not (self._resume or model_id in self._seen):
            self.store.forget(model_id)
        self.store.register(model_id, self.model.state_dict())
        self._seen.add(model_id)
        self._train = self.store.train(model_id)

    def featurize(self, batch: Sequence[Tensor], inds: Indices | None = None, num_samples: int | None = None) -> None:
        """Stores the features and weightings of a batch of training samples that are not stored yet.

        Args:
            batch: The tensors that the task asks for, (B, ...) each.
            inds: (B,) the samples' numbers in the training set, each once.
            num_samples: B, instead of `inds`: the samples follow those of the previous call.

        Raises:
            RuntimeError: No checkpoint is loaded.
            ValueError: `inds`, `num_samples` or `batch` do not fit, or a gradient is not finite.
            TypeError: `inds` holds no integers, or `batch` no tensors.
        """
        if self._train is None:
            raise RuntimeError("call load_checkpoint before featurize")
        rows, following = self._row_numbers(batch, inds, num_samples, self.train_set_size)
        self._fill(self._train, batch, rows, np.flatnonzero(~self._train.done[rows]))
        self._next = following

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
        for model_id in tqdm(self._model_ids(model_ids), desc="finalizing features", disable=None):
            if not self.store.is_finalized(model_id):
                rows = self.store.train(model_id)
                rows.require_all(f"training samples of model_id {model_id} are not featurized")
                self.store.save_gram(model_id, gram_matrix(rows.columns["features"], self._solver_device).cpu().numpy())
        self._next = 0

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
                with another number of targets.
        """
        model_id = self._load(checkpoint, model_id)
        self._require_finalized([model_id])
        self.store.check_weights(model_id, self.model.state_dict())
        self._seen.add(model_id)
        self._targets = self.store.targets(model_id, exp_name, _integer("num_targets", num_targets))

    def score(self, batch: Sequence[Tensor], inds: Indices | None = None, num_samples: int | None = None) -> None:
        """Stores the features of a batch of targets; the scores are computed by `finalize_scores`.

        What is stored for these targets is replaced, so that an experiment can be repeated with other targets.

        Args:
            batch: The tensors that the task asks for, (B, ...) each.
            inds: (B,) the targets' numbers, each once.
            num_samples: B, instead of `inds`: the targets follow those of the previous call.

        Raises:
            RuntimeError: No checkpoint was opened for scoring.
            ValueError, TypeError: as in `featurize`.
        """
        if self._targets is None:
            raise RuntimeError("call start_scoring_checkpoint before score")
        rows, following = self._row_numbers(batch, inds, num_samples, len(self._targets.done))
        self._fill(self._targets, batch, rows, np.arange(len(rows)))
        self._next = following

    def finalize_scores(
        self, exp_name: str, model_ids: Iterable[int] | None = None, allow_skip: bool = False
    ) -> np.memmap:
        """Computes the scores of an experiment, averaged over checkpoints.

        Args:
            exp_name: The experiment.
            model_ids: Checkpoints; all by default.
            allow_skip: Leaves out checkpoints without all of the experiment's targets, with a log message.

        Returns:
            (n, m) float32, a copy-on-write memory map of save_dir/scores/<exp_name>.npy.

        Raises:
            ValueError: A checkpoint was never loaded, or has no targets of this experiment.
            RuntimeError: A checkpoint is not finalized or lacks targets.
        """
        used: dict[int, Rows] = {}
        for model_id in self._model_ids(model_ids):
            try:
                targets = self.store.targets(model_id, exp_name)
                targets.require_all(f"targets of exp_name {exp_name!r} are not scored for model_id {model_id}")
                used[model_id] = targets
            except (ValueError, RuntimeError) as error:
                if not allow_skip:
                    raise
                self.logger.warning("skipping model_id %d: %s", model_id, error)
        sizes = {len(targets.done) for targets in used.values()}
        if len(sizes) != 1:
            raise ValueError(
                f"exp_name {exp_name!r} has numbers of targets that differ: {sorted(sizes)}"
                if sizes
                else f"exp_name {exp_name!r} has no checkpoint with all its targets"
            )

        self._require_finalized(used)
        weights = self._mean_weights(used) / len(used)
        with self.store.writing_scores(exp_name, sizes.pop()) as scores:
            for model_id in tqdm(used, desc="finalizing scores", disable=None):
                for rows, columns, block in self._solver(model_id, len(used)).scores(
                    used[model_id].columns["features"]
                ):
                    scores[rows, columns] += (block * weights[rows, None]).numpy()
        self.scores = self.store.scores(exp_name)
        self._next = 0
        return self.scores

    def self_influence(self, model_ids: Iterable[int] | None = None) -> NDArray[np.float32]:
        """The score of each training sample for itself; high values point to wrong labels and outliers.

        This is the diagonal of the scores with the training set as targets, without computing the rest.

        Args:
            model_ids: Checkpoints; all by default.

        Returns:
            (n,) float32.

        Raises:
            ValueError: A checkpoint was never loaded.
            RuntimeError: A checkpoint is not finalized.
        """
        ids = self._model_ids(model_ids)
        self._require_finalized(ids)
        total = torch.zeros(self.train_set_size, dtype=torch.float64)
        for model_id in tqdm(ids, desc="self-influence", disable=None):
            total += self._solver(model_id, len(ids)).self_influence()
        return (total / len(ids) * self._mean_weights(ids)).float().numpy()

    def _load(self, checkpoint: Mapping[str, Tensor], model_id: int) -> int:
        """Loads `checkpoint` for featurizing or scoring to begin; returns `model_id` as a Python integer."""
        model_id = _integer("model_id", model_id, 0, 2**32 - 1)
        self._train = self._targets = None
        self.model.load_state_dict(checkpoint)
        self.gradient_computer.load_model_params(self.model)
        self._model_id, self._next = model_id, 0
        return model_id

    def _row_numbers(
        self, batch: Sequence[Tensor], inds: Indices | None, num_samples: int | None, num_rows: int
    ) -> tuple[NDArray[np.intp], int]:
        """The rows that a batch goes to, (B,), and the row that follows if they were given by `num_samples`."""
        if isinstance(batch, Tensor) or not all(isinstance(x, Tensor) and x.ndim > 0 for x in batch):
            raise TypeError(f"batch must be a sequence of tensors (B, ...), not {type(batch).__name__}")
        if (inds is None) == (num_samples is None):
            raise ValueError("give either inds or num_samples")
        if num_samples is not None:
            rows = np.arange(self._next, self._next + _integer("num_samples", num_samples))
            following = self._next + len(rows)
        else:
            rows = np.asarray(inds.cpu() if isinstance(inds, Tensor) else inds).reshape(-1)
            if rows.size and not np.issubdtype(rows.dtype, np.integer):
                raise TypeError(f"inds must be integers, not {rows.dtype}")
            following = self._next
        if any(len(x) != len(rows) for x in batch):
            raise ValueError(
                f"batch has {[len(x) for x in batch]} samples in its tensors, "
                f"{'inds' if num_samples is None else 'num_samples'} says {len(rows)}"
            )
        if rows.size and not 0 <= rows.min() <= rows.max() < num_rows:
            raise ValueError(f"samples {rows.min()} to {rows.max()} are not all in [0, {num_rows})")
        if len(np.unique(rows)) != len(rows):
            raise ValueError("inds has the same number twice")
        return rows.astype(np.intp), following

    def _fill(self, stored: Rows, batch: Sequence[Tensor], rows: NDArray[np.intp], positions: NDArray[np.intp]) -> None:
        """Computes what `stored` keeps of the samples at some positions of the batch, whose rows there are `rows`."""
        size = self.chunk_size or max(1, len(positions))
        for part in (positions[start : start + size] for start in range(0, len(positions), size)):
            samples = [x[torch.from_numpy(part).to(x.device)].to(self.device) for x in batch]
            values = {}
            with evaluation_mode(self.model):
                # handed over without a name, so that no gradients are kept while the next are computed
                values["features"] = self.projector.project(
                    self.gradient_computer.compute_per_sample_grad(samples), model_id=self._model_id
                )
                if "weights" in stored.columns:
                    values["weights"] = self.gradient_computer.compute_loss_grad(samples).reshape(-1)
            for name, value in values.items():
                values[name] = value.detach().to(device="cpu", dtype=torch.float32)
                expected = (len(part), *stored.columns[name].shape[1:])
                if value.shape != expected:
                    raise ValueError(f"{name} must have shape {expected}, not {tuple(value.shape)}")
                # one row that is not finite would spoil all scores, through X'X
                if not (finite := values[name].isfinite().reshape(len(part), -1).all(1)).all():
                    raise ValueError(f"the {name} of samples {rows[part][~finite].tolist()[:5]} are not finite")
            stored.write(rows[part], **values)

    def _model_ids(self, model_ids: Iterable[int] | None) -> list[int]:
        stored = self.store.model_ids()
        if model_ids is None:
            ids = stored if self._resume else [i for i in stored if i in self._seen]
        else:
            ids = list(dict.fromkeys(map(operator.index, model_ids)))
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

    def _solver(self, model_id: int, num_checkpoints: int) -> Solver:
        """The solver of one of `num_checkpoints` checkpoints whose scores are averaged."""
        columns = self.store.train(model_id).columns
        features, weights = columns["features"], None
        if self.lambda_reg is None and self.curvature and hasattr(self.task, "get_loss_curvature"):
            weights = curvature_weights(self.task.get_loss_curvature(np.array(columns["weights"], np.float64)))
        if weights is None and not self.normalize:
            gram = torch.from_numpy(self.store.gram(model_id)).to(self._solver_device)
        else:
            gram = gram_matrix(features, self._solver_device, weights, self.normalize)
        if self.lambda_reg is None:
            ridge = auto_ridge(gram, len(features), features.shape[1], num_checkpoints)
        else:
            ridge = self.lambda_reg * self.grad_dim
        solver = Solver(features, gram, ridge, weights, self.normalize)
        self.logger.info(
            "model_id %d: ridge %.3g, %.3g times the mean squared norm of the features; condition number %.2g",
            model_id, ridge, ridge * len(features) / (gram.trace().item() or 1.0), solver.inverse.condition,
        )  # fmt: skip
        return solver

    def _mean_weights(self, model_ids: Iterable[int]) -> Tensor:
        weights = [np.array(self.store.train(model_id).columns["weights"], np.float64) for model_id in model_ids]
        return torch.from_numpy(np.mean(weights, axis=0))

    @property
    def _solver_device(self) -> torch.device:
        return self.device if self.device.type == "cuda" else torch.device("cpu")  # not all others have float64


def _ridge(lambda_reg: float | str | None) -> float | None:
    """`lambda_reg` with None for "auto"."""
    if lambda_reg is None or (isinstance(lambda_reg, str) and lambda_reg == "auto"):
        return None
    if isinstance(lambda_reg, (str, bool)) or not 0 <= lambda_reg < math.inf:
        raise ValueError(f'lambda_reg must be "auto" or a finite number >= 0, not {lambda_reg!r}')
    return float(lambda_reg)


def _integer(name: str, value: int, low: int = 1, high: int = 2**48) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, not {value!r}")
    if not low <= operator.index(value) <= high:
        raise ValueError(f"{name} must be in [{low}, {high}], not {value}")
    return operator.index(value)
