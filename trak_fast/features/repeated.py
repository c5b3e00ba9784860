"""Calls of layers without a rule, which are made once more by themselves and differentiated sample by sample."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..gradients.errors import is_out_of_memory
from ..gradients.modes import unfused_attention
from ..gradients.pieces import Piece, Whole

LARGEST_AT_ONCE = 64 << 20
"""Bytes of per-sample gradients that a layer without a rule may have together; larger ones are made one by one."""


@dataclass(frozen=True)
class SplitTensor:
    """A tensor with one slice for each sample, or one that all share.

    Attributes:
        values: (B, ...), or the tensor as it is.
        is_split: True in the first case.
        had_batch: True where the slices are samples of a batch, which a layer gets as batches of one.
    """

    values: Tensor
    is_split: bool
    had_batch: bool

    def restored(self, value: Tensor) -> Tensor:
        """Returns the slice of one sample as the layer takes it."""
        return value.unsqueeze(0) if self.had_batch else value


def by_samples(tensor: Tensor, count: int) -> Tensor:
    """Gives each sample its rows, as many as others have: (B · T, ...) becomes (B, T, ...)."""
    return tensor.reshape(count, -1, *tensor.shape[1:])


def split_by_samples(tensors: Sequence[Tensor], count: int, lengths: set[int]) -> list[SplitTensor]:
    """Splits tensors by samples.

    Args:
        tensors: The tensors; those with neither one row for each sample nor one of `lengths` are shared.
        count: Samples, B.
        lengths: Rows that the outputs of the layer have.
    """
    parts = []
    for tensor in tensors:
        length = len(tensor) if tensor.ndim else 0
        if length == count:
            parts.append(SplitTensor(tensor, is_split=True, had_batch=True))
        elif length in lengths:
            parts.append(SplitTensor(by_samples(tensor, count), is_split=True, had_batch=False))
        else:
            parts.append(SplitTensor(tensor, is_split=False, had_batch=False))
    return parts


class RepeatedCall:
    """A call of a layer, to be made once more.

    Attributes:
        parts: The tensors that the layer was called with, and the gradients of its outputs.
    """

    def __init__(
        self,
        layer: nn.Module,
        names: Sequence[str],
        arguments: Sequence[Any],
        structure: Any,
        tensors: Sequence[SplitTensor],
        output_grads: Mapping[int, SplitTensor],
        count: int,
    ) -> None:
        """Takes the call.

        Args:
            layer: The layer.
            names: The layer's names of the parameters to differentiate with respect to.
            arguments: All that it was called with, None in place of tensors, and others as tuples of one.
            structure: The structure of these.
            tensors: The tensors among them.
            output_grads: The gradients of outputs, by their places among those that are floating-point tensors.
            count: Samples, B.
        """
        self._layer = layer
        self._weights = {name: layer.get_parameter(name).detach() for name in names}
        self._arguments = arguments
        self._structure = structure
        self._places = list(output_grads)
        self._inputs = len(tensors)
        self._count = count
        self.parts = [*tensors, *output_grads.values()]

    def gradients(self) -> Iterator[tuple[str, Piece, int]]:
        """Yields gradients by the layer's names of parameters, each with its first sample."""
        together = self._differentiate_together()
        if together is not None:
            for name, value in together.items():
                yield name, Whole(value), 0
            return
        for sample in range(self._count):
            for name, value in self._differentiate_one(sample).items():
                yield name, Whole(value.unsqueeze(0)), sample

    def _multiply(self, weights: Mapping[str, Tensor], *values: Tensor) -> Tensor:
        """Computes Σ output · gradient for one sample, of which the gradient is that of f."""
        own = [part.restored(value) for part, value in zip(self.parts, values, strict=True)]
        tensors = iter(own[: self._inputs])
        leaves = [next(tensors) if leaf is None else leaf[0] for leaf in self._arguments]
        args, kwargs = tree_unflatten(leaves, self._structure)
        # a weight that a layer inside shares has a tap of its own there
        results, _ = tree_flatten(functional_call(self._layer, dict(weights), args, kwargs, tie_weights=False))
        outputs = [x for x in results if isinstance(x, Tensor) and x.is_floating_point() and x.ndim]
        grads = own[self._inputs :]
        return torch.stack([(outputs[i] * g).sum() for i, g in zip(self._places, grads, strict=True)]).sum()

    @torch.enable_grad()
    def _differentiate_together(self) -> dict[str, Tensor] | None:
        """Computes the gradients of all samples, if torch.func can and they are small."""
        size = self._count * sum(weight.numel() * weight.element_size() for weight in self._weights.values())
        if size > LARGEST_AT_ONCE:
            return None
        in_dims = (None, *(0 if part.is_split else None for part in self.parts))
        try:
            with warnings.catch_warnings(), unfused_attention():
                warnings.simplefilter("error")  # about loops in place of what cannot be batched
                values = [part.values for part in self.parts]
                gradients = vmap(grad(self._multiply), in_dims=in_dims)(self._weights, *values)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return None
        return {name: value.detach() for name, value in gradients.items()}

    @torch.enable_grad()
    def _differentiate_one(self, sample: int) -> dict[str, Tensor]:
        """Computes the gradients of one sample, by autograd itself: torch.func refuses hooks on saved tensors."""
        weights = {name: weight.detach().requires_grad_() for name, weight in self._weights.items()}
        values = [part.values[sample] if part.is_split else part.values for part in self.parts]
        total = self._multiply(weights, *values)
        if not total.requires_grad:
            return {}
        found = torch.autograd.grad(total, list(weights.values()), allow_unused=True, materialize_grads=True)
        return dict(zip(weights, found, strict=True))
