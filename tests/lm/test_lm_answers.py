"""Ensembles, groups, controls, selections, windows, maskings, classes, chats and adapters, from runs of their parts."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from libraries import needs
from lm_runs import (
    CHAT,
    LONGEST,
    VOCABULARY,
    page_data,
    read_lines,
    refusal,
    save_model,
    save_word_tokenizer,
    scores_of,
    succeed,
    texts_of,
    write,
)
from numpy.typing import NDArray

from trak_fast import TRAKer
from trak_fast.lm.texts.documents import Document
from trak_fast.lm.texts.encoding import collate, encode
from trak_fast.tasks.text import CausalLM

transformers = needs("transformers")
needs("jinja2")

# peft asks transformers for it, while these tests build adapters
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

LENGTHS = [6, 12, 9, 20, 8, 7, 11, 10]
WAY = ["--method", "cosine", "--sketch", "dense", "--proj-dim", 64, "--scores"]


class Home:
    """Two checkpoints of a model, documents and queries."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.models = [folder / "checkpoint-10", folder / "checkpoint-20"]
        for seed, path in enumerate(self.models):
            model = save_model(path, seed=seed)
            optimizer = torch.optim.AdamW(model.parameters())
            torch.manual_seed(seed)
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
            torch.save(optimizer.state_dict(), path / "optimizer.pt")
            steps = [{"step": 10 * (i + 1), "learning_rate": rate} for i, rate in enumerate((3e-3, 1e-3)[: seed + 1])]
            state = {"global_step": 10 * (seed + 1), "log_history": steps}
            (path / "trainer_state.json").write_text(json.dumps(state))
        self.texts = texts_of(LENGTHS)
        self.train = write(folder / "train.jsonl", self.texts)
        rows = [{"text": text, "set": name} for text, name in zip(texts_of([6, 7, 9, 8], seed=1), "xyxx", strict=True)]
        self.query = write(folder / "query.jsonl", rows)

    def run(self, out: Path, *words: object, models: Sequence[Path] = (), query: Path | None = None) -> NDArray[Any]:
        """Runs the command, by default with one checkpoint, and returns all scores."""
        succeed(
            *(models or self.models[:1]), "--train", self.train, "--query", query or self.query, "--out", out, *WAY,
            *words,
        )  # fmt: skip
        return scores_of(out)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return Home(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def plain(home: Home) -> NDArray[Any]:
    """The scores of one checkpoint."""
    return home.run(home.folder / "plain")


@pytest.mark.parametrize("method", ["cosine", "dot"])
def test_scores_of_checkpoints_are_the_mean_of_each_alone(method: str, home: Home, tmp_path: Path) -> None:
    both = home.run(tmp_path / "both", "--method", method, models=home.models)
    parts = [parts_of(tmp_path / "both", i, method) for i in range(2)]
    np.testing.assert_allclose(both, (parts[0] + parts[1]) / 2, rtol=0, atol=1e-5 * np.abs(both).max())
    # a checkpoint's number selects its projection: the second is the first of another run
    swapped = home.run(tmp_path / "swapped", "--method", method, models=home.models[::-1])
    np.testing.assert_allclose(
        swapped, sum(parts_of(tmp_path / "swapped", i, method) for i in range(2)) / 2, rtol=0, atol=1e-5
    )
    for model, name in zip(home.models, ("both", "swapped"), strict=True):
        alone = home.run(tmp_path / model.name, "--method", method, models=[model])
        part = parts_of(tmp_path / name, 0, method)
        if method == "dot":  # weights are averaged apart from the products
            part = part / mean_weights(tmp_path / name) * mean_weights(tmp_path / model.name)
        np.testing.assert_allclose(alone, part, rtol=0, atol=1e-5 * np.abs(part).max())


def mean_weights(out: Path) -> NDArray[Any]:
    """Returns the mean weights of a run's documents over its checkpoints, (n, 1)."""
    paths = out.glob("features/checkpoint_*/train/weights.npy")
    return np.mean([np.load(path) for path in paths], axis=0, dtype=np.float64)[:, None]


def parts_of(out: Path, model_id: int, method: str) -> NDArray[Any]:
    """Computes the scores of one checkpoint of a run from the features that it stored, with the run's mean weights."""
    folders = sorted((out / "features").glob("checkpoint_*"))
    features, queries = (
        np.load(path).astype(np.float64)
        for path in (folders[model_id] / "train" / "features.npy", *folders[model_id].glob("targets/*/features.npy"))
    )
    exponents = [
        np.load(path)
        for path in (
            folders[model_id] / "train" / "features_exponent.npy",
            *folders[model_id].glob("targets/*/features_exponent.npy"),
        )
    ]
    features = features * 2.0 ** exponents[0].reshape(-1, 1)
    queries = queries * 2.0 ** exponents[1].reshape(-1, 1)
    if method == "dot":
        return mean_weights(out) * (features @ queries.T) / np.mean(np.sum(features**2, 1))
    features, queries = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (features, queries))
    return features @ queries.T


def test_less_weighs_checkpoints_by_their_learning_rates(home: Home, tmp_path: Path) -> None:
    found = home.run(tmp_path / "run", "--method", "less", models=home.models)
    parts = [parts_of(tmp_path / "run", i, "less") for i in range(2)]
    # the second checkpoint's rate is the mean of those logged after the first
    np.testing.assert_allclose(found, 0.75 * parts[0] + 0.25 * parts[1], rtol=0, atol=1e-5)


def test_less_needs_moments_and_rates(home: Home, tmp_path: Path) -> None:
    bare = [tmp_path / "a", tmp_path / "b"]
    for seed, path in enumerate(bare):
        save_model(path, seed=seed)
    words = ["--train", home.train, "--query", home.query, "--out", tmp_path / "run", "--method", "less"]
    assert refusal(*bare, *words) == (
        f"--method less needs Adam's moments: {bare[0]}/optimizer.pt is missing; --method cosine"
    )
    for path, source in zip(bare, home.models, strict=True):
        state = torch.load(source / "optimizer.pt")
        for group in state["param_groups"]:
            del group["lr"]
        torch.save(state, path / "optimizer.pt")
    assert refusal(*bare, *words) == (
        f"--method less weighs checkpoints by their learning rates, and {bare[0]} has none: no trainer_state.json, "
        "scheduler.pt or optimizer.pt with it; --method cosine"
    )
    assert not (tmp_path / "run").exists()


def test_questions_of_a_group_are_scored_as_their_mean(home: Home, plain: NDArray[Any], tmp_path: Path) -> None:
    found = home.run(tmp_path, "--group", "set")
    expected = np.stack([plain[:, [0, 2, 3]].mean(1), plain[:, 1]], 1)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    lines = read_lines(tmp_path / "top.jsonl")
    assert [(line["query"], line["group"], line["queries"]) for line in lines] == [(0, "x", 3), (1, "y", 1)]
    page = page_data(tmp_path / "index.html")
    assert [query["name"] for query in page["queries"]] == ["x", "y"]


def test_the_mean_score_of_a_control_set_is_subtracted(home: Home, plain: NDArray[Any], tmp_path: Path) -> None:
    control = write(tmp_path / "control.jsonl", texts_of([5, 9, 7], seed=2))
    alone = home.run(tmp_path / "control", query=control)
    found = home.run(tmp_path / "run", "--against", control)
    np.testing.assert_allclose(found, plain - alone.mean(1, keepdims=True), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("wanted", "count"), [("30%", 2), ("3", 3), ("1%", 1), ("100%", 8)])
def test_documents_are_selected_by_their_highest_score(
    wanted: str, count: int, home: Home, plain: NDArray[Any]
) -> None:
    out = home.folder / "plain"
    result = succeed("--out", out, "--query", home.query, "--select", wanted, "--scores")
    assert f"selected  {count} of 8 documents: {out}/selected.jsonl" in result.out
    best = np.argsort(-plain.max(1), kind="stable")[:count]
    expected = [
        {"rank": rank, "row": row, "file": str(home.train), "text": home.texts[row], "query": int(plain[row].argmax())}
        for rank, row in enumerate(best.tolist(), 1)
    ]
    lines = read_lines(out / "selected.jsonl")
    np.testing.assert_allclose([line.pop("score") for line in lines], plain.max(1)[best], rtol=1e-6)
    assert lines == expected


def tie_of(out: Path) -> float:
    """Reads the noise of scores that a page tells."""
    return float(page_data(out / "index.html")["tie"])


def test_the_noise_of_scores_is_that_of_the_sums_and_means_that_they_are(home: Home, tmp_path: Path) -> None:
    """Single scores have 1/√64; measured over seeds, the others lie within 10 % of these."""
    home.run(tmp_path / "single")
    assert tie_of(tmp_path / "single") == pytest.approx(1 / 8)
    home.run(tmp_path / "group", "--group", "set")  # means of three questions and of one
    assert tie_of(tmp_path / "group") == pytest.approx(math.sqrt((1 / 3 + 1) / 2) / 8)
    control = write(tmp_path / "control.jsonl", texts_of([9, 10], seed=4))
    home.run(tmp_path / "against", "--against", control)
    assert tie_of(tmp_path / "against") == pytest.approx(math.sqrt(1 + 1 / 2) / 8)
    home.run(tmp_path / "both", models=home.models)
    assert tie_of(tmp_path / "both") == pytest.approx(math.sqrt(1 / 2) / 8)
    home.run(tmp_path / "less", "--method", "less", models=home.models)  # rates of 3e-3 and 1e-3
    assert tie_of(tmp_path / "less") == pytest.approx(math.sqrt(0.75**2 + 0.25**2) / 8)
    home.run(tmp_path / "split", "--long", "split", "--max-tokens", 5)
    windows = [[math.ceil((length - 1) / 4) for length in lengths] for lengths in (LENGTHS, [6, 7, 9, 8])]
    assert tie_of(tmp_path / "split") == pytest.approx(math.sqrt(np.mean(windows[0]) * np.mean(windows[1])) / 8)


def test_tokens_of_documents_without_a_gradient_add_nothing(home: Home, tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", ["ba", home.texts[0], ""])
    succeed(home.models[0], "--train", train, "--query", home.query, "--out", tmp_path / "run", "--method", "cosine")
    data = page_data(tmp_path / "run" / "index.html")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["facts"]["store_dtype"] == "1bit"
    for query in data["queries"]:
        parts = {data["documents"][card["document"]]["row"]: card["tokens"] for card in query["top"]}
        assert [part for _, _, part in parts[0]] == [0]
        assert any(part for _, _, part in parts[1])


def test_lines_of_results_end_where_any_program_sees_their_end(home: Home, tmp_path: Path) -> None:
    texts = ["ba be bi\u2028bo bu", "da de\u2029di \x85 do"]
    home.run(tmp_path, query=write(tmp_path / "query.jsonl", texts))
    lines = [json.loads(line) for line in (tmp_path / "top.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["text"] for line in lines] == texts


def test_other_questions_leave_no_documents_that_were_selected_before(home: Home, tmp_path: Path) -> None:
    home.run(tmp_path, "--select", 2)
    assert len(read_lines(tmp_path / "selected.jsonl")) == 2
    succeed("--out", tmp_path, "--query", write(tmp_path / "other.jsonl", texts_of([5], seed=3)))
    assert not (tmp_path / "selected.jsonl").exists()


def test_selected_documents_name_their_group(home: Home, plain: NDArray[Any], tmp_path: Path) -> None:
    scores = home.run(tmp_path, "--group", "set", "--select", 4)
    lines = read_lines(tmp_path / "selected.jsonl")
    assert [line["row"] for line in lines] == np.argsort(-scores.max(1), kind="stable")[:4].tolist()
    assert [line["group"] for line in lines] == ["xy"[scores[line["row"]].argmax()] for line in lines]


def encoded(home: Home, texts: Sequence[str], tokenizer_of: Path) -> Any:
    """Encodes texts as the command does."""
    documents = [Document("x", row + 1, row, text=text) for row, text in enumerate(texts)]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_of)
    return encode(documents, tokenizer, max_tokens=LONGEST, vocab_size=61).pieces


def test_documents_are_cleaned_in_the_order_of_self_influence(home: Home, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = succeed(home.models[0], "--train", home.train, "--out", out, "--method", "dot", *WAY[2:-1], "--clean")
    model = transformers.AutoModelForCausalLM.from_pretrained(home.models[0])
    traker = TRAKer(
        model, CausalLM(), len(LENGTHS), tmp_path / "hand", proj_dim=64, lambda_reg=float("inf"), metric=None,
        grad_wrt=["*"],
    )  # fmt: skip
    state = {name: value.clone() for name, value in model.state_dict().items()}
    traker.load_checkpoint(state, 0)
    traker.featurize(collate(encoded(home, home.texts, home.models[0]), "causal_lm"), num_samples=len(LENGTHS))
    traker.finalize_features()
    expected = traker.self_influence()
    lines = read_lines(out / "clean.jsonl")
    assert [line["row"] for line in lines] == np.argsort(-expected).tolist()
    np.testing.assert_allclose([line["score"] for line in lines], np.sort(expected)[::-1], rtol=1e-4)
    assert f"clean     all 8 documents by self-influence: {out}/clean.jsonl" in result.out
    assert not (out / "top.jsonl").exists()


def test_scores_of_long_documents_are_the_sums_over_their_windows(home: Home, tmp_path: Path) -> None:
    size = 8
    scores = home.run(tmp_path / "split", "--max-tokens", size, "--long", "split")
    words = [text.split() for text in home.texts]
    windows = [[text[i : i + size] for i in range(0, len(text) - 1, size - 1)] for text in words]
    assert max(len(parts) for parts in windows) == 3
    train = write(tmp_path / "windows.jsonl", [" ".join(window) for parts in windows for window in parts])
    rows = [json.loads(line)["text"].split() for line in home.query.read_text().splitlines()]
    query = write(tmp_path / "query.jsonl", [
        " ".join(text[i : i + size]) for text in rows for i in range(0, len(text) - 1, size - 1)
    ])  # fmt: skip
    succeed(home.models[0], "--train", train, "--query", query, "--out", tmp_path / "windows", *WAY)
    alone = scores_of(tmp_path / "windows")
    starts = np.cumsum([0, *(len(parts) for parts in windows[:-1])])
    columns = np.cumsum([0, *(len(range(0, len(text) - 1, size - 1)) for text in rows[:-1])])
    expected = np.add.reduceat(np.add.reduceat(alone, starts, axis=0), columns, axis=1)
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)


def test_scores_of_maskings_are_averaged(home: Home, tmp_path: Path) -> None:
    save_model(tmp_path / "bert", "bert")
    words = [tmp_path / "bert", "--train", home.train, "--query", home.query, *WAY[2:], "--method", "cosine"]
    succeed(*words, "--out", tmp_path / "run", "--maskings", 3)
    run = json.loads((tmp_path / "run" / "run.json").read_text())["facts"]
    assert (run["task"], run["documents"], run["pieces"]) == ("masked_lm", 8, 24)
    parts = parts_of(tmp_path / "run", 0, "cosine")
    expected = parts.reshape(8, 3, 4, 3).mean((1, 3))
    np.testing.assert_allclose(scores_of(tmp_path / "run"), expected, rtol=0, atol=1e-6)
    succeed(*words, "--out", tmp_path / "default")
    assert json.loads((tmp_path / "default" / "run.json").read_text())["facts"]["pieces"] == 32


def test_classifiers_take_labels_by_name_and_a_repeated_document_is_first(tmp_path: Path) -> None:
    names = {"id2label": {0: "bad", 1: "good", 2: "none"}, "label2id": {"bad": 0, "good": 1, "none": 2}}
    save_model(tmp_path / "model", "bert_classifier", **names)
    texts = texts_of(LENGTHS)
    rows = [{"text": text, "label": ("bad", "good", 2)[i % 3]} for i, text in enumerate(texts)]
    train, query = write(tmp_path / "train.jsonl", rows), write(tmp_path / "query.jsonl", [rows[4], rows[2]])
    words = [tmp_path / "model", "--train", train, "--query", query, "--out", tmp_path / "run"]
    result = succeed(*words, "--scores")
    assert "task text_classification" in result.out
    assert scores_of(tmp_path / "run").argmax(0).tolist() == [4, 2]
    assert [line["label"] for line in read_lines(tmp_path / "run" / "top.jsonl")] == ["good", 2]
    example = succeed(*words, "--dry-run").out.split("example   ")[1].splitlines()[0]
    assert example == f"⟦{texts[4]}⟧"
    write(query, [{"text": "ba be", "label": "great"}])
    assert refusal(*words) == (
        f'{query}:1 has the label "great", and the model\'s labels are "bad" (0), "good" (1), "none" (2); mend one of '
        "them"
    )


def test_chats_are_scored_by_what_the_assistant_says(home: Home, tmp_path: Path) -> None:
    model = tmp_path / "model"
    save_model(model)
    save_word_tokenizer(model, chat=CHAT)
    chats = [[{"role": "user", "content": text[:8]}, {"role": "assistant", "content": text[9:]}] for text in home.texts]
    train = write(tmp_path / "train.jsonl", [{"messages": chat} for chat in chats])
    query = write(tmp_path / "query.jsonl", [{"messages": chats[5]}])
    result = succeed(model, "--train", train, "--query", query, "--out", tmp_path / "chat", *WAY)
    assert f'{train} ("messages"): 8 documents' in result.out
    # the template writes "user TEXT assistant TEXT ": the same tokens and labels as a prompt and its completion
    pairs = [
        {"prompt": f"user {user['content']} assistant ", "completion": f"{said['content']} "} for user, said in chats
    ]
    train, query = write(tmp_path / "pairs.jsonl", pairs), write(tmp_path / "pair.jsonl", [pairs[5]])
    succeed(model, "--train", train, "--query", query, "--out", tmp_path / "pairs", *WAY)
    np.testing.assert_allclose(scores_of(tmp_path / "chat"), scores_of(tmp_path / "pairs"), rtol=0, atol=1e-6)
    line = read_lines(tmp_path / "chat" / "top.jsonl")[0]
    assert line["messages"] == chats[5]
    assert line["top"][0]["messages"] == chats[5]


def test_adapters_alone_are_attributed(home: Home, tmp_path: Path) -> None:
    needs("peft")
    from model_folders import save_adapter

    save_model(tmp_path / "base", "llama")
    for seed in range(2):
        torch.manual_seed(seed)
        save_adapter(tmp_path / "base", tmp_path / f"adapter-{seed}")
    adapters = [tmp_path / "adapter-0", tmp_path / "adapter-1"]
    query = write(tmp_path / "query.jsonl", home.texts[3:4])
    succeed(*adapters, "--train", home.train, "--query", query, "--out", tmp_path / "run", *WAY)
    facts = json.loads((tmp_path / "run" / "run.json").read_text())["facts"]
    assert facts["parameters"] == 2 * (2 * (16 + 16) + 2 * (16 + 8))  # rank 2 at q and v of two layers
    parts = [parts_of(tmp_path / "run", i, "cosine") for i in range(2)]
    scores = scores_of(tmp_path / "run")
    np.testing.assert_allclose(scores, (parts[0] + parts[1]) / 2, rtol=0, atol=1e-6)
    assert scores[:, 0].argmax() == 3
    result = succeed("--out", tmp_path / "run", "--ask", "ba be bi")
    assert f"adapter of {tmp_path}/base" in result.out
    shutil.copytree(tmp_path / "base", tmp_path / "moved")
    succeed(*adapters, "--base", tmp_path / "moved", "--out", tmp_path / "run", "--query", query, *WAY[:-1])
    save_model(tmp_path / "other", "llama", seed=1)
    assert refusal(*adapters, "--base", tmp_path / "other", "--out", tmp_path / "run", "--query", query) == (
        f"{adapters[0]} has other weights, or another optimizer.pt, than {tmp_path}/run/ was made with; give these, "
        "another --out, or --overwrite"
    )


def test_less_takes_the_moments_of_an_adapter(home: Home, tmp_path: Path) -> None:
    peft = needs("peft")
    save_model(tmp_path / "base", "llama")
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(whole, config)
    own = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(own, lr=1e-3)
    for parameter in own:
        parameter.grad = 0.01 * torch.randn_like(parameter)
    optimizer.step()
    model.save_pretrained(tmp_path / "adapter")
    torch.save(optimizer.state_dict(), tmp_path / "adapter" / "optimizer.pt")
    query = write(tmp_path / "query.jsonl", home.texts[3:4])
    words = ["--train", home.train, "--query", query, "--out", tmp_path / "run", "--method", "less", "--scores"]
    result = succeed(tmp_path / "adapter", *words, "--sketch", "dense", "--proj-dim", 2048)
    assert "parameters as Adam's steps, dense projection" in result.out
    gradients = [gradients_of(model, text) for text in home.texts]
    losses = [slope * gradient for slope, gradient in gradients]
    mean, square = (
        torch.cat([optimizer.state[parameter][key].flatten() for parameter in own]).double()
        for key in ("exp_avg", "exp_avg_sq")
    )
    steps = [(0.1 * g - 0.9 * mean) / ((0.999 * square + 0.001 * g**2).sqrt() + 1e-8) for g in losses]
    asked = gradients[3][1]
    expected = [float(step @ asked / step.norm() / asked.norm()) for step in steps]
    # six standard deviations of a cosine after projection
    np.testing.assert_allclose(scores_of(tmp_path / "run")[:, 0], expected, rtol=0, atol=6 / np.sqrt(2048))


def gradients_of(model: Any, text: str) -> tuple[float, torch.Tensor]:
    """Differentiates f = log(p/(1 − p)) of a text by the parameters that require gradients, (D,) float64.

    Returns:
        1 − p, and the gradient.
    """
    tokens = torch.tensor([[VOCABULARY.index(word) for word in text.split()]])
    logs = model.double()(input_ids=tokens).logits[0, :-1].log_softmax(1)
    log_p = logs.gather(1, tokens[0, 1:, None]).mean()
    value = log_p - torch.log(-torch.expm1(log_p))
    own = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradient = torch.cat([part.flatten() for part in torch.autograd.grad(value, own)])
    return 1 - float(log_p.detach().exp()), gradient
