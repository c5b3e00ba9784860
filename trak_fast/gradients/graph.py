"""The graph that autograd records."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


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
