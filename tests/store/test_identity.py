"""Tasks that differ are described by other lines or other code; equal ones by the same."""

import argparse
import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any

import attribution
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from trak_fast.store.manifest import differences, manifest_of
from trak_fast.tasks import CLIP, FunctionTask, ImageClassification, MaskedLM, Task

BORDER = 0.5


class Projector:
    proj_type, seed, definition = "rademacher", 0, 1


def manifest(task: object) -> dict[str, Any]:
    model = nn.Linear(2, 3)
    made: dict[str, Any] = manifest_of(Projector(), 4, task, model, dict(model.named_parameters()), 10)
    return json.loads(json.dumps(made))


def output(model: nn.Module, x: Tensor) -> Tensor:
    return model(x[None])[0, 0]


def by_closure(factor: Any) -> Callable[..., Tensor]:
    def loss(f: Tensor, x: Tensor) -> Tensor:
        return factor * f**2

    return loss


def by_default(factor: Any) -> Callable[..., Tensor]:
    def loss(f: Tensor, x: Tensor, factor: Any = factor) -> Tensor:
        return factor * f**2

    return loss


def scaled(f: Tensor, x: Tensor, factor: Any) -> Tensor:
    return factor * f**2


def by_partial(factor: Any) -> Callable[..., Tensor]:
    return functools.partial(scaled, factor=factor)


class Scaled:
    def __init__(self, factor: Any) -> None:
        self.factor = factor

    def __call__(self, f: Tensor, x: Tensor) -> Tensor:
        return self.factor * f**2

    def method(self, f: Tensor, x: Tensor) -> Tensor:
        return self.factor * f**2


@dataclasses.dataclass
class Options:
    factor: Any


VALUES = [
    (2.0, 3.0),
    ([1, 2], [1, 3]),
    ({"a": 1}, {"a": 2}),
    ("mean", "sum"),
    (np.float64(1), np.float64(2)),
    (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0])),
    (np.arange(3), np.arange(3) + 1),
    (Options(1), Options(2)),
    (torch.float32, torch.float64),
    (None, 1),
    (nn.CrossEntropyLoss(label_smoothing=0.1), nn.CrossEntropyLoss(label_smoothing=0.2)),
    (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0])), nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0]))),
]


@pytest.mark.parametrize(("one", "other"), VALUES)
@pytest.mark.parametrize("make", [by_closure, by_default, by_partial, Scaled, lambda value: Scaled(value).method])
def test_losses_that_hold_other_values_differ(make: Callable[..., Any], one: object, other: object) -> None:
    first = manifest(FunctionTask(output, loss=make(one)))
    assert differences(first, manifest(FunctionTask(output, loss=make(one)))) == []
    assert differences(first, manifest(FunctionTask(output, loss=make(other))))


def test_the_difference_is_told_by_name() -> None:
    lines = differences(
        manifest(FunctionTask(output, loss=by_closure(2.0))), manifest(FunctionTask(output, loss=by_closure(3.0)))
    )
    assert lines == ["task_settings[2]: stored 'loss.factor = 2.0', given 'loss.factor = 3.0'"]


def test_functions_of_one_line_differ_by_their_code() -> None:
    one, other = FunctionTask(output, lambda f, x: f**2), FunctionTask(output, lambda f, x: f.abs())  # fmt: skip
    assert differences(manifest(one), manifest(other)) == ["task: the code of its functions is another"]
    stored = manifest(other)
    stored["task_code"]["python"] = "2.7"
    assert differences(stored, manifest(one)) == []  # code of other versions of Python says nothing


def test_helpers_and_constants_that_a_function_reads_count(monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(f: Tensor, x: Tensor) -> Tensor:
        return scaled(f, x, BORDER)

    before = manifest(FunctionTask(output, loss))
    monkeypatch.setitem(globals(), "BORDER", 0.7)
    assert differences(before, manifest(FunctionTask(output, loss)))
    monkeypatch.setitem(globals(), "BORDER", 0.5)
    assert not differences(before, manifest(FunctionTask(output, loss)))

    def other(f: Tensor, x: Tensor, factor: Any) -> Tensor:
        return factor * f**3

    monkeypatch.setitem(globals(), "scaled", other)
    assert differences(before, manifest(FunctionTask(output, loss)))


class Smooth(ImageClassification):
    def __init__(self, temperature: float) -> None:
        self.temperature = temperature
        self._calls = 0

    def get_weightings(self, outputs: Tensor, batch: Any) -> Tensor:
        return torch.sigmoid(-outputs / self.temperature)


def test_classes_count_by_attributes_and_code_but_not_by_private_state() -> None:
    one, same, other = Smooth(1.0), Smooth(1.0), Smooth(2.0)
    same._calls = 7
    assert differences(manifest(one), manifest(same)) == []
    assert differences(manifest(one), manifest(other))
    methods = {"get_weightings": lambda self, outputs, batch: -outputs, "__module__": __name__}
    changed = type("Smooth", (Smooth,), methods)
    assert differences(manifest(one), manifest(changed(1.0)))


def test_tasks_of_the_package_are_known_by_name_and_settings() -> None:
    assert manifest(ImageClassification())["task_settings"] == []
    assert differences(manifest(MaskedLM()), manifest(MaskedLM())) == []
    assert differences(manifest(CLIP(seed=0)), manifest(CLIP(seed=1)))
    used = CLIP()
    used.image_embeddings = torch.randn(3, 2)  # of the last checkpoint
    assert differences(manifest(CLIP()), manifest(used)) == []


def test_tasks_of_other_libraries_count_by_their_attributes() -> None:
    class Foreign:
        def __init__(self, temperature: float) -> None:
            self.temperature = temperature

        def get_output(self) -> None: ...

    assert differences(manifest(Foreign(1.0)), manifest(Foreign(2.0)))
    assert isinstance(Smooth(1.0), Task)


OPTIONS = argparse.Namespace(factor=2.0)
TABLE = {"factor": [1.0, 2.0]}
CRITERION = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0]))
CALLS = 0


class Plain:
    def __init__(self) -> None:
        self.factor = 1.0


CONFIG = Plain()


@pytest.mark.parametrize("change", ["OPTIONS", "TABLE", "CRITERION", "CONFIG", "helper"])
def test_global_objects_that_a_function_reads_count(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(f: Tensor, x: Tensor) -> Tensor:
        global CALLS
        CALLS += 1  # changes as the task runs
        return OPTIONS.factor * TABLE["factor"][1] * CONFIG.factor * CRITERION(f, x) * attribution.SEED

    before = manifest(FunctionTask(output, loss))
    monkeypatch.setitem(globals(), "CALLS", 7)
    assert differences(before, manifest(FunctionTask(output, loss))) == []
    if change == "OPTIONS":
        monkeypatch.setattr(OPTIONS, "factor", 3.0)
    elif change == "TABLE":
        monkeypatch.setitem(TABLE, "factor", [1.0, 3.0])
    elif change == "CRITERION":
        monkeypatch.setattr(CRITERION, "weight", torch.tensor([1.0, 3.0]))
    elif change == "CONFIG":
        monkeypatch.setattr(CONFIG, "factor", 3.0)
    else:
        monkeypatch.setattr(attribution, "SEED", 3)  # a module of the user's own
    assert differences(before, manifest(FunctionTask(output, loss)))


def test_documentation_and_the_model_itself_do_not_count() -> None:
    made = []
    for text in ("Says something.", "Says something else."):
        scope: dict[str, Any] = {}
        exec(f'def documented(model, x):\n    """{text}"""\n    return model(x[None])[0, 0]', scope)
        made.append(manifest(FunctionTask(scope["documented"])))
    assert differences(*made) == []
    model = nn.Linear(2, 3)
    parameters = dict(model.named_parameters())

    def closed(_: nn.Module, x: Tensor) -> Tensor:
        return model(x[None])[0, 0]

    made = [manifest_of(Projector(), 4, FunctionTask(closed), model, parameters, 10)]
    nn.init.zeros_(model.weight)
    made.append(manifest_of(Projector(), 4, FunctionTask(closed), model, parameters, 10))
    assert differences(*made) == []
