"""Adam's moments against the optimizer's own, and preconditioned gradients against a loop in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from moments import State, Wrapper, assert_moments, moments, network, step, trained
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.optim import Adam, AdamW, Optimizer

EPSILON = 2**-24
"""Half the distance of float32 numbers from 1: the largest relative error of one rounding."""


def decay_groups(model: nn.Module) -> list[State]:
    """Groups parameters as transformers' Trainer does, by names written out."""
    plain = ["block.norm.weight", "block.norm.bias", "block.first.bias", "block.second.bias", "convolution.bias"]
    parameters = dict(model.named_parameters())
    return [
        {"params": [parameter for name, parameter in parameters.items() if name not in plain], "weight_decay": 0.1},
        {"params": [parameters[name] for name in plain], "weight_decay": 0.0},
    ]


def by_hand(state: State, group: State, grads: Tensor) -> Tensor:
    """Computes minus Adam's step with the gradient of −f, entry by entry with Python's floats."""
    (beta1, beta2), eps = group["betas"], group["eps"]
    m, v = state["exp_avg"].flatten().tolist(), state["exp_avg_sq"].flatten().tolist()
    peak = state["max_exp_avg_sq"].flatten().tolist() if group["amsgrad"] else [0.0] * len(v)
    rows = []
    for sample in grads.flatten(1).tolist():
        row = []
        for i, slope in enumerate(sample):
            g = -slope
            square = max(beta2 * v[i] + (1 - beta2) * g * g, peak[i])
            row.append(-(beta1 * m[i] + (1 - beta1) * g) / (math.sqrt(square) + eps))
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64).view(grads.shape)


def error_bound(state: State, group: State, grads: Tensor) -> Tensor:
    """Bounds the rounding: the numerator's terms may cancel, all else only multiplies, or adds what is positive.

    Each constant, moment, product and sum has one relative error; the longest chain has fewer than 16.
    """
    (beta1, beta2), eps = group["betas"], group["eps"]
    m, v = state["exp_avg"].double().flatten(), state["exp_avg_sq"].double().flatten()
    g = grads.double().flatten(1)
    size = (beta1 * m.abs() + (1 - beta1) * g.abs()) / ((beta2 * v + (1 - beta2) * g**2).sqrt() + eps)
    return 16 * EPSILON * size.view(grads.shape)


CONSTANTS = [
    {},
    {"betas": (0.5, 0.75), "eps": 1e-2},
    {"amsgrad": True},
    {"maximize": True},
    {"betas": (0.0, 0.0)},
]


@pytest.mark.parametrize("make", [Adam, AdamW])
@pytest.mark.parametrize("options", CONSTANTS)
def test_steps_are_those_of_a_loop_over_entries(make: type[Adam], options: State) -> None:
    model, optimizer = trained(make, **options)
    if options.get("amsgrad"):
        for state in optimizer.state.values():
            state["exp_avg_sq"] *= 0.5  # so that the largest one is larger
    found = moments(optimizer.state_dict(), model)
    for name, parameter in model.named_parameters():
        grads = torch.randn(3, *parameter.shape) * torch.logspace(-6, 3, 3).view(3, *[1] * parameter.ndim)
        given = grads.clone()
        steps = found.precondition(name, given.flatten(1), 0).view(grads.shape)
        assert steps.dtype == torch.float32
        assert torch.equal(given, grads)
        arguments = optimizer.state[parameter], optimizer.param_groups[0], grads
        assert bool(((steps - by_hand(*arguments)).abs() <= error_bound(*arguments)).all()), name


def test_the_step_of_a_sample_is_the_optimizer_s_own_with_its_loss() -> None:
    """Adam's next step with the gradient of one sample's loss: the parameters move to where f rises."""
    model = nn.Linear(3, 2, bias=False).double()
    optimizer = Adam(model.parameters(), lr=1.0)
    step(optimizer, times=5)
    slope = torch.randn(1, 2, 3, dtype=torch.float64)
    gamma = moments(optimizer, model).precondition("weight", slope, 0)[0]
    before = model.weight.detach().clone()
    optimizer.zero_grad()
    model.weight.grad = -slope[0]  # of the loss −f
    optimizer.step()
    # torch corrects both moments for their start at zero: in its sixth step by factors that do not depend on the entry
    factor = (1 - 0.9**6) / math.sqrt(1 - 0.999**6)
    torch.testing.assert_close((model.weight - before) * factor, gamma.double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("sign", [1, -1])
def test_maximized_objectives_have_moments_of_what_the_steps_go_down(sign: int) -> None:
    """An optimizer that maximizes minus the loss has the same moments as one that minimizes the loss."""
    model = nn.Linear(3, 2)
    optimizer = AdamW(model.parameters(), maximize=sign == -1)
    model.weight.grad, model.bias.grad = sign * torch.arange(6.0).view(2, 3), sign * torch.ones(2)
    optimizer.step()
    steps = moments(optimizer, model).precondition("weight", torch.zeros(1, 6), 0)
    assert bool((steps[0, 1:] < 0).all())  # where the loss rises with the weight, f = −loss falls


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_slices_are_parts_of_the_whole(dtype: torch.dtype) -> None:
    model, optimizer = trained()
    found = moments(optimizer, model)
    for name, parameter in model.named_parameters():
        grads = torch.randn(2, *parameter.shape).to(dtype)
        whole = found.precondition(name, grads.flatten(1), 0)
        size = parameter.numel()
        for first, last in [(0, 1), (1, size), (size // 2, size // 2 + 1), (size - 1, size), (size, size)]:
            part = found.precondition(name, grads.flatten(1)[:, first:last], first)
            # vectors are computed in other groups of entries, by the same operations
            torch.testing.assert_close(part, whole[:, first:last], rtol=4 * EPSILON, atol=0)
        if parameter.ndim == 2:
            rows = found.precondition(name, grads[:, 2:4], 2 * parameter.shape[1])
            assert rows.shape == (2, 2, parameter.shape[1])
            expected = whole.view(grads.shape)[:, 2:4]
            torch.testing.assert_close(rows, expected, rtol=4 * EPSILON, atol=0)


@pytest.mark.parametrize(("first", "count"), [(-1, 2), (15, 2), (17, 0)])
def test_entries_beyond_the_parameter_are_refused(first: int, count: int) -> None:
    model, optimizer = trained()
    found = moments(optimizer, model)
    with pytest.raises(ValueError, match=rf"^first must leave .* 16 entries of block.first.weight, not be {first} "):
        found.precondition("block.first.weight", torch.zeros(1, count), first)


def one_group(model: nn.Module) -> Any:
    return model.parameters()


def named(model: nn.Module) -> Any:
    return list(model.named_parameters())[::-1]  # in an order that no rule has


FORMS: dict[str, Callable[[nn.Module, Optimizer, Path], Any]] = {
    "optimizer": lambda model, optimizer, folder: optimizer,
    "state dict": lambda model, optimizer, folder: optimizer.state_dict(),
    "names": lambda model, optimizer, folder: get_optimizer_state_dict(model, optimizer),
    "file": lambda model, optimizer, folder: folder / "moments",
    "old file": lambda model, optimizer, folder: folder / "old",
    "checkpoint folder": lambda model, optimizer, folder: str(folder),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("groups", [one_group, decay_groups, named])
@pytest.mark.parametrize("names", [None, ["block.*"], ["block.second.weight"]])
def test_every_form_gives_each_parameter_its_own(
    form: str, groups: Callable[[nn.Module], Any], names: list[str] | None, tmp_path: Path
) -> None:
    model = network()
    optimizer = AdamW(groups(model))
    step(optimizer)
    torch.save(optimizer.state_dict(), tmp_path / "moments")
    torch.save(optimizer.state_dict(), tmp_path / "old", _use_new_zipfile_serialization=False)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    found = moments(FORMS[form](model, optimizer, tmp_path), model, names)
    assert_moments(found, model, optimizer, names)
    assert found.digest() == moments(optimizer, model, names).digest()


def test_what_fsdp_saves_in_a_checkpoint_folder_is_found(tmp_path: Path) -> None:
    model, optimizer = trained()
    torch.save(get_optimizer_state_dict(model, optimizer), tmp_path / "optimizer.bin")
    assert_moments(moments(tmp_path, model), model, optimizer)


def test_frozen_parameters_are_not_numbered() -> None:
    model = network()
    model.block.first.weight.requires_grad_(False)
    optimizer = AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    step(optimizer)
    state = optimizer.state_dict()
    assert_moments(moments(state, model), model, optimizer)
    assert_moments(moments(state, model, ["*norm*"]), model, optimizer, ["*norm*"])


def test_selected_parameters_may_be_the_trained_ones_if_no_others_have_their_shapes() -> None:
    """Adapters that are loaded for inference require no gradients, and have shapes of their own."""
    model = network()
    optimizer = AdamW(model.convolution.parameters())
    step(optimizer)
    assert_moments(moments(optimizer.state_dict(), model, ["conv*"]), model, optimizer, ["conv*"])
    optimizer = AdamW(model.block.first.parameters())
    step(optimizer)
    with pytest.raises(
        ValueError, match=r"^optimizer_state must .* \[2\] .*; set requires_grad as in training, or pass"
    ):
        moments(optimizer.state_dict(), model, ["block.second.*"])


def test_parameters_that_were_never_stepped_matter_only_where_selected() -> None:
    model = network()
    optimizer = AdamW(model.parameters())
    step(optimizer)
    del optimizer.state[model.block.first.bias]
    for state in (optimizer, optimizer.state_dict()):
        assert_moments(moments(state, model, ["*second*"]), model, optimizer, ["*second*"])
        with pytest.raises(
            ValueError, match=r"^optimizer_state must .* not nothing for block.first.bias: it was never"
        ):
            moments(state, model)


def test_each_group_has_its_own_constants() -> None:
    model = network()
    groups = decay_groups(model)
    groups[1] |= {"betas": (0.5, 0.6), "eps": 1e-3}
    optimizer = AdamW(groups)
    step(optimizer)
    found = moments(optimizer.state_dict(), model)
    for name, group in (("block.first.weight", 0), ("block.first.bias", 1)):
        parameter = dict(model.named_parameters())[name]
        grads = torch.randn(2, parameter.numel())
        arguments = optimizer.state[parameter], optimizer.param_groups[group], grads
        steps = found.precondition(name, grads, 0)
        assert bool(((steps - by_hand(*arguments)).abs() <= error_bound(*arguments)).all())


@pytest.mark.parametrize("prefix", ["module", "_orig_mod", "_fsdp_wrapped_module", "base_model.model"])
def test_names_of_wrapped_models_fit_those_without_wrappers(prefix: str) -> None:
    model, optimizer = trained()
    wrapped: nn.Module = model
    for part in reversed(prefix.split(".")):
        wrapped = Wrapper(part, wrapped)
    bare = get_optimizer_state_dict(model, optimizer)
    # torch takes these prefixes from the names itself, therefore they are written here
    state = {f"{prefix}.{name}": value for name, value in bare["state"].items()}
    groups = [{**bare["param_groups"][0], "params": list(state)}]
    expected = moments(optimizer, model)
    assert_moments(moments({"state": state, "param_groups": groups}, model), model, optimizer)
    assert_moments(moments(bare, wrapped), wrapped, optimizer)
    assert moments(bare, wrapped).digest() == expected.digest()
    inner = {name.replace("block.", "block._checkpoint_wrapped_module."): value for name, value in state.items()}
    assert_moments(
        moments({"state": inner, "param_groups": [{**groups[0], "params": list(inner)}]}, model), model, optimizer
    )


def test_tied_parameters_are_found_by_either_name() -> None:
    model, optimizer = trained()
    state = get_optimizer_state_dict(model, optimizer)
    assert "head.weight" not in state["state"]
    state["state"]["head.weight"] = state["state"].pop("words.weight")
    names = state["param_groups"][0]["params"]
    names[names.index("words.weight")] = "head.weight"
    assert_moments(moments(state, model), model, optimizer)


def test_shapes_that_only_one_parameter_has_are_enough() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 5))
    optimizer = AdamW([{"params": [parameter]} for parameter in reversed(list(model.parameters()))])
    step(optimizer)
    assert_moments(moments(optimizer.state_dict(), model), model, optimizer)


class Scale(nn.Module):
    """A layer of one parameter, which is no norm by its class."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))


class OwnNorm(Scale):
    """A norm by its class alone."""


@pytest.mark.parametrize(
    "plain",
    {
        "transformers 5": ["linear.bias", "q_norm.weight"],
        "transformers 4, registered norms": ["linear.bias", "stretch.weight"],
        "transformers 4": ["linear.bias"],
        "all but vectors": ["linear.bias", "gain.weight"],
    }.values(),
)
def test_each_rule_of_weight_decay_is_known(plain: list[str]) -> None:
    """Each rule differs from the others in a layer; two blocks, so that no shape is found once."""
    model = nn.Sequential(nn.Module(), nn.Module())
    for block in model:
        block.q_norm, block.linear, block.gain, block.stretch = Scale(1, 4), nn.Linear(4, 4), Scale(4), OwnNorm(4, 1)
    split: list[list[Tensor]] = [[], []]
    for name, parameter in model.named_parameters():
        split[name.partition(".")[2] in plain].append(parameter)
    optimizer = AdamW([{"params": group} for group in split])
    step(optimizer)
    assert_moments(moments(optimizer.state_dict(), model), model, optimizer)


def within(address: int, addresses: str) -> bool:
    """Tells if an address is in a range that is written as "first-last" in hexadecimal digits."""
    first, last = (int(number, 16) for number in addresses.split("-"))
    return first <= address < last


def test_moments_of_a_file_are_not_read_before_they_are_used(tmp_path: Path) -> None:
    model, optimizer = trained()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    found = moments(tmp_path, model, ["block.*"])
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    for entry in found._moments.values():
        files = [line[5:] for line in maps if within(entry.mean.data_ptr(), line[0])]
        assert files == [[str(tmp_path / "optimizer.pt")]]


def test_digests_tell_moments_constants_and_parameters_apart() -> None:
    model, optimizer = trained()
    states = [optimizer.state_dict()]
    for change in (
        lambda s: s["state"][1]["exp_avg"].view(-1)[3].add_(1e-3),
        lambda s: s["state"][1]["exp_avg_sq"].view(-1)[0].add_(1e-3),
        lambda s: s["state"][1].update(exp_avg=s["state"][2]["exp_avg"]),
        lambda s: s["param_groups"][0].update(eps=1e-7),
        lambda s: s["param_groups"][0].update(betas=(0.9, 0.99)),
    ):
        states.append(copy.deepcopy(states[0]))
        change(states[-1])
    digests = [moments(state, model).digest() for state in states] + [moments(optimizer, model, ["block.*"]).digest()]
    assert len(set(digests)) == len(digests)
    assert moments(copy.deepcopy(states[0]), model).digest() == digests[0]
    assert all(len(digest) == 16 for digest in digests)
