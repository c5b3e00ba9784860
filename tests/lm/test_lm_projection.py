"""The choice of a projection by its costs."""

from __future__ import annotations

import pytest
from torch import nn

from trak_fast.lm.projection import SPARSE_NUMBERS, choose_projection, patterns_of
from trak_fast.lm.settings import Settings
from trak_fast.tasks import resolve_task

WIDTH, LAYERS, VOCABULARY = 64, 3, 50


class Language(nn.Module):
    """A language model by its parameters alone; it is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)


def choose(model: nn.Module, tokens: float, device: str = "cpu", **settings: object) -> tuple[dict[str, object], str]:
    """Returns the arguments of TRAKer and the reasons."""
    given = Settings(models=("model",), train=("train.jsonl",), **settings)  # type: ignore[arg-type]
    found = choose_projection(given, model, resolve_task("causal_lm"), tokens, device)
    return dict(found.arguments), found.text


def total(model: nn.Module) -> int:
    """Counts the parameters of a model."""
    return sum(parameter.numel() for parameter in model.parameters())


def test_a_dense_projection_is_chosen_up_to_the_operations_of_a_pass() -> None:
    model = Language()
    # 2 D k operations against 4 N T with D = N: as many at T = k / 2
    for tokens, kind in ((2048, "rademacher"), (2047, "sjlt")):
        arguments, _ = choose(model, tokens, method="cosine")
        assert arguments["proj_type"] == kind
    assert choose(model, 2048, method="cosine")[0]["proj_dim"] == 4096
    sparse, _ = choose(model, 2047, method="cosine")
    assert (sparse["proj_dim"], sparse["store_dtype"]) == (SPARSE_NUMBERS, "1bit")


def test_few_parameters_of_a_large_model_are_projected_densely() -> None:
    model = Language()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.layers[1].bias.requires_grad_(True)
    arguments, reason = choose(model, 20, method="less")
    assert (arguments["proj_type"], arguments["proj_dim"]) == ("rademacher", 8192)
    share = 2 * WIDTH * 8192 / (4 * total(model) * 20)
    assert reason == f"in {share:.0%} of the operations of a forward and backward pass"


def test_two_sided_sketches_are_chosen_where_moving_gradients_takes_longest() -> None:
    """On a device with many operations for each byte, short texts, and wide layers."""
    wide = nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(2)))
    arguments, _ = choose(wide, 16, device="cuda", method="cosine")
    assert (arguments["sketch"], arguments["sketch_side"]) == ("two_sided", 64)
    assert choose(wide, 1500, device="cuda", method="cosine")[0].get("sketch") is None
    assert choose(wide, 16, device="cuda", method="less")[0].get("sketch") is None  # a step of Adam has no factors


def test_whole_models_have_a_metric_and_its_defaults() -> None:
    arguments, reason = choose(Language(), 20)
    assert (arguments["metric"], arguments["proj_dim"], reason) == ("kfac", None, "in K-FAC's metric")
    assert "proj_type" not in arguments
    assert choose(Language(), 20, method="cosine")[0]["metric"] is None


@pytest.mark.parametrize(("sketch", "kind"), [("dense", "rademacher"), ("sjlt", "sjlt"), ("two_sided", "rademacher")])
def test_a_sketch_that_is_given_is_taken(sketch: str, kind: str) -> None:
    arguments, _ = choose(Language(), 20, sketch=sketch, method="dot", proj_dim=1024)
    assert (arguments["proj_type"], arguments["proj_dim"]) == (kind, 1024)
    assert (arguments.get("sketch") == "two_sided") == (sketch == "two_sided")


def test_parameters_are_those_of_the_names() -> None:
    model = Language()
    layers = [f"layers.{i}.weight" for i in range(LAYERS)]
    expected = {None: None, ("trainable",): None, ("all",): ["*"], ("linear",): [*layers, "head.weight"]}
    for params, patterns in (*expected.items(), (("head.*", "words.*"), ["head.*", "words.*"])):
        assert patterns_of(Settings(models=("m",), train=("t",), params=params), model) == patterns
