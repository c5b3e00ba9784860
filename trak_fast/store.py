"""Features on disk.

    save_dir/manifest.json                           what the features are; written once
    save_dir/checkpoint_<model_id>/checkpoint.json   digest of the checkpoint's weights
                                   gram.npy          X'X or XX'; once it is there the checkpoint is finalized
                                   train/            rows of the training samples
                                   targets/<name>/   rows of the targets of an experiment
    save_dir/scores/<name>.npy

Rows are memory-mapped arrays with one flag a row. Whole files and folders appear by renaming, and a row's flag is set
after its values are on disk, so whatever is there after a crash is complete and right. Each checkpoint has its own
files, and no file holds the state of several.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from torch import Tensor

FORMAT = 1
"""Number of the folder's format, in each manifest."""


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary file name that replaces `path` at the end of the block, unless something was raised."""
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _building(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes `path` at the end of the block, unless something was raised."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(path.parent.stat().st_mode & 0o777)  # mkdtemp's own mode is the user's alone
        try:
            temporary.rename(path)
        except OSError:
            if not path.exists():  # otherwise another process was quicker, and what it made is as good
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with _replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"cannot read {path}, it is missing, truncated or corrupt ({error}); use another save_dir, "
            "or delete this one to start again"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is corrupt: it holds no JSON object")
    return content


def differences(stored: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """One line for each entry that differs, with both values; lists are compared item by item."""
    lines = []
    for name in dict.fromkeys([*given, *stored]):
        old, new = stored.get(name), given.get(name)
        if isinstance(old, list) and isinstance(new, list):
            pairs = zip_longest(old, new)
            lines += [f"{name}[{i}]: stored {a!r}, given {b!r}" for i, (a, b) in enumerate(pairs) if a != b]
        elif old != new:
            lines.append(f"{name}: stored {old!r}, given {new!r}")
    return lines


def digest(weights: Mapping[str, Any]) -> str:
    """SHA-256 of the tensors of a state dict, with their names, shapes and dtypes."""
    sha = hashlib.sha256()
    for name, tensor in weights.items():
        if isinstance(tensor, Tensor):
            sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def describe(
    projector: Any, proj_dim: int, task: object, parameters: Mapping[str, Tensor], train_set_size: int
) -> dict[str, Any]:
    """What features depend on, as a manifest.

    Args:
        projector: An object with `proj_type`, and perhaps `seed` and `definition`, the number of its matrix's.
        proj_dim: Size of a feature, k.
        task: The task, known by its class's name.
        parameters: What gradients are taken of, in this order.
        train_set_size: Training samples, n.
    """
    proj_type, seed = getattr(projector, "proj_type", None), getattr(projector, "seed", None)
    return {
        # a projector that follows no numbered definition is known by its class's name
        "matrix_definition": getattr(projector, "definition", type(projector).__qualname__),
        "proj_type": getattr(proj_type, "value", proj_type),
        "seed": None if seed is None else int(seed),
        "proj_dim": proj_dim,
        "grad_dim": sum(parameter.numel() for parameter in parameters.values()),
        "train_set_size": train_set_size,
        "task": type(task).__qualname__,
        "dtype": "float32",
        "parameters": [f"{name} {p.dtype} {tuple(p.shape)}" for name, p in parameters.items()],
    }


class Rows:
    """Memory-mapped float32 columns of equal length in one folder, with a flag for each row that is written.

    Attributes:
        columns: Each column's array, (rows, *shape) float32.
        done: (rows,) bool.
    """

    def __init__(self, path: Path, num_rows: int, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Opens the columns that `create` made.

        Raises:
            ValueError: A file is missing, truncated, corrupt, or has another shape.
        """
        self.columns = {name: _open(path / f"{name}.npy", (num_rows, *shape)) for name, shape in shapes.items()}
        self.done = _open(path / "done.npy", (num_rows,), np.bool_)

    @staticmethod
    def create(path: Path, num_rows: int, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Makes a folder of columns without any row done.

        Raises:
            OSError: The disk has too little space. (Running out of it in a memory map would kill the process.)
        """
        path.mkdir(exist_ok=True)
        needed = sum(4 * num_rows * int(np.prod(shape)) for shape in shapes.values())
        if (free := shutil.disk_usage(path).free) < needed:
            raise OSError(errno.ENOSPC, f"features need {needed / 1e9:.3g} GB, {free / 1e9:.3g} GB are free", str(path))
        for name, shape in shapes.items():
            open_memmap(path / f"{name}.npy", "w+", np.float32, (num_rows, *shape)).flush()
        open_memmap(path / "done.npy", "w+", np.bool_, (num_rows,)).flush()

    def write(self, inds: NDArray[np.integer], **values: NDArray[np.float32] | Tensor) -> None:
        """Writes rows `inds` of every column; their flags are down meanwhile."""
        if self.done[inds].any():
            self.done[inds] = False
            self.done.flush()
        for name, column in self.columns.items():
            column[inds] = values[name]
            column.flush()
        self.done[inds] = True
        self.done.flush()

    def require_all(self, what: str) -> None:
        """Checks that every row is written.

        Raises:
            RuntimeError: Some are not; the message counts them as `what` and numbers the first.
        """
        if len(missing := np.flatnonzero(~self.done)):
            numbers = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
            raise RuntimeError(f"{len(missing)} of {len(self.done)} {what}: {numbers}")


def _read(path: Path) -> np.memmap:
    try:
        return open_memmap(path, "r")
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"cannot open {path}, it is missing, truncated or corrupt ({error})") from error


def _open(path: Path, shape: tuple[int, ...], dtype: type[np.generic] = np.float32) -> np.memmap:
    stored = _read(path)  # before it is opened for writing, which would extend a truncated file without a word
    if stored.shape != shape or stored.dtype != dtype:
        raise ValueError(f"{path}: stored {stored.dtype} {stored.shape}, expected {np.dtype(dtype)} {shape}")
    return open_memmap(path, "r+")


class Store:
    """The folder of one set of training samples, model architecture, task and projection, for all checkpoints."""

    def __init__(
        self, save_dir: str | os.PathLike[str], manifest: Mapping[str, Any], num_rows: int, width: int
    ) -> None:
        """Opens `save_dir`, or makes it.

        Args:
            save_dir: The folder.
            manifest: What the features depend on: a JSON object whose values must equal those stored.
            num_rows: Training samples, n.
            width: Size of a projected gradient, k.

        Raises:
            ValueError: The folder holds features of another kind (the message says what differs), or its manifest
                is missing, truncated or corrupt.
        """
        self.path = Path(save_dir).resolve()
        self.num_rows, self.width = num_rows, width
        (self.path / "scores").mkdir(parents=True, exist_ok=True)
        manifest = {"format": FORMAT, **manifest}
        file = self.path / "manifest.json"
        if not file.exists() and not self.model_ids():
            _write_json(file, manifest)
        if lines := differences(_read_json(file), manifest):
            more = [f"and {len(lines) - 8} more"] if len(lines) > 8 else []
            raise ValueError(
                f"{self.path} holds features made in another way, use another save_dir:\n  "
                + "\n  ".join(lines[:8] + more)
            )

    def model_ids(self) -> list[int]:
        """Checkpoints that the folder has, in increasing order."""
        names = [path.name.removeprefix("checkpoint_") for path in self.path.glob("checkpoint_*")]
        return sorted(int(name) for name in names if name.isdecimal())

    def checkpoint(self, model_id: int) -> Path:
        """The folder of a checkpoint."""
        return self.path / f"checkpoint_{model_id}"

    def register(self, model_id: int, weights: Mapping[str, Any]) -> None:
        """Makes a checkpoint's folder with no row done, or checks that the one that is there has these weights.

        Raises:
            ValueError: The folder belongs to other weights.
        """
        path = self.checkpoint(model_id)
        if not path.exists():
            with _building(path) as folder:
                Rows.create(folder / "train", self.num_rows, self._train_shapes)
                _write_json(folder / "checkpoint.json", {"digest": digest(weights)})
        self.check_weights(model_id, weights)

    def check_weights(self, model_id: int, weights: Mapping[str, Any]) -> None:
        """Checks that a checkpoint's folder belongs to a state dict.

        Raises:
            ValueError: It does not.
        """
        stored = _read_json(self.checkpoint(model_id) / "checkpoint.json")
        if lines := differences(stored, {"digest": digest(weights)}):
            raise ValueError(
                f"the features of model_id {model_id} in {self.path} belong to other weights than the "
                f"checkpoint given ({lines[0]}); use another model_id, or featurize again"
            )

    def forget(self, model_id: int) -> None:
        """Deletes all that is stored for a checkpoint."""
        path = self.checkpoint(model_id)
        if path.exists():
            leaving = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=self.path))
            path.rename(leaving / path.name)  # so that half of it is never taken for a whole checkpoint
            shutil.rmtree(leaving)

    @property
    def _train_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"features": (self.width,), "weights": ()}

    def train(self, model_id: int) -> Rows:
        """Training rows of a registered checkpoint: `features` (n, k) and `weights` (n,), the task's Q."""
        return Rows(self.checkpoint(model_id) / "train", self.num_rows, self._train_shapes)

    def targets(self, model_id: int, exp_name: str, num_targets: int | None = None) -> Rows:
        """Target rows of an experiment: `features` (m, k). They are made if `num_targets` is given.

        Raises:
            ValueError: Nothing is stored for this experiment and checkpoint, or another number of targets, or
                `exp_name` cannot be a file's name.
        """
        if not exp_name or exp_name.startswith(".") or any(c in exp_name for c in "/\\\0"):
            raise ValueError(f"exp_name must be a file name, without separators or a leading dot, not {exp_name!r}")
        path = self.checkpoint(model_id) / "targets" / exp_name
        if num_targets is not None and not path.exists():
            with _building(path) as folder:
                Rows.create(folder, num_targets, {"features": (self.width,)})
        if not path.exists():
            raise ValueError(f"exp_name {exp_name!r} has no targets for model_id {model_id}")
        stored = len(_read(path / "done.npy"))
        if num_targets not in (None, stored):
            raise ValueError(f"exp_name {exp_name!r} has {stored} targets for model_id {model_id}, not {num_targets}")
        return Rows(path, stored, {"features": (self.width,)})

    def save_gram(self, model_id: int, gram: NDArray[np.float64]) -> None:
        """Stores a checkpoint's Gram matrix, which makes the checkpoint finalized."""
        with _replacing(self.checkpoint(model_id) / "gram.npy") as temporary:
            np.save(temporary, gram)

    def is_finalized(self, model_id: int) -> bool:
        """Whether a checkpoint has its Gram matrix."""
        return (self.checkpoint(model_id) / "gram.npy").exists()

    def gram(self, model_id: int) -> NDArray[np.float64]:
        """The Gram matrix of a finalized checkpoint."""
        gram: NDArray[np.float64] = np.load(self.checkpoint(model_id) / "gram.npy")
        return gram

    @contextmanager
    def writing_scores(self, exp_name: str, num_targets: int) -> Iterator[np.memmap]:
        """A new (n, num_targets) float32 array of zeros, which replaces the stored scores at the end of the block."""
        with _replacing(self.path / "scores" / f"{exp_name}.npy") as temporary:
            scores = open_memmap(temporary, "w+", np.float32, (self.num_rows, num_targets))
            yield scores
            scores.flush()

    def scores(self, exp_name: str) -> np.memmap:
        """Scores of an experiment, (n, m) float32. Changes that the caller makes do not reach the disk."""
        return open_memmap(self.path / "scores" / f"{exp_name}.npy", "c")
