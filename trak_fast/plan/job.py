"""A TRAK run whose time, memory and disk are to be predicted."""

from __future__ import annotations

from dataclasses import dataclass

from ..bench.case import Case


@dataclass(frozen=True)
class Job:
    """A run.

    Attributes:
        params: Parameters that gradients are taken of, D.
        proj_dim: k.
        samples: Training samples, n.
        targets: m.
        checkpoints: C.
        batch: Samples whose gradients are there at a time, B.
        dtype: Of the gradients.
        proj_type: Kind of matrix.
        device: Where to run.
        half: Whether features are stored in float16.
        tokens: Of a sample, to estimate its gradient's time; 1 for a model that uses each weight once for a sample.
        gradient_seconds: Of one sample's gradient, if it is known; takes the place of `tokens`.
        processes: That share the work, each on a machine or GPU like this.
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

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            ValueError: Something is out of its range.
        """
        for name in ("params", "proj_dim", "samples", "checkpoints", "batch", "processes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.targets < 0:
            raise ValueError(f"targets must be at least 0, not {self.targets}")
        if self.tokens is not None and self.tokens < 1:
            raise ValueError(f"tokens must be at least 1, not {self.tokens}")
        if self.gradient_seconds is not None and not self.gradient_seconds >= 0:
            raise ValueError(f"gradient_seconds must be at least 0, not {self.gradient_seconds}")

    @property
    def case(self) -> Case:
        """One call of the projection."""
        return Case(self.batch, self.params, self.proj_dim, self.dtype, self.proj_type, self.device)
