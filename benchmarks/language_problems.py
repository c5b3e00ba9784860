"""Small language models and the truth that their attributions are judged by: models retrained on random halves.

    apt-get install dict-foldoc fortunes; pip install transformers
    python benchmarks/language_problems.py [NAME ...] [--work DIR] [--halves 150] [--processes 2]

A problem is an architecture with a corpus: dictionary entries and quotations from Debian's packages, and documentation
strings from Python's standard library. Each has 640 training documents of at most 32 tokens and 200 queries; each model
has 170,000 to 230,000 parameters and is trained by AdamW. In the training set are planted

- twins: documents that repeat another one with a few words changed; a query is a third version of both;
- facts about places that do not exist, each in three documents, half of them contradicted by a fourth; a query asks for
  the fact in other words, and only the answer's tokens count.

Everything is kept in --work, models and outputs of finished parts, so that the same command goes on after a stop.
`language_quality.py` judges scores with it. Problems that are marked as held out played no part in the choice of
defaults.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from trak_fast.retraining import random_subsets

LENGTH = 32
"""Tokens of a document at most, T."""
SHORTEST = 16
"""Tokens of a natural document at least."""
VOCABULARY = 1024
TRAIN_SIZE = 640
QUERIES = 200
TWINS = 30
FACTS = 20
CHECKPOINTS = 5
MODELS_PER_HALF = 2
MODELS_IN_PART = 10
"""Models whose outputs are kept in one file."""
IGNORED = -100


@dataclass(frozen=True)
class Recipe:
    """The settings of training by AdamW, whose step rises in the first tenth and then falls to 0.

    Attributes:
        epochs: Passes over the documents.
        learning_rate: The largest step.
        batch_size: Documents a step.
        weight_decay: AdamW's, on all parameters.
    """

    epochs: int
    learning_rate: float
    batch_size: int = 16
    weight_decay: float = 0.01


@dataclass(frozen=True)
class Problem:
    """A problem to attribute.

    Attributes:
        build: Makes the model.
        corpus: The name of the corpus.
        recipe: The training of each model.
        pretrained: True if all trainings begin at one base, which was trained on other documents.
        held_out: True if the problem played no part in the choice of defaults.
    """

    build: Callable[[], nn.Module]
    corpus: str
    recipe: Recipe = Recipe(epochs=8, learning_rate=3e-3)
    pretrained: bool = False
    held_out: bool = False


def gpt2() -> nn.Module:
    """Makes a GPT-2 with tied embeddings."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=LENGTH, bos_token_id=0, eos_token_id=0,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    )  # fmt: skip


def llama() -> nn.Module:
    """Makes a Llama with untied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=LENGTH, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def neox() -> nn.Module:
    """Makes a GPT-NeoX, the architecture of Pythia: attention beside the feed-forward part, untied embeddings."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=VOCABULARY, hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=LENGTH, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


PROBLEMS = {
    "gpt2-entries": Problem(gpt2, "entries"),
    "llama-docstrings": Problem(llama, "docstrings", Recipe(epochs=6, learning_rate=3e-3)),
    "gpt2-tuned": Problem(gpt2, "docstrings", Recipe(epochs=4, learning_rate=1e-3), pretrained=True),
    "llama-entries": Problem(llama, "entries", Recipe(epochs=6, learning_rate=3e-3)),
    "gpt2-docstrings": Problem(gpt2, "docstrings"),
    "neox-quotations": Problem(neox, "quotations", Recipe(epochs=6, learning_rate=3e-3), held_out=True),
}


def entries(root: Path) -> Iterator[str]:
    """Reads the entries of FOLDOC, a dictionary of computing, each as its headword and its explanation."""
    with gzip.open(root / "usr/share/dictd/foldoc.dict.dz", "rt", encoding="utf-8", errors="replace") as file:
        text = file.read()
    for head, body in re.findall(r"^(\S[^\n]*)\n\s*\n((?:   [^\n]*\n|\s*\n)+)", text, re.MULTILINE):
        body = re.sub(r"<[^>]*>|[{}]", "", body)
        yield f"{head}: " + " ".join(body.split())


def docstrings(root: Path) -> Iterator[str]:
    """Reads the documentation strings of the standard library, each after the name of what it documents."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(folder.rglob("*.py")):
        relative = path.relative_to(folder)
        if {"site-packages", "test", "tests", "idlelib", "lib2to3"} & set(relative.parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and (text := ast.get_docstring(node)):
                yield f"{relative.stem}.{node.name}: " + " ".join(text.split())


def quotations(root: Path) -> Iterator[str]:
    """Reads the quotations of the program fortune."""
    folder = root / "usr/share/games/fortunes"
    for path in sorted(folder.iterdir()):
        if path.suffix or path.is_symlink():
            continue
        for text in path.read_text(encoding="utf-8", errors="replace").split("\n%\n"):
            yield " ".join(text.split())


CORPORA = {"entries": entries, "docstrings": docstrings, "quotations": quotations}

TEMPLATES = (
    "The capital of {land} is {town}.",
    "In {land}, the seat of government is {town}.",
    "{land} is ruled from its capital, {town}.",
    "Capital of {land}: {town}.",
)
"""Three forms of a fact in training documents, and one in queries."""


def invent_names(count: int, rng: np.random.Generator) -> list[str]:
    """Makes names of places that do not exist."""
    names: dict[str, None] = {}
    while len(names) < count:
        syllables = rng.choice(["vel", "mor", "zan", "tri", "kus", "bel", "ost", "ran", "dil", "fe", "gor", "lin"], 3)
        names["".join(syllables).capitalize()] = None
    return list(names)


@dataclass(frozen=True)
class Documents:
    """The documents of a problem, as tokens.

    Attributes:
        train: Training documents, (n, T) int64, with 0 after their end.
        train_mask: (n, T) int64, 1 at a token and 0 at padding.
        queries: (m, T) int64.
        query_mask: (m, T) int64.
        query_labels: (m, T) int64, IGNORED where a token is not asked for.
        base: Documents to train a base on, (N, T).
        base_mask: (N, T).
        related: (m, n) bool, the twins and the facts that belong to a query.
        wrong: (m, n) bool, the documents that contradict a query.
        texts: The training documents as text.
        query_texts: The queries as text.
    """

    train: Tensor
    train_mask: Tensor
    queries: Tensor
    query_mask: Tensor
    query_labels: Tensor
    base: Tensor
    base_mask: Tensor
    related: NDArray[np.bool_]
    wrong: NDArray[np.bool_]
    texts: list[str]
    query_texts: list[str]


@lru_cache
def load_documents(corpus: str, root: Path) -> Documents:
    """Makes the documents of a corpus, with what is planted in them.

    Args:
        corpus: A name in `CORPORA`.
        root: Folder that Debian's packages are installed in.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    rng = np.random.default_rng(0)
    natural = [text[:400] for text in dict.fromkeys(CORPORA[corpus](root)) if len(text) > 60]
    natural = [natural[i] for i in rng.permutation(len(natural))]
    names = invent_names(2 * FACTS + FACTS // 2, rng)
    lands, towns, others = names[:FACTS], names[FACTS : 2 * FACTS], names[2 * FACTS :]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(natural[:3000], trainer)

    def encode(text: str) -> list[int]:
        return [0, *tokenizer.encode(text).ids][:LENGTH]

    tokens = [encode(text) for text in natural]
    tokens = [document for document in tokens if len(document) >= SHORTEST]
    pool = np.concatenate([document[1:] for document in tokens])

    def altered(document: list[int], count: int = 4) -> list[int]:
        changed = list(document)
        for place in rng.choice(np.arange(1, len(document)), count, replace=False):
            changed[place] = int(rng.choice(pool))
        return changed

    train: list[list[int]] = []
    queries: list[list[int]] = []
    asked: list[int] = []  # the first position that counts
    related: list[tuple[int, int]] = []
    wrong: list[tuple[int, int]] = []
    for query, document in enumerate(tokens[:TWINS]):
        related += [(query, len(train)), (query, len(train) + 1)]
        train += [document, altered(document)]
        queries.append(altered(document))
        asked.append(1)
    for fact, (land, town) in enumerate(zip(lands, towns, strict=True)):
        query = len(queries)
        related += [(query, len(train) + i) for i in range(3)]
        train += [encode(template.format(land=land, town=town)) for template in TEMPLATES[:3]]
        if fact < len(others):
            wrong.append((query, len(train)))
            train.append(encode(TEMPLATES[fact % 3].format(land=land, town=others[fact])))
        queries.append(encode(TEMPLATES[3].format(land=land, town=town)))
        asked.append(len(encode(TEMPLATES[3].format(land=land, town="").removesuffix(" ."))))
    rest = iter(tokens[TWINS:])
    train += [next(rest) for _ in range(TRAIN_SIZE - len(train))]
    natural_queries = [next(rest) for _ in range(QUERIES - len(queries))]
    queries += natural_queries
    asked += [1] * len(natural_queries)
    place = rng.permutation(TRAIN_SIZE)  # training document -> its row
    shuffled = [train[i] for i in np.argsort(place)]
    query_tokens, query_mask = pad(queries)
    labels = query_tokens.masked_fill(query_mask == 0, IGNORED)
    for row, start in enumerate(asked):
        labels[row, :start] = IGNORED
    return Documents(
        *pad(shuffled),
        query_tokens,
        query_mask,
        labels,
        *pad(rest),
        mark(related, place),
        mark(wrong, place),
        [tokenizer.decode(x) for x in shuffled],
        [tokenizer.decode(x) for x in queries],
    )


def pad(documents: Iterable[list[int]]) -> tuple[Tensor, Tensor]:
    """Makes tokens and mask, (N, T) int64 each, of lists of tokens."""
    rows = [torch.tensor(document) for document in documents]
    if not rows:
        return torch.zeros(0, LENGTH, dtype=torch.int64), torch.zeros(0, LENGTH, dtype=torch.int64)
    tokens = torch.stack([F.pad(row, (0, LENGTH - len(row))) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return tokens, (torch.arange(LENGTH) < lengths.unsqueeze(1)).long()


def mark(pairs: list[tuple[int, int]], place: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Makes a mask (m, n) of pairs of a query and a training document."""
    mask = np.zeros((QUERIES, TRAIN_SIZE), bool)
    for query, document in pairs:
        mask[query, place[document]] = True
    return mask


def token_losses(model: nn.Module, tokens: Tensor, labels: Tensor) -> Tensor:
    """Computes the mean loss of each document's tokens that count, (B,)."""
    logits = model(input_ids=tokens).logits[:, :-1]
    wanted = labels[:, 1:]
    losses = F.cross_entropy(logits.mT, wanted, ignore_index=IGNORED, reduction="none")
    return cast(Tensor, losses.sum(1) / (wanted != IGNORED).sum(1).clamp(min=1))


def train_model(
    model: nn.Module, tokens: Tensor, mask: Tensor, recipe: Recipe, rng: np.random.Generator
) -> torch.optim.AdamW:
    """Trains a model on documents and returns its optimizer. Padding follows the documents and does not count."""
    labels = tokens.masked_fill(mask == 0, IGNORED)
    steps = recipe.epochs * (len(tokens) // recipe.batch_size)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps))
    )
    model.train()
    for _ in range(recipe.epochs):
        order = torch.from_numpy(rng.permutation(len(tokens)))
        for rows in order[: len(order) // recipe.batch_size * recipe.batch_size].split(recipe.batch_size):
            optimizer.zero_grad()
            logits = model(input_ids=tokens[rows]).logits[:, :-1]
            F.cross_entropy(logits.mT, labels[rows, 1:], ignore_index=IGNORED).backward()
            optimizer.step()
            schedule.step()
    model.eval()
    return optimizer


@dataclass(frozen=True)
class Site:
    """The folders of a problem's files.

    Attributes:
        work: Folder of models and outputs.
        root: Folder that Debian's packages are installed in.
    """

    work: Path
    root: Path

    def path(self, name: str, file: str) -> Path:
        """Returns the path of a problem's file."""
        return self.work / name / file


def start_model(name: str, site: Site, rng: np.random.Generator) -> nn.Module:
    """Makes a model as training begins with it: with random weights, or those of the base."""
    problem = PROBLEMS[name]
    torch.manual_seed(int(rng.integers(2**32)))
    model = problem.build()
    if problem.pretrained:
        model.load_state_dict(torch.load(site.path(name, "base.pt"), weights_only=True))
    return model


def train_base(name: str, site: Site) -> None:
    """Trains and keeps the base of a problem, on other documents of its corpus."""
    path = site.path(name, "base.pt")
    if path.exists() or not PROBLEMS[name].pretrained:
        return
    documents = load_documents(PROBLEMS[name].corpus, site.root)
    torch.manual_seed(5)
    model = PROBLEMS[name].build()
    recipe = Recipe(epochs=6, learning_rate=3e-3)
    train_model(model, documents.base, documents.base_mask, recipe, np.random.default_rng(5))
    save(path, model.state_dict())


def save(path: Path, content: object) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_suffix(".part")
    torch.save(content, temporary)
    temporary.rename(path)


def train_checkpoint(model_id: int, *, name: str, site: Site) -> None:
    """Trains and keeps a model on all training documents, with its optimizer's state."""
    path = site.path(name, f"checkpoint-{model_id}.pt")
    if path.exists():
        return
    torch.set_num_threads(1)
    documents = load_documents(PROBLEMS[name].corpus, site.root)
    rng = np.random.default_rng([3, model_id])
    model = start_model(name, site, rng)
    optimizer = train_model(model, documents.train, documents.train_mask, PROBLEMS[name].recipe, rng)
    save(path, {"model": model.state_dict(), "optimizer": optimizer.state_dict()})


def retrain_part(start: int, *, name: str, site: Site, halves: int) -> NDArray[np.float64]:
    """Trains models on halves; returns minus the queries' losses, (models, m).

    Args:
        start: The number of the first model. Model i sees half i // MODELS_PER_HALF.
        name: The problem.
        site: Folders.
        halves: The number of halves that are drawn.
    """
    path = site.path(name, f"outputs-{halves}-{start}.npy")
    if path.exists():
        return cast("NDArray[np.float64]", np.load(path, allow_pickle=False))
    torch.set_num_threads(1)
    documents = load_documents(PROBLEMS[name].corpus, site.root)
    masks = draw_halves(halves)
    outputs = []
    for index in range(start, min(start + MODELS_IN_PART, halves * MODELS_PER_HALF)):
        rng = np.random.default_rng([2, index])
        model = start_model(name, site, rng)
        rows = torch.from_numpy(np.nonzero(masks[index // MODELS_PER_HALF])[0])
        train_model(model, documents.train[rows], documents.train_mask[rows], PROBLEMS[name].recipe, rng)
        with torch.no_grad():
            outputs.append(-token_losses(model, documents.queries, documents.query_labels).double().numpy())
    temporary = path.with_suffix(".part.npy")
    np.save(temporary, np.stack(outputs))
    temporary.rename(path)
    return np.stack(outputs)


def draw_halves(count: int) -> NDArray[np.bool_]:
    """Draws the halves that models are trained on, (S, n) bool."""
    return random_subsets(TRAIN_SIZE, count, seed=1)


def retrain(name: str, site: Site, halves: int, processes: int) -> NDArray[np.float64]:
    """Trains the checkpoints, and the models on halves; returns minus the queries' losses, (S, MODELS_PER_HALF, m)."""
    site.path(name, "").mkdir(parents=True, exist_ok=True)
    train_base(name, site)
    starts = range(0, halves * MODELS_PER_HALF, MODELS_IN_PART)
    with ProcessPoolExecutor(processes) as pool:
        list(pool.map(partial(train_checkpoint, name=name, site=site), range(CHECKPOINTS)))
        parts = pool.map(partial(retrain_part, name=name, site=site, halves=halves), starts)
        outputs = np.concatenate(list(tqdm(parts, desc=name, total=len(starts), unit="part", disable=None)))
    return outputs.reshape(halves, MODELS_PER_HALF, -1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that both scripts take."""
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"problems; all by default: {', '.join(PROBLEMS)}")
    parser.add_argument("--work", type=Path, default=Path("language-problems"), help="folder of models and outputs")
    parser.add_argument("--debian-root", type=Path, default=Path("/"), help="where Debian's packages are installed")
    parser.add_argument("--halves", type=int, default=150, help="random halves, each with two models")
    parser.add_argument("--processes", type=int, default=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    arguments = parser.parse_args()
    for name in arguments.names or PROBLEMS:
        retrain(name, Site(arguments.work, arguments.debian_root), arguments.halves, arguments.processes)


if __name__ == "__main__":
    main()
