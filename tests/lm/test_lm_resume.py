"""Runs of `trak-fast lm` that are stopped, go on, grow, or meet files that are no longer what they were."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from libraries import needs
from lm_runs import call, read_lines, refusal, save_model, scores_of, succeed, texts_of, write

from trak_fast.lm import run as rooms

needs("transformers")

LENGTHS = [6, 12, 9, 20, 8, 7, 11, 10, 5, 9]


class Home:
    """Two checkpoints, documents, queries, and the scores of a run that nothing stopped."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.models = [folder / "first", folder / "second"]
        for seed, path in enumerate(self.models):
            save_model(path, seed=seed)
        self.texts = texts_of(LENGTHS)
        self.train = write(folder / "train.jsonl", self.texts)
        self.query = write(folder / "query.jsonl", texts_of([6, 7], seed=1))
        succeed(*self.words(folder / "whole"))
        self.scores = scores_of(folder / "whole")

    def words(self, out: Path) -> list[object]:
        """Returns the command of a run whose batches have two or three documents."""
        return [
            *self.models, "--train", self.train, "--query", self.query, "--out", out, "--proj-dim", 64,
            "--batch-tokens", 24, "--scores", "--tokens", 0,
        ]  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return Home(tmp_path_factory.mktemp("home"))


@pytest.mark.parametrize(("batches", "stored"), [(2, "3 and 0"), (9, "10 and 7")])
def test_an_interrupted_run_says_how_far_it_is_and_goes_on_to_the_same_scores(
    batches: int, stored: str, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    featurize = rooms.TRAKer.featurize
    left = batches

    def interrupt(traker: rooms.TRAKer, batch: dict[str, torch.Tensor], **options: Any) -> None:
        nonlocal left
        if not left:
            raise KeyboardInterrupt
        left -= 1
        featurize(traker, batch, **options)

    with monkeypatch.context() as patch:
        patch.setattr(rooms.TRAKer, "featurize", interrupt)
        result = call(*home.words(out))
    assert result.status == 130
    told = f"{stored} of 10 documents at the checkpoints are"
    assert result.err == f"trak-fast: stopped; {told} stored. The same command goes on from here.\n"
    assert not (out / "top.jsonl").exists()
    result = succeed(*home.words(out))
    assert f"train     {told} there" in result.out
    assert scores_of(out).tobytes() == home.scores.tobytes()
    assert read_lines(out / "top.jsonl") == read_lines(home.folder / "whole" / "top.jsonl")


KILLED = """
import os, signal, sys
from trak_fast.cli import main
from trak_fast.lm import run as rooms

featurize = rooms.TRAKer.featurize
calls = []

def kill(traker, batch, **options):
    calls.append(batch)
    if len(calls) == 3:
        print("working", flush=True)
    if len(calls) > 3:
        signal.pause()
    featurize(traker, batch, **options)

rooms.TRAKer.featurize = kill
main(sys.argv[1:])
"""
"""A program that stores two batches, and then waits in its fourth."""


def test_a_killed_run_goes_on_to_the_same_scores(home: Home, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-c", KILLED, "lm", *map(str, home.words(out))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        while process.stdout.readline() not in ("working\n", ""):
            pass
        time.sleep(0.2)  # in the third batch, or after it
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    done = np.load(out / "features" / "checkpoint_0" / "train" / "done.npy")
    assert 0 < done.sum() < len(LENGTHS)
    succeed(*home.words(out))
    assert scores_of(out).tobytes() == home.scores.tobytes()


def test_rows_that_another_process_writes_are_left_to_it_with_a_sentence(home: Home, tmp_path: Path) -> None:
    words = home.words(tmp_path / "run")
    succeed(*words, "--limit", 5)
    holder = (
        "import sys; from pathlib import Path; from trak_fast.store.locks import WHOLE, lock_file;"
        "locks = [lock_file(path) for path in Path(sys.argv[1]).rglob('*lock*')];"
        "print(all([lock.acquire(0, WHOLE + 1) for lock in locks]) and len(locks) > 0, flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", holder, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "True"
        result = call(*words)
        process.communicate()
    assert result.status == 1
    assert "by another process" in result.err.splitlines()[-1]
    assert result.err.splitlines()[-1].endswith("wait until it has ended")
    succeed(*words)
    assert scores_of(tmp_path / "run").shape == home.scores.shape


def test_a_finished_run_computes_nothing_again(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    shutil.copytree(home.folder / "whole", out)
    (out / "scores.npy").unlink()

    def refuse(*words: Any, **options: Any) -> None:
        raise AssertionError("nothing is to be computed")

    for name in ("featurize", "score", "load_checkpoint"):
        monkeypatch.setattr(rooms.TRAKer, name, refuse)
    succeed("--out", out, "--query", home.query, "--scores", "--tokens", 0)
    assert scores_of(out).tobytes() == home.scores.tobytes()


def copied(home: Home, folder: Path) -> Path:
    """Copies the finished run."""
    shutil.copytree(home.folder / "whole", folder / "run")
    return folder / "run"


def test_changed_documents_are_named_by_row(home: Home, tmp_path: Path) -> None:
    out = copied(home, tmp_path)
    texts = list(home.texts)
    texts[6] += " ba"
    train = write(tmp_path / "train.jsonl", texts)
    words = [*home.models, "--train", train, "--query", home.query, "--out", out]
    expected = f"{train} has changed since {out}/ was made (row 7{{}}); --overwrite, or the old file"
    assert refusal(*words) == expected.format("")
    texts[8] = "ba be"
    write(train, texts)
    assert refusal(*words) == expected.format(", and 1 more")
    write(train, home.texts[:8])
    assert refusal(*words) == (
        f"{train} ends after 8 documents, by itself or by --limit, and {out}/ was made of 10; --overwrite, or all of "
        "these"
    )
    write(train, home.texts)
    succeed(*words)


def test_questions_alone_notice_documents_that_changed(home: Home, tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", home.texts)
    out = tmp_path / "run"
    succeed(home.models[0], "--train", train, "--out", out, "--proj-dim", 64)
    write(train, [*home.texts[:3], "ba be", *home.texts[4:]])
    assert refusal("--out", out, "--ask", "ba be").startswith(f"{train} has changed since {out}/ was made (row 4)")
    write(train, [*home.texts, "ba be"])  # more documents count once --train is given
    result = json.loads(succeed("--out", out, "--ask", "ba be", "--top", 99, "--json").out)
    assert len(result["queries"][0]["top"]) == len(home.texts)


@pytest.mark.parametrize("separate", [False, True])
def test_documents_that_were_appended_are_added(separate: bool, home: Home, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train = write(tmp_path / "train.jsonl", home.texts[:6])
    rest = ["--query", home.query, "--out", out, "--scores", "--tokens", 0]
    way = ["--method", "cosine", "--sketch", "dense", "--proj-dim", 64]
    succeed(*home.models, "--train", train, *rest, *way)
    before = scores_of(out)
    files = [train]
    if separate:
        files.append(write(tmp_path / "more.jsonl", home.texts[6:]))
    else:
        write(train, home.texts)
    result = succeed(*home.models, "--train", *files, *rest)
    assert "train     6 and 6 of 10 documents at the checkpoints are there" in result.out
    whole = tmp_path / "whole"
    succeed(*home.models, "--train", home.train, "--query", home.query, "--out", whole, "--scores", "--tokens", 0, *way)
    np.testing.assert_allclose(scores_of(out), scores_of(whole), rtol=0, atol=1e-6)
    np.testing.assert_allclose(scores_of(out)[:6], before, rtol=0, atol=1e-6)
    result = succeed("--out", out, *rest[:2], "--scores", "--tokens", 0)  # all files from run.json
    assert len(scores_of(out)) == 10


def test_a_limit_is_the_beginning_of_a_run_of_all_documents(home: Home, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = [home.models[0], "--train", home.train, "--query", home.query, "--out", out, "--scores", "--proj-dim", 64]
    assert "train     " + str(home.train) + ' ("text"): 4 documents, 47 tokens' in succeed(*words, "--limit", 4).out
    assert len(scores_of(out)) == 4
    assert refusal(*words, "--limit", 3).endswith(
        f"ends after 3 documents, by itself or by --limit, and {out}/ was made of 4; --overwrite, or all of these"
    )
    succeed("--out", out, "--query", home.query, "--scores")
    assert len(scores_of(out)) == 4
    succeed(*words)
    assert len(scores_of(out)) == 10


def test_moved_checkpoints_are_accepted_and_others_are_refused(home: Home, tmp_path: Path) -> None:
    out = copied(home, tmp_path)
    moved = [tmp_path / "a", tmp_path / "b"]
    for old, new in zip(home.models, moved, strict=True):
        shutil.copytree(old, new)
    questions = ["--query", home.query, "--out", out, "--scores", "--tokens", 0]
    succeed(*moved, *questions)
    assert scores_of(out).tobytes() == home.scores.tobytes()
    other = tmp_path / "other"
    save_model(other, seed=2)
    before = (out / "run.json").read_bytes()
    expected = (
        f"{other} has other weights, or another optimizer.pt, than {out}/ was made with; give these, another --out, or "
        "--overwrite"
    )
    assert refusal(moved[0], other, *questions) == expected
    assert refusal(moved[0], other, "--ask", "ba be", "--out", out) == expected
    assert (out / "run.json").read_bytes() == before
    succeed(*questions)
    message = refusal(moved[0], *questions)
    assert message == (f"{out}/ was made with 2 checkpoints, not 1; give these, another --out, or --overwrite")
    shutil.rmtree(moved[1])
    shutil.copytree(other, moved[1])  # the same path with other weights
    expected = expected.replace(str(other), str(moved[1]))
    assert refusal("--out", out, "--ask", "ba be") == expected
    assert refusal("--out", out, "--query", home.query) == expected


def test_the_same_path_with_other_moments_is_refused(home: Home, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        torch.save(optimizer.state_dict(), tmp_path / "model" / "optimizer.pt")

    step()
    out = tmp_path / "run"
    succeed(
        tmp_path / "model", "--train", home.train, "--query", home.query, "--out", out, "--method", "less",
        "--proj-dim", 64,
    )  # fmt: skip
    step()
    assert "optimizer" in refusal("--out", out, "--ask", "ba be")
    assert "optimizer" in refusal("--out", out, "--query", home.query)  # of which all is stored
    (tmp_path / "model" / "optimizer.pt").write_bytes(b"junk")
    assert "weights_only=True" in refusal("--out", out, "--ask", "ba be")


def test_weights_that_were_replaced_are_noticed_where_nothing_is_left_to_compute(home: Home, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(home.models[0], model)
    out = tmp_path / "run"
    words = ["--query", home.query, "--out", out, "--tokens", 0]
    succeed(model, "--train", home.train, *words, "--proj-dim", 64)
    weights = model / "model.safetensors"
    os.utime(weights, ns=(0, 0))  # the same weights in a newer or older file
    succeed(*words)
    shutil.copyfile(home.models[1] / "model.safetensors", weights)
    expected = f"{model} has other weights"
    assert refusal(*words).startswith(expected)
    assert refusal("--out", out, "--clean").startswith(expected)
