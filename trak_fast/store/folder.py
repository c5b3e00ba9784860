"""The folder of features.

    save_dir/manifest.json                              all that the features depend on; written once
    save_dir/growth.json                                the number of training samples, once it is another (growth.py)
    save_dir/writers.lock                               shared by who adds a checkpoint, locked by who extends it all
    save_dir/checkpoint_<model_id>/checkpoint.json      digest of the checkpoint's weights
                                   gram.npy             X'X (and X'CX) or XX'; a checkpoint that has it is finalized
                                   gram/                parts of X'X until then (scoring/partial_grams.py)
                                   samples.safetensors  some of its samples with their f and Q (samples.py)
                                   metric.safetensors   the metric that its features are in, if there is one
                                   train/               rows of the training samples (rows.py), locks of their writers
                                   targets/<name>/      rows of the targets of an experiment
    save_dir/scores/<name>.npy, <name>.highest.npz, ...

Whole files and folders appear by renaming, and a row's flag is set after its values are on disk, so everything that is
found after a crash is complete and right. Each checkpoint has its own files, and no file holds the state of several.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from .files import (
    advising_on_denied,
    atomic_file,
    atomic_folder,
    is_file_name,
    read_array,
    read_json,
    remove_leftovers,
    temporary_name,
    write_json,
)
from .growth import Growth, grow_folder, size_kept
from .locks import let_go
from .manifest import differences, digest
from .rows import LOCK_FILE, Rows, claimed_for_deletion

FORMAT = 6
"""The number of the folder's format, which each manifest has."""

LONGEST_NAME = 150
"""Bytes of an experiment's name: file systems take names of 255, and temporary names have more in them."""

SCORE_ENDINGS = (".npy", ".highest.npz", ".lowest.npz")
"""Endings of the names of the files of an experiment's scores: all, and the best of each target."""

logger = logging.getLogger("trak_fast")


class Store:
    """The folder of one set of training samples, model architecture, task and projection, for all checkpoints."""

    def __init__(
        self, save_dir: str | os.PathLike[str], manifest: Mapping[str, Any], num_rows: int, width: int
    ) -> None:
        """Opens `save_dir`, or makes it.

        Args:
            save_dir: The folder.
            manifest: All that the features depend on: a JSON object whose values must equal those stored. Its
                "dtype" is the way in which training features are stored (`encodings.STORE_DTYPES`).
            num_rows: Training samples, n.
            width: Size of a projected gradient, k.

        Raises:
            ValueError: The folder holds features that were made in another way (the message says what differs), or its
                manifest is missing, truncated or corrupt.
            PermissionError: There is no such folder, and it may not be made.
        """
        self.path = Path(save_dir).expanduser().resolve()
        self.num_rows = num_rows
        self.width = width
        self.store_dtype = str(manifest.get("dtype", "float32"))
        manifest = {"format": FORMAT, **manifest}
        file = self.path / "manifest.json"
        if not file.exists() and not self.model_ids():
            with advising_on_denied(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
                write_json(file, manifest)
        if not (scores := self.path / "scores").is_dir():
            with suppress(PermissionError), advising_on_denied(scores):  # features may be read nevertheless
                scores.mkdir(exist_ok=True)
        stored = read_json(file)
        if (growth := Growth.load(self.path)) is not None:
            stored["train_set_size"] = growth.train_set_size
        if lines := differences(stored, manifest):
            if len(lines) == 1 and growth is not None and growth.train_set_size > num_rows:
                self._require_size()
            more = [f"and {len(lines) - 8} more"] if len(lines) > 8 else []
            if isinstance(size := stored.get("train_set_size"), int) and size < num_rows:
                more.append(f"(TRAKer(..., train_set_size={size}).extend({num_rows}) adds rows to the folder)")
            if stored.get("format") != manifest["format"]:
                more.append("(another version of trak_fast made the folder)")
            if any(line.startswith("task_settings") for line in lines):
                more.append("(names of what changes as a task runs should begin with an underscore)")
            if self._is_unused():
                more.append("(no row has been written there yet: delete the folder if no other run is about to use it)")
            raise ValueError(
                f"{self.path} holds features made in another way, use another save_dir:\n  "
                + "\n  ".join(lines[:8] + more)
            )

    def _require_size(self) -> None:
        """Checks that the folder has as many training samples as when it was opened.

        Raises:
            ValueError: Another process has extended it since.
            RuntimeError: It is being extended, or a process was killed while it did that.
        """
        growth = Growth.load(self.path) or Growth(self.num_rows)
        if growth.train_set_size != self.num_rows:
            size = growth.train_set_size
            raise ValueError(f"train_set_size must be {size}, not {self.num_rows}; the folder has grown ({self.path})")
        if not growth.is_finished:
            raise RuntimeError(f"{self.path} is half extended; TRAKer(...) finishes it")

    @property
    def is_growing(self) -> bool:
        """True while the folder is extended, and where that was interrupted: `grow` finishes it."""
        growth = Growth.load(self.path)
        return growth is not None and not growth.is_finished

    def grow(self, num_rows: int) -> None:
        """Makes room for more training samples; finishes what a killed process has begun of that.

        Stored rows and targets stay. Gram matrices, their unfinished sums and all scores are deleted. Objects that have
        the folder open, this one too, must have their `num_rows` set to go on.

        Args:
            num_rows: Training samples, n.

        Raises:
            ValueError: The folder has more, or a file is missing, truncated or corrupt.
            RuntimeError: Another process that is alive writes rows, or computes with them.
            PermissionError: The folder may be read but not written.
            OSError: The disk has too little space.
        """
        with ExitStack() as locks:
            locks.enter_context(claimed_for_deletion(self.path))  # no checkpoint is added from here on
            checkpoints = [self.checkpoint(i) for i in self.model_ids()]
            for path in [path for i in self.model_ids() for path in self._rows_of(i)]:
                locks.enter_context(claimed_for_deletion(path))
            scores = [path for path in self.path.glob("scores/[!.]*") if path.name.endswith(SCORE_ENDINGS)]
            before = Growth.load(self.path) or Growth(self.num_rows)
            grow_folder(self.path, before, num_rows, checkpoints, scores, self._train_shapes, self.store_dtype)

    def _is_unused(self) -> bool:
        """Tells if no row of a training sample is stored."""
        return not any(read_array(self.checkpoint(i) / "train" / "done.npy").any() for i in self.model_ids())

    def model_ids(self) -> list[int]:
        """Lists the checkpoints that the folder has, in increasing order."""
        names = [path.name.removeprefix("checkpoint_") for path in self.path.glob("checkpoint_*")]
        return sorted(int(name) for name in names if name.isdecimal())

    def checkpoint(self, model_id: int) -> Path:
        """Returns the path of a checkpoint's folder."""
        return self.path / f"checkpoint_{model_id}"

    def register(self, model_id: int, weights: Mapping[str, Any] | str) -> Rows:
        """Makes a checkpoint's folder with no row done, or checks that the existing one belongs to these weights.

        Args:
            model_id: The checkpoint's number.
            weights: Its state dict, or the digest of it (`manifest.digest`).

        Returns:
            The training rows.

        Raises:
            ValueError: The folder belongs to other weights.
            OSError: The disk has too little space.
        """
        path = self.checkpoint(model_id)
        if not path.exists():
            with size_kept(self.path), advising_on_denied(self.path):
                self._require_size()
                with atomic_folder(path) as folder:
                    Rows.create(folder / "train", self.num_rows, self._train_shapes, self.store_dtype)
                    write_json(folder / "checkpoint.json", self._marks(weights))
            self._warn_of_same_weights(model_id)
        train = self.train(model_id)  # before the check: others may replace the folder until rows are claimed
        self.check_weights(model_id, weights)
        return train

    def check_weights(self, model_id: int, weights: Mapping[str, Any] | str) -> None:
        """Checks that a checkpoint's folder belongs to a state dict, or to that of a digest.

        Raises:
            ValueError: The folder belongs to other weights.
        """
        stored = read_json(self.checkpoint(model_id) / "checkpoint.json")
        marks = self._marks(weights)
        if stored.get("manifest") != marks["manifest"]:
            raise ValueError(
                f"{self.checkpoint(model_id)} was made in another folder, with another manifest.json; delete it"
            )
        if differences(stored, marks):
            raise ValueError(
                f"the features of model_id {model_id} in {self.path} belong to other weights than the checkpoint "
                "given, or to another optimizer_state; use another model_id, or featurize again (a model's own "
                "state_dict() changes as other checkpoints are loaded into it: copy.deepcopy it, or give TRAKer a "
                "model of its own)"
            )

    def _marks(self, weights: Mapping[str, Any] | str) -> dict[str, str]:
        """Makes what a checkpoint's folder is known by: the digests of its weights and of this folder's manifest."""
        manifest = (self.path / "manifest.json").read_bytes()
        of_weights = weights if isinstance(weights, str) else digest(weights)
        return {"digest": of_weights, "manifest": hashlib.sha256(manifest).hexdigest()[:16]}

    def _warn_of_same_weights(self, model_id: int) -> None:
        """Warns if another checkpoint has the very weights of this one."""
        own = read_json(self.checkpoint(model_id) / "checkpoint.json")["digest"]
        for other in self.model_ids():
            if other != model_id and read_json(self.checkpoint(other) / "checkpoint.json")["digest"] == own:
                logger.warning(
                    "model_id %d has the very weights of model_id %d: a model's state_dict() changes with the model, "
                    "copy.deepcopy(model.state_dict()) does not",
                    model_id,
                    other,
                )
                return

    def forget(self, model_id: int) -> None:
        """Deletes everything that is stored for a checkpoint.

        Raises:
            RuntimeError: Another process that is alive computes with it.
            PermissionError: The folder may be read but not written.
        """
        path = self.checkpoint(model_id)
        if path.exists():
            self._delete(path.name, [path], self._rows_of(model_id))

    def delete_experiment(self, exp_name: str) -> None:
        """Deletes the targets of an experiment at all checkpoints, and its scores.

        Raises:
            ValueError: There is no such experiment.
            RuntimeError: Another process that is alive computes with it.
            PermissionError: The folder may be read but not written.
        """
        check_name(exp_name)
        rows = [path for i in self.model_ids() if (path := self._targets_path(i, exp_name)).exists()]
        scores = [path for ending in SCORE_ENDINGS if (path := self.scores_file(exp_name, ending)).exists()]
        if not rows and not scores:
            known = ", ".join(map(repr, self.experiments())) or "none"
            raise ValueError(f"exp_name must be an experiment of {self.path}, one of {known}, not {exp_name!r}")
        self._delete(exp_name, [*scores, *rows], rows)

    def experiments(self) -> list[str]:
        """Lists the experiments that have targets or scores, in alphabetical order."""
        names = {name for i in self.model_ids() for name in self.experiments_of(i)}
        for path in (self.path / "scores").glob("*"):
            names |= {path.name.removesuffix(ending) for ending in SCORE_ENDINGS if path.name.endswith(ending)}
        return sorted(name for name in names if not name.startswith("."))

    def experiments_of(self, model_id: int) -> list[str]:
        """Lists the experiments that have targets at a checkpoint, in alphabetical order."""
        return sorted(path.name for path in self.checkpoint(model_id).glob("targets/[!.]*") if path.is_dir())

    def _delete(self, name: str, paths: Sequence[Path], rows: Collection[Path]) -> None:
        """Deletes files and folders; `rows` are the folders of rows among them, or in them."""
        with ExitStack() as locks:
            for path in rows:
                locks.enter_context(claimed_for_deletion(path))
            with advising_on_denied(self.path):
                remove_leftovers(self.path / name)
                leaving = temporary_name(self.path / name)
                leaving.mkdir()
                for number, path in enumerate(paths):  # so that half of a folder is never taken for the whole
                    path.rename(leaving / str(number))
                shutil.rmtree(leaving)

    def _rows_of(self, model_id: int) -> list[Path]:
        """Lists the folders of a checkpoint's rows, of training samples and targets."""
        path = self.checkpoint(model_id)
        return [folder for folder in (path / "train", *path.glob("targets/[!.]*")) if folder.is_dir()]

    def let_go(self, model_ids: Collection[int], exp_name: str | None = None) -> None:
        """Gives up all that this process has claimed of an experiment at some checkpoints, or of the checkpoints."""
        for i in model_ids:
            for path in self._rows_of(i) if exp_name is None else [self._targets_path(i, exp_name)]:
                let_go(path / LOCK_FILE)

    @contextmanager
    def reading(self, model_id: int, exp_name: str) -> Iterator[Rows]:
        """Opens the target rows of an experiment, and keeps other processes from replacing what scores come from.

        Raises:
            RuntimeError: Another process that is alive writes targets, or deletes the checkpoint.
            ValueError: As in `targets`.
        """
        with self.train(model_id).kept():
            targets = self.targets(model_id, exp_name)
            with targets.unchanged():
                yield targets

    @property
    def _train_shapes(self) -> dict[str, tuple[int, ...]]:
        """The columns of training rows, by the shape of one row."""
        return {"features": (self.width,), "weights": ()}

    def train(self, model_id: int) -> Rows:
        """Opens the training rows of a registered checkpoint: `features` (n, k) and `weights` (n,), the task's Q.

        Raises:
            ValueError: A file is missing, truncated or corrupt, or another process has extended the folder.
            RuntimeError: The folder is being extended.
        """
        self._require_size()
        path = self.checkpoint(model_id)
        return Rows(path / "train", self.num_rows, self._train_shapes, self.store_dtype)

    def targets(self, model_id: int, exp_name: str, num_targets: int | None = None) -> Rows:
        """Opens the target rows of an experiment, `features` (m, k); makes them if `num_targets` is given.

        Raises:
            TypeError: `exp_name` is no string.
            ValueError: Nothing is stored for this experiment and checkpoint, or another number of targets, or
                `exp_name` cannot be a file's name.
            PermissionError: The targets may not be made.
        """
        check_name(exp_name)
        path = self._targets_path(model_id, exp_name)
        if num_targets is not None and not path.exists():
            with advising_on_denied(self.path), atomic_folder(path) as folder:
                Rows.create(folder, num_targets, {"features": (self.width,)})
        if not path.exists():
            raise ValueError(f"exp_name {exp_name!r} has no targets for model_id {model_id}")
        stored = len(read_array(path / "done.npy"))
        if num_targets not in (None, stored):
            raise ValueError(
                f"exp_name {exp_name!r} has {stored} targets for model_id {model_id}, not {num_targets}; use another "
                f"exp_name, or delete this one by TRAKer.delete_experiment({exp_name!r})"
            )
        return Rows(path, stored, {"features": (self.width,)})

    def _targets_path(self, model_id: int, exp_name: str) -> Path:
        """Returns the path of an experiment's target rows."""
        return self.checkpoint(model_id) / "targets" / exp_name

    def samples_file(self, model_id: int) -> Path:
        """Returns the path of the file with some samples of a checkpoint (`StoredSamples`)."""
        return self.checkpoint(model_id) / "samples.safetensors"

    def metric_file(self, model_id: int) -> Path:
        """Returns the path of the file with the metric that a checkpoint's features are in."""
        return self.checkpoint(model_id) / "metric.safetensors"

    def partial_grams(self, model_id: int) -> Path:
        """Returns the path of the folder of a checkpoint's unfinished sums."""
        return self.checkpoint(model_id) / "gram"

    def save_gram(self, model_id: int, gram: NDArray[np.float64]) -> None:
        """Stores a checkpoint's Gram matrices (see `gram`), which makes the checkpoint finalized."""
        path = self.checkpoint(model_id) / "gram.npy"
        with advising_on_denied(self.path), atomic_file(path) as temporary, temporary.open("wb") as file:
            np.save(file, gram)
        shutil.rmtree(self.partial_grams(model_id), ignore_errors=True)

    def is_finalized(self, model_id: int) -> bool:
        """Tells if a checkpoint has its Gram matrices."""
        return (self.checkpoint(model_id) / "gram.npy").exists()

    def gram(self, model_id: int) -> NDArray[np.float64]:
        """Reads the Gram matrices of a finalized checkpoint: XX' (1, n, n), or X'X and perhaps X'CX (1 or 2, k, k)."""
        return np.array(read_array(self.checkpoint(model_id) / "gram.npy"), np.float64)

    def scores_file(self, exp_name: str, ending: str = ".npy") -> Path:
        """Returns the path of a file of an experiment's scores."""
        check_name(exp_name)
        return self.path / "scores" / f"{exp_name}{ending}"

    def scores(self, exp_name: str) -> np.memmap:
        """Opens the scores of an experiment, (n, m) float32. Changes that the caller makes do not reach the disk."""
        return open_memmap(self.scores_file(exp_name), "c")


def check_name(exp_name: str) -> None:
    """Checks that an experiment's name can be a file's.

    Raises:
        TypeError: The name is no string.
        ValueError: The name is empty, begins with a dot, or has a character that file names cannot have.
    """
    if not isinstance(exp_name, str):
        raise TypeError(f"exp_name must be a string, not {type(exp_name).__name__} ({exp_name!r})")
    strange = not is_file_name(exp_name) or any("\ud800" <= c <= "\udfff" for c in exp_name)
    if strange or exp_name.startswith(".") or len(exp_name.encode(errors="replace")) > LONGEST_NAME:
        raise ValueError(
            f"exp_name must be a file name of at most {LONGEST_NAME} bytes, without separators or a leading dot, "
            f"not {exp_name!r}"
        )
