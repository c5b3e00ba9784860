"""Stored arrays in the arrangement of traker's `saver`, for programs that read from that (quanda and dattri's do)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..scales import beyond_float32, joined
from ..store.rows import Rows
from .estimator import Estimator
from .gram import blocks, plain_arithmetic


class Saver:
    """The checkpoints of a store, one of which is the current one; nothing can be written by it.

    Attributes:
        save_dir: The folder.
        current_model_id: The current checkpoint: the last that `load_current_store`, or a method of `TRAKer`, loaded;
            None before.
        current_store: Its arrays (see `CheckpointArrays`).
    """

    def __init__(self, estimator: Estimator) -> None:
        """Takes the estimator of the scores, and with it the store; no checkpoint is the current one yet."""
        self._estimator = estimator
        self.save_dir: Path = estimator.store.path
        self.current_model_id: int | None = None
        self.current_store = CheckpointArrays(estimator, None)

    @property
    def model_ids(self) -> dict[int, dict[str, int]]:
        """The stored checkpoints: "is_featurized" and "is_finalized", 0 or 1, by model_id."""
        store = self._estimator.store
        return {
            i: {"is_featurized": int(store.train(i).done.all()), "is_finalized": int(store.is_finalized(i))}
            for i in store.model_ids()
        }

    def load_current_store(
        self, model_id: int, exp_name: str | None = None, exp_num_targets: int | None = -1, mode: str = "r"
    ) -> None:
        """Makes a checkpoint the current one.

        Args:
            model_id: The checkpoint.
            exp_name: Checks that the checkpoint has targets of this experiment; those of all are in `current_store`.
            exp_num_targets: Checks their number; None or −1: any.
            mode: "r" or "r+", which do the same here.

        Raises:
            ValueError: The checkpoint or the experiment is not stored, or `mode` would make files anew.
        """
        if mode not in ("r", "r+"):
            raise ValueError(f'mode must be "r" or "r+", not {mode!r}: this saver only reads')
        store = self._estimator.store
        if model_id not in (stored := store.model_ids()):
            raise ValueError(f"model_id must be one of {stored}, which {store.path} has, not {model_id}")
        if exp_name is not None:
            count = len(store.targets(model_id, exp_name).done)
            if exp_num_targets not in (None, -1, count):
                raise ValueError(f"exp_num_targets must be {count} for exp_name {exp_name!r}, not {exp_num_targets}")
        self.current_model_id = model_id
        self.current_store = CheckpointArrays(self._estimator, model_id)


class CheckpointArrays(Mapping[str, NDArray[Any]]):
    """The arrays of a checkpoint by the names that traker gives them; they are made when asked for, and read-only.

    With √D = `TRAKer.normalize_factor`:

        "grads"             (n, k) float32: the projected gradients of the training samples, divided by √D
        "out_to_loss"       (n, 1) float32: the weightings Q
        "is_featurized"     (n, 1) int32: 1 where a training sample is featurized
        "features"          (n, k) float32: √D X (X'RX + λI)⁻¹, with the ridge and weights of the scores of this
                            checkpoint alone; there once the checkpoint is finalized
        "<exp_name>_grads"  (m, k) float32: the projected gradients of the targets, divided by √D

    `(phi / √D) @ features.T * out_to_loss.T` are the scores of targets phi (m, k) for this checkpoint, (m, n), without
    `shrink_weights` and `normalize`.
    """

    def __init__(self, estimator: Estimator, model_id: int | None) -> None:
        """Takes the checkpoint, None for none."""
        self._estimator = estimator
        self._model_id = model_id
        self._features: NDArray[Any] | None = None
        self._made_from: object = None  # what the features depend on

    def __iter__(self) -> Iterator[str]:
        if self._model_id is None:
            return
        store = self._estimator.store
        yield from ("grads", "out_to_loss", "is_featurized")
        if store.is_finalized(self._model_id):
            yield "features"
        for exp_name in store.experiments_of(self._model_id):
            yield f"{exp_name}_grads"

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getitem__(self, name: str) -> NDArray[Any]:
        names = list(self)
        if self._model_id is None or name not in names:
            raise KeyError(self._complaint(name, names))
        train = self._estimator.store.train(self._model_id)
        match name:
            case "grads":
                array: NDArray[Any] = self._divided(train)
            case "out_to_loss":
                array = np.array(train.weights)[:, None]
            case "is_featurized":
                array = np.array(train.done, np.int32)[:, None]
            case "features":
                array = self._solved(self._model_id, train)
            case _:
                array = self._divided(self._estimator.store.targets(self._model_id, name.removesuffix("_grads")))
        array.setflags(write=False)
        return array

    def _complaint(self, name: str, names: list[str]) -> str:
        """Says what there is instead of `name`."""
        if self._model_id is None:
            return f"{name!r}: no checkpoint is loaded; call load_current_store with one of the saver's model_ids"
        return f"{name!r} must be one of {', '.join(map(repr, names))} for model_id {self._model_id}" + (
            "; 'features' are there after finalize_features" if name == "features" else ""
        )

    def _divided(self, rows: Rows) -> NDArray[Any]:
        """Divides features by √D."""
        divided: NDArray[Any] = np.asarray(rows.features) / np.float32(math.sqrt(self._estimator.grad_dim))
        return _narrowed(divided)

    @plain_arithmetic()
    def _solved(self, model_id: int, train: Rows) -> NDArray[Any]:
        """Computes √D X (X'RX + λI)⁻¹, unless it was computed from the same before."""
        status = (self._estimator.store.checkpoint(model_id) / "gram.npy").stat()
        made_from = (status.st_ino, status.st_mtime_ns, dataclasses.astuple(self._estimator.settings))
        if self._features is None or made_from != self._made_from:
            with train.kept():
                solver = self._estimator.solver(model_id, 1, self._estimator.disagreement([model_id]))
                n, k = train.features.shape
                solved = np.empty((n, k), np.float64)
                if solver.primal:  # a row is (X'RX + λI)⁻¹ x of a training sample x
                    for rows in blocks(n, k):
                        solved[rows] = joined(solver.solve(train.features[rows])).mT.cpu().numpy()
                else:  # a column is the scores of a unit vector
                    for columns in blocks(k, k):
                        units = np.eye(columns.stop - columns.start, k, columns.start, dtype=np.float32)
                        solved[:, columns] = joined(solver.solve(units)).cpu().numpy()
                solved *= math.sqrt(self._estimator.grad_dim)
            self._features, self._made_from = _narrowed(solved), made_from
        return self._features


def _narrowed(array: NDArray[Any]) -> NDArray[Any]:
    """Returns an array as float32, where that holds its largest magnitude."""
    return array if beyond_float32(np.abs(array).max(initial=0)) else array.astype(np.float32)
