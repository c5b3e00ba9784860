"""From batches to rows on disk, each once, by the process that claims them; X'X is summed beside."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .arguments import Indices, row_numbers
from .checkpoint_metrics import MOST_SAMPLES, CheckpointMetrics
from .distributed import Ranks
from .features.featurizer import Featurizer, Part
from .gradients.repeatable import differ
from .scoring.estimator import Estimator
from .scoring.gram import plain_arithmetic
from .scoring.partial_grams import PartialGram
from .store.rows import Rows
from .store.samples import StoredSamples, digest_samples, other_samples_message

REMEMBERED = 32
"""Samples from row 0 on that are remembered, to notice a loop that is run again."""

KEPT = 4
"""Samples that are stored with their f and Q, to compare the task by when the folder is opened again."""

SAME_TASK = {torch.float64: 1e-6, torch.float32: 1e-2, torch.float16: 0.05, torch.bfloat16: 0.1}
"""The difference of f and Q between devices, as a share of the largest, up to which a task is the same."""

logger = logging.getLogger("trak_fast")


class Repeats:
    """Notices a loop over batches that is run again while `num_samples` goes on counting from its first run.

    Attributes:
        matched: Samples up to the last one that repeat those from row 0 on, as far as they were compared.
    """

    def __init__(self) -> None:
        self.matched = 0
        self._first: list[int] = []  # digests of the samples from row 0 on

    def add(self, start: int, digests: Sequence[int]) -> int | None:
        """Takes the samples that go to rows `start` and following ones.

        Args:
            start: The first row.
            digests: Digests of the first samples of the batch, up to `REMEMBERED`.

        Returns:
            The number of samples before this batch that belong to a repetition, once it is one: as many samples as were
            given before it, up to `REMEMBERED`, repeat the first ones, and are not all alike. None otherwise.
        """
        known = self._first
        if start == len(known) < REMEMBERED:
            self._first = known + [*digests][: REMEMBERED - start]
        for matched in dict.fromkeys((self.matched, 0)):
            compared = min(len(digests), len(known) - matched)
            if start and compared > 0 and list(digests[:compared]) == known[matched : matched + compared]:
                self.matched = matched + compared
                before = start - matched  # rows that came before the repetition
                certain = self.matched >= min(REMEMBERED, before) and len(set(known[: self.matched])) > 1
                return matched if certain else None
        self.matched = 0
        return None


@dataclass
class _Opened:
    """The rows that are being recorded.

    Attributes:
        rows: The rows.
        is_training: True for training samples, False for targets.
        others: The training rows of other checkpoints, whose samples must be the same.
        samples_file: Some samples with their f and Q, from when features were first stored for this checkpoint.
        given: (n,) bool, the rows that this process has been given since.
        repeats: Notices a loop that is run again.
        following: The row that `num_samples` continues from.
        is_lost: True once a loop was run again, so that `num_samples` says nothing until rows are opened again.
        is_task_known: True once the task has been compared with the stored samples.
        warned: True once it was said that gradients are 0.
    """

    rows: Rows
    is_training: bool
    others: Sequence[Rows]
    samples_file: Path
    given: NDArray[np.bool_]
    repeats: Repeats = field(default_factory=Repeats)
    following: int = 0
    is_lost: bool = False
    is_task_known: bool = False
    warned: bool = False

    @property
    def opener(self) -> str:
        """The call that opens such rows."""
        return "load_checkpoint" if self.is_training else "start_scoring_checkpoint"


class Recorder:
    """Records the training samples or the targets of one checkpoint at a time."""

    def __init__(
        self,
        featurizer: Featurizer,
        estimator: Estimator,
        ranks: Ranks,
        metrics: CheckpointMetrics,
        *,
        task: object,
        check_samples: bool = True,
    ) -> None:
        """Starts with nothing open.

        Args:
            featurizer: Computes features and weightings.
            estimator: Says if and how X'X is summed.
            ranks: The processes that share the work.
            metrics: Makes the metric of a checkpoint of the first training samples.
            task: The task; where its batches are padded (`PaddedBatches`), padding is no part of a sample.
            check_samples: Refuses samples that differ from those that rows were stored from.
        """
        self._featurizer = featurizer
        self._estimator = estimator
        self._ranks = ranks
        self._metrics = metrics
        self._task = task
        self._check_samples = check_samples
        self._model_id = 0
        self._opened: _Opened | None = None
        self._sum: PartialGram | None = None  # over the training rows that this process writes
        self._close_sum: Callable[[], object] | None = None

    def open_training(self, model_id: int, train: Rows, others: Sequence[Rows]) -> None:
        """Records to the training rows of a checkpoint from here on.

        Args:
            model_id: The checkpoint's number.
            train: Its training rows.
            others: Those of other checkpoints, which hold the same samples.
        """
        self._open(model_id, train, is_training=True, others=others)

    def open_targets(self, model_id: int, targets: Rows) -> None:
        """Records to the target rows of a checkpoint from here on."""
        self._open(model_id, targets, is_training=False, others=())
        _ = targets.locks  # a folder that may not be written is refused before gradients are computed

    def _open(self, model_id: int, rows: Rows, *, is_training: bool, others: Sequence[Rows]) -> None:
        self.close()
        self._model_id = model_id
        self._opened = _Opened(
            rows=rows,
            is_training=is_training,
            others=others,
            samples_file=self._estimator.store.samples_file(model_id),
            given=np.zeros(len(rows.done), np.bool_),
        )

    def record_training(self, batch: Sequence[Tensor], inds: Indices | None, num_samples: int | None) -> None:
        """Records the training samples of a batch that are not recorded yet; arguments as of `TRAKer.featurize`."""
        if self._opened is None or not self._opened.is_training:
            raise RuntimeError("call load_checkpoint before featurize")
        self._record(self._opened, batch, inds, num_samples)

    def record_targets(self, batch: Sequence[Tensor], inds: Indices | None, num_samples: int | None) -> None:
        """Records the targets of a batch, in place of what was there; arguments as of `TRAKer.score`."""
        if self._opened is None or self._opened.is_training:
            raise RuntimeError("call start_scoring_checkpoint before score")
        self._record(self._opened, batch, inds, num_samples)

    def _record(self, opened: _Opened, batch: Sequence[Tensor], inds: Indices | None, num_samples: int | None) -> None:
        stored = opened.rows
        share = self._ranks.rows(len(stored.done))
        if num_samples is not None and opened.is_lost:
            raise RuntimeError(f"a loop was run again before: call {opened.opener} first, or give inds")
        try:
            rows, following = row_numbers(batch, inds, num_samples, opened.following, len(stored.done))
        except ValueError:
            if num_samples is not None and opened.following + int(num_samples) > len(stored.done):
                self._take_back(opened, opened.repeats.matched, share)  # the end of a loop that was run again, perhaps
            raise
        positions = np.flatnonzero((rows >= share.start) & (rows < share.stop))
        stored.claim(rows[positions])
        marked = self._task.clear_padding(batch) if hasattr(self._task, "clear_padding") else batch
        heads = np.arange(0 if num_samples is None else min(len(rows), REMEMBERED))  # of other processes too
        places = np.union1d(heads, positions)
        digests = dict(zip(rows[places].tolist(), digest_samples(marked, places), strict=True))
        if len(heads):
            self._refuse_repeats(opened, rows, np.array([digests[row] for row in rows[heads].tolist()]), share)
        own = [digests[row] for row in rows[positions].tolist()]
        self._compare_samples(opened, rows[positions], np.array(own, np.uint32))
        if len(positions):
            self._compare_task(opened, [x[torch.from_numpy(positions[:KEPT]).to(x.device)] for x in batch])
        if opened.is_training:
            if self._metrics.is_missing and len(rows):
                self._metrics.fit([x[:MOST_SAMPLES] for x in batch], self._model_id)
            positions = positions[~stored.done[rows[positions]]]
        all_zero = len(positions) > 0

        def write(part: Part) -> None:
            nonlocal all_zero
            all_zero = all_zero and not part.features.any()
            of_part = np.array([digests[row] for row in part.rows.tolist()], np.uint32)
            self._write(opened, part, of_part)

        self._featurizer.compute(
            batch,
            positions=positions,
            rows=rows[positions],
            model_id=self._model_id,
            weighted=opened.is_training,
            write=write,
        )
        if all_zero and not opened.warned:
            opened.warned = True
            logger.warning(
                "all gradients of samples %d to %d are exactly 0: does the output depend on the parameters that are "
                "attributed (grad_wrt), by the weights that the task is given, and without detach or no_grad?",
                rows[positions].min(),
                rows[positions].max(),
            )
        opened.given[rows] = True
        opened.following = following

    def _refuse_repeats(
        self, opened: _Opened, rows: NDArray[np.intp], digests: NDArray[np.uint32], share: slice
    ) -> None:
        """Refuses the samples of a loop that is run again without being opened again.

        Raises:
            RuntimeError: These samples were given before; rows that were written from them are taken back.
        """
        before = opened.repeats.add(int(rows[0]), digests.tolist())
        if before is None:
            return
        self._take_back(opened, before, share)
        opened.is_lost = True
        raise RuntimeError(
            f"the samples for rows {rows[0] - before} to {rows[0] + len(digests) - 1} were given before, from row 0 "
            f"on: num_samples goes on from the last row; to run a loop again, call {opened.opener} first (if the set "
            "really repeats its first samples, give inds)"
        )

    def _take_back(self, opened: _Opened, count: int, share: slice) -> None:
        """Has the last `count` rows that `num_samples` counted count as not written."""
        wrong = np.arange(opened.following - count, opened.following)
        opened.rows.undo(wrong[(wrong >= share.start) & (wrong < share.stop)])
        if count:
            opened.is_lost = True
            if self._sum is not None:
                self._sum.discard()

    def _compare_samples(self, opened: _Opened, rows: NDArray[np.intp], digests: NDArray[np.uint32]) -> None:
        """Compares samples with those that rows were stored from.

        Training samples must be the same. Targets may be others; then all rows of this process that were stored from
        those before count as not written.

        Raises:
            ValueError: Training samples differ.
        """
        if not self._check_samples:
            return
        if opened.is_training:
            for known in (opened.rows, *opened.others):
                if len(other := known.other_samples(rows, digests)):
                    raise ValueError(other_samples_message(other, known.path))
        elif len(opened.rows.other_samples(rows, digests)):
            share = self._ranks.rows(len(opened.given))
            stale = np.arange(share.start, share.stop)
            stale = stale[opened.rows.done[share] & ~opened.given[share]]
            opened.rows.claim(stale)
            opened.rows.undo(stale)

    def require_samples(self, stored: Rows, batch: Sequence[Tensor], rows: NDArray[np.intp]) -> None:
        """Refuses samples that differ from those that rows were stored from.

        Raises:
            ValueError: They differ.
        """
        if len(other := self._other_samples(stored, batch, rows)):
            raise ValueError(other_samples_message(other, stored.path))

    def are_samples(self, stored: Rows, batch: Sequence[Tensor], rows: NDArray[np.intp]) -> bool:
        """Tells if samples are those that rows were stored from."""
        return not len(self._other_samples(stored, batch, rows))

    def _other_samples(self, stored: Rows, batch: Sequence[Tensor], rows: NDArray[np.intp]) -> NDArray[np.integer]:
        """Returns those of some rows that were stored from other samples."""
        if not self._check_samples:
            return np.empty(0, np.intp)
        marked = self._task.clear_padding(batch) if hasattr(self._task, "clear_padding") else batch
        return stored.other_samples(rows, digest_samples(marked, np.arange(len(rows))))

    def _compare_task(self, opened: _Opened, some: Sequence[Tensor]) -> None:
        """Compares f and Q of the stored samples with what the task makes of them now; stores some if there are none.

        Raises:
            ValueError: They differ.
        """
        if opened.is_task_known:
            return
        known = StoredSamples.load(opened.samples_file)
        if known is not None:
            now = self._featurizer.evaluate(known.batch)
            for name, before, after in (("f", known.outputs, now.outputs), ("Q", known.weightings, now.weightings)):
                if differ(before, after, SAME_TASK.get(self._featurizer.dtype, 0.1)):
                    raise ValueError(
                        f"the task or the model computes something else than when features were stored in "
                        f"{opened.samples_file.parent}: {name} of stored samples was {before.tolist()}, and is "
                        f"{after.tolist()} now; use another save_dir"
                    )
        elif opened.is_training:
            some = [x.cpu() for x in some]
            try:
                now = self._featurizer.evaluate(some)
                StoredSamples(batch=some, outputs=now.outputs, weightings=now.weightings).save(opened.samples_file)
            except Exception as error:  # gradients or rows will say so, if it is in their way too
                logger.debug("samples are not stored, later runs compare the task's description alone: %s", error)
        opened.is_task_known = True

    @plain_arithmetic()
    def _write(self, opened: _Opened, part: Part, digests: NDArray[np.uint32]) -> None:
        """Writes a part, and adds that of training samples to X'X unless X'X is finalized already."""
        if not opened.is_training:
            opened.rows.write(part.rows, digests, features=part.features)
            return
        assert part.weights is not None
        written = opened.rows.write(part.rows, digests, features=part.features, weights=part.weights)
        if self._estimator.sums_while_featurizing and not self._estimator.store.is_finalized(self._model_id):
            curvature = self._estimator.curvature(written["weights"])
            self._open_sum(opened.rows).add(part.rows, written["features"], curvature)

    def _open_sum(self, train: Rows) -> PartialGram:
        if self._sum is None:
            self._sum = self._estimator.partial_gram(self._model_id, train)
            # also when the interpreter ends, or this object goes without `close`
            self._close_sum = weakref.finalize(self, self._sum.close)
        return self._sum

    def save_sum(self) -> None:
        """Puts the sum of X'X on disk, where `Estimator.gram_summand` finds it."""
        if self._sum is not None:
            self._sum.save()

    def rewind(self) -> None:
        """Lets `num_samples` of targets continue from the first row."""
        if self._opened is not None and not self._opened.is_training:
            self._opened.following = 0
            self._opened.is_lost = False
            self._opened.repeats = Repeats()

    def close(self) -> None:
        """Ends the recording of a checkpoint: saves the sum, and lets other processes write its rows."""
        if self._close_sum is not None:
            self._close_sum()
        if self._opened is not None:
            self._opened.rows.release()
        self._opened = self._sum = self._close_sum = None
