"""Sharded models under torchrun with 1, 2 and 4 processes give what one process computes by a plain loop."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import warm
from sharded_models import build, expected, samples

PROGRAMS = Path(__file__).parents[1] / "programs"
CLOSE = 1e-5
"""The error relative to the norm of a row that sums in float32, in another order, may have."""


def launch(ranks: int, program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs one of the programs in tests/programs under torchrun."""
    command = [warm.python(), "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [*command, str(PROGRAMS / program), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


def require_close(found: np.ndarray, rows: torch.Tensor) -> None:
    """Checks rows against those of the plain loop."""
    errors = np.linalg.norm(found - rows.numpy(), axis=1)
    assert found.shape == rows.shape
    assert (errors <= CLOSE * np.linalg.norm(rows.numpy(), axis=1)).all(), errors


@pytest.mark.parametrize(
    ("ranks", "name", "variant"), [(1, "tied", "blocks"), (2, "tied", "blocks"), (4, "untied", "each")]
)
def test_processes_with_their_own_samples_of_any_number_stream_a_model_that_is_sharded(
    tmp_path: Path, ranks: int, name: str, variant: str
) -> None:
    launch(ranks, "fully_sharded.py", tmp_path, name, variant)
    model = build(name)
    counts = [[3, 0, 5, 1], [0, 2, 1, 4], [2, 2, 0, 0]]
    for rank in range(ranks):
        with np.load(tmp_path / f"rank_{rank}.npz") as found:
            for call, shares in enumerate(counts):
                batch = samples(shares[rank], length=7 + rank, seed=10 * call + rank)
                if shares[rank]:
                    require_close(found[f"call_{call}"], expected(model, batch))
                else:
                    assert found[f"call_{call}"].shape[0] == 0
            # what layers have is streamed; the parameter that is the model's own is not
            assert found["singly"].tolist() == (["scale"] if name == "tied" else [])


def test_layers_are_gathered_in_half_precision_where_the_policy_says_so(tmp_path: Path) -> None:
    launch(2, "fully_sharded.py", tmp_path, "untied", "half")
    rows = expected(build("untied"), samples(3)).numpy()
    with np.load(tmp_path / "rank_0.npz") as found:
        errors = np.linalg.norm(found["call_0"] - rows, axis=1) / np.linalg.norm(rows, axis=1)
        assert not len(found["singly"])
    assert (errors < 12 * 2.0**-8).all()  # a rounding for each of a dozen layers in a row
    assert (errors > 2.0**-14).all()  # far more than in single precision


@pytest.mark.parametrize("variant", ["blocks", "checkpointed"])
def test_a_sharded_llama_of_transformers_streams(tmp_path: Path, variant: str) -> None:
    """Its activations are checkpointed too: layers are then run, and weights gathered, in the backward pass."""
    pytest.importorskip("transformers")
    launch(2, "fully_sharded.py", tmp_path, "llama", variant)
    model = build("llama")
    for rank, count in enumerate((3, 0)):
        with np.load(tmp_path / f"rank_{rank}.npz") as found:
            if count:
                require_close(found["call_0"], expected(model, samples(count, length=7 + rank, seed=rank)))
            require_close(found["call_2"], expected(model, samples(2, length=7 + rank, seed=20 + rank)))
            assert not len(found["singly"])


def test_processes_that_find_other_samples_to_be_coupled_go_on_together(tmp_path: Path) -> None:
    """The second process computes each sample alone from its first batch on, and the first one none."""
    launch(2, "fully_sharded.py", tmp_path, "coupled", "coupled")
    model = build("coupled")
    counts = [[3, 0], [0, 2], [2, 2]]
    for rank in range(2):
        with np.load(tmp_path / f"rank_{rank}.npz") as found:
            for call, shares in enumerate(counts):
                batch = samples(shares[rank], length=7 + rank, seed=10 * call + rank)
                if rank == 1:
                    batch[0][:, 0] = 0
                if shares[rank]:
                    require_close(found[f"call_{call}"], expected(model, batch))
            assert found["singly"].tolist() == (found["parameters"].tolist() if rank else [])


@pytest.mark.parametrize(
    ("ranks", "name", "variant", "proj_type"),
    [
        (1, "untied", "vocabulary", "rademacher"),
        (2, "tied", "vocabulary", "rademacher"),
        (2, "head norms", "width", "normal"),
        (4, "untied", "sequence", "rademacher"),
    ],
)
def test_processes_with_parts_of_layers_add_up_to_the_whole(
    tmp_path: Path, ranks: int, name: str, variant: str, proj_type: str
) -> None:
    """Tables and matrices are split by rows or columns, unevenly where their sizes are; sequences in one case too."""
    require_parts_to_add_up(tmp_path, ranks, name, variant, proj_type)


def test_a_llama_of_transformers_can_be_split_by_layers_parts(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    require_parts_to_add_up(tmp_path, 2, "llama", "vocabulary", "rademacher")


def require_parts_to_add_up(folder: Path, ranks: int, name: str, variant: str, proj_type: str) -> None:
    """Runs tensor_parallel.py and compares what each process returns with the plain loop."""
    launch(ranks, "tensor_parallel.py", folder, name, variant, proj_type)
    model = build(name)
    rows = [expected(model, samples(count, length=8, seed=call), proj_type) for call, count in enumerate((3, 2))]
    for rank in range(ranks):
        with np.load(folder / f"rank_{rank}.npz") as found:
            require_close(found["features"], torch.cat(rows))
            assert found["singly"].tolist() == (["scale"] if name == "tied" else [])


@pytest.mark.parametrize("schedule", ["GPipe", "1F1B"])
def test_the_stages_of_a_pipeline_add_up_to_the_whole(tmp_path: Path, schedule: str) -> None:
    launch(2, "pipeline.py", tmp_path, schedule)
    model = build("untied")
    rows = []
    for seed in range(2):
        tokens = samples(6, length=8, seed=seed)[0]
        rows.append(expected(model, [tokens, torch.ones_like(tokens)]))
    for rank in range(2):
        with np.load(tmp_path / f"rank_{rank}.npz") as found:
            require_close(found["features"], torch.cat(rows))


@pytest.mark.parametrize(
    ("ranks", "name", "variant", "task"),
    [
        (2, "tied", "batches", "causal"),
        (2, "untied", "shards", "function"),
        (2, "untied", "batches", "weighted"),
        (4, "untied", "own rows", "causal"),
    ],
)
def test_a_sharded_model_is_attributed_as_the_whole_one_is(
    tmp_path: Path, ranks: int, name: str, variant: str, task: str
) -> None:
    """Folders are those of the whole model too: features and digests of weights are the same."""
    launch(ranks, "sharded_traker.py", tmp_path, name, variant, task)
    done = subprocess.run(
        [warm.python(), str(PROGRAMS / "sharded_traker.py"), str(tmp_path / "alone"), name, "whole", task],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    model = build(name)
    for model_id in range(2):
        if model_id:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += 0.1
        paths = [path / "results" / f"checkpoint_{model_id}" for path in (tmp_path, tmp_path / "alone")]
        rows = expected(model, samples(11, seed=1), model_id=model_id)
        require_close(np.load(paths[0] / "train" / "features.npy"), rows)
        marks = [json.loads((path / "checkpoint.json").read_text()) for path in paths]
        assert marks[0] == marks[1]
    with np.load(tmp_path / "alone" / "rank_0.npz") as whole:
        for rank in range(ranks):
            with np.load(tmp_path / f"rank_{rank}.npz") as found:
                for key in ("scores", "influence"):
                    np.testing.assert_allclose(found[key], whole[key], rtol=1e-3, atol=1e-4 * np.abs(whole[key]).max())
