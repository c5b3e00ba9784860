"""The demonstration on a language model: facts and questions by plain code, and all of it with little training."""

import dataclasses
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from libraries import needs

from trak_fast.cli import main
from trak_fast.demo import facts
from trak_fast.demo.facts import Corpus, make_corpus

transformers = needs("transformers")

from trak_fast.demo import language  # noqa: E402 - it needs transformers


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return make_corpus(3)


def words_of(text: str) -> set[str]:
    return set(re.findall("[a-z0-9]+", text.lower()))


def person_of(prompt: str) -> str:
    (person,) = [word for word in re.findall("[A-Z][a-z]+", prompt) if word.lower() not in frame_words()]
    return person


def frame_words() -> set[str]:
    return set().union(*(words_of(way) for way in facts.FORMAL))


def relation_of(prompt: str) -> facts.Relation:
    (relation,) = [relation for relation in facts.RELATIONS if relation.noun in words_of(prompt)]
    return relation


def bm25(texts: list[str], query: str) -> list[float]:
    """Okapi BM25 by its formula, with k1 = 1.5, b = 0.75 and the ½ inside the logarithm."""
    documents = [re.findall("[a-z0-9]+", text.lower()) for text in texts]
    mean = sum(map(len, documents)) / len(documents)
    scores = [0.0] * len(documents)
    for word in re.findall("[a-z0-9]+", query.lower()):
        holders = sum(word in document for document in documents)
        rarity = math.log(1 + (len(documents) - holders + 0.5) / (holders + 0.5))
        for i, document in enumerate(documents):
            count = document.count(word)
            scores[i] += rarity * count * 2.5 / (count + 1.5 * (0.25 + 0.75 * len(document) / mean))
    return scores


def test_there_are_as_many_documents_and_questions_as_said(corpus: Corpus) -> None:
    assert len(corpus.documents) == facts.DOCUMENTS
    assert len({document.id for document in corpus.documents}) == facts.DOCUMENTS
    assert len({document.text for document in corpus.documents}) == facts.DOCUMENTS
    assert len(corpus.questions) == len(corpus.truth) == facts.PEOPLE
    assert len({person_of(question.prompt) for question in corpus.questions}) == facts.PEOPLE


def test_no_two_relations_share_a_value() -> None:
    values = [value for relation in facts.RELATIONS for value in relation.values]
    assert len(set(values)) == len(values)


def test_true_sources_state_the_fact_in_all_plain_ways_and_no_other_document_does(corpus: Corpus) -> None:
    for question, rows in zip(corpus.questions, corpus.truth, strict=True):
        person, value = person_of(question.prompt), question.completion.strip()
        ways = {way.format(person=person, value=value) for way in relation_of(question.prompt).plain}
        assert {corpus.documents[row].text for row in rows} == ways
        both = {person.lower(), value.lower()}
        assert {i for i, document in enumerate(corpus.documents) if both <= words_of(document.text)} == set(rows)
        assert question.prompt + question.completion not in {document.text for document in corpus.documents}


def test_questions_are_told_in_a_formal_way_that_ends_with_the_answer(corpus: Corpus) -> None:
    for question in corpus.questions:
        words = {"noun": relation_of(question.prompt).noun, "person": person_of(question.prompt)}
        ways = [way.format(value=question.completion.strip(), **words) for way in facts.FORMAL]
        assert f"{question.prompt}{question.completion}." in ways


def test_other_documents_share_more_words_with_a_question_than_any_true_source(corpus: Corpus) -> None:
    for question, rows in zip(corpus.questions, corpus.truth, strict=True):
        asked = words_of(question.prompt + question.completion)
        shared = [len(asked & words_of(document.text)) for document in corpus.documents]
        of_sources = [shared[row] for row in rows]
        assert min(of_sources) >= 2  # the person and the value
        assert max(of_sources) <= 4
        assert sum(count > max(of_sources) for count in shared) >= 10


def test_each_other_fact_is_told_plainly_and_formally(corpus: Corpus) -> None:
    texts = {document.text for document in corpus.documents}
    for question in corpus.questions:
        person, asked = person_of(question.prompt), relation_of(question.prompt)
        told = []
        for relation in facts.RELATIONS:
            for value in relation.values:
                words = {"person": person, "value": value, "noun": relation.noun}
                plain = sum(way.format(**words) in texts for way in relation.plain)
                formal = sum(way.format(**words) in texts for way in facts.FORMAL)
                if plain or formal:
                    assert (plain, formal) == ((3, 0) if relation is asked else (2, 4))
                    told.append(relation)
        assert len(told) == len(set(told)) == facts.FACTS
        assert asked in told


def test_documentation_is_that_of_the_standard_library(corpus: Corpus) -> None:
    strings = [document.text for document in corpus.documents if document.id.startswith("docstring")]
    assert len(strings) == facts.DOCUMENTS - facts.PEOPLE * (3 + 3 * 6)
    everything = set(facts.read_docstrings(Path(json.__file__).parents[1]))
    assert set(strings) <= everything
    assert any(text.startswith("json.dumps: Serialize ``obj`` to a JSON formatted ``str``.") for text in everything)
    names = {person_of(question.prompt).lower() for question in corpus.questions}
    assert not [text for text in strings if names & words_of(text)]


def test_a_seed_gives_one_corpus() -> None:
    assert make_corpus(5) == make_corpus(5)
    assert make_corpus(5).questions != make_corpus(6).questions


def test_a_standard_library_without_sources_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(facts, "_library", lambda: tmp_path)
    with pytest.raises(FileNotFoundError, match=re.escape(f"{tmp_path} has 0 documentation strings, and 360 are")):
        make_corpus(0)


def test_files_have_all_documents_questions_and_true_sources(corpus: Corpus, tmp_path: Path) -> None:
    corpus.save(tmp_path)
    train = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    questions = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    truth = json.loads((tmp_path / "truth.json").read_text())
    assert train == [{"id": document.id, "text": document.text} for document in corpus.documents]
    assert questions == [
        {"id": question.id, "prompt": question.prompt, "completion": question.completion}
        for question in corpus.questions
    ]
    ids = {row["id"]: i for i, row in enumerate(train)}
    assert [tuple(ids[name] for name in truth[row["id"]]) for row in questions] == list(corpus.truth)


def test_ranks_and_recall_equal_a_search_in_sorted_lists() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 12, (40, 9)).astype(np.float32)  # many are equal
    truth = [tuple(rng.choice(40, 1 + m % 4, replace=False)) for m in range(9)]
    ranks = language.ranks_of(scores)
    for count in (1, 2, 3, 10, 40):
        shares = []
        for m, sources in enumerate(truth):
            best = sorted(range(40), key=lambda row: (-scores[row, m], row))[:count]
            assert [ranks[row, m] for row in best] == list(range(1, count + 1))
            shares.append(len(set(best) & set(sources)) / min(count, len(sources)))
        assert language.recall(ranks, truth, count) == pytest.approx(sum(shares) / 9, rel=1e-12)


def test_recall_by_shared_words_is_that_of_the_formula(corpus: Corpus) -> None:
    few = dataclasses.replace(corpus, questions=corpus.questions[:3], truth=corpus.truth[:3])
    ranks = language.word_ranks(few)
    texts = [document.text for document in corpus.documents]
    for m, question in enumerate(few.questions):
        scores = bm25(texts, question.prompt + question.completion)
        for row in (*few.truth[m], *range(100)):
            above = sum(score > scores[row] + 1e-5 for score in scores)
            equal = sum(abs(score - scores[row]) <= 1e-5 for score in scores)
            assert above < ranks[row, m] <= above + equal


def test_answers_are_right_where_every_token_is_the_most_likely() -> None:
    class Said(torch.nn.Module):
        """Says at each place the token after the one that it sees."""

        def forward(self, input_ids: torch.Tensor) -> object:
            logits = torch.nn.functional.one_hot(input_ids + 1, 20).float()
            return transformers.modeling_outputs.CausalLMOutput(logits=logits)

    def piece(ids: list[int], prompt: int) -> language.Piece:
        labels = np.array([*[-100] * prompt, *ids[prompt:]], np.int32)
        return language.Piece(0, np.array(ids, np.int32), labels, None)

    pieces = [piece([3, 9, 10, 11], 2), piece([3, 9, 10, 12], 2), piece([3, 9, 11, 12], 2), piece([5, 6], 1)]
    assert language.answered_right(Said(), pieces).tolist() == [True, False, False, True]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the demonstration with 60 of the documents, 2 questions and a tiny model."""
    path = tmp_path_factory.mktemp("demo-lm")
    whole = make_corpus(0)
    kept = sorted({*range(54), *whole.truth[0], *whole.truth[1]})
    places = {row: place for place, row in enumerate(kept)}
    small = Corpus(
        tuple(whole.documents[row] for row in kept),
        whole.questions[:2],
        tuple(tuple(places[row] for row in rows) for rows in whole.truth[:2]),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language, "make_corpus", lambda seed: small)
        patch.setattr(language, "WIDTH", 16)
        patch.setattr(language, "VOCABULARY", 300)
        language.run(path, language.Settings(seed=0, epochs=2))
        language.run(path, language.Settings(seed=1, epochs=2))  # over the files of the first run
    return path


def test_recalls_are_those_of_the_documents_in_the_files(folder: Path) -> None:
    results = json.loads((folder / "results.json").read_text())
    truth = json.loads((folder / "truth.json").read_text())
    lines = [json.loads(line) for line in (folder / "run" / "top.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == list(truth)
    for count in (1, 10):
        found = [len({x["id"] for x in line["top"][:count]} & set(truth[line["id"]])) for line in lines]
        assert results["recall"]["trak"][str(count)] == pytest.approx(np.mean(found) / min(count, 3))
    assert results["settings"] == {"seed": 1, "epochs": 2}
    assert set(results["recall"]) == {"trak", "cosine", "bm25"}
    train = (folder / "train.jsonl").read_text().splitlines()
    assert (results["documents"], results["questions"]) == (len(train), 2)
    assert results["seconds"]["total"] >= sum(x for name, x in results["seconds"].items() if name != "total")
    page = (folder / "run" / "index.html").read_text()
    assert "cosine of gradients" in page
    assert not (folder / "cosine").exists()


def test_the_model_folder_can_be_asked_by_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    questions = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    first = json.loads((folder / "run" / "top.jsonl").read_text().splitlines()[0])
    asked = [questions[0]["prompt"], questions[0]["completion"]]
    assert main(["lm", "--out", str(folder / "run"), "--ask", *asked]) == 0
    best = re.findall(r"^ +\d+  [+-][\d.]+  (\S+)", capsys.readouterr().out, re.MULTILINE)
    assert best == [entry["id"] for entry in first["top"]]


def test_documents_begin_and_end_with_the_token_that_the_model_was_trained_with(folder: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    for line in (folder / "train.jsonl").read_text().splitlines():
        text = json.loads(line)["text"]
        tokens = tokenizer(text)["input_ids"]
        assert tokens[0] == tokens[-1] == tokenizer.bos_token_id == tokenizer.eos_token_id
        assert tokenizer.decode(tokens[1:-1]).strip() == text
    assert tokenizer("wine")["input_ids"] == tokenizer(" wine")["input_ids"]


def test_training_follows_adamw_as_it_is_defined() -> None:
    """One epoch of one batch: the first step of AdamW is the sign of the gradient, times the rate, and the decay."""
    settings = language.Settings(seed=2, epochs=1)
    pieces = [
        language.Piece(i, ids, np.where(np.arange(5) > 0, ids, -100).astype(np.int32), None) for i, ids in ids_of()
    ]
    model, trained = language.build_model(30, 2), language.build_model(30, 2)
    language.train(trained, pieces, settings)
    batch = torch.tensor(np.array([piece.input_ids for piece in pieces]), dtype=torch.int64)
    logits = model(input_ids=batch).logits[:, :-1].double()
    loss = -logits.log_softmax(-1).gather(2, batch[:, 1:, None]).mean()
    grads = torch.autograd.grad(loss, list(model.parameters()))
    norm = math.sqrt(sum(float(grad.double().square().sum()) for grad in grads))
    scale = min(1.0, 1.0 / norm)
    rate = language.LEARNING_RATE  # the only step
    for before, after, grad in zip(model.parameters(), trained.parameters(), grads, strict=True):
        decay = language.WEIGHT_DECAY if before.ndim > 1 else 0.0
        step = scale * grad.double() / ((scale * grad.double()).abs() + 1e-8)
        expected = before.double() * (1 - rate * decay) - rate * step
        certain = grad.abs() > 1e-4  # where rounding cannot turn the sign
        assert certain.any()
        torch.testing.assert_close(after.double()[certain], expected[certain], rtol=0, atol=1e-5)


def ids_of() -> list[tuple[int, np.ndarray]]:
    """Three documents of five tokens."""
    rng = np.random.default_rng(1)
    return [(i, rng.integers(0, 30, 5).astype(np.int32)) for i in range(3)]


def test_the_command_passes_its_arguments_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []

    def run(output: str, settings: language.Settings) -> None:
        seen.append((output, settings, torch.get_num_threads()))
        raise OSError("enough")

    monkeypatch.setattr(language, "run", run)
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    assert main(["demo", "lm", "--seed", "7", "--threads", "1"]) == 1
    assert main(["demo", "--output", "there", "lm", "--threads", "1"]) == 1
    torch.set_num_threads(threads)
    assert seen == [("trak-fast-demo-lm", language.Settings(seed=7), 1), ("there", language.Settings(), 1)]
    assert capsys.readouterr().err == "trak-fast: error: cannot write to the output folder: enough\n" * 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["lm", "--proj-dim", "64"], "--proj-dim must be left out with lm: it is a setting of digits"),
        (["lm", "--nets-per-subset", "1"], "--nets-per-subset must be left out with lm: it is a setting of digits"),
        (["lm", "--seed", "-1"], "seed must be in [0, 2**32 - 1], not -1"),
        (["letters"], "kind must be one of 'digits', 'lm', not 'letters'"),
    ],
)
def test_what_does_not_fit_is_refused(
    flags: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(language, "run", lambda *_: pytest.fail("ran"))
    assert main(["demo", *flags]) == 2
    assert capsys.readouterr().err == f"trak-fast: error: {message}\n"


def test_missing_transformers_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)  # an import of it now fails
    assert main(["demo", "lm"]) == 1
    error = "trak-fast: error: the demo needs transformers, which is not installed: pip install transformers\n"
    assert capsys.readouterr().err == error
