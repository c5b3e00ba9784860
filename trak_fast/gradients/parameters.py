"""The parameters that gradients are taken with respect to."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn


def select_parameters(model: nn.Module, grad_wrt: Iterable[str] | None = None) -> dict[str, nn.Parameter]:
    """Selects the parameters that gradients are taken with respect to, by name.

    Args:
        model: The model.
        grad_wrt: Names of parameters, or patterns such as those of file names: "head.*", "*.bias". None: all.

    Returns:
        The parameters in the model's order, whatever the order of `grad_wrt`: a parameter's place decides which columns
        of the projection matrix its gradient meets.

    Raises:
        TypeError: `grad_wrt` is a single string.
        ValueError: `grad_wrt` is empty, or one of its entries fits no parameter of `model`.
    """
    parameters = dict(model.named_parameters())
    if isinstance(grad_wrt, str):
        raise TypeError(f"grad_wrt must be an iterable of names or patterns of parameters, not the string {grad_wrt!r}")
    patterns = ["*"] if grad_wrt is None else list(grad_wrt)
    fitting = {
        pattern: {name for name in parameters if name == pattern or fnmatchcase(name, pattern)} for pattern in patterns
    }
    if unknown := sorted(pattern for pattern, names in fitting.items() if not names and grad_wrt is not None):
        raise ValueError(f"grad_wrt: the model has no parameter {', '.join(unknown)}; it has {', '.join(parameters)}")
    names = set().union(*fitting.values())
    if not parameters:
        raise ValueError("the model has no parameters")
    if not names:
        raise ValueError("grad_wrt must name at least one parameter, not none")
    return {name: parameter for name, parameter in parameters.items() if name in names}
