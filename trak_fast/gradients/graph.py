"""The graph that autograd records."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def edges_of(last: Any) -> Iterator[tuple[Any, Any]]:
    """Yields each pair of a node of autograd's graph and a node whose result it takes, backwards from the last one."""
    seen = {last}
    waiting = [last]
    while waiting:
        node = waiting.pop()
        for following, _ in node.next_functions:
            if following is not None:
                yield node, following
                if following not in seen:
                    seen.add(following)
                    waiting.append(following)


@contextmanager
def gradients_kept(outputs: Tensor, own: Iterable[Tensor]) -> Iterator[None]:
    """Keeps a backward pass from changing `.grad` of tensors other than `own`, such as another model's weights."""
    known = {id(tensor) for tensor in own}
    leaves = {following.variable for _, following in edges_of(outputs.grad_fn) if hasattr(following, "variable")}
    before = [(leaf, leaf.grad) for leaf in leaves if id(leaf) not in known]
    try:
        for leaf, _ in before:
            leaf.grad = None
        yield
    finally:
        for leaf, gradient in before:
            leaf.grad = gradient


@contextmanager
def without_gradient_hooks(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Takes off the hooks that run once gradients have been added up: optimizers that step in the backward pass."""
    hooks = [found for tensor in tensors if (found := getattr(tensor, "_post_accumulate_grad_hooks", None))]
    before = [dict(found) for found in hooks]
    try:
        for found in hooks:
            found.clear()
        yield
    finally:
        for found, content in zip(hooks, before, strict=True):
            found.clear()
            found.update(content)


@contextmanager
def gradients_taken(
    tensors: Mapping[str, Tensor], take: Callable[[str, Tensor], object]
) -> Iterator[Callable[[str, Tensor], None]]:
    """Hands the gradients that backward passes in the block give tensors to `take`, and keeps their `.grad` as it was.

    Yields:
        A function that has the gradients of another tensor taken too, under a name.
    """
    before = {name: tensor.grad for name, tensor in tensors.items()}
    handles: dict[Tensor, Any] = {}

    def hook(name: str, tensor: Tensor) -> None:
        @torch.no_grad()
        def take_gradient(tensor: Tensor) -> None:
            gradient = tensor.grad
            tensor.grad = None
            assert gradient is not None
            take(name, gradient)

        if tensor not in handles:
            handles[tensor] = tensor.register_post_accumulate_grad_hook(take_gradient)  # type: ignore[no-untyped-call]

    with without_gradient_hooks(tensors.values()):
        try:
            for name, tensor in tensors.items():
                tensor.grad = None
                hook(name, tensor)
            yield hook
        finally:
            for handle in handles.values():
                handle.remove()
            for name, tensor in tensors.items():
                tensor.grad = before[name]
