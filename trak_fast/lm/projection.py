"""The choice of the parameters and of the way in which their gradients are made small, by its costs.

Of a sample of T tokens, with N parameters of the model, D of them attributed, and k numbers of a feature:

    forward and backward pass, weights frozen     4 N T operations
    forming the gradients                         2 D T operations
    a dense projection                            2 D k operations
    a sparse one (sjlt)                           reading and writing each number of the gradient once, 8 D bytes
    two-sided sketches of side s                  2 T s operations for each input and output of a layer
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..features.computers import choose_metric
from ..gradients import select_parameters
from ..tasks import Task
from .settings import Settings

OPERATIONS_OF_A_BYTE = {"cuda": 300, "cpu": 40}
"""Operations that a device makes in the time of moving one byte of memory, in round numbers."""

DENSE_NUMBERS = {"trak": 2048, "cosine": 4096, "dot": 4096, "less": 8192}
"""Numbers of a feature after a dense projection; 8,192 are those of LESS (Xia et al., ICML 2024)."""

SPARSE_NUMBERS = 131072
"""Numbers of a feature after a sparse projection, whose time does not grow with them; of one bit each."""

SIDE = 64
"""Rows and columns of a two-sided sketch."""

FASTER = 2.0
"""Two-sided sketches, which lose more, are chosen where they make a whole pass faster by more than this factor."""


NEEDED = {"grad_wrt", "metric", "projector_seed", "proj_dim"}
"""Arguments of TRAKer that each choice has."""

OTHERS = {"proj_type", "store_dtype", "sketch", "sketch_side"}
"""Arguments of TRAKer that a choice may have."""


@dataclass(frozen=True)
class Choice:
    """The way from gradients to features.

    Attributes:
        arguments: Arguments of TRAKer, as run.json has them.
        text: The reasons, for people.
    """

    arguments: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""


def stored_choice(facts: Mapping[str, Any], out: str) -> Choice:
    """Returns the choice of a run that is there; arguments that no choice has are none of TRAKer's to take from a file.

    Args:
        facts: Those of run.json.
        out: The run's folder, for the message.

    Raises:
        ValueError: There are others.
    """
    arguments, text = facts["arguments"], facts.get("way")
    if not isinstance(arguments, dict) or not isinstance(text, str) or not NEEDED <= set(arguments) <= NEEDED | OTHERS:
        raise ValueError(f"{out}/run.json was written by another version; another --out, or --overwrite")
    return Choice(arguments, text)


def patterns_of(settings: Settings, model: nn.Module) -> list[str] | None:
    """Returns `grad_wrt` for --params; None leaves the choice to TRAKer."""
    params = settings.params
    if params is None or params == ("trainable",):
        return None
    if params == ("all",):
        return ["*"]
    if params == ("linear",):
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        weights = [id(module.weight) for module in model.modules() if _is_linear(module)]
        return list(dict.fromkeys(names[weight] for weight in weights if weight in names))  # tied ones have one name
    return list(params)


def _is_linear(module: nn.Module) -> bool:
    """Tells if a module multiplies by a matrix; transformers' Conv1D is one with the weight transposed."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def choose_projection(settings: Settings, model: nn.Module, task: Task, mean_tokens: float, device: str) -> Choice:
    """Chooses the arguments of TRAKer that features depend on.

    Args:
        settings: The settings; what they leave open is chosen.
        model: The model.
        task: The task.
        mean_tokens: Tokens of a document, on average.
        device: "cpu" or "cuda".

    Raises:
        ValueError: --params names no parameter.
    """
    grad_wrt = patterns_of(settings, model)
    try:
        parameters = select_parameters(model, grad_wrt)
    except ValueError as error:
        raise ValueError(str(error).replace("grad_wrt", "--params")) from None
    metric = None
    if settings.method == "trak":
        free = settings.sketch in ("auto", "sjlt")
        metric = choose_metric("auto", model, task, parameters=parameters, gradients_are_free=free)
    arguments: dict[str, Any] = {"grad_wrt": grad_wrt, "metric": metric, "projector_seed": settings.seed}
    if metric is not None:
        sparse = {} if settings.sketch == "auto" else {"proj_type": "sjlt"}
        return Choice(arguments | sparse | {"proj_dim": settings.proj_dim}, "in K-FAC's metric")
    dense = settings.proj_dim or DENSE_NUMBERS[settings.method]
    own = 4 * sum(parameter.numel() for parameter in model.parameters()) * mean_tokens
    sketch, reason = settings.sketch, "as --sketch says"
    if sketch == "auto":
        sketch, reason = _cheapest(settings, parameters, model, own=own, dense=dense, tokens=mean_tokens, device=device)
    if sketch == "sjlt":
        inverts = settings.method == "trak"
        numbers = settings.proj_dim or (_power_of_two(dense) if inverts else SPARSE_NUMBERS)
        few_bits = {} if inverts or numbers < 16384 else {"store_dtype": "1bit"}
        return Choice(arguments | few_bits | {"proj_type": "sjlt", "proj_dim": numbers}, reason)
    arguments |= {"proj_type": "rademacher", "proj_dim": dense}
    if sketch == "two_sided":
        arguments |= {"sketch": "two_sided", "sketch_side": SIDE}
        return Choice(arguments, f"linear layers two-sided {SIDE} × {SIDE} first; {reason}")
    return Choice(arguments, reason)


def _cheapest(
    settings: Settings,
    parameters: Mapping[str, Tensor],
    model: nn.Module,
    *,
    own: float,
    dense: int,
    tokens: float,
    device: str,
) -> tuple[str, str]:
    """Chooses among dense, sjlt and two-sided by their operations for one document, and gives the reason."""
    grad_dim = sum(parameter.numel() for parameter in parameters.values())
    if 2 * grad_dim * dense <= own:
        return "dense", f"in {2 * grad_dim * dense / own:.0%} of the operations of a forward and backward pass"
    sparse = 2 * grad_dim * tokens + 8 * grad_dim * OPERATIONS_OF_A_BYTE[device]
    sides = sum(sum(p.shape) for p in parameters.values() if p.ndim == 2)
    sketches = sum(min(SIDE, p.shape[0]) * min(SIDE, p.shape[1]) for p in parameters.values() if p.ndim == 2)
    two_sided = 2 * tokens * SIDE * sides + 2 * sketches * dense
    if settings.method != "less" and own + sparse > FASTER * (own + two_sided):
        return "two_sided", f"{(own + sparse) / (own + two_sided):.1f} times as fast as sjlt"
    times = 2 * grad_dim * dense / own
    return "sjlt", f"a dense one would have {times:.1f} times the operations of a forward and backward pass"


def _power_of_two(number: int) -> int:
    """Returns the next power of two."""
    return 1 << (number - 1).bit_length()
