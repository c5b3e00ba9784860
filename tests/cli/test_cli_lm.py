"""The command `trak-fast lm`: its lines, messages, questions and names, and its predictions."""

from __future__ import annotations

import csv
import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from libraries import needs
from lm_runs import VOCABULARY, call, page_data, read_lines, refusal, save_model, scores_of, succeed, texts_of, write

from trak_fast.cli import main
from trak_fast.features.tokens import NoTokensError
from trak_fast.lm import run as rooms

needs("transformers")

LENGTHS = [6, 12, 9, 20, 8, 7, 11, 10]
QUICK = ["--proj-dim", 64]


class Home:
    """A model, documents with ids, questions, and a finished run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = folder / "model"
        save_model(self.model)
        self.texts = texts_of(LENGTHS)
        self.train = write(
            folder / "train.jsonl", [{"id": f"doc-{i}", "text": text} for i, text in enumerate(self.texts)]
        )
        rows = [{"prompt": text[:8], "completion": text[8:]} for text in [self.texts[4], *texts_of([6, 8, 9], seed=1)]]
        self.query = write(folder / "query.jsonl", rows)
        self.out = folder / "run"
        self.result = succeed(*self.words(self.out))

    def words(self, out: Path) -> list[object]:
        """Returns the command of a run with the usual settings but a small projection."""
        return [self.model, "--train", self.train, "--query", self.query, "--out", out, *QUICK]

    def copy(self, folder: Path) -> Path:
        """Copies the finished run."""
        shutil.copytree(self.out, folder / "run")
        return folder / "run"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return Home(tmp_path_factory.mktemp("home"))


def test_the_command_prints_what_it_reads_does_and_found(home: Home) -> None:
    assert home.result.err == ""
    lines = home.result.out.splitlines()
    assert lines[:3] == [
        f"model     {home.model}: GPT2LMHeadModel, 7,952 parameters, float32 on cpu; task causal_lm",
        f'train     {home.train} ("text"): 8 documents, 83 tokens',
        f'query     {home.query} ("prompt", "completion"): 4 questions, 31 tokens',
    ]
    assert lines[3].startswith("gradients 7,120 of 7,952 parameters, sparse projection to k = 64 (in K-FAC's metric)")
    assert lines[4].startswith("scores    cosines of gradients in K-FAC's metric; ±0.12 by projection")
    top = read_lines(home.out / "top.jsonl")
    for line, entry in zip(lines[5:8], top, strict=False):
        best = "  ".join(f"{x['score']:+.3f} {x['id']}" for x in entry["top"][:3])
        assert line == f'          Q{entry["query"]} "{entry["prompt"]}{entry["completion"]}"  {best}'
    assert lines[8] == "          (3 of 4 shown)"
    assert lines[9] == (
        f"page      {home.out}/index.html      top 20 of each: {home.out}/top.jsonl, {home.out}/top.csv"
        f"      settings: {home.out}/run.json"
    )
    assert len(lines) == 10
    assert not (home.out / "scores.npy").exists()


def test_files_hold_texts_ids_files_and_rows(home: Home) -> None:
    lines = read_lines(home.out / "top.jsonl")
    assert len(lines) == 4
    for number, line in enumerate(lines):
        assert line["query"] == number
        assert (len(line["top"]), len(line["worst"])) == (8, 5)
        assert [entry["rank"] for entry in line["top"]] == list(range(1, 9))
        for entry in line["top"] + line["worst"]:
            row = entry["row"]
            assert (entry["id"], entry["file"], entry["text"]) == (f"doc-{row}", str(home.train), home.texts[row])
    with (home.out / "top.csv").open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [(entry["query"], entry["rank"], entry["row"]) for entry in table] == [
        (str(line["query"]), str(sign * entry["rank"]), str(entry["row"]))
        for line in lines
        for sign, key in ((1, "top"), (-1, "worst"))
        for entry in line[key]
    ]
    facts = json.loads((home.out / "run.json").read_text())["facts"]
    assert (facts["documents"], facts["proj_dim"]) == (8, 64)


def test_tokens_of_the_best_documents_add_up_to_their_scores(home: Home) -> None:
    queries = page_data(home.out / "index.html")["queries"]
    for query in queries:
        assert ["tokens" in card for card in query["top"]] == [True] * 3 + [False] * 5
        for card in query["top"][:3]:
            parts = [part for *_, part in card["tokens"]]
            # parts have three digits
            assert sum(parts) == pytest.approx(card["score"], abs=1e-3 * sum(map(abs, parts)) + 1e-6)


def test_top_worst_and_tokens_count_documents(home: Home, tmp_path: Path) -> None:
    out = home.copy(tmp_path)
    succeed("--out", out, "--query", home.query, "--top", 4, "--worst", 0, "--tokens", 1)
    for line, query in zip(read_lines(out / "top.jsonl"), page_data(out / "index.html")["queries"], strict=True):
        assert (len(line["top"]), len(line["worst"])) == (4, 0)
        assert [len(query["top"]), len(query["worst"])] == [4, 0]
        assert sum("tokens" in card for card in query["top"]) == 1


def test_other_questions_need_neither_model_nor_documents(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = home.copy(tmp_path)
    before = (out / "top.jsonl").read_bytes()
    more = write(tmp_path / "more.jsonl", [home.texts[6], home.texts[1]])
    calls: list[str] = []
    for name in ("featurize", "score"):
        monkeypatch.setattr(rooms.TRAKer, name, counted(calls, name))
    monkeypatch.chdir(tmp_path)
    result = succeed("--out", "run", "--query", "more.jsonl", "--name", "more", "--scores")
    assert calls == ["score"]
    assert "train  " not in result.out
    assert result.out.splitlines()[-1] == (
        "page      run/more/index.html      top 20 of each: run/more/top.jsonl, run/more/top.csv"
        "      settings: run/run.json      all scores: run/more/scores.npy"
    )
    assert scores_of(out / "more").argmax(0).tolist() == [6, 1]
    assert [line["top"][0]["row"] for line in read_lines(out / "more" / "top.jsonl")] == [6, 1]
    assert (out / "top.jsonl").read_bytes() == before
    again = succeed("--out", "run", "--query", more, "--name", "more")
    assert calls == ["score"]  # the same questions are not computed again
    assert not (out / "more" / "scores.npy").exists()
    assert again.out.splitlines()[-2] == result.out.splitlines()[-2]
    write(more, [home.texts[2]])
    succeed("--out", "run", "--query", more, "--name", "more")
    assert calls == ["score", "score"]
    assert [line["top"][0]["row"] for line in read_lines(out / "more" / "top.jsonl")] == [2]


def counted(calls: list[str], name: str) -> Any:
    """Returns a method of TRAKer that lists its calls."""
    method = getattr(rooms.TRAKer, name)

    def call_it(traker: rooms.TRAKer, *words: Any, **options: Any) -> Any:
        calls.append(name)
        return method(traker, *words, **options)

    return call_it


def test_a_text_is_asked_alone_or_as_prompt_and_completion(home: Home, tmp_path: Path) -> None:
    out = home.copy(tmp_path)
    result = succeed("--out", out, "--ask", home.texts[3], "--top", 2)
    lines = result.out.splitlines()
    entry = read_lines(out / "ask" / "top.jsonl")[0]
    assert (entry["text"], entry["top"][0]["row"]) == (home.texts[3], 3)
    assert lines[-3] == f"            1  {entry['top'][0]['score']:+.4f}  doc-3  {home.texts[3]}"
    assert lines[-2].startswith("            2  ")
    prompt, completion = home.texts[6][:8], home.texts[6][8:]
    succeed("--out", out, "--ask", prompt, completion)
    entry = read_lines(out / "ask" / "top.jsonl")[0]
    assert (entry["prompt"], entry["completion"]) == (prompt, completion)
    query = page_data(out / "ask" / "index.html")["queries"][0]
    assert (query["prompt"], query["completion"], query["text"]) == (prompt, completion, None)
    # the same question from a file has the same scores
    file = write(tmp_path / "file.jsonl", [{"prompt": prompt, "completion": completion}])
    succeed("--out", out, "--query", file, "--name", "file")
    assert read_lines(out / "file" / "top.jsonl")[0]["top"] == entry["top"]


def test_questions_may_have_other_fields_than_the_documents(home: Home, tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", [{"body": text, "text": "ba"} for text in home.texts])
    words = ["--train", train, "--text", "body", "--out", tmp_path / "run", *QUICK]
    succeed(home.model, *words, "--query", write(tmp_path / "query.jsonl", [{"body": home.texts[2], "text": "ba"}]))
    assert read_lines(tmp_path / "run" / "top.jsonl")[0]["text"] == home.texts[2]
    succeed("--out", tmp_path / "run", "--query", home.query)
    assert [line["prompt"] for line in read_lines(tmp_path / "run" / "top.jsonl")] == [
        line["prompt"] for line in read_lines(home.query)
    ]
    lacking = write(tmp_path / "lacking.jsonl", [{"title": "ba be"}])
    assert refusal("--out", tmp_path / "run", "--query", lacking) == (
        f'{lacking}:1 has no field "text", only "title"; --text title'
    )


def test_json_is_printed_alone(home: Home, tmp_path: Path) -> None:
    out = home.copy(tmp_path)
    found = json.loads(succeed("--out", out, "--query", home.query, "--clean", "--json").out)
    assert found["page"] == f"{out}/index.html"
    assert found["queries"] == read_lines(out / "top.jsonl")
    assert found["clean"] == read_lines(out / "clean.jsonl")
    assert json.loads(succeed("--out", out, "--json").out) == {"documents": 8}
    found = json.loads(succeed(*home.words(tmp_path / "new"), "--dry-run", "--json").out)
    assert found.keys() == {"seconds", "memory_bytes", "disk_bytes"}
    assert min(found[key]["peak" if key == "memory_bytes" else "total"] for key in found) > 0


def test_a_run_without_questions_says_how_to_go_on(home: Home, tmp_path: Path) -> None:
    result = succeed(home.model, "--train", home.train, "--out", tmp_path, *QUICK)
    assert result.out.splitlines()[-1] == (
        f"features  all stored; --out {tmp_path} with --query, --ask or --clean goes on"
    )
    assert not (tmp_path / "top.jsonl").exists()


def test_a_dry_run_shows_an_example_and_stores_nothing(home: Home, tmp_path: Path) -> None:
    lines = succeed(*home.words(tmp_path / "run"), "--dry-run").out.splitlines()
    assert list(tmp_path.iterdir()) == []
    example = next(line for line in lines if line.startswith("example   "))
    prompt, completion = home.texts[4][:8].split(), home.texts[4][8:].split()
    assert example.removeprefix("example   ") == f"{' '.join(prompt)}⟦{' '.join(completion)}⟧"
    assert lines[-1].startswith("needs     ")
    seconds, memory, disk = re.fullmatch(
        r"needs     (.*) \(.*\), (.*) of memory, (.*) of disk in .*/run/", lines[-1]
    ).groups()  # type: ignore[union-attr]
    assert not seconds.startswith("0 ")
    assert float(memory.split()[0]) > 0
    assert float(disk.split()[0]) > 0
    out = home.copy(tmp_path)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    succeed("--out", out, "--query", home.query, "--dry-run")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("way", [[], ["--method", "cosine"], ["--sketch", "dense"]])
def test_the_disk_that_is_predicted_is_that_of_the_folder(way: list[object], home: Home, tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", texts_of(np.random.default_rng(3).integers(4, 20, 60).tolist()))
    words = [home.model, "--train", train, "--query", home.query, "--out", tmp_path / "run", *way]
    predicted = json.loads(succeed(*words, "--dry-run", "--json").out)["disk_bytes"]["total"]
    succeed(*words)
    size = sum(path.stat().st_size for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert predicted == pytest.approx(size, rel=0.25)


def test_questions_without_a_scored_token_are_left_out(home: Home, tmp_path: Path) -> None:
    out = home.copy(tmp_path)
    rows = [
        {"prompt": "ba be", "completion": ""}, {"prompt": "", "completion": "ba be bi"},
        {"prompt": "ba", "completion": ""}, {"prompt": "", "completion": "ba"},
    ]  # fmt: skip
    query = write(tmp_path / "query.jsonl", rows)
    result = succeed("--out", out, "--query", query)
    assert result.err == (
        "trak-fast: warning: 3 queries have no scored token (empty completion): 0, 2, 3; they are left out\n"
    )
    assert [line["query"] for line in read_lines(out / "top.jsonl")] == [1]
    write(query, rows[:2])
    assert succeed("--out", out, "--query", query).err == (
        "trak-fast: warning: 1 query has no scored token (empty completion): 0; it is left out\n"
    )
    write(query, rows[:1])
    result = call("--out", out, "--query", query)
    assert result.status == 2
    assert result.err.splitlines()[-1] == (
        "trak-fast: error: --query must have a question with a scored token, and none of them has one"
    )
    result = call("--out", out, "--query", home.query, "--against", query)
    assert result.err.splitlines()[-1] == (
        "trak-fast: error: --against must have a question with a scored token, and none of them has one"
    )


def test_warnings_of_the_package_are_the_commands(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    featurize = rooms.TRAKer.featurize
    logger = logging.getLogger("trak_fast")

    def warn(traker: rooms.TRAKer, *words: Any, **options: Any) -> None:
        logger.info("nothing to see")
        logger.warning("gradients of %s are computed sample by sample from here on", "experts (MixtralExperts)")
        featurize(traker, *words, **options)

    monkeypatch.setattr(rooms.TRAKer, "featurize", warn)
    result = succeed(*home.words(tmp_path / "run"))
    assert result.err == (
        "trak-fast: warning: gradients of experts (MixtralExperts) are computed sample by sample from here on\n"
    )
    assert not logger.handlers
    assert logger.propagate


def test_tokens_that_cannot_be_told_apart_are_not_coloured(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = home.copy(tmp_path)

    def refuse(*words: Any, **options: Any) -> None:
        raise NoTokensError("no sums over tokens")

    monkeypatch.setattr(rooms.TRAKer, "token_scores", refuse)
    result = succeed("--out", out, "--query", home.query)
    assert result.err == (
        "trak-fast: warning: tokens are not coloured: the parameters' gradients are no sums over tokens\n"
    )
    assert "tokens" not in page_data(out / "index.html")["queries"][0]["top"][0]
    assert read_lines(out / "top.jsonl") == read_lines(home.out / "top.jsonl")


def test_files_of_folders_that_are_not_read_are_named(home: Home, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    shutil.copy(home.train, folder / "a.jsonl")
    (folder / "notes.md").write_text("no document")
    result = succeed(home.model, "--train", folder, "--out", tmp_path / "run", *QUICK)
    assert result.err == (f"trak-fast: warning: 1 file is of no kind that is read, and left out: {folder}/notes.md\n")


def test_what_is_wrong_with_files_and_folders_is_said_before_a_model_runs(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(home.model, tmp_path / "model")
    write(tmp_path / "q.jsonl", ["ba be"])
    rest = ["--query", "q.jsonl", "--out", "run"]

    def refused(rows: list[Any] | str, *flags: object) -> str:
        if isinstance(rows, str):
            (tmp_path / "wiki.jsonl").write_text(rows)
        else:
            write(tmp_path / "wiki.jsonl", rows)
        return refusal("model", "--train", "wiki.jsonl", *rest, *flags)

    row = {"title": "ba", "body": "ba be bi"}
    assert refused([row]) == 'wiki.jsonl:1 has no field "text", only "title", "body"; --text body'
    good = json.dumps({"text": "ba be"}) + "\n"
    assert refused(good * 8 + '{"text": "ba" "id": 3}\n') == (
        "wiki.jsonl:9 is not JSON (Expecting ',' delimiter: column 15)"
    )
    assert refusal("gpt2", "--train", "wiki.jsonl", *rest) == (
        "gpt2 is no folder here, and nothing is downloaded: save it with save_pretrained first"
    )
    assert refusal("--train", "wiki.jsonl", *rest) == (
        "MODEL must be given, a folder of save_pretrained, or several: run/ has no run yet"
    )
    assert (
        refusal("model", *rest)
        == "--train must be given, a file of training documents, or several: run/ has no run yet"
    )
    assert call("model", "--train", "none.jsonl", *rest).err == "trak-fast: error: none.jsonl does not exist\n"
    bare = tmp_path / "out" / "checkpoint-500"
    shutil.copytree(home.model, bare)
    for file in bare.glob("token*"):
        shutil.move(file, tmp_path / "out")
    assert refusal("out/checkpoint-500", "--train", "wiki.jsonl", *rest) == (
        "out/checkpoint-500 has no tokenizer; --tokenizer DIR (out/ has one)"
    )
    succeed("out/checkpoint-500", "--train", "q.jsonl", "--tokenizer", "out", "--out", "two", *QUICK)
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_of_another_model_is_refused(home: Home, tmp_path: Path) -> None:
    save_model(tmp_path / "small", vocab_size=30)
    train = write(tmp_path / "train.jsonl", ["ba be", f"ba {VOCABULARY[50]}"])
    words = [tmp_path / "small", "--train", train, "--out", tmp_path / "run"]
    assert refusal(*words) == (f"token 50 of {train}:2 is beyond the model's 30: the tokenizer is another model's")


def test_a_missing_package_is_a_failure_of_the_machine(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*words: Any, **options: Any) -> Any:
        raise ModuleNotFoundError("No module named 'peft'", name="peft")

    monkeypatch.setattr(rooms, "find_models", fail)
    result = call(*home.words(tmp_path / "run"))
    assert result.status == 1
    assert result.err == "trak-fast: error: trak-fast lm needs peft, which is not installed: pip install peft\n"


def test_fields_are_those_of_documents_or_of_questions(home: Home, tmp_path: Path) -> None:
    """A flag may name a field that either lacks, but not one that both lack."""
    texts = [row["text"] for row in read_lines(home.train)]
    questions = read_lines(home.query)
    train = write(tmp_path / "odd.jsonl", [{"uid": f"u{i}", "body": text} for i, text in enumerate(texts)])
    asked = [{"question": x["prompt"], "answer": x["completion"]} for x in questions]
    query = write(tmp_path / "asked.jsonl", asked)
    names = ["--text", "body", "--id", "uid", "--prompt", "question", "--completion", "answer"]
    found = tmp_path / "found"
    succeed(home.model, "--train", train, "--query", query, *names, "--out", found, "--proj-dim", 64)
    assert [line["prompt"] for line in read_lines(found / "top.jsonl")] == [x["prompt"] for x in questions]
    assert {entry["id"] for line in read_lines(found / "top.jsonl") for entry in line["top"]} <= {
        f"u{i}" for i in range(99)
    }
    scores = [[entry["score"] for entry in line["top"]] for line in read_lines(found / "top.jsonl")]
    assert scores == [[entry["score"] for entry in line["top"]] for line in read_lines(home.out / "top.jsonl")]
    succeed("--query", query, "--prompt", "question", "--completion", "answer", "--out", found)
    assert refusal("--query", query, "--prompt", "none", "--completion", "answer", "--out", found) == (
        f'no row of {query} has the field "none" of --prompt, only "question", "answer"'
    )
    assert refusal(home.model, "--train", train, "--text", "bodi", "--out", tmp_path / "typo") == (
        f'no row of {train} has the field "bodi" of --text, only "uid", "body"'
    )
    message = refusal(home.model, "--train", train, "--text", "body", "--query", query, "--out", tmp_path / "other")
    assert message.endswith("--text question, or --prompt question --completion answer")


def test_flags_that_are_misspelled_are_suggested(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["lm", "model", "--qery", "q.jsonl"])
    message = "trak-fast lm: error: unrecognized arguments: --qery q.jsonl; did you mean --query?"
    assert message in capsys.readouterr().err


def test_results_of_other_questions_are_said_to_be_replaced(home: Home, tmp_path: Path) -> None:
    query = write(tmp_path / "one.jsonl", read_lines(home.query)[:1])
    run = tmp_path / "run"
    shutil.copytree(home.out, run)
    note = "(results of other questions are replaced; --name NAME keeps both)"
    assert note not in succeed("--out", run, "--query", home.query).out
    assert note in succeed("--out", run, "--query", query).out
    assert note not in succeed("--out", run, "--query", query, "--name", "one").out
