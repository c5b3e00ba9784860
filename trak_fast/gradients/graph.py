"""The graph that autograd records."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

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
def reached_ones(tensors: Mapping[str, Tensor]) -> Iterator[set[str]]:
    """Finds the names of the tensors that backward passes in the block give gradients, which are dropped."""
    reached: set[str] = set()
    before = {name: tensor.grad for name, tensor in tensors.items()}
    handles = []

    def drop(name: str, tensor: Tensor) -> None:
        reached.add(name)
        tensor.grad = None

    with without_gradient_hooks(tensors.values()):
        try:
            for name, tensor in tensors.items():
                tensor.grad = None
                handles.append(tensor.register_post_accumulate_grad_hook(partial(drop, name)))  # type: ignore[no-untyped-call]
            yield reached
        finally:
            for handle in handles:
                handle.remove()
            for name, tensor in tensors.items():
                tensor.grad = before[name]


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
