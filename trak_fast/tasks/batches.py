"""Batches by name: mappings, such as those of tokenizers and collators, for tasks that name their tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, TypeAlias, cast

import numpy as np
from torch import Tensor


class NamedTensors(Protocol):
    """Tensors by name: a dict, or anything else with its `keys` and `[]`, such as transformers' BatchEncoding."""

    def keys(self) -> Iterable[str]:
        """Returns the names."""

    def __getitem__(self, name: str, /) -> Tensor:
        """Returns the tensor of a name."""


Batch: TypeAlias = Sequence[Tensor] | NamedTensors
"""A batch: tensors in the order that the task takes them, or by name."""

ALIASES = {"labels": "label"}
"""Name of a field -> the name that many data sets have for it."""


def batch_tensors(batch: Batch, task: object) -> Sequence[Tensor]:
    """Returns the tensors of a batch in the order in which a task takes them.

    Args:
        batch: Tensors (B, ...), or such by name. "label" is taken for a field "labels" that is required and absent,
            None counts as absent, and keys that are no fields of the task have no influence.
        task: The task; one that has `fields` takes batches by name (`tasks.NamedBatches`).

    Returns:
        The tensors of the fields, without optional ones that are absent. A sequence, and any batch of a task without
        fields, is returned as it is.

    Raises:
        ValueError: A field is absent.
        TypeError: A field is no tensor.
    """
    fields: tuple[str, ...] = getattr(task, "fields", ())
    if not fields or not hasattr(batch, "keys"):
        return cast("Sequence[Tensor]", batch)
    named = cast("NamedTensors", batch)
    optional: tuple[str, ...] = getattr(task, "optional_fields", ())
    keys = [str(key) for key in named.keys()]  # noqa: SIM118 (it need not be iterable)
    found = {}
    missing = []
    for field in fields:
        # an optional field is not looked for: the label of a text's class says nothing to a language model
        key = field if field in keys or field in optional else ALIASES.get(field, field)
        value = named[key] if key in keys else None
        if isinstance(value, Tensor):
            found[field] = value
        elif value is not None:
            raise TypeError(f"batch[{key!r}] must be a tensor (B, ...), not {type(value).__name__}; {_fix(key, value)}")
        elif field not in optional:
            missing.append(field)
    if missing:
        wanted = ", ".join(f"{field!r} (optional)" if field in optional else repr(field) for field in fields)
        given = ", ".join(map(repr, keys[:10])) + (", ..." if len(keys) > 10 else "")
        raise ValueError(
            f"batch must have the keys {wanted}, not {given or 'none'}; add {', '.join(map(repr, missing))}, or give "
            "the tensors in a list in this order"
        )
    return list(found.values())


def _fix(key: str, value: object) -> str:
    """Says how a field of another type becomes a tensor."""
    if isinstance(value, np.ndarray):
        return f"torch.from_numpy(batch[{key!r}]) is one"
    return "a tokenizer or processor of transformers makes tensors with return_tensors='pt'"


def by_name(batch: Sequence[Tensor], task: object) -> dict[str, Tensor]:
    """Gives the tensors of a batch the names of a task's fields: of all, or of those that are not optional.

    Raises:
        ValueError: There are more or fewer of them.
    """
    fields: tuple[str, ...] = getattr(task, "fields", ())
    optional: tuple[str, ...] = getattr(task, "optional_fields", ())
    required = tuple(field for field in fields if field not in optional)
    for names in (fields, required):
        if len(names) == len(batch):
            return dict(zip(names, batch, strict=True))
    fewer = f", or {len(required)} without {' and '.join(optional)}" if optional else ""
    raise ValueError(
        f"{type(task).__name__}: batch must be ({', '.join(fields)}), {len(fields)} tensors{fewer}, not {len(batch)}"
    )
