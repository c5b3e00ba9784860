"""A TRAK run whose time, memory and disk are to be predicted."""

from __future__ import annotations

from dataclasses import dataclass

from ..arguments import choice, integer, real
from ..bench.case import DEVICES, DTYPES, MOST_GRADIENTS, PROJ_TYPES
from ..projection.checks import KINDS, MAX_COLUMNS, NONZEROS, nonzeros_of

MOST_SECONDS = 1e9
"""Seconds that one sample's gradient may be said to take."""

LIMITS = {
    "params": (1, MAX_COLUMNS), "proj_dim": (1, 2**32), "samples": (1, 2**48), "targets": (0, 2**48),
    "checkpoints": (1, 2**32), "batch": (1, MOST_GRADIENTS), "tokens": (1, 2**48), "processes": (1, 2**32),
}  # fmt: skip
"""The least and the largest value of each integer of a job."""


@dataclass(frozen=True)
class Job:
    """A run to predict.

    Attributes:
        params: Parameters that gradients are taken of, D.
        proj_dim: Size of the projected gradients, k.
        samples: Training samples, n.
        targets: Samples to attribute, m.
        checkpoints: Checkpoints, C.
        batch: Samples whose gradients are in memory at a time, B.
        dtype: The gradients' dtype, by torch's name.
        proj_type: Kind of matrix.
        device: "cpu" or "cuda".
        half: Stores features in float16.
        tokens: Tokens of a sample, to estimate its gradient's time; 1 for a model that uses each weight once for a
            sample.
        gradient_seconds: Seconds of one sample's gradient, if they are known; they take the place of `tokens`.
        processes: Processes that share the work, each on a machine or GPU like this.
        nonzeros: Entries in each column of the kind "sjlt"; None: the default.
    """

    params: int
    proj_dim: int
    samples: int
    targets: int = 1000
    checkpoints: int = 1
    batch: int = 32
    dtype: str = "float32"
    proj_type: str = "rademacher"
    device: str = "cpu"
    half: bool = False
    tokens: int | None = None
    gradient_seconds: float | None = None
    processes: int = 1
    nonzeros: int | None = None

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            TypeError: A value has a wrong type.
            ValueError: A value is out of its range.
        """
        for name, (low, high) in LIMITS.items():
            if name != "tokens" or self.tokens is not None:
                integer(name, getattr(self, name), low, high)
        if self.gradient_seconds is not None:
            real("gradient_seconds", self.gradient_seconds, 0.0, MOST_SECONDS)
        choice("dtype", self.dtype, DTYPES)
        choice("proj_type", self.proj_type, PROJ_TYPES)
        choice("device", self.device, DEVICES)
        if self.nonzeros is not None:
            integer("nonzeros", self.nonzeros, NONZEROS[0], NONZEROS[-1])
        nonzeros_of(KINDS[self.proj_type], self.proj_dim, self.nonzeros)

    @property
    def column_entries(self) -> int:
        """Number of entries of a column of the matrix that are not 0: k for a dense kind."""
        return nonzeros_of(KINDS[self.proj_type], self.proj_dim, self.nonzeros) or self.proj_dim
