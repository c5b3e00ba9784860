"""The rules of layers: per-sample gradients of a layer's parameters from its input and the gradient of its output."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .pieces import Convolved, Lookup, Outer, Piece, Summed, Whole

LayerGradients = Mapping[str, Piece]
"""Per-sample gradients by the parameters' names in their layer."""


def _covers_all(layer: nn.Module) -> bool:
    """Says that a rule holds whatever the layer's options are."""
    return True


@dataclass(frozen=True)
class Rule:
    """The way to the gradients of one type of layer.

    Attributes:
        gradients: Maps a layer, its input (B, ...) and the gradient of its output (B, ...) to the gradients of its
            parameters, whether or not the layer has all of them.
        covers: Tells from a layer's options if the rule holds for it.
        least_dims: Fewest dimensions of an input whose first one is the batch.
        is_linear: True where the weight is a matrix that tokens are multiplied by.
    """

    gradients: Callable[[Any, Tensor, Tensor], LayerGradients]
    covers: Callable[[Any], bool] = _covers_all
    least_dims: int = 2
    is_linear: bool = False


def _tokens(x: Tensor) -> Tensor:
    """Returns (B, ..., C) with its middle dimensions as one, (B, T, C)."""
    return x.reshape(len(x), -1, x.shape[-1])


def _linear(layer: nn.Module, inputs: Tensor, output_grads: Tensor) -> LayerGradients:
    output_grads = _tokens(output_grads)
    right = _tokens(inputs).to(output_grads.dtype)  # under autocast the product is in the output's dtype
    return {"weight": Outer(left=output_grads, right=right), "bias": Summed(output_grads)}


def _transposed_linear(layer: nn.Module, inputs: Tensor, output_grads: Tensor) -> LayerGradients:
    """Differentiates what transformers calls Conv1D: a linear layer whose weight is (in, out)."""
    output_grads = _tokens(output_grads)
    left = _tokens(inputs).to(output_grads.dtype)
    return {"weight": Outer(left=left, right=output_grads), "bias": Summed(output_grads)}


def _embedding(layer: nn.Embedding, inputs: Tensor, output_grads: Tensor) -> LayerGradients:
    size, width = layer.weight.shape
    indices = inputs.reshape(len(inputs), -1)
    values = output_grads.reshape(len(inputs), -1, width)
    if layer.padding_idx is not None:
        values = values * (indices != layer.padding_idx).unsqueeze(2)
    return {"weight": Lookup(indices=indices, values=values, height=size)}


def _scaled_embedding(layer: Any, inputs: Tensor, output_grads: Tensor) -> LayerGradients:
    """Differentiates an embedding that multiplies what it has read by `embed_scale`, as those of Gemma do."""
    scale = torch.as_tensor(layer.embed_scale, device=output_grads.device).to(output_grads.dtype)
    return _embedding(layer, inputs, output_grads * scale)


def _is_plain_embedding(layer: nn.Embedding) -> bool:
    """Tells if rows are looked up as they are, and their gradients neither rescaled nor sparse."""
    return not hasattr(layer, "embed_scale") and _is_dense_embedding(layer)


def _is_dense_embedding(layer: nn.Embedding) -> bool:
    """Tells if an embedding's gradients are neither rescaled nor sparse."""
    return not (layer.max_norm or layer.scale_grad_by_freq or layer.sparse)


def _convolution(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, inputs: Tensor, output_grads: Tensor) -> LayerGradients:
    inputs = inputs.to(output_grads.dtype)
    bias = Summed(output_grads.flatten(2).mT)
    return {"weight": Convolved(layer, inputs=inputs, output_grads=output_grads), "bias": bias}


def _is_padded_by_zeros(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> bool:
    """Tells if each side is padded by as many zeros as the other; "same" may need one more on the right."""
    return layer.padding_mode == "zeros" and layer.padding != "same"


def _exact(x: Tensor) -> Tensor:
    """Returns numbers in float32 at least: products of half-precision numbers are rounded once they are summed."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _layer_norm(layer: nn.LayerNorm, inputs: Tensor, output_grads: Tensor) -> LayerGradients:
    """Differentiates weight · normalised + bias, (B, ..., *normalized_shape)."""
    shape = layer.normalized_shape
    product = F.layer_norm(_exact(inputs), shape, None, None, layer.eps) * output_grads
    middle = range(1, inputs.ndim - len(shape))
    if len(shape) == 1:
        return {"weight": Summed(_tokens(product)), "bias": Summed(_tokens(output_grads))}
    dims = tuple(middle)
    if not dims:
        return {"weight": Whole(product), "bias": Whole(output_grads)}
    return {"weight": Whole(product.sum(dims)), "bias": Whole(_exact(output_grads).sum(dims))}


def _channels(product: Tensor, output_grads: Tensor) -> LayerGradients:
    """Differentiates weight · normalised + bias, both one number a channel of (B, C, ...)."""
    return {"weight": Summed(product.flatten(2).mT), "bias": Summed(output_grads.flatten(2).mT)}


def _group_norm(layer: nn.GroupNorm, inputs: Tensor, output_grads: Tensor) -> LayerGradients:
    normalised = F.group_norm(_exact(inputs), layer.num_groups, None, None, layer.eps)
    return _channels((normalised * output_grads).unsqueeze(-1), output_grads.unsqueeze(-1))


def _batch_norm(layer: Any, inputs: Tensor, output_grads: Tensor) -> LayerGradients:
    """Differentiates a batch norm in evaluation mode."""
    inputs = _exact(inputs)
    mean, variance = layer.running_mean.to(inputs.dtype), layer.running_var.to(inputs.dtype)
    normalised = F.batch_norm(inputs, mean, variance, None, None, False, 0.0, layer.eps)
    return _channels((normalised * output_grads).unsqueeze(-1), output_grads.unsqueeze(-1))


def _has_running_statistics(layer: Any) -> bool:
    return layer.running_mean is not None


def _rms_norm(layer: Any, inputs: Tensor, output_grads: Tensor) -> LayerGradients:
    eps = getattr(layer, "variance_epsilon", getattr(layer, "eps", None))
    eps = torch.finfo(inputs.dtype).eps if eps is None else eps
    exact = _exact(inputs)
    normalised = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)
    return {"weight": Summed(_tokens(normalised * output_grads))}


def _has_weight_vector(layer: nn.Module) -> bool:
    weight = getattr(layer, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 1


_CONVOLUTION = Rule(_convolution, covers=_is_padded_by_zeros)
_BATCH_NORM = Rule(_batch_norm, covers=_has_running_statistics)

RULES: dict[type, Rule] = {
    nn.Linear: Rule(_linear, is_linear=True),
    nn.Embedding: Rule(_embedding, covers=_is_plain_embedding, least_dims=1),
    nn.Conv1d: _CONVOLUTION,
    nn.Conv2d: _CONVOLUTION,
    nn.Conv3d: _CONVOLUTION,
    nn.LayerNorm: Rule(_layer_norm),
    nn.GroupNorm: Rule(_group_norm),
    nn.BatchNorm1d: _BATCH_NORM,
    nn.BatchNorm2d: _BATCH_NORM,
    nn.BatchNorm3d: _BATCH_NORM,
}
"""Rules of classes; they are tried on subclasses too."""

RULES_BY_NAME: dict[str, Rule] = {
    "Conv1D": Rule(_transposed_linear, is_linear=True),
    "*ScaledWordEmbedding": Rule(_scaled_embedding, covers=_is_dense_embedding, least_dims=1),
    "*RMSNorm": Rule(_rms_norm, covers=_has_weight_vector),
}
"""Rules of classes that many libraries define for themselves, by patterns of the classes' names."""


def rule_of(layer: nn.Module) -> Rule | None:
    """Finds the rule of a layer by its class, the nearest class that it inherits from, or its class's name.

    A subclass, or a class that only has the name, may compute something else: results are compared with autograd's.

    Returns:
        The rule; None where there is none, or the one found does not cover the layer's options.
    """
    layer_type = type(layer)
    written = layer_type.__name__.removeprefix("FSDP")  # which fully_shard puts before it
    found = [RULES[base] for base in layer_type.__mro__ if base in RULES][:1]
    found += [rule for pattern, rule in RULES_BY_NAME.items() if fnmatchcase(written, pattern)]
    return next((rule for rule in found if rule.covers(layer)), None)
