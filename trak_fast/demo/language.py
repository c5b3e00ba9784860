"""The demonstration behind `trak-fast demo lm`: which documents taught a language model its answers.

A small GPT-2 is trained from scratch on the documents of facts.py, and asked its questions. Each answer is attributed
to the training documents by trak_fast, by the cosine of gradients, and by the words that a question shares with a
document (BM25). How many of the true sources come first is what the methods are judged by; none is told of them.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..arguments import integer
from ..lm import results as lm_results
from ..lm.answer import Wanted, answer
from ..lm.compute import compute
from ..lm.machine import Machine
from ..lm.models.loading import quiet
from ..lm.run import Run, Targets, open_run
from ..lm.texts.documents import read_documents
from ..lm.texts.encoding import Piece, collate, encode
from ..lm.word_ranks import WordRanks
from ..store.files import atomic_file, temporary_folder
from ..tasks.tokens import IGNORED
from .facts import Corpus, make_corpus

LENGTH = 64
"""Tokens that the model takes."""
VOCABULARY = 1500
WIDTH = 128
LAYERS = 2
HEADS = 4
EPOCHS = 16
"""Passes over the documents. More teach more answers, but fewer true sources were found after them."""
BATCH_SIZE = 16
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.1
BETAS = (0.9, 0.98)
WARM_UP = 0.05
"""Share of the steps in which the learning rate rises; then it falls to 0."""
MIXING = 6.0
"""Tokens by which lengths in a batch differ at least: batches are of like lengths, and not the same in each epoch."""
END = "<|endoftext|>"
"""The token before and after each document."""

COUNTS = (1, 10)
"""Documents, from the best on, among which sources are looked for."""
METHODS = {"trak": "trak-fast lm", "cosine": "cosine of gradients", "bm25": "shared words (BM25)"}
"""The methods that are compared, and their names for people."""


@dataclass(frozen=True)
class Settings:
    """The settings of a run; the same settings on the same machine and Python give the same figures, times aside.

    Attributes:
        seed: Determines everything random, in [0, 2^32).
        epochs: Passes over the documents.
    """

    seed: int = 0
    epochs: int = EPOCHS

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            TypeError: A setting is no number.
            ValueError: A setting is out of its range.
        """
        integer("seed", self.seed, 0, 2**32 - 1)
        integer("epochs", self.epochs, 1, 10_000)


@dataclass(frozen=True)
class Results:
    """The contents of results.json.

    Attributes:
        settings: The settings of the run.
        documents: Training documents, n.
        tokens: Their tokens.
        parameters: Parameters of the model.
        questions: Questions, m.
        answered: Share of the questions that the model answers right, by its most likely tokens.
        recall: By method and count k: the share of true sources among the first k documents (see `recall`).
        seconds: Seconds of each stage, and "total".
    """

    settings: Settings
    documents: int
    tokens: int
    parameters: int
    questions: int
    answered: float
    recall: Mapping[str, Mapping[str, float]]
    seconds: Mapping[str, float]


def run(output: str | os.PathLike[str], settings: Settings) -> Results:
    """Runs the demonstration.

    Args:
        output: The folder to write to, made if it is missing: model/ (as `save_pretrained` writes it), train.jsonl,
            questions.jsonl, truth.json, results.json, and run/, the folder of `trak-fast lm` with index.html.
        settings: The run's settings.

    Returns:
        The contents of results.json.

    Raises:
        OSError: `output` cannot be made or written to, which is tried before the model is trained.
        ValueError: `output` has a folder run/ that is no run.
    """
    folder = Path(output).expanduser().resolve()
    folder.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = {}
    start = time.perf_counter()
    corpus = make_corpus(settings.seed)
    corpus.save(folder)
    with _timing(seconds, "train"):
        tokens, answered, parameters = train_and_save(folder, settings)
    with _timing(seconds, "word overlap"):
        ranks = {"bm25": word_ranks(corpus)}
    with _timing(seconds, "cosine"), temporary_folder(folder / "cosine") as temporary:
        ranks["cosine"] = ranks_of(scores_of(*attribute(folder, temporary / "run", "cosine", settings.seed)))
    with _timing(seconds, "trak"):
        found, targets = attribute(folder, folder / "run", "trak", settings.seed)
        ranks["trak"] = ranks_of(scores_of(found, targets))
    shares = {
        name: {str(count): recall(ranks[name], corpus.truth, count) for count in COUNTS} for name in METHODS
    }  # fmt: skip
    with _timing(seconds, "page"):
        write_page(found, targets, table(shares))
    results = Results(
        settings=settings,
        documents=len(corpus.documents),
        tokens=tokens,
        parameters=parameters,
        questions=len(corpus.questions),
        answered=answered,
        recall=shares,
        seconds={**seconds, "total": time.perf_counter() - start},
    )
    with atomic_file(folder / "results.json") as path:
        path.write_text(json.dumps(asdict(results), indent=1) + "\n")
    return results


@contextmanager
def _timing(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Stores the seconds of the block."""
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start


def train_and_save(folder: Path, settings: Settings) -> tuple[int, float, int]:
    """Trains tokenizer and model on train.jsonl of a folder, and saves both in model/.

    Returns:
        Tokens of the documents, the share of questions.jsonl that the model answers right, and its parameters.
    """
    documents = read_documents([folder / "train.jsonl"]).documents
    questions = read_documents([folder / "questions.jsonl"]).documents
    tokenizer = build_tokenizer([document.shown for document in documents])
    encoded, asked = (
        encode(texts, tokenizer, task="causal_lm", max_tokens=LENGTH, vocab_size=len(tokenizer))
        for texts in (documents, questions)
    )
    model = build_model(len(tokenizer), settings.seed)
    with _one_thread():
        train(model, encoded.pieces, settings)
    with quiet():
        cast(Any, model).save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
    answered = answered_right(model, asked.pieces)
    return encoded.tokens, float(answered.mean()), sum(parameter.numel() for parameter in model.parameters())


@contextmanager
def _one_thread() -> Iterator[None]:
    """Has torch compute in one thread: for matrices as small as these, a second one costs more than it saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def build_tokenizer(texts: Sequence[str]) -> Any:
    """Makes a byte-level BPE tokenizer of texts, by which each text begins and ends with `END`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    # a word at the start of a text is the token that it is elsewhere
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} $A {END}", special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    wrap: Any = PreTrainedTokenizerFast
    return wrap(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=LENGTH,
        add_prefix_space=True,  # which transformers 4 would set to False in the tokenizer
    )


def build_model(vocab_size: int, seed: int) -> nn.Module:
    """Makes a GPT-2 with random weights, in evaluation mode."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=vocab_size, n_positions=LENGTH, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, bos_token_id=0,
        eos_token_id=0, embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = GPT2LMHeadModel(config)
    return model.train(False)


def train(model: nn.Module, pieces: Sequence[Piece], settings: Settings) -> None:
    """Trains a model by AdamW. Matrices decay, vectors do not.

    Args:
        model: The model. It has no dropout and stays in the mode that it is in.
        pieces: The documents as tokens.
        settings: The number of epochs, and the seed of the documents' order.
    """
    rng = np.random.default_rng(settings.seed)
    lengths = np.array([len(piece.input_ids) for piece in pieces])
    groups = [
        {"params": [p for p in model.parameters() if (p.ndim > 1) == is_matrix], "weight_decay": decay}
        for is_matrix, decay in ((True, WEIGHT_DECAY), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS)
    batches = -(-len(pieces) // BATCH_SIZE)
    steps = settings.epochs * batches
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / (WARM_UP * steps), (steps - step) / ((1 - WARM_UP) * steps))
    )
    with tqdm(total=steps, desc="training", unit=" steps", disable=None) as bar:
        for _ in range(settings.epochs):
            order = np.argsort(lengths + rng.uniform(0, MIXING, len(pieces)))
            for batch in rng.permutation(batches):
                rows = order[batch * BATCH_SIZE : (batch + 1) * BATCH_SIZE]
                tensors = collate([pieces[row] for row in rows], "causal_lm")
                # no mask: what pads follows all that is predicted
                logits = model(input_ids=tensors["input_ids"]).logits[:, :-1]
                loss = F.cross_entropy(logits.flatten(0, 1), tensors["labels"][:, 1:].flatten(), ignore_index=IGNORED)
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                bar.update()


@torch.no_grad()
def answered_right(model: nn.Module, pieces: Sequence[Piece]) -> NDArray[np.bool_]:
    """Tells for which questions the model's most likely tokens are those of the completion, (m,) bool."""
    tensors = collate(pieces, "causal_lm")
    labels = tensors["labels"][:, 1:]
    said = model(input_ids=tensors["input_ids"]).logits[:, :-1].argmax(-1)
    right: NDArray[np.bool_] = ((said == labels) | (labels == IGNORED)).all(1).numpy()
    return right


def attribute(folder: Path, out: Path, method: str, seed: int) -> tuple[Run, Targets]:
    """Computes the features of all documents and questions, as `trak-fast lm` does.

    Args:
        folder: The folder with model/, train.jsonl and questions.jsonl.
        out: The folder of the run; one that is there is deleted.
        method: A method of `trak-fast lm`.
        seed: Its seed.
    """
    given: dict[str, Any] = {
        "models": (str(folder / "model"),), "train": (str(folder / "train.jsonl"),), "method": method, "seed": seed,
    }  # fmt: skip
    found = open_run(out, given, Machine(device="cpu"), overwrite=True)
    targets = found.targets(read_documents([folder / "questions.jsonl"]), "queries")
    compute(found, [targets])
    return found, targets


def scores_of(found: Run, targets: Targets) -> NDArray[np.float32]:
    """Computes the scores of all documents for the questions, (n, m)."""
    with temporary_folder(found.folder.path / "scores") as temporary:
        lm_results.write_scores(found, targets, temporary / "scores.npy")
        scores: NDArray[np.float32] = np.load(temporary / "scores.npy", allow_pickle=False)
    return scores


def ranks_of(scores: NDArray[np.float32]) -> NDArray[np.int64]:
    """Ranks documents by their scores (n, m), from 1; of equal ones, the lower row first."""
    ranks = np.empty(scores.shape, np.int64)
    places = np.arange(1, len(scores) + 1)
    np.put_along_axis(ranks, np.argsort(-scores, axis=0, kind="stable"), places[:, None], axis=0)
    return ranks


def word_ranks(corpus: Corpus) -> NDArray[np.int64]:
    """Ranks documents by the words that they share with a question and its answer, (n, m), from 1."""
    words = WordRanks([document.text for document in corpus.documents])
    return np.stack([words.ranks(question.prompt + question.completion) for question in corpus.questions], axis=1)


def recall(ranks: NDArray[np.int64], truth: Sequence[Sequence[int]], count: int) -> float:
    """Computes the mean share of true sources among the first documents.

    Args:
        ranks: Ranks of documents for each question, (n, m), from 1.
        truth: Rows of the true sources of each question.
        count: Documents that are looked at, k. Where they are fewer than the sources, k sources are all that there
            can be: with k = 1 the recall is the share of questions whose first document is a source.
    """
    shares = [(ranks[list(rows), m] <= count).sum() / min(count, len(rows)) for m, rows in enumerate(truth)]
    return float(np.mean(shares))


def write_page(found: Run, targets: Targets, lines: Sequence[str]) -> None:
    """Writes the page of `trak-fast lm`, and the files beside it, with the table of recalls among its facts."""
    answer(
        found,
        targets,
        None,
        Wanted(top=10, worst=3, tokens=3),
        name=None,
        title="trak-fast demo lm",
        facts=[("recall" if not place else "", line) for place, line in enumerate(lines)],
        tie=lm_results.tie_of(found, targets),
    )


def table(shares: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Writes the recalls as lines."""
    head = "".join(f"{f'@{count}':>7}" for count in COUNTS)
    lines = [f"{'':<22}{head}"]
    for method, name in METHODS.items():
        numbers = "".join(f"{shares[method][str(count)]:7.0%}" for count in COUNTS)
        lines.append(f"{name:<22}{numbers}")
    return lines


def summary(results: Results) -> str:
    """Puts the main figures of a run into a few lines of text."""
    head, *lines = table(results.recall)
    seconds = results.seconds
    return "\n".join(
        [
            f"model           GPT-2 of {results.parameters:,} parameters trained on {results.documents:,} documents, "
            f"{results.tokens:,} tokens, in {seconds['train']:.0f} s",
            f"answers         {results.answered:.0%} of {results.questions} questions right, which are in other words "
            "than the documents",
            f"true sources    found among the first{head[22:]}",
            *(f"                {line}" for line in lines),
            f"time            {seconds['total']:.0f} s for everything",
        ]
    )
