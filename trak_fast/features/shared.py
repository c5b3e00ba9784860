"""The gradients of outputs that all samples share, sample by sample.

The embeddings of positions are the same for all samples of a batch, and so is the bias that relative positions give to
attention: they have a leading dimension of 1, or none for samples. Where they meet something that has, autograd sums
their gradient over the samples. Here it is taken before this sum, and passed back through the operations in between.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..gradients.graph import edges_of

VIEWS = {
    "CloneBackward0",
    "PermuteBackward0",
    "ReshapeAliasBackward0",
    "SliceBackward0",
    "SqueezeBackward1",
    "TBackward0",
    "ToCopyBackward0",
    "TransposeBackward0",
    "UnsafeViewBackward0",
    "UnsqueezeBackward0",
    "ViewBackward0",
}
"""Nodes of operations that only rearrange: their result is shared if what they rearrange is."""


@dataclass(frozen=True)
class _Step:
    """A node with one result, which a shared result is an input of.

    Attributes:
        node: The node.
        place: The place of the shared input among the node's inputs.
        shape: The shape of this input.
    """

    node: Any
    place: int
    shape: torch.Size


@dataclass(frozen=True)
class _Use(_Step):
    """A node at which a shared result meets samples.

    Attributes:
        path: The steps from the shared output to this one, the last of them first.
    """

    path: tuple[_Step, ...]


def hook_uses(
    last: Any, shared: Mapping[Any, torch.Size], count: int, take: Callable[[Any, Tensor], None], *, once: bool
) -> list[Any]:
    """Has the gradients of shared outputs handed on during the backward pass, once for each of their uses.

    Args:
        last: The node of autograd's graph that the backward pass begins at.
        shared: The nodes that have made the outputs, each with its output's shape. Outputs that are used in a way that
            is not understood are left out.
        count: Samples of the batch, B.
        take: Takes such a node and the gradient of its output for each sample, (B, *shape).
        once: True where what nodes have saved may be read once only, by the backward pass.

    Returns:
        The hooks' handles.
    """
    users: dict[Any, list[Any]] = defaultdict(list)
    for node, following in edges_of(last):
        if node not in users[following]:
            users[following].append(node)
    handles = []
    for node, shape in shared.items():
        for use in _uses(node, shape, users, count, ()):
            if once and any(_has_saved(passed) for passed in (use.node, *(step.node for step in use.path))):
                break
            handles.append(use.node.register_prehook(_hook(node, use, count, take)))
    return handles


def _has_saved(node: Any) -> bool:
    """Tells if a node has saved tensors."""
    return any(name.startswith("_raw_saved_") for name in dir(node))


def _uses(
    node: Any, shape: torch.Size, users: Mapping[Any, Sequence[Any]], count: int, path: tuple[_Step, ...]
) -> list[_Use]:
    """Finds where a shared result meets samples; lists nothing if it is used in a way that is not understood."""
    found: list[_Use] = []
    for user in users.get(node, ()):
        results = user._input_metadata  # those of the gradients that it takes
        places = [i for i, (following, _) in enumerate(user.next_functions) if following is node]
        if len(results) != 1 or len(places) != 1:
            return []
        result = torch.Size(results[0].shape)
        step = _Step(node=user, place=places[0], shape=shape)
        if user.name() in VIEWS or (result[:1] == (1,) and count > 1):
            further = _uses(user, result, users, count, (step, *path))
            if not further:
                return []
            found += further
        elif result[:1] == (count,) and (len(shape) < len(result) or shape[:1] == (1,)):
            found.append(_Use(node=user, place=step.place, shape=shape, path=path))
        else:
            return []
    return found


def _hook(node: Any, use: _Use, count: int, take: Callable[[Any, Tensor], None]) -> Callable[[Any], None]:
    """Returns a hook on a node at which a shared result meets samples."""

    @torch.no_grad()
    def keep(grads: tuple[Tensor | None, ...]) -> None:
        if grads[0] is None:
            return
        # a node called by itself leaves the sum over broadcast dimensions to autograd's engine, all but this one
        whole = grads[0] if use.node.name() == "ExpandBackward0" else _called(use.node, use.place, grads[0])
        if whole.shape[:1] != (count,):
            return
        if not use.path and whole.numel() == count * use.shape.numel():
            take(node, whole.reshape(count, *use.shape))
            return
        rows = []
        for i in range(count):
            row = whole[i : i + 1].sum_to_size(use.shape)
            for step in use.path:
                row = _called(step.node, step.place, row).sum_to_size(step.shape)
            rows.append(row)
        take(node, torch.stack(rows))

    return keep


def _called(node: Any, place: int, gradient: Tensor) -> Tensor:
    """Returns the gradient that a node gives for one of its inputs."""
    result = node(gradient)
    found: Tensor = result[place] if isinstance(result, tuple) else result
    return found
