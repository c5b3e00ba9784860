"""Checkpoints that are the model's but for a detail, and those that are not: the weights after each."""

import copy
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attribution import CHECKPOINTS, TRAIN, N, build, checkpoint, network, run
from torch import Tensor, nn

from trak_fast import TRAKer
from trak_fast.checkpoints import load_checkpoint

State = dict[str, Any]


def equal(state: State, other: State) -> bool:
    return list(state) == list(other) and all(torch.equal(state[name], other[name]) for name in other)


def renamed(change: Callable[[str], str]) -> State:
    return {change(name): value for name, value in CHECKPOINTS[0].items()}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (renamed(lambda k: "module." + k), r"not 'module.0.weight'; load"),
        (renamed(lambda k: "_orig_mod." + k), r"not '_orig_mod.0.weight'; load"),
        (renamed(lambda k: "module._orig_mod." + k), "load"),
        (renamed(lambda k: "_orig_mod.module." + k), "load"),
        (renamed(lambda k: k.replace("0.", "0._orig_mod.")), "load"),
        (renamed(lambda k: "module." + k.replace("0.", "0._orig_mod.")), "load"),
        (
            {"epoch": 3, "state_dict": CHECKPOINTS[0]},
            r"not a dict that has one in it; load checkpoint\['state_dict'\]$",
        ),
        ({"model": CHECKPOINTS[0], "optimizer": {"state": {}}}, r"load checkpoint\['model'\]$"),
        ({"state_dict": renamed(lambda k: "model." + k)}, r"load .* in checkpoint\['state_dict'\]"),
    ],
)
def test_the_way_to_the_model_s_names_is_said_and_works(given: State, message: str) -> None:
    model = network()
    with pytest.raises(ValueError, match=rf"^checkpoint must .*{message}") as caught:
        load_checkpoint(model, given)
    advice = str(caught.value).rsplit("; load ", 1)[1]
    load_checkpoint(model, eval(advice, {"checkpoint": given}))
    assert equal(model.state_dict(), CHECKPOINTS[0])


def test_a_bare_checkpoint_for_a_wrapped_model_is_told_the_wrapper_s_names() -> None:
    model = nn.Sequential(OrderedDict(module=network()))
    with pytest.raises(ValueError, match=r"such as 'module.0.weight', not '0.weight'; load ") as caught:
        load_checkpoint(model, CHECKPOINTS[0])
    load_checkpoint(model, eval(str(caught.value).rsplit("; load ", 1)[1], {"checkpoint": CHECKPOINTS[0]}))
    assert equal(model[0].state_dict(), CHECKPOINTS[0])


def without(*names: str) -> State:
    return {name: value for name, value in CHECKPOINTS[1].items() if name not in names}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (without("4.weight", "4.bias"), r"the 7 parameters and buffers .*, not lack 2 \(4.weight, 4.bias\);"),
        (without("0.bias") | {"head.bias": torch.ones(3)}, r"not lack 1 \(0.bias\), have unknown 1 \(head.bias\);"),
        (CHECKPOINTS[1] | {"0.weight": torch.ones(8, 13)}, r"differ: 1 \(0.weight \(8, 13\) for \(8, 12\)\);"),
        (
            {str(i): torch.ones(1) for i in range(100)},
            r"lack 7 \(0.weight, .*, \.\.\.\), have unknown 100 \(0, 1, 2, 3, 4, \.\.\.",
        ),
        ({}, r"lack 7 \("),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_and_changes_nothing(
    tmp_path: Path, given: State, message: str
) -> None:
    """The entries that fit would be in the model otherwise, and a later batch would be featurized with them."""
    expected = run(build(tmp_path / "alone")).copy()
    traker = build(tmp_path / "refused")
    traker.load_checkpoint(CHECKPOINTS[0], 0)
    traker.featurize([x[:5] for x in TRAIN], num_samples=5)
    for load in (
        lambda: traker.load_checkpoint(given, 1),
        lambda: traker.start_scoring_checkpoint("test", given, 0, num_targets=3),
    ):
        with pytest.raises(ValueError, match=rf"^checkpoint must .*{message}"):
            load()
        assert equal(traker.model.state_dict(), CHECKPOINTS[0])
        with pytest.raises(RuntimeError, match="call load_checkpoint before featurize"):
            traker.featurize([x[5:] for x in TRAIN], num_samples=N - 5)
    assert (run(traker) == expected).all()


class Tied(nn.Module):
    """A model whose first and last layer have the same weights."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm, self.head = nn.Embedding(5, 3), nn.LayerNorm(3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.words(x)).mean(1))


@pytest.mark.parametrize("dropped", ["words.weight", "head.weight"])
def test_tied_weights_may_be_there_once(tmp_path: Path, dropped: str) -> None:
    torch.manual_seed(0)
    trained, model = Tied(), Tied()
    state = trained.state_dict()
    once = {name: value.clone() for name, value in state.items() if name != dropped}
    traker = TRAKer(model, "image_classification", 4, tmp_path, proj_dim=8)
    traker.load_checkpoint(once, 0)
    assert equal(model.state_dict(), state)
    assert model.head.weight is model.words.weight
    traker.load_checkpoint(state, 0)  # the same weights to the folder
    with pytest.raises(ValueError, match=r"lack 2 \(words.weight, head.weight\)"):
        load_checkpoint(model, {"norm.weight": torch.ones(3), "norm.bias": torch.ones(3)})
    untied = Tied()
    untied.head.weight = nn.Parameter(torch.ones(5, 3))
    with pytest.raises(ValueError, match=rf"lack 1 \({dropped}\)"):
        load_checkpoint(untied, once)


def test_models_that_rename_old_entries_load_them() -> None:
    class Renaming(nn.Linear):
        def _load_from_state_dict(self, state: State, prefix: str, *args: Any) -> None:
            state[prefix + "weight"] = state.pop(prefix + "w")
            super()._load_from_state_dict(state, prefix, *args)

    model = nn.Sequential(Renaming(2, 3))
    load_checkpoint(model, {"0.w": torch.ones(3, 2), "0.bias": torch.zeros(3)})
    assert model[0].weight.eq(1).all()


def test_checkpoints_of_an_older_version_keep_it() -> None:
    """Batch norms had no count of batches once, and torch knows by the version that it is not missing."""
    state = copy.deepcopy(checkpoint(3))
    del state["1.num_batches_tracked"]
    versioned = OrderedDict(state)
    versioned._metadata = {"1": {"version": 1}}  # type: ignore[attr-defined]
    model = network()
    load_checkpoint(model, versioned)
    assert equal({k: v for k, v in model.state_dict().items() if k in state}, state)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("model.pt", r"not str; torch.load\(checkpoint, map_location=\"cpu\", weights_only=True\) reads a file"),
        (network(), r"not Sequential; checkpoint.state_dict\(\) is one"),
        (None, "not NoneType$"),
    ],
)
def test_other_things_than_state_dicts_are_refused(given: Any, message: str) -> None:
    with pytest.raises(TypeError, match=f"checkpoint must be a state dict, {message}"):
        load_checkpoint(network(), given)
