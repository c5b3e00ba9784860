"""The parameters that gradients are taken with respect to."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from itertools import chain, pairwise
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

Parameters = dict[str, nn.Parameter]


def select_parameters(model: nn.Module, grad_wrt: Iterable[str] | None = None) -> Parameters:
    """Selects the parameters that gradients are taken with respect to, by name.

    Args:
        model: The model.
        grad_wrt: Names of parameters, or patterns such as those of file names: "head.*", "*.bias". They may name
            parameters that do not require gradients; those that are no floating-point numbers, such as quantised
            weights, are left out of what a pattern fits. None: all that require gradients.

    Returns:
        The parameters in the model's order, whatever the order of `grad_wrt`: a parameter's place decides which columns
        of the projection matrix its gradient meets.

    Raises:
        TypeError: `grad_wrt` is a single string.
        ValueError: `grad_wrt` is empty, one of its entries fits no parameter of `model`, or it names one that has no
            gradient; it is None, and no parameter requires gradients, or some cannot in a model without adapters; a
            chosen parameter is complex; or the model has lazy parameters without a shape yet.
    """
    if isinstance(grad_wrt, str):
        raise TypeError(f"grad_wrt must be an iterable of names or patterns of parameters, not the string {grad_wrt!r}")
    parameters = dict(model.named_parameters())
    if not parameters:
        raise ValueError("model must have parameters, not none: the model has no parameters")
    if lazy := [name for name, tensor in chain(parameters.items(), model.named_buffers()) if is_lazy(tensor)]:
        raise ValueError(
            f"model must have parameters with shapes, not lazy ones ({listed(lazy)}); run it on a batch once before"
        )
    names = _requiring_gradients(model, parameters) if grad_wrt is None else _fitting(parameters, list(grad_wrt))
    if complex_names := [name for name in names if parameters[name].is_complex()]:
        raise ValueError(
            f"parameters must be real, not complex ({_typed(complex_names, parameters)}); store them as pairs of real "
            "numbers, torch.view_as_real(parameter), and use torch.view_as_complex(parameter) in forward, or leave "
            "them out with grad_wrt"
        )
    return {name: parameter for name, parameter in parameters.items() if name in names}


def layers_of(model: nn.Module, selected: Mapping[str, Tensor]) -> dict[nn.Module, dict[str, str]]:
    """Lists the modules that selected parameters belong to, each with the model's names by its own names of them."""
    model_names = {id(parameter): name for name, parameter in selected.items()}
    layers = {}
    for layer in model.modules():
        own = layer.named_parameters(recurse=False)
        if names := {name: model_names[id(parameter)] for name, parameter in own if id(parameter) in model_names}:
            layers[layer] = names
    return layers


Parts = list[tuple[str, nn.Module | nn.Parameter]]
"""Modules and parameters with their names."""


def parts_of(model: nn.Module) -> Parts:
    """Lists the modules and parameters of a model."""
    return [*model.named_modules(), *model.named_parameters()]


def same_parts(first: Parts, second: Parts) -> bool:
    """Tells if a model has the very modules and parameters that it had."""
    return len(first) == len(second) and all(
        name == other_name and part is other for (name, part), (other_name, other) in zip(first, second, strict=True)
    )


class Columns(NamedTuple):
    """The columns of the projection matrix that belong to a parameter, its entries row by row.

    Attributes:
        first: The first column.
        count: Their number.
    """

    first: int
    count: int  # type: ignore[assignment]  # and no method that counts values


def columns_of(parameters: Mapping[str, Tensor]) -> dict[str, Columns]:
    """Numbers the columns of parameters, one after the other in their order."""
    columns: dict[str, Columns] = {}
    first = 0
    for name, parameter in parameters.items():
        columns[name] = Columns(first=first, count=parameter.numel())
        first += parameter.numel()
    return columns


def placed_columns(own: Mapping[str, Columns], given: Mapping[str, tuple[int, int]]) -> dict[str, Columns]:
    """Returns the columns, among those of a larger model, of each parameter of a part of it.

    Args:
        own: The columns of the part's parameters alone, whose numbers must be those given.
        given: (first, count) by name; of parameters that the part does not have too.

    Raises:
        ValueError: Columns are missing, of another number than the parameter has entries, or overlap.
    """
    if missing := [name for name in own if name not in given]:
        raise ValueError(f"columns must have all parameters, not lack {listed(missing)}")
    placed = {name: Columns(*given[name]) for name in own}
    for name, columns in placed.items():
        if columns.first < 0 or columns.count != own[name].count:
            raise ValueError(
                f"columns of {name} must be (first, {own[name].count}), as it has so many entries, not {tuple(columns)}"
            )
    ordered = sorted(placed.items(), key=lambda item: item[1].first)
    for (name, columns), (other, following) in pairwise(ordered):
        if columns.first + columns.count > following.first:
            raise ValueError(f"columns must not overlap, as those of {name} and {other} do")
    return placed


def _requiring_gradients(model: nn.Module, parameters: Parameters) -> list[str]:
    """Lists the parameters that require gradients, in a model where all could or that has adapters (PEFT)."""
    names = [name for name, parameter in parameters.items() if parameter.requires_grad]
    if not names:
        raise ValueError(
            f"grad_wrt must be given where none of the model's {len(parameters)} parameters requires gradients; "
            "grad_wrt=['*'] takes all of them"
        )
    if any(hasattr(module, "peft_config") for module in model.modules()):
        return names  # the model below is frozen on purpose, and may be quantised
    if others := [name for name, parameter in parameters.items() if not _is_differentiable(parameter)]:
        raise ValueError(
            f"grad_wrt must be given where the model has parameters without gradients ({_typed(others, parameters)}); "
            "grad_wrt=[name for name, p in model.named_parameters() if p.requires_grad] takes those that require them: "
            f"{listed(names)}"
        )
    return names


def _fitting(parameters: Parameters, patterns: list[str]) -> list[str]:
    """Lists the parameters that names and patterns choose."""
    if other := [type(pattern).__name__ for pattern in patterns if not isinstance(pattern, str)]:
        raise TypeError(f"grad_wrt must hold names or patterns of parameters, not {other[0]}")
    if not patterns:
        raise ValueError("grad_wrt must name at least one parameter, not none")
    if unknown := sorted(
        pattern
        for pattern in patterns
        if pattern not in parameters and not any(fnmatchcase(name, pattern) for name in parameters)
    ):
        raise ValueError(
            f"grad_wrt: the model has no parameter {listed(unknown)}; it has {listed(parameters)}, "
            f"{len(parameters)} in all"
        )
    named = [name for name in parameters if name in patterns]
    if wrong := [name for name in named if not _is_differentiable(parameters[name])]:
        raise ValueError(
            f"grad_wrt must name parameters of floating-point numbers, not {_typed(wrong, parameters)}; leave them out"
        )
    fitting = [name for name in parameters if any(name == p or fnmatchcase(name, p) for p in patterns)]
    names = [name for name in fitting if _is_differentiable(parameters[name])]
    if not names:
        raise ValueError(
            f"grad_wrt must fit parameters of floating-point numbers, not only {_typed(fitting, parameters)}"
        )
    return names


def _is_differentiable(parameter: nn.Parameter) -> bool:
    """Tells if a parameter has numbers that could have a gradient, a complex one included."""
    return parameter.is_floating_point() or parameter.is_complex()


def _typed(names: Collection[str], parameters: Mapping[str, nn.Parameter]) -> str:
    """Lists parameters with their dtypes."""
    return listed([f"{name} {parameters[name].dtype}" for name in names])


def listed(names: Collection[str], most: int = 10) -> str:
    """Lists the first names, and counts the others."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(list(names)[:most]) + more
