"""Judges scores of small language models by models retrained on random halves: trak_fast, its peers and baselines.

    pip install transformers kronfluence rank-bm25
    python benchmarks/language_quality.py [NAME ...] [--work DIR] --output benchmarks/results/NAME.json

The problems, and the files that this needs, are those of `language_problems.py`, which retrains the models; this script
calls it first. For each problem it reports, for one checkpoint (the mean over five by themselves) and for five,

- the LDS, the rank correlation over halves of a query's log-likelihood with the sum of the scores of the half's
  documents, in the mean over queries, with its standard error by resampling both;
- the recall of planted twins and facts among the ten best documents;
- the share of documents that score lower than the one that contradicts a fact (0: it is the most harmful of all);

of `trak_fast` at its defaults, with a metric of more documents, the same features in float32, its defaults before it
had a metric, EK-FAC (kronfluence) with the output layer at the best damping of a grid, two-sided sketches by layer with
the inverse of their X'X (as LoGra), the cosine of gradients, that of hidden states, and BM25; methods that need no five
checkpoints have one.
Of some problems `sizes` has LDS and recall by kind of projection, size and bits, and `rerank` the recall of the 20
best documents by gradients that are not projected, before and after reranking.

The LDS cannot exceed `ceiling`, which follows from how well two models of the same half agree.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from language_problems import (
    CHECKPOINTS,
    IGNORED,
    PROBLEMS,
    QUERIES,
    TRAIN_SIZE,
    TWINS,
    Documents,
    Site,
    add_arguments,
    draw_halves,
    load_documents,
    retrain,
    token_losses,
)
from numpy.typing import NDArray
from record import save
from scipy.stats import rankdata
from torch import Tensor, nn

import trak_fast
from trak_fast.features.metric import matrices_of
from trak_fast.features.rotation import Rotation
from trak_fast.store.encodings import decode, encode

BATCH = 64
"""Documents a batch; a metric is made of the first."""
DAMPINGS = (0.001, 0.01, 0.1, 1.0)
"""Damping of EK-FAC, in units of the typical eigenvalue of a layer."""
SIZES = {
    "rademacher": (256, 1024, 4096, 16384),
    "sjlt": (256, 1024, 4096, 16384, 65536, 131072),
    "two_sided": (256, 1024, 4096, 16384, 65536),
}
SIZED = ("gpt2-entries", "neox-quotations")
"""Problems whose features are judged by size, too, which takes longer than all the rest."""
RERANKED = 100
"""Candidates that are reranked."""
Scores = NDArray[np.floating[Any]]


def ranks(values: NDArray[Any]) -> NDArray[np.float64]:
    """Returns centred ranks, each column scaled to length 1, or 0 if all its values are tied."""
    centered = rankdata(values, axis=0) - (len(values) + 1) / 2
    return centered / np.maximum(np.sqrt((centered**2).sum(axis=0)), 1e-30)


class Judge:
    """Judges scores (n, m) by the outputs of retrained models.

    Attributes:
        ceiling: The LDS of perfect predictions, by the agreement of two models of each half (Spearman and Brown).
    """

    def __init__(self, outputs: NDArray[np.float64], documents: Documents) -> None:
        """Takes outputs (S, 2, m) of two models for each half."""
        self._masks = draw_halves(len(outputs)).astype(np.float64)
        self._means = outputs.mean(1)
        self._documents = documents
        agreement = (ranks(outputs[:, 0]) * ranks(outputs[:, 1])).sum(0)
        self.ceiling = float(np.sqrt(np.clip(2 * agreement / (1 + agreement), 0, 1)).mean())

    def lds(self, scores: Scores) -> NDArray[np.float64]:
        """Computes the LDS of each query, (m,)."""
        return (ranks(self._masks @ scores) * ranks(self._means)).sum(0)

    def error(self, scores: Scores, rounds: int = 30) -> float:
        """Estimates the standard error of the mean LDS by drawing halves and queries with replacement."""
        rng = np.random.default_rng(0)
        predicted = self._masks @ scores
        means = []
        for _ in range(rounds):
            halves = rng.integers(len(predicted), size=len(predicted))
            queries = rng.integers(predicted.shape[1], size=predicted.shape[1])
            drawn = np.ix_(halves, queries)
            means.append((ranks(predicted[drawn]) * ranks(self._means[drawn])).sum(0).mean())
        return float(np.std(means))

    def report(self, scores: Scores) -> dict[str, float]:
        """Computes all figures of scores."""
        by_query = np.asarray(scores).T
        related, wrong = self._documents.related, self._documents.wrong
        best = np.argsort(-by_query, axis=1)[:, :10]
        recall = np.take_along_axis(related, best, 1).sum(1) / np.maximum(related.sum(1), 1)
        is_twin = np.arange(len(recall)) < TWINS
        is_fact = related.any(1) & ~is_twin
        lower = [(own < own[bad].min()).mean() for own, bad in zip(by_query, wrong, strict=True) if bad.any()]
        return {
            "lds": float(self.lds(scores).mean()),
            "lds of other queries": float(self.lds(scores)[~is_twin & ~is_fact].mean()),
            "recall of twins": float(recall[is_twin].mean()),
            "recall of facts": float(recall[is_fact].mean()),
            "lower than the contradiction": float(np.mean(lower)),
        }

    def summarize(self, singles: list[Scores], of_all: Scores | None = None) -> dict[str, Any]:
        """Reports the mean over checkpoints by themselves, and all of them."""
        reports = [self.report(scores) for scores in singles]
        one = {name: float(np.mean([report[name] for report in reports])) for name in reports[0]}
        summary: dict[str, Any] = {"one checkpoint": {**one, "lds error": self.error(singles[0])}}
        if of_all is None and len(singles) > 1:
            of_all = sum((x / x.std() for x in singles), np.zeros_like(singles[0]))
        if of_all is not None:
            summary[f"{len(singles)} checkpoints"] = {**self.report(of_all), "lds error": self.error(of_all)}
        return summary


@dataclass(frozen=True)
class Subject:
    """A problem with its models.

    Attributes:
        name: The problem.
        site: Folders.
        documents: Its documents.
    """

    name: str
    site: Site
    documents: Documents

    def state(self, model_id: int) -> dict[str, Tensor]:
        """Loads the weights of a checkpoint."""
        content = torch.load(self.site.path(self.name, f"checkpoint-{model_id}.pt"), weights_only=True)
        state: dict[str, Tensor] = content["model"]
        return state

    def model(self, model_id: int) -> nn.Module:
        """Makes the model of a checkpoint."""
        model = PROBLEMS[self.name].build().eval()
        model.load_state_dict(self.state(model_id))
        return model

    def train_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the training documents' tensors and masks."""
        yield from zip(self.documents.train.split(BATCH), self.documents.train_mask.split(BATCH), strict=True)

    def query_batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yields the queries' tensors, masks and labels."""
        own = (self.documents.queries, self.documents.query_mask, self.documents.query_labels)
        yield from zip(*(x.split(BATCH) for x in own), strict=True)


def traker_scores(
    subject: Subject, checkpoints: int, metric_documents: int = 0, **arguments: Any
) -> tuple[list[Scores], Scores | None, dict[str, float]]:
    """Attributes by TRAKer; returns the scores of each checkpoint and of all, and cost and size."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        model = PROBLEMS[subject.name].build().eval()
        traker = trak_fast.TRAKer(
            model, "causal_lm", TRAIN_SIZE, save_dir=folder, logging_level=logging.ERROR, **arguments
        )
        for model_id in range(checkpoints):
            traker.load_checkpoint(subject.state(model_id), model_id)
            if metric_documents:
                traker.fit_metric(
                    [x[:metric_documents] for x in (subject.documents.train, subject.documents.train_mask)]
                )
            for batch in subject.train_batches():
                traker.featurize(batch, num_samples=len(batch[0]))
        traker.finalize_features()
        for model_id in range(checkpoints):
            traker.start_scoring_checkpoint("queries", subject.state(model_id), model_id, QUERIES)
            for queries in subject.query_batches():
                traker.score(queries, num_samples=len(queries[0]))
        singles = [np.array(traker.finalize_scores("queries", [i])) for i in range(checkpoints)]
        of_all = np.array(traker.finalize_scores("queries")) if checkpoints > 1 else None
        stored = (traker.store.checkpoint(0) / "train" / "features.npy").stat().st_size / TRAIN_SIZE
        cost = {"KB a document": stored / 1024, "CPU seconds": (time.process_time() - start) / checkpoints}
    return singles, of_all, cost


def ekfac_scores(subject: Subject, model_id: int) -> dict[float, Scores]:
    """Computes scores by EK-FAC (kronfluence) of all linear layers, the output layer among them, by damping."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task
    from torch.utils.data import TensorDataset
    from transformers.pytorch_utils import Conv1D

    class Modelling(Task):
        """Language modelling, for kronfluence."""

        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            tokens, labels = batch
            logits = model(input_ids=tokens).logits[:, :-1]
            wanted = labels[:, 1:]
            if sample:
                with torch.no_grad():
                    drawn = torch.multinomial(logits.softmax(-1).flatten(0, 1), 1).view(wanted.shape)
                wanted = torch.where(wanted == IGNORED, IGNORED, drawn)
            losses = F.cross_entropy(logits.mT, wanted, ignore_index=IGNORED, reduction="none")
            return (losses.sum(1) / (wanted != IGNORED).sum(1)).sum()

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return token_losses(model, *batch).sum()

    model = subject.model(model_id)
    for path, layer in list(model.named_modules()):
        if isinstance(layer, Conv1D):
            linear = nn.Linear(layer.weight.shape[0], layer.weight.shape[1])
            linear.weight.data, linear.bias.data = layer.weight.data.mT.contiguous(), layer.bias.data
            parent, _, own = path.rpartition(".")
            setattr(model.get_submodule(parent), own, linear)
    if getattr(model.config, "tie_word_embeddings", False):  # kronfluence has layers of their own
        model.get_output_embeddings().weight = nn.Parameter(model.get_output_embeddings().weight.detach().clone())
    documents = subject.documents
    train = TensorDataset(documents.train, documents.train.masked_fill(documents.train_mask == 0, IGNORED))
    queries = TensorDataset(documents.queries, documents.query_labels)
    scores: dict[float, Scores] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = prepare_model(model, Modelling())
        analyzer = Analyzer("quality", model, Modelling(), cpu=True, output_dir=folder, disable_tqdm=True)
        analyzer.fit_all_factors("ekfac", train, per_device_batch_size=BATCH, factor_args=FactorArguments("ekfac"))
        eigenvalues = analyzer.load_lambda_matrices("ekfac")
        assert eigenvalues is not None
        means = {
            module: (matrix / eigenvalues["num_lambda_processed"][module]).mean().item()
            for module, matrix in eigenvalues["lambda_matrix"].items()
        }
        typical = float(np.exp(np.mean(np.log(list(means.values())))))
        for damping in DAMPINGS:
            name = f"damping {damping}"
            analyzer.compute_pairwise_scores(
                name, "ekfac", queries, train, per_device_query_batch_size=QUERIES, per_device_train_batch_size=BATCH,
                score_args=ScoreArguments(damping_factor=damping * typical),
            )  # fmt: skip
            found = analyzer.load_pairwise_scores(name)
            assert found is not None
            scores[damping] = found["all_modules"].T.double().numpy()
    return scores


def hidden_state_scores(subject: Subject, model_id: int) -> Scores:
    """Computes the cosine of documents' mean hidden states."""
    model = subject.model(model_id)

    def states(tokens: Tensor, mask: Tensor) -> Tensor:
        last = model(input_ids=tokens, output_hidden_states=True).hidden_states[-1]
        return F.normalize((last * mask.unsqueeze(2)).sum(1), dim=1)

    with torch.no_grad():
        train = states(subject.documents.train, subject.documents.train_mask)
        return (train @ states(subject.documents.queries, subject.documents.query_mask).mT).double().numpy()


def bm25_scores(documents: Documents) -> Scores:
    """Computes BM25 of tokens."""
    from rank_bm25 import BM25Okapi

    def tokens(rows: Tensor, mask: Tensor) -> list[list[int]]:
        return [row[: int(length)].tolist()[1:] for row, length in zip(rows, mask.sum(1), strict=True)]

    index = BM25Okapi(tokens(documents.train, documents.train_mask))
    queries = tokens(documents.queries, documents.query_mask)
    return np.stack([index.get_scores(query) for query in queries], axis=1)


def features_of(subject: Subject, projector: trak_fast.GradientProjector) -> tuple[Tensor, Tensor, Tensor]:
    """Computes features of documents and queries of one checkpoint, and the documents' weightings Q."""
    first, *_ = subject.train_batches()
    projector.fit_metric(first)
    train = torch.cat([projector.project(batch) for batch in subject.train_batches()])
    queries = torch.cat([projector.project(batch) for batch in subject.query_batches()])
    weightings = torch.cat([projector.compute_loss_grad(list(batch)).reshape(-1) for batch in subject.train_batches()])
    return train, queries, weightings


def judge_sizes(subject: Subject, judge: Judge) -> list[dict[str, Any]]:
    """Judges features of one checkpoint in the metric, by kind of projection, size and bits of a number."""
    rows = []
    model = subject.model(0)
    names = matrices_of(model, [name for name, _ in model.named_parameters()])
    for kind, sizes in SIZES.items():
        for size in sizes:
            projector = trak_fast.GradientProjector(
                model, "causal_lm", size, proj_type="rademacher" if kind == "rademacher" else "sjlt",
                sketch="two_sided" if kind == "two_sided" else "full", grad_wrt=names, metric="kfac",
            )  # fmt: skip
            train, queries, weightings = features_of(subject, projector)
            rotation = Rotation(size)
            turned, target = rotation.apply(train), rotation.apply(queries)
            for dtype, bits in (("float32", 32), ("int8", 8), ("1bit", 1)):
                stored = turned
                if bits < 32:
                    items, scales = encode((turned / turned.abs().amax()).numpy(), dtype)
                    stored = torch.from_numpy(decode(items, scales, dtype, slice(None), size))
                scores = (weightings.unsqueeze(1) * (stored @ target.mT)).double().numpy()
                report = judge.report(scores)
                rows.append({"kind": kind, "k": size, "dtype": dtype, "bytes": size * bits / 8, **report})
    return rows


def judge_rerank(subject: Subject) -> dict[str, Any]:
    """Compares the 20 best documents by gradients that are not projected with those by features, and reranked ones."""
    model = subject.model(0)
    names = matrices_of(model, [name for name, _ in model.named_parameters()])
    recalls: dict[str, list[float]] = {}
    documents = subject.documents
    for size, dtype in ((4096, "1bit"), (131072, "1bit")):
        with tempfile.TemporaryDirectory() as folder:
            traker = trak_fast.TRAKer(
                model, "causal_lm", TRAIN_SIZE, save_dir=folder, logging_level=logging.ERROR, grad_wrt=names,
                proj_dim=size, proj_type="sjlt", store_dtype=dtype,
            )  # fmt: skip
            state = subject.state(0)
            traker.load_checkpoint(state, 0)
            for batch in subject.train_batches():
                traker.featurize(batch, num_samples=len(batch[0]))
            traker.finalize_features()
            chosen = list(range(0, QUERIES, 20))
            traker.start_scoring_checkpoint("queries", state, 0, len(chosen))
            queries = [x[chosen] for x in (documents.queries, documents.query_mask, documents.query_labels)]
            traker.score(queries, num_samples=len(chosen))
            scores = np.array(traker.finalize_scores("queries"))
            for target, by_feature in enumerate(scores.T):
                query = [x[target : target + 1] for x in queries]
                everything = np.arange(TRAIN_SIZE)
                exact = traker.rerank("queries", target, query, (documents.train, documents.train_mask), everything)
                best = set(np.argsort(-exact)[:20].tolist())
                order = np.argsort(-by_feature)
                candidates = order[:RERANKED]
                again = candidates[np.argsort(-exact[candidates])]
                for label, found in ((f"k={size} {dtype}", order), (f"k={size} {dtype}, reranked", again)):
                    recalls.setdefault(label, []).append(len(best & set(found[:20].tolist())) / 20)
    return {label: float(np.mean(own)) for label, own in recalls.items()}


def judge(name: str, site: Site, halves: int, processes: int) -> dict[str, Any]:
    """Judges all methods on a problem."""
    outputs = retrain(name, site, halves, processes)
    documents = load_documents(PROBLEMS[name].corpus, site.root)
    subject = Subject(name, site, documents)
    own_judge = Judge(outputs, documents)
    methods: dict[str, Any] = {}
    before: dict[str, Any] = {"metric": None, "grad_wrt": ["*"]}
    attributed: dict[str, dict[str, Any]] = {
        "trak_fast": {"checkpoints": CHECKPOINTS},
        "trak_fast, metric of 256 documents": {"checkpoints": CHECKPOINTS, "metric_documents": 256},
        "trak_fast, float32": {"checkpoints": 1, "store_dtype": "float32"},
        "trak_fast without metric": {**before, "checkpoints": CHECKPOINTS, "proj_dim": 2048},
        "two-sided by layer, inverse": {
            **before, "checkpoints": 1, "proj_dim": 0, "sketch": "two_sided", "sketch_side": 16,
        },
        "gradient cosine": {
            **before, "checkpoints": 1, "proj_dim": 131072, "proj_type": "sjlt", "lambda_reg": float("inf"),
            "normalize": True,
        },
    }  # fmt: skip
    for label, arguments in attributed.items():
        singles, of_all, cost = traker_scores(subject, **arguments)
        methods[label] = {**own_judge.summarize(singles, of_all), **cost}
    start = time.process_time()
    by_checkpoint = [ekfac_scores(subject, i) for i in range(CHECKPOINTS)]
    by_damping = {d: own_judge.summarize([scores[d] for scores in by_checkpoint]) for d in DAMPINGS}
    best = max(DAMPINGS, key=lambda d: by_damping[d]["one checkpoint"]["lds"])
    methods["EK-FAC"] = {
        **by_damping[best],
        "damping": best,
        "CPU seconds": (time.process_time() - start) / CHECKPOINTS,
    }
    methods["hidden states"] = own_judge.summarize([hidden_state_scores(subject, 0)])
    methods["BM25"] = own_judge.summarize([bm25_scores(documents)])
    for label, own in methods.items():
        print(f"{name:18s} {label:36s}", *(f"{k}: {v['lds']:.3f}" for k, v in own.items() if isinstance(v, dict)))
    result: dict[str, Any] = {"ceiling": own_judge.ceiling, "held out": PROBLEMS[name].held_out, "methods": methods}
    if name in SIZED:
        result.update(sizes=judge_sizes(subject, own_judge), rerank=judge_rerank(subject))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    site = Site(arguments.work, arguments.debian_root)
    results = {}
    for name in arguments.names or PROBLEMS:
        results[name] = judge(name, site, arguments.halves, arguments.processes)
        save(arguments.output, results)


if __name__ == "__main__":
    main()
