"""Flags of `trak-fast lm`: each changes what is made or is refused; a run that is there refuses others than its own."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from libraries import needs
from lm_runs import VOCABULARY, call, read_lines, refusal, save_model, succeed, texts_of, write
from numpy.typing import NDArray

from trak_fast.cli import lm
from trak_fast.lm import run as rooms
from trak_fast.lm.models.folders import Models
from trak_fast.lm.settings import Settings

transformers = needs("transformers")
tokenizers = needs("tokenizers")

LENGTHS = [6, 12, 9, 24, 8]
QUICK = ["--proj-dim", 64, "--tokens", 0]


class Home:
    """A model, documents with several fields, and a finished run of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = save_model(folder / "model")
        texts = texts_of(LENGTHS)
        rows = [
            {"text": text, "other": text[3:], "prompt": text[:5], "question": text[:8], "answer": text[9:],
             "completion": text[6:], "id": f"a{i}", "key": f"b{i}", "label": i % 2}
            for i, text in enumerate(texts)
        ]  # fmt: skip
        self.train = write(folder / "train.jsonl", rows)
        self.query = write(folder / "query.jsonl", rows[:1])
        self.out = folder / "run"
        succeed(*self.words(self.out))

    def words(self, out: Path) -> list[object]:
        """Returns the command of a run with few settings."""
        return [self.folder / "model", "--train", self.train, "--query", self.query, "--out", out, *QUICK]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return Home(tmp_path_factory.mktemp("home"))


FLIPPED: dict[str, tuple[Sequence[object], str]] = {
    "text": (["--text", "other"], "without --text; leave this out"),
    "prompt": (["--prompt", "question"], "without --prompt; leave this out"),
    "completion": (["--completion", "answer"], "without --completion; leave this out"),
    "id": (["--id", "key"], "without --id; leave this out"),
    "label": (["--label", "label"], "without --label; leave this out"),
    "by_file": (["--by-file"], "without --by-file; leave this out"),
    "task": (["--task", "masked_lm"], "without --task; leave this out"),
    "params": (["--params", "*attn*"], "without --params; leave this out"),
    "method": (["--method", "cosine"], "with --method trak; give this"),
    "proj_dim": (["--proj-dim", 128], "with --proj-dim 64; give this"),
    "sketch": (["--sketch", "dense"], "with --sketch auto; give this"),
    "max_tokens": (["--max-tokens", 10], "without --max-tokens; leave this out"),
    "long": (["--long", "split"], "with --long cut; give this"),
    "maskings": (["--maskings", 2], "without --maskings; leave this out"),
    "dtype": (["--dtype", "bfloat16"], "without --dtype; leave this out"),
    "attention": (["--attention", "eager"], "without --attention; leave this out"),
    "seed": (["--seed", 1], "with --seed 0; give this"),
}
"""Settings -> flags that a run refuses which was made without them, and its message."""

FOUND_BY_CONTENT = {"models", "train", "base", "tokenizer"}
"""Settings that are paths, which may change as long as what they lead to does not."""


def test_the_tables_name_every_setting_and_flag() -> None:
    settings = set(Settings.__dataclass_fields__)
    assert settings == set(lm.SETTINGS) == FLIPPED.keys() | FOUND_BY_CONTENT
    parser = argparse.ArgumentParser()
    lm.add(parser.add_subparsers())
    (command,) = next(iter(parser._subparsers._group_actions)).choices.values()  # type: ignore[union-attr]
    flags = {action.dest for action in command._actions} - {"help"}
    machine = {"device", "batch_tokens", "memory"}
    results = {
        "query", "ask", "against", "group", "out", "name", "top", "worst", "tokens", "scores", "select", "clean",
        "overwrite", "dry_run", "json", "limit",
    }  # fmt: skip
    assert flags == settings | machine | results


@pytest.mark.parametrize("name", FLIPPED)
def test_a_run_refuses_each_setting_that_is_not_its_own(name: str, home: Home) -> None:
    flags, message = FLIPPED[name]
    before = (home.out / "run.json").read_bytes()
    expected = f"{home.out}/ was made {message}, another --out, or --overwrite"
    found = refusal(*home.words(home.out)[:-4], *flags)
    assert found == expected
    assert (home.out / "run.json").read_bytes() == before


def test_a_refusal_names_all_settings_that_differ(home: Home, tmp_path: Path) -> None:
    words = [home.folder / "model", "--train", home.train, "--out", tmp_path / "run"]
    succeed(*words, "--proj-dim", 128, "--max-tokens", 20, "--method", "cosine", "--params", "*wpe*", "*attn*")
    assert refusal(*words, "--proj-dim", 64, "--max-tokens", 10) == (
        f"{tmp_path}/run/ was made with --proj-dim 128, --max-tokens 20; give these, another --out, or --overwrite"
    )
    assert refusal(*words, "--seed", 1, "--dtype", "float32", "--params", "all") == (
        f"{tmp_path}/run/ was made with --params '*wpe*' '*attn*', --seed 0 and without --dtype; do so, another --out, "
        "or --overwrite"
    )
    succeed(*words)  # what is not given is the run's own
    succeed(*words, "--proj-dim", 128, "--params", "*wpe*", "*attn*")


def made(out: Path) -> dict[str, Any]:
    """Collects what a run holds that settings have an influence on."""
    arrays: dict[str, NDArray[Any]] = {
        str(path.relative_to(out)): np.load(path) for path in sorted(out.glob("features/*/t*/**/*s.npy"))
    }
    return {
        "manifest": (out / "features" / "manifest.json").read_text(),
        "top": [{key: x for key, x in line.items() if key != "file"} for line in read_lines(out / "top.jsonl")],
        "arrays": {name: array.tobytes() for name, array in arrays.items()},
    }


REFUSED = {
    "by_file": "--by-file is for .txt files, and {train} is none; leave it out",
    "label": "--label must be left out for causal_lm: it is for text_classification",
    "maskings": "--maskings must be left out for causal_lm: it is for masked_lm",
    "task": "{model} is GPT2LMHeadModel, and transformers has no AutoModelForMaskedLM",
}
"""Settings -> the message by which a causal language model and a file of rows refuse them."""


@pytest.mark.parametrize("name", [name for name in FLIPPED if name != "attention"])
def test_each_setting_changes_features_or_results_or_is_refused(name: str, home: Home, tmp_path: Path) -> None:
    words = [*home.words(tmp_path / "run"), "--max-tokens", 20, *FLIPPED[name][0]]
    if name in REFUSED:
        assert refusal(*words).startswith(REFUSED[name].format(train=home.train, model=home.folder / "model"))
        assert not (tmp_path / "run").exists()
        return
    base = home.folder / "twenty"
    if not base.exists():
        succeed(*home.words(base), "--max-tokens", 20)
    succeed(*words)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["settings"][name] is not None
    assert made(tmp_path / "run") != made(base)


def test_attention_is_that_of_the_flag(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []
    build = Models.build

    def watch(models: Models, **options: Any) -> Any:
        model = build(models, **options)
        built.append(model.config._attn_implementation)
        return model

    monkeypatch.setattr(Models, "build", watch)
    succeed(*home.words(tmp_path / "run"), "--attention", "eager")
    assert built == ["eager"]


def test_a_base_without_an_adapter_is_refused(home: Home, tmp_path: Path) -> None:
    model = home.folder / "model"
    assert refusal(*home.words(tmp_path / "run"), "--base", model) == (
        f"{model} is no adapter and needs no base model; leave --base out"
    )


def test_another_tokenizer_gives_other_tokens(home: Home, tmp_path: Path) -> None:
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(reversed(VOCABULARY))}, unk_token="?")
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?").save_pretrained(tmp_path / "other")
    words = [*home.words(tmp_path / "run"), "--tokenizer", tmp_path / "other"]
    succeed(*words)
    assert made(tmp_path / "run")["arrays"] != made(home.out)["arrays"]
    # tokens are not those that the stored rows were made of
    assert refusal(*home.words(home.out), "--tokenizer", tmp_path / "other", "--name", "other") == (
        f"the tokenizer of {tmp_path}/other makes other tokens of {home.train}:1 than those that {home.out}/ was made "
        "of; --tokenizer DIR with the old one, another --out, or --overwrite"
    )


def test_paths_may_change_but_not_what_they_lead_to(home: Home, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(home.out, out)
    shutil.copytree(home.folder / "model", tmp_path / "moved")
    train = write(tmp_path / "moved.jsonl", read_lines(home.train))
    succeed(tmp_path / "moved", "--train", train, "--query", home.query, "--out", out)
    settings = json.loads((out / "run.json").read_text())["settings"]
    assert settings["models"] == [str(tmp_path / "moved")]
    assert settings["train"] == [str(train)]
    assert made(out)["arrays"] == made(home.out)["arrays"]


def test_flags_of_results_are_refused_where_they_have_no_influence(home: Home) -> None:
    for flags, needed in [
        (["--against", home.query], "against"), (["--select", "5%"], "select"), (["--name", "x"], "name"),
        (["--scores"], "scores"),
    ]:  # fmt: skip
        assert refusal("--out", home.out, *flags) == f"--query or --ask must be given with --{needed}"
    assert refusal("--out", home.out, "--ask", "ba be", "--group", "key") == (
        "--query must be given with --group, which is a field of its files"
    )
    assert refusal("--out", home.out, "--ask", "ba be", "--query", home.query).startswith("--ask must be one question")
    assert refusal("--out", home.out, "--ask", "a", "b", "c").endswith("put each in quotation marks")
    assert refusal("--out", home.out, "--ask", "ba be", "--name", "features").startswith("--name must be letters")
    assert refusal("--out", home.out, "--ask", "ba be", "--name", "../x").startswith("--name must be letters")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "tracin"], "--method must be one of 'trak', 'cosine', 'dot', 'less', not 'tracin'"),
        (["--proj-dim", "many"], "--proj-dim must be an integer, not str ('many')"),
        (["--proj-dim", 0], "--proj-dim must be in [1, 2**24], not 0"),
        (["--max-tokens", 1], "--max-tokens must be in [2, 2**31], not 1"),
        (["--max-tokens", 25], "--max-tokens must be at most 24, which the model takes, not 25"),
        (["--top", 0], "--top must be in [1, 1000000], not 0"),
        (["--worst", -1], "--worst must be in [0, 1000000], not -1"),
        (["--tokens", "x"], "--tokens must be an integer, not str ('x')"),
        (["--memory", "much"], "--memory must be a number of GB above 0, not 'much'"),
        (["--memory", 0], "--memory must be a number of GB above 0, not 0"),
        (["--batch-tokens", 0], "--batch-tokens must be in [1, 2**40], not 0"),
        (["--device", "tpu"], "--device must be cpu, cuda or cuda:1, for example, not 'tpu'"),
        (["--device", "meta"], "--device must be cpu or cuda, not 'meta'"),
        (["--limit", 0], "--limit must be 1 or more, not 0"),
        (["--select", "0%"], "--select must be a share such as 5% or a number up to 5, not '0%'"),
        (["--select", "6"], "--select must be a share such as 5% or a number up to 5, not '6'"),
        (["--select", "half"], "--select must be a share such as 5% or a number up to 5, not 'half'"),
        (["--params", "head.*"], "--params: the model has no parameter head.*; it has transformer.wte.weight"),
        (["--attention", "fast"], "--attention must be one of 'eager', 'sdpa', "),
        (["--sketch", "two_sided", "--method", "less"], "--sketch must be auto, dense or sjlt with --method less, "),
    ],
)
def test_values_out_of_range_are_refused_before_anything_is_stored(
    flags: Sequence[object], message: str, home: Home, tmp_path: Path
) -> None:
    assert refusal(*home.words(tmp_path / "run")[:-4], *flags).startswith(message)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The shapes of the batches of training documents that are computed."""
    shapes: list[tuple[int, int]] = []
    featurize = rooms.TRAKer.featurize

    def watch(traker: rooms.TRAKer, batch: dict[str, torch.Tensor], **options: Any) -> None:
        shapes.append(tuple(batch["input_ids"].shape))  # type: ignore[arg-type]
        featurize(traker, batch, **options)

    monkeypatch.setattr(rooms.TRAKer, "featurize", watch)
    return shapes


def test_batches_hold_as_many_tokens_as_the_flag_says_and_change_no_scores(
    home: Home, tmp_path: Path, batches: list[tuple[int, int]]
) -> None:
    for tokens in (30, 1):
        succeed(*home.words(tmp_path / f"{tokens}"), "--batch-tokens", tokens, "--scores")
    assert batches == [(1, 24), (2, 12), (2, 8), (1, 24), (1, 12), (1, 9), (1, 8), (1, 6)]
    scores = [np.load(tmp_path / name / "scores.npy") for name in ("30", "1")]
    np.testing.assert_allclose(scores[0], scores[1], rtol=0, atol=1e-5)


def test_memory_is_the_budget_of_batches(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    budgets: list[int] = []
    make = rooms.TRAKer.__init__

    def watch(traker: rooms.TRAKer, *words: Any, **options: Any) -> None:
        budgets.append(options["memory_budget"])
        make(traker, *words, **options)

    monkeypatch.setattr(rooms.TRAKer, "__init__", watch)
    succeed(*home.words(tmp_path / "run"), "--memory", 0.5)
    assert budgets == [500_000_000]


def test_an_older_run_is_deleted_only_once_the_new_one_is_accepted(home: Home, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(home.out, out)
    (out / "mine.txt").write_text("stays")
    before = made(out)
    assert refusal("--out", out, "--overwrite").startswith("MODEL must be given, a folder of save_pretrained")
    assert refusal(tmp_path / "none", "--train", home.train, "--out", out, "--overwrite").endswith(
        "save_pretrained first"
    )
    assert refusal(*home.words(out), "--overwrite", "--max-tokens", 99).startswith("--max-tokens must be at most 24")
    assert refusal(*home.words(out), "--overwrite", "--params", "none").startswith("--params: the model has no")
    assert refusal(*home.words(out), "--overwrite", "--sketch", "sjlt", "--proj-dim", 100).startswith(
        "proj_dim must be"
    )
    empty = write(tmp_path / "empty.jsonl", ["ba", ""])
    assert refusal(*home.words(out), "--overwrite", "--train", empty) == (
        "--train must have a document with a scored token, and none of them has one"
    )
    succeed(*home.words(out), "--overwrite", "--dry-run", "--method", "cosine")
    assert made(out) == before
    succeed(*home.words(out), "--overwrite", "--method", "cosine")
    assert json.loads((out / "run.json").read_text())["settings"]["method"] == "cosine"
    assert (out / "mine.txt").read_text() == "stays"


def test_a_run_within_the_folder_of_an_older_one_stays(home: Home, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(home.out, out)
    shutil.copytree(home.out, out / "other")
    shutil.copytree(home.out, out / "answers")
    (out / "answers" / "run.json").unlink()
    before = made(out / "other")
    succeed(*home.words(out), "--overwrite")
    assert made(out / "other") == before
    assert not (out / "answers" / "top.jsonl").exists()


def test_a_folder_of_other_files_is_not_overwritten(home: Home, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("stays")
    assert refusal(*home.words(tmp_path), "--overwrite") == (
        f"--overwrite must be given with a run's folder, and {tmp_path} has no run.json"
    )


def test_a_run_of_another_version_is_refused(home: Home, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"format": 99, "settings": {}}))
    expected = f"{tmp_path}/run.json was written by another version; another --out, or --overwrite"
    assert refusal("--out", tmp_path) == expected
    assert call(*home.words(tmp_path), "--overwrite").status == 0
