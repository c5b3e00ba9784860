"""Scores of `trak-fast lm`, against gradients of single texts by autograd, and against TRAKer called by hand."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from libraries import needs
from lm_runs import VOCABULARY, gradients_alone, page_data, read_lines, save_model, scores_of, succeed, texts_of, write
from numpy.typing import NDArray
from torch import Tensor

from trak_fast import Projector, TRAKer
from trak_fast.lm.texts.encoding import collate
from trak_fast.lm.texts.pieces import Piece
from trak_fast.tasks import CausalLM

needs("transformers")

LENGTHS = [6, 0, 5, 1, 4, 9, 7, 8, 6, 5]
"""Words of the training documents."""

EQUAL = {0: 5, 1: 6, 2: 2}
"""Queries -> the training documents that they repeat."""

METHODS = ["trak", "cosine", "dot", "less"]
DENSE = ["--sketch", "dense", "--proj-dim", 256, "--params", "all"]


class Trained:
    """A model's folder with Adam's moments, training documents and queries."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = save_model(folder / "model")
        self.texts = texts_of(LENGTHS)
        self.queries = [*(self.texts[row] for row in EQUAL.values()), *texts_of([7], seed=1)]
        self.train = write(folder / "train.jsonl", self.texts)
        self.query = write(folder / "query.jsonl", self.queries)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        for step in range(3):
            torch.manual_seed(step)
            for parameter in self.model.parameters():
                parameter.grad = 0.01 * torch.randn_like(parameter)
            self.optimizer.step()
        self.model.save_pretrained(folder / "model")
        torch.save(self.optimizer.state_dict(), folder / "model" / "optimizer.pt")

    def run(self, method: str, *words: object, train: Path | None = None) -> Path:
        """Runs the command, unless it was run before, and returns the folder of its results."""
        name = "-".join(map(str, [method, *words, "" if train is None else train.name])).replace("/", "_")
        out = self.folder / name
        if not out.exists():
            succeed(
                self.folder / "model", "--train", train or self.train, "--query", self.query, "--out", out,
                "--method", method, "--scores", *words,
            )  # fmt: skip
        return out

    def gradients(self, texts: list[str]) -> Tensor:
        """Differentiates f of each text alone, (B, D) float64; 0 for texts without a predicted token."""
        ids = [ids_of(text) for text in texts]
        long = [i for i, tokens in enumerate(ids) if len(tokens) > 1]
        model = self.model.double()
        found = gradients_alone(model, [ids[i] for i in long])
        model.float()
        whole = torch.zeros(len(texts), found.shape[1], dtype=torch.float64)
        whole[long] = found
        return whole

    def weights(self, texts: list[str]) -> Tensor:
        """Computes 1 − p of each text alone, (B,) float64; 0 for texts without a predicted token."""
        return torch.tensor([1 - math.exp(self.log_p(text)) for text in texts], dtype=torch.float64)

    def log_p(self, text: str) -> float:
        """Computes the mean of the log probabilities of a text's tokens but the first; 0 where there are none."""
        tokens = torch.tensor([ids_of(text)])
        if tokens.shape[1] < 2:
            return 0.0
        with torch.no_grad():
            logits = self.model.double()(input_ids=tokens).logits[0, :-1]
        self.model.float()
        return float(logits.log_softmax(1).gather(1, tokens[0, 1:, None]).mean())


def ids_of(text: str) -> list[int]:
    """Returns the numbers of a text's words."""
    return [VOCABULARY.index(word) for word in text.split()]


def normed(x: Tensor) -> Tensor:
    """Divides rows by their norms; rows of 0 stay."""
    return x / x.norm(dim=1, keepdim=True).clamp(min=1e-300)


def projected(gradients: Tensor) -> Tensor:
    """Projects gradients with the matrix of the first checkpoint."""
    return Projector(gradients.shape[1], 256, seed=0, proj_type="rademacher").project(gradients.float()).double()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def exact(trained: Trained) -> Mapping[str, tuple[Tensor, Tensor, Tensor]]:
    """The gradients of each method's features of documents and queries, and the weights of documents, one at a time."""
    train, query = trained.gradients(trained.texts), trained.gradients(trained.queries)
    ones = torch.ones(len(train), dtype=torch.float64)
    weights = trained.weights(trained.texts)
    return {
        "cosine": (normed(train), normed(query), ones),
        "dot": (train / train.square().sum(1).mean().sqrt(), query / train.square().sum(1).mean().sqrt(), weights),
        "less": (normed(steps_of(trained, weights[:, None] * train)), normed(query), ones),
    }


def steps_of(trained: Trained, gradients: Tensor) -> Tensor:
    """Computes the steps that Adam would make with gradients of log p, (B, D), up to its learning rate."""
    own = [trained.optimizer.state[parameter] for parameter in trained.model.parameters()]
    mean = torch.cat([state["exp_avg"].flatten() for state in own]).double()
    square = torch.cat([state["exp_avg_sq"].flatten() for state in own]).double()
    return (0.1 * gradients - 0.9 * mean) / ((0.999 * square + 0.001 * gradients**2).sqrt() + 1e-8)


@pytest.mark.parametrize("method", ["cosine", "dot", "less"])
def test_scores_are_products_of_projected_gradients_of_single_texts(
    trained: Trained, exact: Mapping[str, tuple[Tensor, Tensor, Tensor]], method: str
) -> None:
    found = scores_of(trained.run(method, *DENSE))
    train, query, weights = exact[method]
    train, query = projected(train), projected(query)
    if method == "dot":
        expected = weights[:, None] * (train @ query.T) / train.square().sum(1).mean()
    else:
        expected = normed(train) @ normed(query).T
    # gradients and features in float32, of sums of up to 7,952 terms: 2^-24 times their root, twice
    np.testing.assert_allclose(found, expected, rtol=0, atol=2 * 90 * 2**-24 * expected.abs().max().item())


@pytest.mark.parametrize("method", ["cosine", "dot", "less"])
def test_scores_of_the_default_projection_are_those_of_whole_gradients_up_to_its_noise(
    trained: Trained, exact: Mapping[str, tuple[Tensor, Tensor, Tensor]], method: str
) -> None:
    out = trained.run(method, "--params", "all")
    train, query, weights = exact[method]
    expected = weights[:, None] * (train @ query.T)
    # standard deviation of a product of unit vectors: √(π/2 / k) where one is stored as signs; six of them
    noise = 6 * math.sqrt(math.pi / 2 / json.loads((out / "run.json").read_text())["facts"]["proj_dim"])
    scale = (train.norm(dim=1)[:, None] * query.norm(dim=1)).numpy()
    assert (np.abs(scores_of(out) - expected.numpy()) <= noise * scale + 1e-6).all()


def pieces_of(texts: list[str]) -> list[Piece]:
    """Makes the pieces of texts; one without words is an end token."""
    pieces = []
    for row, text in enumerate(texts):
        ids = np.array(ids_of(text) or [VOCABULARY.index("</s>")], np.int32)
        labels = ids.copy()
        labels[0] = -100
        pieces.append(Piece(row, ids, labels, None))
    return pieces


@pytest.mark.parametrize(
    ("words", "options"),
    [
        (["--sketch", "dense"], {"metric": None, "proj_type": "rademacher", "proj_dim": 2048, "lambda_reg": "auto"}),
        ([], {"metric": "kfac", "lambda_reg": "auto"}),
        (["--seed", 3, "--proj-dim", 128, "--sketch", "sjlt"],
         {"metric": "kfac", "proj_type": "sjlt", "proj_dim": 128, "projector_seed": 3}),
        (["--sketch", "two_sided", "--params", "linear"],
         {"metric": None, "sketch": "two_sided", "sketch_side": 64, "proj_type": "rademacher", "proj_dim": 2048,
          "grad_wrt": ["*c_attn.weight", "*c_proj.weight", "*c_fc.weight", "*wte.weight"]}),
    ],
)  # fmt: skip
def test_scores_of_trak_are_those_of_traker_called_with_one_batch(
    trained: Trained, words: list[object], options: Mapping[str, Any], tmp_path: Path
) -> None:
    found = scores_of(trained.run("trak", *words))
    pieces = pieces_of(trained.texts)
    state = {name: value.clone() for name, value in trained.model.state_dict().items()}
    traker = TRAKer(trained.model, CausalLM(), len(pieces), tmp_path, normalize=True, shrink_weights=False, **options)
    traker.load_checkpoint(state, 0)
    if options["metric"]:
        scored = [i for i, piece in enumerate(pieces) if len(piece.input_ids) > 1]
        order = np.random.default_rng(options.get("projector_seed", 0)).permutation(scored)
        traker.fit_metric(collate(sorted((pieces[i] for i in order), key=lambda x: -len(x.input_ids)), "causal_lm"))
    traker.featurize(collate(pieces, "causal_lm"), num_samples=len(pieces))
    traker.finalize_features()
    targets = pieces_of(trained.queries)
    traker.start_scoring_checkpoint("q", state, 0, len(targets))
    traker.score(collate(targets, "causal_lm"), num_samples=len(targets))
    # documents that are known by heart count as others do
    weights = np.array(traker.store.train(0).weights)
    expected = np.array(traker.finalize_scores("q")) / np.where(weights > 0, weights, 1)[:, None]
    # the batches differ, and with them the order of float32 sums of up to 7,952 terms
    np.testing.assert_allclose(found, expected, rtol=0, atol=90 * 2**-20 * np.abs(expected).max())


def features_of(out: Path) -> NDArray[Any]:
    """Reads the features of the training documents of a run's first checkpoint."""
    features: NDArray[Any] = np.load(next((out / "features").glob("**/train/features.npy")))
    return features


def test_short_documents_leave_the_features_of_the_others_as_they_are(trained: Trained) -> None:
    whole = trained.run("cosine", *DENSE)
    long = [row for row, length in enumerate(LENGTHS) if length > 1]
    train = write(trained.folder / "long.jsonl", [trained.texts[row] for row in long])
    alone = trained.run("cosine", *DENSE, train=train)
    found = features_of(whole)
    np.testing.assert_allclose(found[long], features_of(alone), rtol=0, atol=90 * 2**-22 * np.abs(found).max())
    np.testing.assert_allclose(scores_of(whole)[long], scores_of(alone), rtol=0, atol=1e-6)
    short = [row for row, length in enumerate(LENGTHS) if length <= 1]
    assert not found[short].any()
    assert not scores_of(whole)[short].any()


@pytest.mark.parametrize("method", METHODS)
def test_a_document_equal_to_the_query_is_first_in_every_output(trained: Trained, method: str) -> None:
    out = trained.run(method)
    lines = read_lines(out / "top.jsonl")
    with (out / "top.csv").open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    page = page_data(out / "index.html")
    for number, row in EQUAL.items():
        assert scores_of(out)[:, number].argmax() == row
        best = lines[number]["top"][0]
        assert (best["rank"], best["row"], best["text"]) == (1, row, trained.texts[row])
        assert best["score"] == pytest.approx(float(scores_of(out)[row, number]), rel=1e-6)
        first = next(entry for entry in table if (entry["query"], entry["rank"]) == (str(number), "1"))
        assert (first["row"], first["text"]) == (str(row), trained.texts[row])
        card = page["queries"][number]["top"][0]
        assert (card["rank"], page["documents"][card["document"]]["row"]) == (1, row)
        assert card["wordRank"] == 1


@pytest.mark.parametrize("method", METHODS)
def test_the_outputs_rank_all_documents_by_their_scores(trained: Trained, method: str) -> None:
    out = trained.run(method)
    scores = scores_of(out)
    for number, line in enumerate(read_lines(out / "top.jsonl")):
        assert [entry["row"] for entry in line["top"]] == np.argsort(-scores[:, number], kind="stable").tolist()
        assert [entry["row"] for entry in line["worst"]] == np.argsort(scores[:, number], kind="stable")[:5].tolist()
