"""Files of others: they run no code, and name no other file, and no source reads one in a way that could."""

from __future__ import annotations

import ast
import contextlib
import copy
import json
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile import plant
from language_models import B, Language, texts
from packaging.requirements import Requirement
from torch import nn

from trak_fast import GradientProjector, TRAKer
from trak_fast.lm.folder import RunFolder
from trak_fast.lm.models.learning_rates import learning_rates
from trak_fast.lm.texts.documents import read_documents
from trak_fast.retraining import Recipe, retrained_outputs
from trak_fast.scoring import TopScores
from trak_fast.scoring.partial_grams import load as load_partial_gram
from trak_fast.store.files import is_file_name, read_array
from trak_fast.store.samples import StoredSamples

ROOT = Path(__file__).resolve().parents[1]

NEEDED = {
    "torch.load": {"weights_only": True},
    "np.load": {"allow_pickle": False},
    "numpy.load": {"allow_pickle": False},
    "from_config": {"trust_remote_code": False},
    "from_pretrained": {"trust_remote_code": False, "local_files_only": True},
}
"""Calls by the ends of their names -> the arguments without which they might run code of a file, or download one."""

FORBIDDEN = (
    *("eval", "exec", "compile", "__import__", "os.system", "torch.jit.load", "torch.hub.load", "load_dataset"),
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "read_pickle", "marshal.load", "marshal.loads", "shelve.open"),
    *("joblib.load", "dill.load", "cloudpickle.load", "yaml.load", "snapshot_download", "hf_hub_download", "urlopen"),
)
"""Calls that run code of a file, or download one."""


def dotted(node: ast.expr) -> str:
    """Returns the name that is called, with a question mark for parts that are no names."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def is_call_of(name: str, call: str) -> bool:
    """Tells if a dotted name ends with a call; builtins must be whole names."""
    return name == call or (call not in ("eval", "exec", "compile", "__import__") and name.endswith(f".{call}"))


def faults(source: str) -> list[str]:
    """Lists the calls of a source that could run code of a file, or download one."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module in ("torch", "numpy", "pickle"):
            names = {alias.name for alias in node.names} & {"load", "loads", "Unpickler"}
            found += [f"from {node.module} import {name}" for name in names]
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        given = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
        found += [name for call in FORBIDDEN if is_call_of(name, call)]
        found += [
            f"{name} without {argument}={value}"
            for call, arguments in NEEDED.items()
            if is_call_of(name, call) and not name.endswith("PeftModel.from_pretrained")  # it has none of these
            for argument, value in arguments.items()
            if given.get(argument) is not value
        ]
        if given.get("shell"):
            found.append(f"{name} with a shell")
    return found


@pytest.mark.parametrize("folder", ["trak_fast", "benchmarks"])
def test_no_source_reads_a_file_in_a_way_that_could_run_code(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert len(files) > 20
    found = {str(path.relative_to(ROOT)): bad for path in files if (bad := faults(path.read_text()))}
    assert not found


@pytest.mark.parametrize(
    ("source", "number"),
    [
        ("torch.load(path)", 1),
        ("torch.load(path, weights_only=False)", 1),
        ("torch.load(path, weights_only=True)", 0),
        ("np.load(path, 'r')", 1),
        ("np.load(path, allow_pickle=False)", 0),
        ("a[0].from_pretrained(path, local_files_only=True)", 1),
        ("getattr(transformers, name).from_config(config)", 1),
        ("pickle.loads(content)", 1),
        ("pickle.dumps(content)", 0),
        ("from torch import load", 1),
        ("eval(text)", 1),
        ("model.eval()", 0),
        ("build(1).eval()", 0),
        ("re.compile(text)", 0),
        ("subprocess.run(text, shell=True)", 1),
    ],
)
def test_calls_that_could_run_code_are_found(source: str, number: int) -> None:
    assert len(faults(source)) == number


def test_the_package_reads_files_of_torch_in_one_place_and_writes_none() -> None:
    users: dict[str, set[str]] = {"load": set(), "save": set()}
    for path in (ROOT / "trak_fast").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and (name := dotted(node.func)) in ("torch.load", "torch.save"):
                users[name.removeprefix("torch.")].add(path.name)
    assert users == {"load": {"torch_files.py"}, "save": set()}


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[Path]:
    """Names the folder that a file makes if it is unpickled, and fails if it is there in the end."""
    path = tmp_path / "code was run"
    yield path
    assert not path.exists()


KINDS = ("pickle", "npy", "npz", "torch", "old torch")


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_files_do_run_code_where_nothing_forbids_it(tmp_path: Path, kind: str) -> None:
    file, made = tmp_path / "file", tmp_path / "made"
    plant(file, kind, made)
    if kind in ("npy", "npz"):
        content = np.load(file, allow_pickle=True)
        _ = content if kind == "npy" else content["gram"]
    elif kind == "pickle":
        pickle.loads(file.read_bytes())
    else:
        torch.load(file, weights_only=False)
    assert made.is_dir()


def optimizer_state(file: Path) -> object:
    return GradientProjector(nn.Linear(2, 2), "image_classification", 4, optimizer_state=file)


def kept_outputs(file: Path) -> object:
    """Reads outputs of models that were trained before, from the file that a run makes."""
    data, masks, recipe = (torch.ones(4, 2), torch.zeros(4).long()), np.eye(4, dtype=bool), Recipe(1, 2, 0.1)

    def outputs(folder: Path) -> object:
        build = lambda: nn.Linear(2, 2)  # noqa: E731
        return retrained_outputs(build, data, masks, lambda models: models["bias"], recipe, 0, save_dir=folder)

    outputs(made := file.parent / "made")
    (own,) = made.iterdir()
    file.replace(own)
    return outputs(made)


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "optimizer": ("optimizer.pt", optimizer_state),
    "samples": ("samples.safetensors", StoredSamples.load),
    "scores": ("test.npy", read_array),
    "top scores": ("test.highest.npz", TopScores.load),
    "documents": ("documents.npz", lambda file: RunFolder(file.parent).documents()),
    "outputs": ("outputs.npy", kept_outputs),
}
"""Names of files, and the calls that read them and refuse what they cannot read."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reader", READERS)
def test_hostile_files_are_refused(tmp_path: Path, mark: Path, reader: str, kind: str) -> None:
    name, read = READERS[reader]
    plant(tmp_path / name, kind, mark)
    with pytest.raises((ValueError, KeyError, pickle.UnpicklingError)):
        read(tmp_path / name)


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_files_that_may_be_missing_count_as_missing(tmp_path: Path, mark: Path, kind: str) -> None:
    plant(tmp_path / "scheduler.pt", kind, mark)
    plant(tmp_path / "optimizer.pt", kind, mark)
    assert learning_rates([tmp_path], [tmp_path / "optimizer.pt"]) == [None]
    plant(tmp_path / "part.npz", kind, mark)
    assert load_partial_gram(tmp_path / "part.npz", 1, (1, 1, 1)) is None


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return copy.deepcopy(Language(tied=False).state_dict())


def steps(folder: Path, state: dict[str, torch.Tensor]) -> Iterator[Callable[[], object]]:
    """Yields the calls of a whole attribution, each of which may fail."""
    torch.manual_seed(0)
    batch = texts()
    traker = TRAKer(Language(tied=False), "causal_lm", B, folder, proj_dim=16)
    yield lambda: traker.load_checkpoint(state, 0)
    yield lambda: traker.featurize(batch, num_samples=B)
    yield traker.finalize_features
    yield lambda: traker.start_scoring_checkpoint("test", state, 0, num_targets=B)
    yield lambda: traker.score(batch, num_samples=B)
    yield lambda: traker.finalize_scores("test")
    yield lambda: traker.top_scores("test", 2)
    yield traker.self_influence


def attribute(folder: Path, state: dict[str, torch.Tensor], errors: type[Exception] | tuple[()] = ()) -> None:
    """Goes through the calls; some errors end a call and not the others."""
    with contextlib.suppress(errors):
        for step in steps(folder, state):
            with contextlib.suppress(errors):
                step()


@pytest.mark.parametrize("kind", KINDS)
def test_no_file_in_a_folder_of_features_runs_code(
    tmp_path: Path, mark: Path, kind: str, state: dict[str, torch.Tensor]
) -> None:
    whole = tmp_path / "whole"
    attribute(whole, state)
    files = [file for file in whole.rglob("*") if file.is_file() and file.suffix != ".lock"]
    names = sorted(str(file.relative_to(whole)) for file in files)
    assert {Path(name).suffix for name in names} == {".json", ".npy", ".npz", ".safetensors"}
    assert "checkpoint_0/metric.safetensors" in names
    for name in names:
        folder = tmp_path / "changed"
        shutil.copytree(whole, folder)
        plant(folder / name, kind, mark)
        attribute(folder, state, errors=Exception)
        assert not mark.exists(), name
        shutil.rmtree(folder)


def test_no_import_and_no_attribution_reaches_for_the_network(tmp_path: Path) -> None:
    program = [sys.executable, "-W", "ignore", ROOT / "tests/programs/without_network.py", tmp_path / "features"]
    done = subprocess.run(program, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/etc/passwd", "a\\b", "a\0b", "../x", None, 3, ["x"]])
def test_names_that_lead_out_of_a_folder_are_none_of_files(name: object) -> None:
    assert not is_file_name(name)


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "...", "a b", "ü", "x..y"])
def test_other_names_are_those_of_files(name: str) -> None:
    assert is_file_name(name)


@pytest.mark.parametrize("name", ["../secret.arrow", "/secret.arrow", "..", "a\0", 3, None])
def test_a_saved_data_set_that_names_files_elsewhere_is_refused(tmp_path: Path, name: object) -> None:
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "dataset_info.json").write_text("{}")
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "a.arrow"}, {"filename": name}]}))
    with pytest.raises(ValueError, match=re.escape(f"{folder}/state.json must name files in its folder, not {name!r}")):
        read_documents([folder])


@pytest.mark.parametrize("content", [[], {}, {"_data_files": None}, {"_data_files": ["a.arrow"]}])
def test_a_saved_data_set_without_files_is_refused(tmp_path: Path, content: object) -> None:
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / "state.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"state\.json must list files of data, as save_to_disk writes it"):
        read_documents([tmp_path])


def bounds() -> dict[str, Requirement]:
    """Reads the dependencies of the package and of its extras by name, without those that build the site."""
    project = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [lines for name, lines in project["optional-dependencies"].items() if name != "docs"]
    lines = [line for part in (project["dependencies"], *extras) for line in part]
    return {wanted.name: wanted for wanted in map(Requirement, lines) if wanted.name != "trak_fast"}


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.13"])
def test_each_dependency_is_pinned_once_within_its_bounds(python: str) -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    pins = [pin for pin in pins if pin.marker is None or pin.marker.evaluate({"python_version": python})]
    versions = {pin.name: str(pin.specifier).removeprefix("==") for pin in pins}
    assert len(versions) == len(pins)
    assert all(str(pin.specifier).startswith("==") for pin in pins)
    for name, wanted in bounds().items():
        if not str(wanted.specifier).startswith("=="):  # a version of its own, that of CUDA's compiler
            assert wanted.specifier.contains(versions[name]), name


def test_no_pyarrow_is_allowed_that_runs_code_of_files() -> None:
    """CVE-2023-47248: a type in a file of parquet may be a pickle, which versions before 14.0.1 load."""
    assert not bounds()["pyarrow"].specifier.contains("14.0.0")
