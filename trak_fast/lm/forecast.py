"""The prediction of a run's time, memory and disk, from a small run of the same kind.

Some batches of the real documents, from the longest to the shortest, are computed with the real model in a temporary
folder, and each step is timed. The time of the run follows from the number of its steps; its memory is that of the
small run, in which batches are as large.
"""

from __future__ import annotations

import itertools
import logging
import os
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ..bench.units import bytes_text, seconds_text
from ..store.files import temporary_folder
from ..tasks.tokens import IGNORED
from ..traker import TRAKer
from .compute import fit_metric, metric_pieces
from .report import gradients_line, label
from .run import Run, Targets
from .texts.encoding import make_batches
from .texts.pieces import Piece
from .word_ranks import WordRanks

SAMPLED_BATCHES = 4
"""Batches that are timed beside the first."""

METRIC_DOCUMENTS = (8, 24)
"""Documents that two metrics are made of, by whose times that of the run's metric is predicted."""

COLOURED = 3
"""Documents whose tokens are coloured for each query."""

SHOWN = 400
"""Letters of the example that is shown, at each end of its scored part."""


@dataclass(frozen=True)
class Forecast:
    """A prediction.

    Attributes:
        seconds: Time by step.
        memory: Bytes of memory at the peak; on a CUDA device, of its own.
        disk: Bytes on disk.
        gradients: The line that describes the way from gradients to features.
    """

    seconds: dict[str, float]
    memory: int
    disk: int
    gradients: str

    @property
    def total(self) -> float:
        """Seconds of all steps."""
        return sum(self.seconds.values())

    def content(self) -> dict[str, dict[str, float]]:
        """Arranges the prediction for JSON, as `trak-fast plan` does."""
        return {
            "seconds": self.seconds | {"total": self.total},
            "memory_bytes": {"peak": self.memory},
            "disk_bytes": {"total": self.disk},
        }


def forecast(run: Run, sets: Sequence[Targets], *, tokens: int = COLOURED) -> Forecast:
    """Predicts what a run needs from its beginning.

    Args:
        run: The run.
        sets: The questions.
        tokens: Documents of each query whose tokens are coloured.

    Raises:
        ValueError: As `Run.compute`.
        OSError: The folder cannot be written.
    """
    opening = _seconds_of_process()
    run.folder.path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(run.folder.path) as folder, _without_warnings():
        return _Trial(run, sets, folder, tokens).forecast(opening)


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Drops warnings, of metrics of few documents for example, which are of the small run."""
    logger = logging.getLogger("trak_fast")
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = False


class _Trial:
    """A small run of the same kind."""

    def __init__(self, run: Run, sets: Sequence[Targets], folder: Path, tokens: int) -> None:
        self.run = run
        self.sets = [targets for targets in sets if targets.pieces]
        self.folder = folder
        self.tokens = tokens
        self.state = run.models.state(0, run.model)
        lengths = run.encoded.lengths
        self.batches = make_batches(lengths, run.machine.tokens)
        self.lengths = np.array(lengths)
        places = np.linspace(0, len(self.batches) - 1, SAMPLED_BATCHES + 1).round().astype(int)
        self.chosen = [self.batches[i] for i in dict.fromkeys(places.tolist())]

    def forecast(self, opening: float) -> Forecast:
        """Makes the small run, and predicts the large one."""
        run = self.run
        seconds = {"opening": opening, "metric": self._metric_seconds()}
        rows = [i for batch in self.chosen for i in batch]
        traker = run.make_traker(self.folder / "features", len(rows))
        loading = _time(lambda: traker.load_checkpoint(self.state, 0))
        if run.choice.arguments["metric"] is not None:
            fit_metric(run, traker, metric_pieces(run)[-METRIC_DOCUMENTS[0] :])  # the shortest: it is not judged
        timed, check = self._featurize(traker)
        seconds["first batch"] = check
        seconds["train"] = self._rate(timed, self.lengths)
        finalizing = _time(lambda: traker.finalize_features([0]))
        num_queries = sum(len(targets.pieces) for targets in self.sets)
        if num_queries:
            seconds["query"] = sum(
                self._rate(timed, np.array([len(piece.input_ids) for piece in targets.pieces])) for targets in self.sets
            )
            seconds |= self._score(traker, num_queries)
        checkpoints = len(run.models.folders)
        for step in ("metric", "first batch", "train", "query", "tokens"):
            if step in seconds:
                seconds[step] *= checkpoints
        seconds["loading"] = (2 if num_queries else 1) * loading * checkpoints
        scale = len(self.lengths) / len(rows) * checkpoints
        seconds["scores"] = finalizing * checkpoints + seconds.get("scores", 0.0) * scale
        return Forecast(
            seconds=seconds,
            memory=self._memory(),
            disk=self._disk(traker, len(rows), num_queries),
            gradients=gradients_line(run, traker),
        )

    def _metric_seconds(self) -> float:
        """Predicts the time of making the metric, by two of fewer documents."""
        run = self.run
        if run.choice.arguments["metric"] is None:
            return 0.0
        pieces = metric_pieces(run)
        points = []
        for number, count in enumerate(METRIC_DOCUMENTS):
            some = pieces[:: max(1, len(pieces) // count)][:count]
            traker = run.make_traker(self.folder / f"metric{number}", len(some))
            traker.load_checkpoint(self.state, 0)
            seconds = _time(lambda traker=traker, some=some: fit_metric(run, traker, some))  # type: ignore[misc]
            points.append((sum(len(piece.input_ids) for piece in some), seconds))
        (few, first), (more, second) = points
        slope = max(0.0, second - first) / max(1, more - few)
        return second + slope * (sum(len(piece.input_ids) for piece in pieces) - more)

    def _featurize(self, traker: TRAKer) -> tuple[list[tuple[int, float]], float]:
        """Computes the chosen batches.

        Returns:
            The tokens of the longest document of each batch and the seconds of a token, padding counted; and the
            seconds that the first batch takes longer, in which all samples are checked.
        """
        run = self.run
        timed: list[tuple[int, float]] = []
        first = 0.0
        place = 0
        for number, batch in enumerate(self.chosen):
            pieces = [run.encoded.pieces[i] for i in batch]
            rows = np.arange(place, place + len(batch))
            place += len(batch)
            tensors = run.batch(pieces)
            seconds = _time(lambda tensors=tensors, rows=rows: traker.featurize(tensors, inds=rows))  # type: ignore[misc]
            padded = tensors["input_ids"].numel()
            if number == 0 and len(self.chosen) > 1:
                first = seconds / padded
            else:
                timed.append((tensors["input_ids"].shape[1], seconds / padded))
        usual = timed[0][1]
        padded = len(self.chosen[0]) * int(self.lengths[self.chosen[0]].max())
        return timed, max(0.0, first - usual) * padded

    def _rate(self, timed: Sequence[tuple[int, float]], lengths: NDArray[np.int64]) -> float:
        """Predicts the seconds of pieces of these lengths."""
        widths, rates = zip(*sorted(timed), strict=True)
        total = 0.0
        for batch in make_batches(lengths.tolist(), self.run.machine.tokens):
            longest = int(lengths[batch].max())
            total += len(batch) * longest * float(np.interp(longest, widths, rates))
        return total

    def _score(self, traker: TRAKer, num_queries: int) -> dict[str, float]:
        """Times scores and tokens."""
        run = self.run
        targets = self.sets[0]
        some = list(targets.pieces[: max(1, run.machine.tokens // max(len(p.input_ids) for p in targets.pieces))])
        traker.start_scoring_checkpoint("trial", self.state, 0, len(some))
        traker.score(run.batch(some), num_samples=len(some))
        scores = _time(lambda: traker.finalize_scores("trial"))
        seconds = {"scores": scores * max(1.0, num_queries / len(some))}
        if self.tokens and run.settings.method != "less":
            chosen = [i for batch in self.chosen for i in batch]
            middle = range(len(chosen) // 2, len(chosen))[: self.tokens]
            tensors = run.batch([run.encoded.pieces[chosen[i]] for i in middle])
            try:
                seconds["tokens"] = num_queries * _time(lambda: traker.token_scores("trial", 0, tensors, list(middle)))
            except ValueError:  # parameters whose gradients are no sums over tokens: nothing is coloured
                seconds["tokens"] = 0.0
        texts = [document.shown for document in run.documents.documents[:1000]]
        seconds["page"] = _time(lambda: WordRanks(texts)) * len(run.documents.documents) / len(texts)
        return seconds

    def _memory(self) -> int:
        """Returns the peak of memory so far."""
        if self.run.machine.chosen_device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def _disk(self, traker: TRAKer, num_rows: int, num_queries: int) -> int:
        """Predicts the bytes of the folder: those of rows grow with them, the others stay."""
        path = traker.store.checkpoint(0)
        rows = _size(path / "train")
        fixed = _size(path) - rows - _size(path / "targets")
        targets = 4 * traker.proj_dim * num_queries
        texts = sum(len(document.shown) for document in self.run.documents.documents)
        mean = texts / len(self.run.documents.documents)
        results = 3 * 25 * num_queries * mean
        checkpoints = len(self.run.models.folders)
        return int(checkpoints * (rows * len(self.lengths) / num_rows + fixed + targets) + results)


def _size(path: Path) -> int:
    """Returns the bytes of the files in a folder."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _time(call: Callable[[], object]) -> float:
    """Returns the seconds of a call."""
    started = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _seconds_of_process() -> float:
    """Returns the seconds since this process was started; 0 where the system does not tell."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return float(Path("/proc/uptime").read_text().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return 0.0


def lines(run: Run, found: Forecast, folder: str | None = None) -> list[str]:
    """Tells a prediction.

    Args:
        run: The run.
        found: The prediction.
        folder: The folder that the run would be written to; None: it is not told.
    """
    memory = "GPU memory" if run.machine.chosen_device.type == "cuda" else "memory"
    steps = sorted(found.seconds.items(), key=lambda item: -item[1])
    told = ", ".join(f"{name} {seconds_text(seconds)}" for name, seconds in steps[:4] if seconds > 0.01 * found.total)
    return [
        found.gradients,
        label(
            "batches",
            f"{len(make_batches(run.encoded.lengths, run.machine.tokens)):,} of up to {run.machine.tokens:,} tokens "
            "(--batch-tokens), by length",
        ),
        label(
            "needs",
            f"{seconds_text(found.total)} ({told}), {bytes_text(found.memory)} of {memory}, {bytes_text(found.disk)} "
            f"of disk{f' in {folder}/' if folder else ''}",
        ),
    ]


def example_lines(piece: Piece, run: Run) -> list[str]:
    """Shows a piece as the model sees it, with its scored part between ⟦ and ⟧."""
    # a class is no token: all of its text is scored
    labels = piece.input_ids if run.models.task == "text_classification" else piece.labels
    parts = itertools.groupby(zip(piece.input_ids.tolist(), labels.tolist(), strict=True), _is_scored)
    texts = []
    for is_scored, tokens in parts:
        part = run.tokenizer.decode([token for token, _ in tokens])  # at once: a token alone may lose its blank
        texts.append(f"⟦{part}⟧" if is_scored else part)
    text = "".join(texts)
    if len(text) > 2 * SHOWN:
        text = f"{text[:SHOWN]} … {text[-SHOWN:]}"
    return [label("example" if not place else "", line) for place, line in enumerate(text.splitlines() or [""])]


def _is_scored(token: tuple[int, int]) -> bool:
    """Tells if a token, given with its label, is scored."""
    return token[1] != IGNORED
