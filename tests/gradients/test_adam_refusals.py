"""States of optimizers without moments of Adam for each parameter, or that do not tell whose moments they are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from moments import State, Wrapper, assert_moments, moments, network, step, trained
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.optim import AdamW, Optimizer


def test_the_order_of_parameters_that_fit_several_ways_is_not_guessed() -> None:
    """The Trainer would put the parameter named bias last; in the model's order it is first. Both have one shape."""
    model = Wrapper("bias", nn.Linear(4, 4, bias=False))
    model.other = nn.Linear(4, 4, bias=False)
    parameters = dict(model.named_parameters())
    optimizer = AdamW([{"params": [parameters["other.weight"]]}, {"params": [parameters["bias.weight"]]}])
    step(optimizer)
    with pytest.raises(
        ValueError, match=r"^optimizer_state must tell .* not only number them, as those of bias.weight, other.weight; "
    ):
        moments(optimizer.state_dict(), model)
    assert_moments(moments(get_optimizer_state_dict(model, optimizer), model), model, optimizer)


@pytest.mark.parametrize("places", [[0, 1], [1, 0]])
def test_groups_that_are_not_of_decay_are_not_guessed(places: list[int]) -> None:
    """Groups of one layer each, in the model's order or not: nothing tells which it is."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = AdamW([{"params": model[place].parameters()} for place in places])
    step(optimizer)
    with pytest.raises(
        ValueError, match=r"^optimizer_state must number .* 4 in groups of \[2, 2\] .* does 0.weight alone"
    ):
        moments(optimizer.state_dict(), model)
    assert_moments(moments(optimizer, model), model, optimizer)


def test_selected_parameters_that_were_not_trained_are_named() -> None:
    model = network()
    model.block.norm.requires_grad_(False)
    optimizer = AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    step(optimizer)
    for state in (optimizer, optimizer.state_dict(), get_optimizer_state_dict(model, optimizer)):
        with pytest.raises(ValueError, match=r"^optimizer_state must .* block.norm.weight, block.norm.bias"):
            moments(state, model, ["*"])


def test_another_model_s_optimizer_is_refused() -> None:
    _, optimizer = trained()
    other = network()
    with pytest.raises(ValueError, match=r"^optimizer_state must be an optimizer of the model's own parameters, not"):
        moments(optimizer, other)
    with pytest.raises(ValueError, match=r"^optimizer_state must number .* not 9 in groups of \[9\] "):
        moments(optimizer.state_dict(), nn.Sequential(other, nn.Linear(4, 4)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1), "not nothing for .*SGD; save the state after a step"),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), "another optimizer .momentum_buffer, for"),
        (lambda p: torch.optim.NAdam(p), "another optimizer .step, mu_product, exp_avg, exp_avg_sq, for"),
        (lambda p: torch.optim.Adamax(p), "another optimizer .step, exp_avg, exp_inf, for"),
        (lambda p: torch.optim.RMSprop(p), "another optimizer .step, square_avg, for"),
    ],
)
def test_other_optimizers_are_refused(make: Callable[[Any], Optimizer], message: str) -> None:
    model, optimizer = trained(make)
    for state in (optimizer, optimizer.state_dict()):
        with pytest.raises(ValueError, match=f"^optimizer_state must hold .*{message}"):
            moments(state, model)


def changed(key: str, value: Any) -> Callable[[State], None]:
    """Makes a change of the second parameter's state, or with None takes an entry out."""

    def change(state: State) -> None:
        if value is None:
            del state["state"][1][key]
        else:
            state["state"][1][key] = value

    return change


def regrouped(key: str, value: Any) -> Callable[[State], None]:
    """Makes a change of the group."""
    return lambda state: state["param_groups"][0].update({key: value})


WEIGHT = "block.norm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed("state1", torch.zeros(4, dtype=torch.uint8)), f"quantised ones of bitsandbytes .state1, for {WEIGHT}"),
        (changed("exp_avg_sq", None), f"another optimizer .step, exp_avg, for {WEIGHT}"),
        (changed("exp_avg_diff", torch.zeros(4)), f"step, exp_avg, exp_avg_sq, exp_avg_diff, for {WEIGHT}"),
        (changed("exp_avg_sq", torch.zeros(2, 2)), rf"not \(2, 2\) as exp_avg_sq of {WEIGHT} \(4,\); build the model"),
        (
            changed("exp_avg", torch.zeros(4).to_sparse()),
            f"torch.sparse_coo of torch.float32 as exp_avg of {WEIGHT}",
        ),
        (changed("exp_avg", torch.zeros(4).int()), f"not torch.strided of torch.int32 as exp_avg of {WEIGHT}; get_opt"),
        (
            changed("exp_avg", nn.Parameter(torch.zeros(4))),
            f"not Parameter as exp_avg of {WEIGHT}; get_opt",
        ),
        (changed("step", torch.tensor(0.0)), f"not before the first, as for {WEIGHT}"),
        (changed("step", 0), f"not before the first, as for {WEIGHT}"),
        (regrouped("amsgrad", True), "max_exp_avg_sq where amsgrad is set, not lack it, as for words.weight"),
        (regrouped("eps", 0.0), r"positive eps, not betas=\(0.9, 0.999\) and eps=0.0, as for words"),
        (regrouped("betas", (0.9, 1.0)), r"not betas=\(0.9, 1.0\) and"),
        (regrouped("betas", ()), r"not betas=\(\) and"),
    ],
)
def test_states_that_are_not_adam_s_are_refused(change: Callable[[State], None], message: str) -> None:
    model, optimizer = trained()
    state = copy.deepcopy(optimizer.state_dict())
    change(state)
    with pytest.raises(ValueError, match=f"^optimizer_state must hold .*{message}"):
        moments(state, model)


def test_states_of_bitsandbytes_alone_are_refused_before_their_order_is_looked_for() -> None:
    state = {"state": {0: {"state1": torch.zeros(2), "state2": torch.zeros(2)}}, "param_groups": [{"params": [0]}]}
    with pytest.raises(ValueError, match=r"^optimizer_state must .* bitsandbytes .* optim='adamw_torch'"):
        moments(state, network())


def test_names_that_fit_two_parameters_are_refused() -> None:
    model = nn.Module()
    model.layer, model.module = nn.Linear(2, 2, bias=False), Wrapper("layer", nn.Linear(2, 2, bias=False))
    optimizer = AdamW(model.parameters())
    step(optimizer)
    state = optimizer.state_dict()
    wrapped = {"module.layer.weight": state["state"][0], "module.module.layer.weight": state["state"][1]}
    groups = [{**state["param_groups"][0], "params": list(wrapped)}]
    with pytest.raises(ValueError, match=r"^optimizer_state must have one name .* for layer.weight and others; rename"):
        moments({"state": wrapped, "param_groups": groups}, model)
    exact = {name.removeprefix("module."): value for name, value in wrapped.items()}
    groups = [{**state["param_groups"][0], "params": list(exact)}]
    assert_moments(moments({"state": exact, "param_groups": groups}, model), model, optimizer)


def test_names_that_lack_a_parameter_are_refused() -> None:
    model, optimizer = trained()
    state = get_optimizer_state_dict(model, optimizer)
    other = nn.Sequential()
    other.block, other.extra = model.block, nn.Linear(2, 2)
    with pytest.raises(
        ValueError, match=r"not lack extra.weight, extra.bias; it has words.weight, block.norm.weight, "
    ):
        moments(state, other)


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        (3, TypeError, "be a torch.optim.Optimizer, its state dict or a path, not int$"),
        ({"epoch": 3}, ValueError, "not a dict of 'epoch'; pass optimizer.state_dict()"),
        ({}, ValueError, "not a dict of nothing; pass"),
        ({"epoch": 3, "optimizer": {"state": {}, "param_groups": []}}, ValueError, "pass its entry 'optimizer'$"),
        ({"state": {}, "param_groups": []}, ValueError, "not nothing for its first parameter"),
    ],
)
def test_what_is_no_state_is_refused(given: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^optimizer_state must .*{message}"):
        moments(given, network())


def test_paths_without_a_state_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"^optimizer_state must .* not a folder without optimizer.pt or opt"):
        moments(tmp_path, network())
    with pytest.raises(FileNotFoundError, match=r"^optimizer_state must .* not a path where nothing is "):
        moments(tmp_path / "absent", network())
    for content in (b"", b"no tensors", b"PK\x03\x04"):
        (tmp_path / "optimizer.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"^optimizer_state must be the path of a file that torch.load reads"):
            moments(tmp_path, network())
