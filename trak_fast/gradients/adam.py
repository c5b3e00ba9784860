"""Adam's moments, which turn the gradient of a sample into the step that Adam would make with it."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from operator import not_
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..torch_files import read_torch_file
from .parameters import Parameters, listed

FILES = ("optimizer.pt", "optimizer.bin")
"""Files of moments in a checkpoint folder of transformers' Trainer; the second is what it saves under FSDP."""

WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Parts of names that DistributedDataParallel, torch.compile, FSDP and activation checkpointing add."""

CHUNK = 1 << 24
"""Numbers that are hashed at once: they may have to be copied from a device or read from a file."""

NAMED = (
    "pass the torch.optim.Optimizer itself, or "
    "torch.distributed.checkpoint.state_dict.get_optimizer_state_dict(model, optimizer), which has names"
)


State = Mapping[str, Any]
"""An optimizer's state of one parameter, or one of its groups of parameters: tensors and plain values by name."""

States = Mapping[Any, State]
"""States by the parameters' numbers, names or identities."""


@dataclass(frozen=True)
class _Moments:
    """The moments of one parameter, flattened in its layout, and the constants of its group.

    Attributes:
        mean: m, the running mean of gradients.
        square: v, the running mean of their squares.
        peak: The largest v until now, which amsgrad divides by; None without amsgrad.
        betas: The decays of m and v.
        eps: The constant that Adam adds to the root of v.
    """

    mean: Tensor
    square: Tensor
    peak: Tensor | None
    betas: tuple[float, float]
    eps: float


class AdamMoments:
    """Adam's moments of the parameters that gradients are taken with respect to.

    LESS compares samples by the steps that Adam would make with them (Xia et al., "LESS: Selecting Influential Data for
    Targeted Instruction Tuning", ICML 2024, section 3.1). With g the gradient of one sample's loss, the step lowers the
    parameters along

        Γ(g) = (β₁ m + (1 − β₁) g) / (√(β₂ v + (1 − β₂) g²) + ε).

    As in the code that LESS's authors published, the moments are not corrected for their start at zero. That code has ε
    under the root; here ε is where Adam has it.

    A task's f is no loss: it rises where the loss falls. For f = −loss, g = −∇f. Features keep the direction in which f
    rises, so ∇f is replaced by

        −Γ(−∇f) = ((1 − β₁) ∇f − β₁ m) / (√(β₂ v + (1 − β₂) (∇f)²) + ε),

    where m counts with a minus. That holds for `maximize=True` as well: torch changes the sign of gradients before they
    enter m, so that m always is the mean of what the steps go down. With amsgrad the larger of the new v and the
    largest one until now is under the root. Weight decay is no part of a sample's gradient.

    Γ is not linear: where f is not −loss, a margin for example, the gradients to hand in are those of −loss, Q ∇f with
    the task's weighting Q.
    """

    def __init__(self, moments: Mapping[str, _Moments]) -> None:
        """Takes the moments by the parameters' names; `from_optimizer_state` makes them."""
        self._moments = dict(moments)

    @classmethod
    def from_optimizer_state(
        cls,
        optimizer_state: Optimizer | Mapping[str, Any] | str | os.PathLike[str],
        model: nn.Module,
        selected: Parameters,
    ) -> AdamMoments:
        """Finds the moments of parameters in what is left of an Adam or AdamW optimizer.

        The moments are neither copied nor moved: those of a file stay in the file, which has to stay as it is, and
        those of an optimizer change with its next step.

        State dicts number the parameters instead of naming them. Where the groups have no "param_names" (torch adds
        them to optimizers of `model.named_parameters()`), the numbers are taken for the model's order in one group, and
        for the Trainer's order in two groups, those with weight decay first; in either case of the parameters that
        require gradients, as they did in training, or of all. An order counts if it fits all sizes of groups and all
        shapes, and no other order that fits too gives a parameter other moments. Failing that, moments are matched by
        shapes that only one parameter of the model has.

        Args:
            optimizer_state: An optimizer of the model's own parameters; a state dict of one, with parameters numbered
                by torch or named by torch.distributed.checkpoint and FSDP; or the path of a file with a state dict, or
                of a checkpoint folder of transformers' Trainer.
            model: The model.
            selected: The parameters to find, by their names in `model`.

        Raises:
            FileNotFoundError: There is no file at the path.
            TypeError: `optimizer_state` is none of these.
            ValueError: It has no moments of Adam for one of the parameters, in that parameter's shape, or more than one
                parameter could be the owner.
        """
        if isinstance(optimizer_state, Optimizer):
            states, groups, owners = _by_identity(optimizer_state, selected)
        else:
            content = _load(optimizer_state) if isinstance(optimizer_state, (str, os.PathLike)) else optimizer_state
            states, groups = _parts(content)
            stored = _stored_names(groups)
            owners = _by_name(stored, model, selected) if stored else _by_order(states, groups, model, selected)
        groups_of = {key: group for group in groups for key in group["params"]}
        return cls(
            {
                name: _moments(name, parameter, states.get(owners[name], {}), groups_of[owners[name]])
                for name, parameter in selected.items()
            }
        )

    def precondition(self, name: str, grads: Tensor, first: int) -> Tensor:
        """Turns gradients of f into Adam's steps.

        Args:
            name: The parameter.
            grads: Per-sample gradients of f (B, c) or (B, r, C): for each sample c or r * C consecutive entries of the
                parameter's gradient, flattened in the parameter's own layout.
            first: The place of the first of these entries.

        Returns:
            The steps along which f rises, float32, of the shape and on the device of `grads`; a new tensor.

        Raises:
            ValueError: The entries are not all the parameter's.
        """
        moments = self._moments[name]
        shape = grads.shape[1:]
        last = first + shape.numel()
        if not 0 <= first <= last <= len(moments.mean):
            raise ValueError(
                f"first must leave the gradients within the {len(moments.mean)} entries of {name}, not be {first} for "
                f"{shape.numel()} entries"
            )

        def part(whole: Tensor) -> Tensor:
            return whole[first:last].to(grads.device, torch.float32).view(shape)

        beta1, beta2 = moments.betas
        grads = grads.float()
        squares = torch.addcmul(beta2 * part(moments.square), grads, grads, value=1 - beta2)
        if moments.peak is not None:
            squares = torch.maximum(squares, part(moments.peak))
        return ((1 - beta1) * grads).sub_(beta1 * part(moments.mean)).div_(squares.sqrt_().add_(moments.eps))

    def digest(self) -> str:
        """Returns a short hash of the parameters' names without wrappers, their moments and constants."""
        sha = hashlib.sha256()
        for name, moments in self._moments.items():
            sha.update(repr((_bare(name), moments.betas, moments.eps)).encode())
            for tensor in (moments.mean, moments.square, moments.peak):
                sha.update(repr(None if tensor is None else (tensor.dtype, len(tensor))).encode())
                for chunk in () if tensor is None else torch.split(tensor, CHUNK):
                    sha.update(chunk.cpu().view(torch.uint8).numpy().data)
        return sha.hexdigest()[:16]


def _load(place: str | os.PathLike[str]) -> object:
    """Reads a state dict from a file, or from a checkpoint folder's file; tensors stay in the file until used."""
    path = Path(place)
    found = [file for file in (path, *(path / name for name in FILES)) if file.is_file()]
    if not found:
        lack = f"a folder without {' or '.join(FILES)}" if path.is_dir() else "a path where nothing is"
        raise FileNotFoundError(
            f"optimizer_state must be the path of a file or of a checkpoint folder, not {lack} ({path}); "
            "torch.save(optimizer.state_dict(), path) makes a file"
        )
    file = found[0]
    try:
        return read_torch_file(file)
    except (MemoryError, OSError):
        raise
    except Exception as error:  # damaged files raise errors of many classes, such as struct.error
        raise ValueError(
            f"optimizer_state must be the path of a file that torch.load reads with weights_only=True, not {file}; "
            "save a plain optimizer.state_dict()"
        ) from error


def _parts(optimizer_state: object) -> tuple[States, list[State]]:
    """Takes a state dict apart: states by number or name, and groups."""
    if not isinstance(optimizer_state, Mapping):
        raise TypeError(
            "optimizer_state must be a torch.optim.Optimizer, its state dict or a path, "
            f"not {type(optimizer_state).__name__}"
        )
    keys = {"state", "param_groups"}
    if not keys <= optimizer_state.keys():
        inner = [key for key, value in optimizer_state.items() if isinstance(value, Mapping) and keys <= value.keys()]
        fix = f"pass its entry {inner[0]!r}" if inner else "pass optimizer.state_dict()"
        raise ValueError(
            "optimizer_state must be an optimizer's state dict, with 'state' and 'param_groups', not a dict of "
            f"{listed([repr(key) for key in optimizer_state]) or 'nothing'}; {fix}"
        )
    return optimizer_state["state"], list(optimizer_state["param_groups"])


def _check_adam(name: str, state: State) -> None:
    """Refuses the state of a parameter that is not that of Adam."""
    if not state:
        raise ValueError(
            f"optimizer_state must hold moments of Adam or AdamW, not nothing for {name}: it was never stepped, or the "
            "optimizer keeps none, as SGD; save the state after a step, or leave the parameter out with grad_wrt"
        )
    if "state1" in state:
        raise ValueError(
            "optimizer_state must hold the moments exp_avg and exp_avg_sq, not the quantised ones of bitsandbytes "
            f"(state1, for {name}); train with torch.optim.AdamW, in transformers optim='adamw_torch'"
        )
    # others build on these two moments as well, but step differently: NAdam also has mu_product
    if not {"exp_avg", "exp_avg_sq"} <= state.keys() <= {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}:
        raise ValueError(
            "optimizer_state must hold the moments of Adam or AdamW, exp_avg and exp_avg_sq, not those of another "
            f"optimizer ({listed(state)}, for {name}); train with torch.optim.Adam or AdamW"
        )


def _moments(name: str, parameter: Tensor, state: State, group: State) -> _Moments:
    """Checks and flattens the moments of one parameter."""
    _check_adam(name, state)
    if float(state.get("step", 1)) == 0:
        raise ValueError(f"optimizer_state must hold moments after a step, not before the first, as for {name}")
    amsgrad = bool(group.get("amsgrad"))
    if amsgrad and "max_exp_avg_sq" not in state:
        raise ValueError(f"optimizer_state must hold max_exp_avg_sq where amsgrad is set, not lack it, as for {name}")
    betas = tuple(float(beta) for beta in group.get("betas", ()))
    eps = float(group.get("eps", 0))
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas) or not 0 < eps < float("inf"):
        raise ValueError(
            "optimizer_state must hold groups with two betas from 0 to below 1 and a positive eps, not "
            f"betas={group.get('betas')} and eps={group.get('eps')}, as for {name}"
        )
    keys = ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if amsgrad else ()))
    flat = [_flat(name, parameter, key, state[key]) for key in keys]
    return _Moments(
        mean=flat[0], square=flat[1], peak=flat[2] if amsgrad else None, betas=(betas[0], betas[1]), eps=eps
    )


def _flat(name: str, parameter: Tensor, key: str, value: object) -> Tensor:
    """Checks one moment and flattens it in the order of indexes; only channels_last and the like need a copy."""
    if type(value) is not Tensor or value.layout != torch.strided or not value.is_floating_point():
        kind = f"{value.layout} of {value.dtype}" if type(value) is Tensor else type(value).__name__
        raise ValueError(
            f"optimizer_state must hold whole, dense tensors of floating-point numbers, not {kind} as {key} of {name}; "
            "get_optimizer_state_dict with StateDictOptions(full_state_dict=True) gathers those of several ranks"
        )
    if value.shape != parameter.shape:
        raise ValueError(
            f"optimizer_state must hold moments in the parameters' shapes, not {tuple(value.shape)} as {key} of {name} "
            f"{tuple(parameter.shape)}; build the model as it was when it was trained, and gather moments that are "
            "sharded or flattened"
        )
    return value.detach().contiguous().view(-1)


def _by_identity(optimizer: Optimizer, selected: Parameters) -> tuple[States, list[State], dict[str, Any]]:
    """Finds parameters in an optimizer that has these very objects; returns states, groups and owners by identity."""
    groups = [{**group, "params": [id(parameter) for parameter in group["params"]]} for group in optimizer.param_groups]
    known = {key for group in groups for key in group["params"]}
    if absent := [name for name, parameter in selected.items() if id(parameter) not in known]:
        raise ValueError(
            f"optimizer_state must be an optimizer of the model's own parameters, not one without {listed(absent)}; "
            "build the optimizer with parameters of this very model, or leave these out with grad_wrt"
        )
    states = {id(parameter): state for parameter, state in optimizer.state.items()}
    return states, list(groups), {name: id(parameter) for name, parameter in selected.items()}


def _stored_names(groups: Sequence[State]) -> dict[str, Any]:
    """Maps names to the keys of states, where a state dict has names; else returns nothing."""
    if all("param_names" in group for group in groups):
        pairs = [pair for group in groups for pair in zip(group["param_names"], group["params"], strict=True)]
    else:
        pairs = [(key, key) for group in groups for key in group["params"]]
    return dict(pairs) if all(isinstance(name, str) for name, _ in pairs) else {}


def _bare(name: str) -> str:
    """Removes from a name what wrappers add."""
    return WRAPPERS.sub("", name).removeprefix("base_model.model.")


def _by_name(stored: Mapping[str, Any], model: nn.Module, selected: Parameters) -> dict[str, Any]:
    """Finds parameters by their names: as they are, or if that leaves some out, all without what wrappers add."""
    aliases: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases[id(parameter)].append(name)
    changes: tuple[Callable[[str], str], ...] = (str, _bare)
    for change in changes:
        by_name: dict[str, list[str]] = defaultdict(list)
        for name in stored:
            by_name[change(name)].append(name)
        own = {name: {change(alias) for alias in aliases[id(parameter)]} for name, parameter in selected.items()}
        found = {name: [entry for alias in own[name] for entry in by_name[alias]] for name in selected}
        if all(found.values()):
            break
    if absent := [name for name, entries in found.items() if not entries]:
        raise ValueError(
            f"optimizer_state must name all parameters, not lack {listed(absent)}; it has {listed(list(stored))}; "
            "leave those that were not trained out with grad_wrt"
        )
    uses = Counter(entry for entries in found.values() for entry in entries)
    if twice := [name for name, entries in found.items() if len(entries) > 1 or uses[entries[0]] > 1]:
        raise ValueError(
            f"optimizer_state must have one name for each parameter, not {listed(found[twice[0]])} for {twice[0]} and "
            "others; rename its entries as the model's parameters"
        )
    return {name: stored[entries[0]] for name, entries in found.items()}


def _by_order(states: States, groups: Sequence[State], model: nn.Module, selected: Parameters) -> dict[str, Any]:
    """Finds parameters by their place, if only one order fits groups and shapes, else by shapes of their own."""
    if not any("exp_avg_sq" in state for state in states.values()):
        _check_adam("its first parameter", next(iter(states.values()), {}))
    keys = [key for group in groups for key in group["params"]]
    shapes = {key: states[key]["exp_avg"].shape for key in keys if "exp_avg" in states.get(key, {})}
    parameters = dict(model.named_parameters())
    owners: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    for order, is_usual in _orders(model, selected, [len(group["params"]) for group in groups]):
        places = dict(zip(order, keys, strict=True))
        if all(shapes.get(key, parameters[name].shape) == parameters[name].shape for name, key in places.items()):
            (owners if is_usual else others).append({name: places.get(name) for name in selected})
    if not owners:
        return _by_shape(shapes, groups, parameters, selected)
    if unsure := [name for name in selected if any(fit[name] != owners[0][name] for fit in owners + others)]:
        raise ValueError(
            "optimizer_state must tell whose moments it holds where several orders of the parameters fit, not only "
            f"number them, as those of {listed(unsure)}; {NAMED}"
        )
    if absent := [name for name, key in owners[0].items() if key is None]:
        raise ValueError(
            "optimizer_state must hold moments of all parameters that gradients are taken with respect to, not lack "
            f"{listed(absent)}, which require no gradient; leave them out with grad_wrt"
        )
    return owners[0]


def _orders(model: nn.Module, selected: Parameters, sizes: Sequence[int]) -> Iterator[tuple[list[str], bool]]:
    """Yields names in the orders that optimizers are given them, where the sizes of their groups fit.

    The parameters that were trained may be those that require gradients now, all, or those selected if no others have
    their shapes: adapters, for example. With each order comes whether it is usual for so many groups; others only cast
    doubt on those that are.
    """
    floating = {name: parameter for name, parameter in model.named_parameters() if parameter.is_floating_point()}
    modules = dict(model.named_modules(remove_duplicate=False))
    decays = {name: _decays(name, parameter, modules) for name, parameter in floating.items()}
    sets = [[name for name in floating if floating[name].requires_grad], list(floating)]
    if not {p.shape for p in selected.values()} & {p.shape for name, p in floating.items() if name not in selected}:
        sets.append(list(selected))
    for trained in sets:
        if len(trained) == sum(sizes):
            yield trained, len(sizes) == 1
        for by_rule in zip(*(decays[name] for name in trained), strict=True):
            if list(sizes) == [sum(by_rule), len(trained) - sum(by_rule)]:
                yield [*compress(trained, by_rule), *compress(trained, map(not_, by_rule))], True


def _decays(name: str, parameter: Tensor, modules: Mapping[str, nn.Module]) -> tuple[bool, ...]:
    """Tells by each of the usual rules if a parameter is in the first of two groups, that with weight decay.

    The rules are those of the Trainer in transformers 5; in transformers 4, for models that register their norms as
    such and for others; and of training loops that decay all but vectors.
    """
    parts = name.split(".")
    above = [modules[".".join(parts[:i])] for i in range(1, len(parts))]
    in_layer_norm = any(isinstance(module, nn.LayerNorm) for module in above)
    in_norm = any("Norm" in type(module).__name__ for module in above)
    special = re.search(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)", name.lower())
    return (
        not in_layer_norm and not special,
        not in_norm and "bias" not in name,
        not in_layer_norm and "bias" not in name,
        parameter.ndim > 1,
    )


def _by_shape(
    shapes: Mapping[Any, torch.Size], groups: Sequence[State], parameters: Parameters, selected: Parameters
) -> dict[str, Any]:
    """Finds parameters by shapes that neither another parameter of the model nor other moments have."""
    of_parameters = Counter(parameter.shape for parameter in parameters.values())
    of_moments = Counter(shapes.values())
    owners = {shape: key for key, shape in shapes.items()}
    for name, parameter in selected.items():
        if of_parameters[parameter.shape] != 1 or of_moments[parameter.shape] != 1:
            sizes = [len(group["params"]) for group in groups]
            raise ValueError(
                "optimizer_state must number the parameters that require gradients in the model's order, or in two "
                f"groups as transformers' Trainer does, not {sum(sizes)} in groups of {sizes} that fit neither, nor "
                f"does {name} alone have its shape; set requires_grad as in training, or {NAMED}"
            )
    return {name: owners[parameter.shape] for name, parameter in selected.items()}
