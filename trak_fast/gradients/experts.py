"""The rule of mixtures of experts whose weights are stacked, one matrix for each expert in a parameter.

The classes are those of transformers 5: `gate_up_proj` (E, 2I, H), or `up_proj` (E, I, H) where nothing is gated, and
`down_proj` (E, H, I), for E experts. A sample's gradient with respect to one expert's matrices is a sum over the tokens
that were sent there. Experts are differentiated one after the other, so no more than the factors of one are held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .pieces import Block, Outer, Piece


@dataclass(frozen=True)
class ExpertsRule:
    """The way to the gradients of stacked experts.

    Attributes:
        least_dims: Fewest dimensions of hidden states whose first one is the batch.
    """

    least_dims: int = 2

    def gradients(
        self, layer: Any, hidden_states: Tensor, index: Tensor, weights: Tensor, output_grads: Tensor
    ) -> Iterator[tuple[str, Piece]]:
        """Yields the gradients of the experts that tokens were sent to, with the names of their parameters.

        Args:
            layer: The experts.
            hidden_states: (B, T, H) or (B, H).
            index: (B, T, K) or (B, K) the experts of each token; numbers from E on stand for none.
            weights: (B, T, K) or (B, K) the factors of their outputs.
            output_grads: (B, T, H) or (B, H).
        """
        first_name = _first_name(layer)
        first, last = getattr(layer, first_name).detach(), layer.down_proj.detach()
        experts, width, _ = last.shape
        count = len(hidden_states)
        hidden_states, index, weights, output_grads = (
            x.reshape(count, -1, x.shape[-1]) for x in (hidden_states, index, weights, output_grads)
        )
        sent = torch.zeros(*index.shape[:2], experts + 1, dtype=torch.bool, device=index.device)
        sent = sent.scatter(2, index.clamp(max=experts), True)
        most = sent.sum(1).amax(0).tolist()  # tokens of a sample, for each expert
        for expert in range(experts):
            if not most[expert]:
                continue
            # each sample's tokens of this expert come first; the others that fill up have the weight 0
            order = sent[:, :, expert].byte().sort(dim=1, descending=True, stable=True).indices
            places = order[:, : most[expert], None]
            factors = torch.where(index == expert, weights, 0).sum(2, keepdim=True)
            inputs = hidden_states.take_along_dim(places, 1).to(first.dtype)
            slopes = output_grads.take_along_dim(places, 1) * factors.take_along_dim(places, 1)
            slopes = slopes.to(last.dtype)
            middle, middle_slopes = _gated(layer, inputs @ first[expert].mT, slopes @ last[expert])
            down = Outer(left=slopes, right=middle)
            yield "down_proj", Block(down, first=expert * width, height=experts * width)
            up = Outer(left=middle_slopes, right=inputs)
            yield first_name, Block(up, first=expert * up.height, height=experts * up.height)


def _gated(layer: Any, inputs: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
    """Applies the gate and the activation of experts.

    Args:
        layer: The experts.
        inputs: (B, T, 2I), or (B, T, I) where nothing is gated.
        slopes: (B, T, I) the gradient with respect to the result.

    Returns:
        The result (B, T, I) and the gradient with respect to `inputs`.
    """
    with torch.enable_grad():
        leaf = inputs.requires_grad_()
        result = _gate_of(layer)(leaf)
    (input_slopes,) = torch.autograd.grad(result, leaf, slopes)
    return result.detach(), input_slopes


def _gate_of(layer: Any) -> Callable[[Tensor], Tensor]:
    """Returns the function between the two matrices of an expert."""
    if not hasattr(layer, "gate_up_proj"):
        activation: Callable[[Tensor], Tensor] = layer.act_fn
        return activation
    if hasattr(layer, "_apply_gate"):
        gate: Callable[[Tensor], Tensor] = layer._apply_gate
        return gate

    def gated(inputs: Tensor) -> Tensor:
        gates, values = inputs.chunk(2, dim=-1)
        product: Tensor = layer.act_fn(gates) * values
        return product

    return gated


def _first_name(layer: nn.Module) -> str:
    return "gate_up_proj" if hasattr(layer, "gate_up_proj") else "up_proj"


def experts_rule_of(layer: nn.Module) -> ExpertsRule | None:
    """Returns the rule of stacked experts if a layer looks like such: by its name, parameters and shapes."""
    if not type(layer).__name__.endswith("Experts") or not hasattr(layer, "act_fn"):
        return None
    shapes = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
    first_name = _first_name(layer)
    if set(shapes) != {first_name, "down_proj"} or any(len(shape) != 3 for shape in shapes.values()):
        return None
    if getattr(layer, "is_transposed", False) or getattr(layer, "has_post_expert_norm", False):
        return None
    experts, width, middle = shapes["down_proj"]
    rows = 2 * middle if first_name == "gate_up_proj" else middle
    return ExpertsRule() if shapes[first_name] == (experts, rows, width) else None
