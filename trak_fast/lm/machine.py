"""The means that a run computes with, which change no scores."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from ..arguments import integer

BATCH_TOKENS = {"cuda": 16384, "cpu": 4096}
"""Tokens of a batch by default; fewer are computed at a time where these do not fit into memory."""


@dataclass(frozen=True)
class Machine:
    """The means to compute with.

    Attributes:
        device: "cpu", "cuda" or "cuda:1"; None: a CUDA device if there is one.
        batch_tokens: Tokens of a batch, with its padding; None: by the device.
        memory: Bytes for computing a batch; None: a part of what is free.
    """

    device: str | None = None
    batch_tokens: int | None = None
    memory: int | None = None

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: A value is out of its range, or there is no such device.
            TypeError: A value is no number.
        """
        if self.batch_tokens is not None:
            integer("--batch-tokens", self.batch_tokens, 1, 2**40)
        if self.memory is not None:
            integer("--memory", self.memory, 1, 2**62)
        try:
            kind = self.chosen_device.type
        except RuntimeError:
            raise ValueError(f"--device must be cpu, cuda or cuda:1, for example, not {self.device!r}") from None
        if kind not in BATCH_TOKENS:
            raise ValueError(f"--device must be cpu or cuda, not {self.device!r}")
        if kind == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"--device must be cpu where torch finds no CUDA device, not {self.device!r}")

    @property
    def chosen_device(self) -> torch.device:
        """The device; under torchrun each process of a machine has its own."""
        if self.device not in (None, "cuda"):
            return torch.device(self.device or "cpu")
        if self.device is None and not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))

    @property
    def tokens(self) -> int:
        """Tokens of a batch."""
        return self.batch_tokens or BATCH_TOKENS[self.chosen_device.type]
