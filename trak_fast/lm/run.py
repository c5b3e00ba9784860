"""A run of `trak-fast lm`: opens what there is, computes what is missing, and says what it found.

run = open_run(folder, given, machine)       settings, documents and model; refuses what does not fit
targets = run.targets(documents, "queries")  encoded questions
compute(run, [targets])                      features of what is not stored yet (compute.py)
answer(run, targets, ...)                    scores, rankings and files (answer.py)
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from ..distributed import Ranks
from ..store.files import temporary_folder
from ..tasks import resolve_task
from ..traker import TRAKer
from .folder import RunFolder, check_is_prefix, digests_of, digests_of_tokens
from .machine import Machine
from .models.folders import Models, find_models
from .projection import Choice, choose_projection, stored_choice
from .settings import FIELDS, MASKINGS, Settings, merged, settings_of
from .texts.documents import Document, Documents, Fields, read_documents, read_documents_of_some
from .texts.encoding import Encoded, Piece, collate, encode

FIRST_DOCUMENTS = 16
"""Documents whose tokens are compared with those that a run was made of."""


@dataclass(frozen=True)
class Targets:
    """Questions, encoded.

    Attributes:
        name: Name of the set, part of folders' names.
        documents: The questions that are scored.
        left_out: Numbers of those without a scored token, which are not.
        pieces: Their pieces.
        owners: The place in `documents` that each piece belongs to.
        encoded: All questions as tokens, those that are left out too.
    """

    name: str
    documents: tuple[Document, ...]
    left_out: tuple[int, ...]
    pieces: tuple[Piece, ...]
    owners: NDArray[np.int64]
    encoded: Encoded

    @cached_property
    def exp_name(self) -> str:
        """The name of TRAKer's experiment, which tells these questions from others of the same name."""
        digest = hashlib.blake2b(digest_size=8)
        for piece in self.pieces:
            digest.update(len(piece.input_ids).to_bytes(8, "little"))
            digest.update(
                np.ascontiguousarray(piece.input_ids).tobytes() + np.ascontiguousarray(piece.labels).tobytes()
            )
        return f"{self.name}-{digest.hexdigest()}"


class Run:
    """A run whose settings are known, and whose documents and model are read."""

    def __init__(
        self,
        folder: RunFolder,
        settings: Settings,
        machine: Machine,
        models: Models,
        documents: Documents,
        *,
        ranks: Ranks,
        is_moved: bool = False,
    ) -> None:
        """Takes the parts; `open_run` reads them.

        Args:
            folder: The folder of the run.
            settings: The settings.
            machine: The means to compute with.
            models: The checkpoints.
            documents: The training documents.
            ranks: The processes that share the work.
            is_moved: True where the checkpoints are in other folders or files than run.json says: their weights are
                checked before anything else is done.
        """
        self.folder = folder
        self.settings = settings
        self.machine = machine
        self.models = models
        self.documents = documents
        self.ranks = ranks
        self.is_moved = is_moved
        self.waiting = 0  # documents in the files behind those of the run, which were not asked for
        self._loaded: int | None = None

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer."""
        return self.models.tokenizer()

    @property
    def max_tokens(self) -> int:
        """Tokens of a document at most.

        Raises:
            ValueError: --max-tokens is more than the model takes, or must be given.
        """
        own = self.models.max_tokens
        wanted = self.settings.max_tokens
        if wanted is None and own is None:
            raise ValueError("--max-tokens must be given: the model's config does not say how many tokens it takes")
        if own is not None and wanted is not None and wanted > own:
            raise ValueError(f"--max-tokens must be at most {own:,}, which the model takes, not {wanted:,}")
        return wanted or own or 0

    def encode(self, documents: Sequence[Document]) -> Encoded:
        """Turns documents into tokens, as the settings say."""
        return encode(
            documents,
            self.tokenizer,
            task=self.models.task,
            max_tokens=self.max_tokens,
            long=self.settings.long,
            vocab_size=self.models.vocab_size,
            label_ids=self.models.label_ids,
            maskings=self.maskings,
            seed=self.settings.seed,
        )

    @cached_property
    def pad_id(self) -> int:
        """The token that pads, by which some classifiers find the last token of a text."""
        tokens = (self.models.folders[0].config.pad_token_id, self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        return next((token for token in tokens if isinstance(token, int)), 0)

    def batch(self, pieces: Sequence[Piece]) -> dict[str, Tensor]:
        """Makes a batch of pieces."""
        return collate(pieces, self.models.task, pad_id=self.pad_id)

    @cached_property
    def encoded(self) -> Encoded:
        """The training documents as tokens."""
        return self.encode(self.documents.documents)

    @cached_property
    def pieces_of_documents(self) -> NDArray[np.int64]:
        """The number of pieces of each training document, (n,)."""
        stored = self.folder.documents()
        if stored is not None and len(stored[1]) == len(self.documents.documents):
            return stored[1]
        owners = [piece.document for piece in self.encoded.pieces]
        return np.bincount(owners, minlength=len(self.documents.documents))

    @cached_property
    def owners(self) -> NDArray[np.int64]:
        """The training document that each piece belongs to."""
        return np.repeat(np.arange(len(self.pieces_of_documents)), self.pieces_of_documents)

    @cached_property
    def model(self) -> nn.Module:
        """The model, with the weights of the first checkpoint."""
        model = self.models.build(
            device=self.machine.chosen_device, dtype=self.settings.dtype, attention=self.settings.attention
        )
        config: Any = model.config
        config.use_cache = False  # keys of past tokens would only take memory
        if self.models.task == "text_classification":
            config.pad_token_id = self.pad_id
        return model.eval()

    @cached_property
    def choice(self) -> Choice:
        """The way from gradients to features: that of the run, or one that is chosen."""
        facts = self.folder.facts()
        if "arguments" in facts:
            return stored_choice(facts, self.folder.name)
        task = resolve_task(self.models.task)
        return choose_projection(self.settings, self.model, task, self.mean_tokens, self.machine.chosen_device.type)

    @cached_property
    def mean_tokens(self) -> float:
        """Tokens of a piece on average."""
        return self.encoded.tokens / max(1, len(self.encoded.pieces))

    @property
    def maskings(self) -> int:
        """Maskings of each document, by which the sum of the scores of its pieces is divided; 1 for other tasks."""
        return (self.settings.maskings or MASKINGS) if self.models.task == "masked_lm" else 1

    @cached_property
    def traker(self) -> TRAKer:
        """The features, with a row for each piece."""
        return self._open_features()

    def _replace_older(self) -> None:
        """Deletes the run that this one overwrites, if there is one, once it is clear that this one can begin.

        Raises:
            ValueError: A setting is refused, or no training document has a scored token; the older run stays.
        """
        if self.folder.is_outdated:
            self._require_scored()
            with temporary_folder(self.folder.features) as folder:
                self.make_traker(folder, len(self.encoded.pieces))
            self.ranks.first(self.folder.delete_outdated)
            self.folder.is_outdated = False

    def _open_features(self) -> TRAKer:
        """Opens the features, makes them, or has them grow to the pieces that there are."""
        self._replace_older()
        stored = self.folder.num_stored()
        if stored is None:
            self._require_scored()
        wanted = int(self.pieces_of_documents.sum())
        self._require_same_tokens()
        traker = self.make_traker(self.folder.features, wanted if stored is None else stored)
        if self.is_moved:
            for model_id in traker.store.model_ids():
                with self._naming_weights(model_id):
                    traker.load_checkpoint(self.models.state(model_id, self.model), model_id)
        if self.ranks.rank == 0:
            stored_digests = self.folder.documents()
            if stored_digests is None or len(stored_digests[0]) != len(self.documents.documents):
                self.folder.save_documents(digests_of(self.documents.documents), self.pieces_of_documents)
            self.folder.save(self.settings.stored(), self.facts(traker))
        if wanted > traker.train_set_size:
            traker.extend(wanted)
        return traker

    def _require_scored(self) -> None:
        """Checks that there is something to attribute to.

        Raises:
            ValueError: No training document has a scored token.
        """
        if len(self.encoded.empty) == len(self.documents.documents):
            raise ValueError("--train must have a document with a scored token, and none of them has one")

    @cached_property
    def first_tokens(self) -> list[str]:
        """Digests of the tokens of the first documents, by which another tokenizer is noticed."""
        return digests_of_tokens(self.encode(self.documents.documents[:FIRST_DOCUMENTS]).pieces)

    def _require_same_tokens(self) -> None:
        """Checks that documents have the tokens that their features were made of.

        Raises:
            ValueError: They have others.
        """
        known = self.folder.facts().get("first_tokens", [])
        for document, old, new in zip(self.documents, known, self.first_tokens, strict=False):
            if old != new:
                raise ValueError(
                    f"the tokenizer of {self.models.tokenizer_path} makes other tokens of {document.where} than those "
                    f"that {self.folder.name}/ was made of; --tokenizer DIR with the old one, another --out, or "
                    "--overwrite"
                )

    def make_traker(self, path: Path, num_rows: int) -> TRAKer:
        """Opens or makes features in a folder, with the settings of the run.

        "dot" multiplies gradients of losses, and "trak" weighs the samples of classifications as TRAK does (Park et
        al., 2023, section 3.2). For language models it does not: with 1 − p documents that are known by heart would
        count for nothing, just those that taught the model its answer.
        """
        method = self.settings.method
        is_weighted = method in ("dot", "less") or (method == "trak" and self.models.task == "text_classification")
        task: Any = resolve_task(self.models.task)
        task._warned = True  # of samples without a predicted token, which the command tells of
        return TRAKer(
            self.model,
            task,
            num_rows,
            path,
            optimizer_state=self.optimizer_states(),
            memory_budget=self.machine.memory,
            lambda_reg="auto" if method == "trak" else math.inf,
            normalize=method != "dot",
            use_weights=is_weighted,
            logging_level=logging.WARNING,
            **self.choice.arguments,
        )

    def optimizer_states(self) -> dict[int, str] | None:
        """Returns the files with Adam's moments of each checkpoint, for the method that needs them.

        Raises:
            ValueError: One is missing.
        """
        if self.settings.method != "less":
            return None
        for folder in self.models.folders:
            if folder.optimizer is None:
                raise ValueError(
                    f"--method less needs Adam's moments: {folder.path}/optimizer.pt is missing; --method cosine"
                )
        return {i: str(folder.optimizer) for i, folder in enumerate(self.models.folders)}

    def facts(self, traker: TRAKer) -> dict[str, Any]:
        """Collects what run.json tells people beside the settings."""
        return {
            "documents": len(self.documents.documents),
            "pieces": int(self.pieces_of_documents.sum()),
            "task": self.models.task,
            "parameters": traker.grad_dim,
            "proj_dim": traker.proj_dim,
            "store_dtype": traker.store.store_dtype,
            "first_tokens": self.first_tokens,
            "weights": stamps_of(self.models),
            "way": self.choice.text,
            "arguments": self.choice.arguments,
        }

    def targets(self, documents: Documents, name: str) -> Targets:
        """Encodes questions; those without a scored token are left out."""
        encoded = self.encode(documents.documents)
        left_out = set(encoded.empty)
        scored = [i for i in range(len(documents.documents)) if i not in left_out]
        places = {document: place for place, document in enumerate(scored)}
        pieces = [piece for piece in encoded.pieces if piece.document in places]
        return Targets(
            name=name,
            documents=tuple(documents.documents[i] for i in scored),
            left_out=tuple(encoded.empty),
            pieces=tuple(pieces),
            owners=np.array([places[piece.document] for piece in pieces], np.int64),
            encoded=encoded,
        )

    def num_featurized(self) -> list[int]:
        """Counts the documents whose features are stored, at each checkpoint."""
        total = len(self.documents.documents)
        return [total - len(np.unique(self.owners[~self.done(i)])) for i in range(len(self.models.folders))]

    def done(self, model_id: int) -> NDArray[np.bool_]:
        """Tells which pieces a checkpoint has features of, (n,)."""
        if model_id not in self.traker.store.model_ids():
            return np.zeros(len(self.owners), bool)
        return np.array(self.traker.store.train(model_id).done, bool)

    @contextmanager
    def _naming_weights(self, model_id: int) -> Iterator[None]:
        """Says in the command's words that features belong to other weights."""
        try:
            yield
        except ValueError as error:
            if "belong to other weights" not in str(error):
                raise
            raise ValueError(
                f"{self.models.folders[model_id].path} has other weights, or another optimizer.pt, than "
                f"{self.folder.name}/ was made with; give these, another --out, or --overwrite"
            ) from error

    def load(self, model_id: int) -> Mapping[str, Tensor]:
        """Loads a checkpoint into the model, with its features open, and returns its state dict.

        Raises:
            ValueError: The checkpoint has other weights than its features were made with.
        """
        state = self.models.state(model_id, self.model)
        with self._naming_weights(model_id):
            self.traker.load_checkpoint(state, model_id)
        self._loaded = model_id
        return state

    def ensure_loaded(self, model_id: int) -> None:
        """Loads a checkpoint unless the model has its weights."""
        if self._loaded != model_id:
            self.load(model_id)

    def forget_scores(self, targets: Targets) -> None:
        """Deletes the file of the scores of pieces, which results are made from."""
        self.ranks.first(self.traker.store.scores_file(targets.exp_name).unlink, missing_ok=True)


def open_run(
    out: str | os.PathLike[str],
    given: Mapping[str, Any],
    machine: Machine,
    *,
    overwrite: bool = False,
    limit: int | None = None,
    has_questions: bool = False,
) -> Run:
    """Opens a run, or begins one; nothing is computed, and a new one leaves nothing on disk yet.

    Args:
        out: The folder.
        given: Settings by name; None for those that were not given, which are those of the run, or the defaults.
        machine: The means to compute with.
        overwrite: Has the run that is there count as none; it is deleted when features are opened.
        limit: Training documents at most.
        has_questions: True where fields that training documents lack may be those of questions.

    Raises:
        ValueError: Settings, documents or models do not fit each other, or the run that is there.
        OSError: A file cannot be read.
    """
    ranks = Ranks()
    folder = RunFolder(out, overwrite=overwrite)
    stored = folder.settings()
    if has_questions:
        given = _without_fields_of_questions(given, limit=limit)
    settings = settings_of(given, folder.name) if stored is None else merged(stored, given, folder.name)
    with _naming_run(folder, settings, given if stored is not None else {"models": True, "train": True}):
        models = find_models(
            _near(settings.models), base=settings.base, tokenizer=settings.tokenizer, task=settings.task
        )
        settings.require_fit(models.task)
        fields = Fields(**{name: getattr(settings, name) for name in (*FIELDS, "label")})
        documents = read_documents(_near(settings.train), fields, by_file=settings.by_file, limit=limit)
    known = folder.documents() if stored is not None else None
    waiting = 0
    if known is not None:
        if given.get("train") is None:  # questions for the run as it is
            waiting = len(documents) - len(known[0])
            documents = Documents(documents.documents[: len(known[0])], documents.fields)
        found = digests_of(documents.documents)
        check_is_prefix(folder, known[0], documents.documents, found)
    is_moved = stored is not None and (
        any(settings.stored()[name] != stored[name] for name in ("models", "base"))
        or folder.facts().get("weights") != stamps_of(models)
    )
    run = Run(folder, settings, machine, models, documents, ranks=ranks, is_moved=is_moved)
    run.waiting = max(0, waiting)
    run.optimizer_states()  # refuses what is missing before a model is read
    return run


def _without_fields_of_questions(given: Mapping[str, Any], *, limit: int | None) -> Mapping[str, Any]:
    """Leaves out the names of fields that training documents lack: they are those of questions."""
    flags = {name: given.get(name) for name in FIELDS}
    if not given.get("train") or not any(flags.values()):
        return given
    fields = Fields(**flags)
    if fields.text is not None:
        fields = dataclasses.replace(fields, prompt=None, completion=None)
    by_file = bool(given.get("by_file"))
    _, taken = read_documents_of_some(_near(given["train"]), fields, FIELDS, by_file=by_file, limit=limit)
    return {**given, **{name: getattr(taken, name) for name in FIELDS}}


@contextmanager
def _naming_run(folder: RunFolder, settings: Settings, given: Mapping[str, Any]) -> Iterator[None]:
    """Says of files that are missing that run.json names them, and how new places are given.

    Raises:
        ValueError: A model or a file is missing that was not given.
    """
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        lost = [path for path in settings.models if given.get("models") is None and not Path(path).is_dir()]
        if lost:
            raise ValueError(
                f"{lost[0]}, of {folder.name}/run.json, is no longer there; give MODEL, the new place"
            ) from error
        lost = [path for path in settings.train if given.get("train") is None and not Path(path).exists()]
        if lost:
            raise ValueError(
                f"{lost[0]}, of {folder.name}/run.json, is no longer there; give --train, the new place"
            ) from error
        raise


def stamps_of(models: Models) -> list[list[list[Any]]]:
    """Returns name, bytes and time of each file of weights and moments, by which files that were replaced are noticed.

    Returns:
        A list for each checkpoint, as JSON has it.
    """
    result = []
    for folder in models.folders:
        places = [folder.path] if folder.base is None else [folder.path, folder.base]
        files = {file for place in places for ending in ("safetensors", "bin") for file in place.glob(f"*.{ending}")}
        files |= set() if folder.optimizer is None else {folder.optimizer}
        states = [(file.name, file.stat()) for file in sorted(files)]
        result.append([[name, state.st_size, state.st_mtime_ns] for name, state in states])
    return result


def _near(paths: Sequence[str]) -> list[Path]:
    """Returns paths as seen from the working directory, where they are below it."""
    here = Path.cwd()
    return [path.relative_to(here) if path.is_relative_to(here) else path for path in map(Path, paths)]
