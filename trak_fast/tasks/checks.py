"""Checks of what a model returns, and of the whole numbers in a batch, under vmap too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def tensor_of(output: object, wanted: str) -> Tensor:
    """Returns a model's output, or the logits in it.

    Args:
        output: A tensor, or an object or mapping that has one as `logits`, as Hugging Face's models return.
        wanted: The tensor that the task needs, for messages.

    Raises:
        TypeError: It is neither.
    """
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if isinstance(found, Tensor):
        return found
    raise TypeError(
        f"the model must return {wanted}, not {described(output)}; if it is to stay as it is, take what counts out of "
        "its output in a function of your own, task=lambda model, *sample: ... (docs/own-task.md)"
    )


def described(output: object) -> str:
    """Says what a model returned: types, shapes and keys."""
    if isinstance(output, Tensor):
        return f"a tensor of shape {tuple(output.shape)}"
    name = type(output).__name__
    if isinstance(output, Mapping):
        return f"a {name} with the keys {', '.join(map(repr, output))}"
    if isinstance(output, (tuple, list)):
        return f"a {name} of {len(output)}: {', '.join(type(item).__name__ for item in output)}"
    return f"a {name}"


def within(name: str, values: Tensor, low: int, high: int, reason: str) -> Tensor:
    """Checks whole numbers before they are used as indexes; also inside of vmap and grad, and before CUDA sees them.

    Args:
        name: Their name, for messages.
        values: Integers of any shape.
        low: The smallest allowed value.
        high: The largest allowed value.
        reason: Tells where the largest value comes from, for messages.

    Returns:
        They in int64.

    Raises:
        TypeError: `values` holds no integers.
        ValueError: A value is out of range.
    """
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, not {values.dtype}")
    result: Tensor = _Within.apply(values.long(), name, low, high, reason)  # type: ignore[no-untyped-call]
    return result


class _Within(torch.autograd.Function):
    """The check of `within`: under vmap, torch hands the whole batch's numbers to `vmap`, and they can be looked at."""

    @staticmethod
    def forward(values: Tensor, name: str, low: int, high: int, reason: str) -> Tensor:
        """Checks plain numbers."""
        if values.numel():
            least, most = (int(value) for value in values.aminmax())
            if least < low or most > high:
                given = f"{least} to {most}" if least < most else str(least)
                raise ValueError(f"{name} must be in [{low}, {high}], {reason}, not {given}; leave out the others")
        return values.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keeps nothing: whole numbers have no derivative."""
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        """Gives none of the arguments a derivative."""
        return (None,) * 5

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], values: Tensor, name: str, low: int, high: int, reason: str
    ) -> tuple[Tensor, int | None]:
        """Checks the numbers of all samples."""
        return _Within.apply(values, name, low, high, reason), in_dims[0]  # type: ignore[no-untyped-call]
