"""The rules of layers: per-sample gradients of a layer's parameters from its input and the gradient of its output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

LayerGradients = dict[str, Tensor]
"""Per-sample gradients (B, *shape) by the parameters' names in their layer."""


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
    """

    gradients: Callable[[Any, Tensor, Tensor], LayerGradients]
    covers: Callable[[Any], bool] = _covers_all
    least_dims: int = 2


def _linear(layer: nn.Module, inputs: Tensor, output_grads: Tensor) -> LayerGradients:
    inputs = inputs.reshape(len(inputs), -1, inputs.shape[-1])
    output_grads = output_grads.reshape(len(output_grads), -1, output_grads.shape[-1])
    return {"weight": output_grads.mT @ inputs, "bias": output_grads.sum(1)}


def _transposed_linear(layer: nn.Module, inputs: Tensor, output_grads: Tensor) -> LayerGradients:
    """Differentiates what transformers calls Conv1D: a linear layer whose weight is (in, out)."""
    grads = _linear(layer, inputs, output_grads)
    return {"weight": grads["weight"].mT, "bias": grads["bias"]}


def _embedding(layer: nn.Embedding, inputs: Tensor, output_grads: Tensor) -> LayerGradients:
    """Adds the gradient of each output to the row of its word, in a matrix of all samples' rows one after the other."""
    count = len(inputs)
    size, width = layer.weight.shape
    first_rows = size * torch.arange(count, device=inputs.device).view(-1, *[1] * (inputs.ndim - 1))
    rows = (inputs + first_rows).flatten()
    weight = output_grads.new_zeros(count * size, width).index_add_(0, rows, output_grads.reshape(-1, width))
    weight = weight.view(count, size, width)
    if layer.padding_idx is not None:
        weight[:, layer.padding_idx] = 0
    return {"weight": weight}


def _is_plain_embedding(layer: nn.Embedding) -> bool:
    """Tells if rows are looked up as they are, and their gradients neither rescaled nor sparse."""
    return not (layer.max_norm or layer.scale_grad_by_freq or layer.sparse)


def _convolution(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, inputs: Tensor, output_grads: Tensor) -> LayerGradients:
    """Takes the samples for groups of channels of one sample, so that one convolution keeps them apart."""
    function = {1: conv1d_weight, 2: conv2d_weight, 3: conv3d_weight}[inputs.ndim - 2]
    count = len(inputs)
    out_channels, in_channels, *kernel = layer.weight.shape
    weight = function(  # type: ignore[no-untyped-call]
        inputs.reshape(1, -1, *inputs.shape[2:]),
        (count * out_channels, in_channels, *kernel),
        output_grads.reshape(1, -1, *output_grads.shape[2:]),
        layer.stride,
        0 if layer.padding == "valid" else layer.padding,
        layer.dilation,
        count * layer.groups,
    )
    return {"weight": weight.view(count, out_channels, in_channels, *kernel), "bias": output_grads.flatten(2).sum(2)}


def _is_padded_by_zeros(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> bool:
    """Tells if each side is padded by as many zeros as the other; "same" may need one more on the right."""
    return layer.padding_mode == "zeros" and layer.padding != "same"


def _scale_and_shift(normalised: Tensor, output_grads: Tensor, axes: range) -> LayerGradients:
    """Differentiates weight · normalised + bias, where both are the same along `axes`."""
    product = normalised * output_grads
    dims = tuple(axes)
    return {
        "weight": product.sum(dims) if dims else product,
        "bias": output_grads.sum(dims) if dims else output_grads,
    }


def _layer_norm(layer: nn.LayerNorm, inputs: Tensor, output_grads: Tensor) -> LayerGradients:
    shape = layer.normalized_shape
    normalised = F.layer_norm(inputs, shape, None, None, layer.eps)
    return _scale_and_shift(normalised, output_grads, range(1, inputs.ndim - len(shape)))


def _group_norm(layer: nn.GroupNorm, inputs: Tensor, output_grads: Tensor) -> LayerGradients:
    normalised = F.group_norm(inputs, layer.num_groups, None, None, layer.eps)
    return _scale_and_shift(normalised, output_grads, range(2, inputs.ndim))


def _batch_norm(layer: Any, inputs: Tensor, output_grads: Tensor) -> LayerGradients:
    """Differentiates a batch norm in evaluation mode."""
    normalised = F.batch_norm(inputs, layer.running_mean, layer.running_var, None, None, False, 0.0, layer.eps)
    return _scale_and_shift(normalised, output_grads, range(2, inputs.ndim))


def _has_running_statistics(layer: Any) -> bool:
    return layer.running_mean is not None


def _rms_norm(layer: Any, inputs: Tensor, output_grads: Tensor) -> LayerGradients:
    eps = getattr(layer, "variance_epsilon", getattr(layer, "eps", None))
    eps = torch.finfo(inputs.dtype).eps if eps is None else eps
    product = inputs * torch.rsqrt(inputs.square().mean(-1, keepdim=True) + eps) * output_grads
    return {"weight": product.reshape(len(inputs), -1, inputs.shape[-1]).sum(1)}


def _has_weight_vector(layer: nn.Module) -> bool:
    weight = getattr(layer, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 1


_CONVOLUTION = Rule(_convolution, covers=_is_padded_by_zeros)
_BATCH_NORM = Rule(_batch_norm, covers=_has_running_statistics)

RULES: dict[type, Rule] = {
    nn.Linear: Rule(_linear),
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
    "Conv1D": Rule(_transposed_linear),
    "*RMSNorm": Rule(_rms_norm, covers=_has_weight_vector),
}
"""Rules of classes that many libraries define for themselves, by patterns of the classes' names."""


def rule_of(layer: nn.Module) -> Rule | None:
    """Finds the rule of a layer by its class, the nearest class that it inherits from, or its class's name.

    A subclass, or a class that only has the name, may compute something else: `HookGradientComputer` compares the first
    batch with autograd's gradients.

    Returns:
        The rule; None where there is none, or the one found does not cover the layer's options.
    """
    layer_type = type(layer)
    found = [RULES[base] for base in layer_type.__mro__ if base in RULES]
    found += [rule for pattern, rule in RULES_BY_NAME.items() if fnmatchcase(layer_type.__name__, pattern)]
    return found[0] if found and found[0].covers(layer) else None
