"""The rule of each kind of layer: per-sample gradients of its parameters from its input and its output's gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

Gradients = dict[str, Tensor]


def _linear(layer: nn.Linear, x: Tensor, g: Tensor) -> Gradients:
    x, g = x.reshape(len(x), -1, x.shape[-1]), g.reshape(len(g), -1, g.shape[-1])
    return {"weight": g.mT @ x, "bias": g.sum(1)}


def _transposed_linear(layer: nn.Module, x: Tensor, g: Tensor) -> Gradients:
    """What transformers calls Conv1D: a linear layer whose weight is (in, out)."""
    grads = _linear(layer, x, g)  # type: ignore[arg-type]
    return {"weight": grads["weight"].mT, "bias": grads["bias"]}


def _rms_norm(layer: nn.Module, x: Tensor, g: Tensor) -> Gradients:
    eps = getattr(layer, "variance_epsilon", getattr(layer, "eps", None))
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    product = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * g
    return {"weight": product.reshape(len(x), -1, x.shape[-1]).sum(1)}


def _embedding(layer: nn.Embedding, x: Tensor, g: Tensor) -> Gradients:
    size, width = layer.weight.shape
    places = (x + size * torch.arange(len(x), device=x.device).view(-1, *[1] * (x.ndim - 1))).flatten()
    weight = g.new_zeros(len(x) * size, width).index_add_(0, places, g.reshape(-1, width)).view(len(x), size, width)
    if layer.padding_idx is not None:
        weight[:, layer.padding_idx] = 0
    return {"weight": weight}


def _convolution(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor, g: Tensor) -> Gradients:
    function = {1: conv1d_weight, 2: conv2d_weight, 3: conv3d_weight}[x.ndim - 2]
    count, (outputs, inputs, *kernel) = len(x), layer.weight.shape
    weight = function(  # type: ignore[no-untyped-call]
        x.reshape(1, -1, *x.shape[2:]),
        (count * outputs, inputs, *kernel),
        g.reshape(1, -1, *g.shape[2:]),
        layer.stride,
        0 if layer.padding == "valid" else layer.padding,
        layer.dilation,
        count * layer.groups,
    )
    return {"weight": weight.view(count, outputs, inputs, *kernel), "bias": g.flatten(2).sum(2)}


def _normalised(layer: nn.Module, x: Tensor) -> tuple[Tensor, int]:
    """What the layer multiplies by its weight, and how many of the last dimensions the weight has; 0: the channels."""
    if isinstance(layer, nn.LayerNorm):
        return F.layer_norm(x, layer.normalized_shape, None, None, layer.eps), len(layer.normalized_shape)
    if isinstance(layer, nn.GroupNorm):
        return F.group_norm(x, layer.num_groups, None, None, layer.eps), 0
    return F.batch_norm(x, layer.running_mean, layer.running_var, None, None, False, 0.0, layer.eps), 0  # type: ignore


def _normalisation(layer: nn.Module, x: Tensor, g: Tensor) -> Gradients:
    normalised, own = _normalised(layer, x)
    axes = tuple(range(1, x.ndim - own)) if own else tuple(range(2, x.ndim))
    product = normalised * g
    return {"weight": product.sum(axes) if axes else product, "bias": g.sum(axes) if axes else g}


def _rule(layer: nn.Module) -> Callable[[Any, Tensor, Tensor], Gradients] | None:
    """How gradients of a layer of this kind are computed; None if not here."""
    # subclasses and classes that only have the name may compute something else: the comparison with autograd tells
    kind = next((kind for kind in _KINDS if isinstance(layer, kind)), type(layer))
    if kind is nn.Linear:
        return _linear
    if kind.__name__ == "Conv1D":
        return _transposed_linear
    if kind.__name__.endswith("RMSNorm") and getattr(layer, "weight", layer).ndim == 1:
        return _rms_norm
    if kind is nn.Embedding and not (layer.max_norm or layer.scale_grad_by_freq or layer.sparse):
        return _embedding
    if kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d) and layer.padding_mode == "zeros" and layer.padding != "same":
        return _convolution
    if kind in (nn.LayerNorm, nn.GroupNorm):
        return _normalisation
    if kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d) and layer.running_mean is not None:
        return _normalisation
    return None


_KINDS = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.LayerNorm, nn.GroupNorm, nn.BatchNorm1d,
          nn.BatchNorm2d, nn.BatchNorm3d)  # fmt: skip
