"""The check that a model gives the same outputs each time: features of a random model would say nothing."""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

OUTPUT_ROUNDINGS = {torch.float64: 2.0**9, torch.float32: 2.0**9, torch.bfloat16: 2.0**3, torch.float16: 2.0**5}
"""The difference of outputs that rounding explains, as a multiple of the dtype's precision and of the largest output.
Sums of half-precision numbers are kept in float32, and grow with the number of summands in the other dtypes alone."""

GRADIENT_ROUNDINGS = {torch.float64: 2.0**10, torch.float32: 2.0**10, torch.bfloat16: 2.0**4, torch.float16: 2.0**5}
"""The same for gradients, relative to the largest entry of a parameter's gradient."""


NEGLIGIBLE_ROUNDINGS = {torch.float64: 16.0, torch.float32: 16.0, torch.bfloat16: 2.0, torch.float16: 4.0}
"""The difference of gradients that does not count, as a multiple of the dtype's precision: relative to the largest of a
parameter. One that is rounding of zero, as that of attention's key biases is, has no correct digits to compare."""


def tolerance_of(roundings: Mapping[torch.dtype, float], dtypes: Iterable[torch.dtype]) -> float:
    """Returns the relative difference that so many roundings explain in a model with parameters of `dtypes`."""
    return max(roundings.get(dtype, 1.0) * torch.finfo(dtype).eps for dtype in dtypes)


def differ(first: Tensor, second: Tensor, tolerance: float) -> bool:
    """Tells if two tensors differ by more than `tolerance` times the largest entry, or in shape."""
    if first.shape != second.shape:
        return True
    first = first.detach().double()
    second = second.detach().double()
    if not first.numel():
        return False
    same = (first == second) | (first.isnan() & second.isnan())
    near = (first - second).abs() <= tolerance * first[first.isfinite()].abs().max() if first.isfinite().any() else same
    return not bool((same | near).all())


class RandomOutputsError(RuntimeError):
    """The outputs of a model are random, or depend on what it has computed before."""


Generators = Sequence[random.Random | np.random.Generator | np.random.RandomState | torch.Generator]


def generators_of(model: nn.Module) -> Generators:
    """Lists the generators of random numbers that a model's modules hold."""
    kinds = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)
    return [value for module in model.modules() for value in vars(module).values() if isinstance(value, kinds)]


class RandomWatch:
    """Tells if a random number was drawn since this object was made, by torch, NumPy, Python or a given generator."""

    def __init__(self, device: torch.device, generators: Generators = ()) -> None:
        self._device = device
        self._generators = generators
        self._before = self._states()

    def drawn(self) -> bool:
        """Tells if a generator has moved."""
        return not all(
            torch.equal(old, new) if isinstance(old, Tensor) else old == new
            for old, new in zip(self._before, self._states(), strict=True)
        )

    def _states(self) -> list[Any]:
        numpy: Any = np.random.get_state(legacy=False)
        states: list[Any] = [torch.get_rng_state(), random.getstate(), pickle.dumps(numpy)]
        if self._device.type == "cuda":
            states.append(torch.cuda.get_rng_state(self._device))
        for generator in self._generators:
            if isinstance(generator, random.Random):
                states.append(generator.getstate())
            elif isinstance(generator, np.random.Generator):
                states.append(pickle.dumps(generator.bit_generator.state))
            else:
                states.append(pickle.dumps(generator.get_state()))
        return states


def require_same(results: Tensor, again: Tensor, tolerance: float) -> None:
    """Checks that a model's results for some samples were the same when it was evaluated once more.

    Raises:
        RandomOutputsError: They differ.
    """
    if differ(results, again, tolerance):
        raise RandomOutputsError(RANDOM)


RANDOM = (
    "the model gives other outputs for the same samples each time, in evaluation mode too, so features would not be "
    "repeatable: an operation is random (F.dropout(x) needs training=self.training), or the model keeps a state that "
    "is no buffer"
)
