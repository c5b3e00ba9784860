"""From batches to rows on disk, each once, by the process that claims them; X'X is summed beside."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from .arguments import Indices, row_numbers
from .distributed import Ranks
from .features.featurizer import Featurizer, Part
from .scoring.estimator import Estimator
from .scoring.partial_grams import PartialGram
from .store.rows import Rows


class Recorder:
    """Records the training samples or the targets of one checkpoint at a time."""

    def __init__(self, featurizer: Featurizer, estimator: Estimator, ranks: Ranks) -> None:
        """Starts with nothing open.

        Args:
            featurizer: Computes features and weightings.
            estimator: Says if and how X'X is summed.
            ranks: The processes that share the work.
        """
        self._featurizer = featurizer
        self._estimator = estimator
        self._ranks = ranks
        self._model_id = 0
        self._train: Rows | None = None
        self._targets: Rows | None = None
        self._sum: PartialGram | None = None  # over the rows that this process writes to _train
        self._close_sum: Callable[[], object] | None = None
        self._next = 0  # row that num_samples continues from

    def open_training(self, model_id: int, train: Rows) -> None:
        """Records to the training rows of a checkpoint from here on."""
        self.close()
        self._model_id = model_id
        self._train = train

    def open_targets(self, model_id: int, targets: Rows) -> None:
        """Records to the target rows of a checkpoint from here on."""
        self.close()
        _ = targets.locks  # a folder that may not be written is refused before gradients are computed
        self._model_id = model_id
        self._targets = targets

    def record_training(self, batch: Sequence[Tensor], inds: Indices | None, num_samples: int | None) -> None:
        """Records the training samples of a batch that are not recorded yet; arguments as of `TRAKer.featurize`."""
        if self._train is None:
            raise RuntimeError("call load_checkpoint before featurize")
        self._record(self._train, batch, inds, num_samples)

    def record_targets(self, batch: Sequence[Tensor], inds: Indices | None, num_samples: int | None) -> None:
        """Records the targets of a batch, in place of what was there; arguments as of `TRAKer.score`."""
        if self._targets is None:
            raise RuntimeError("call start_scoring_checkpoint before score")
        self._record(self._targets, batch, inds, num_samples)

    def _record(self, stored: Rows, batch: Sequence[Tensor], inds: Indices | None, num_samples: int | None) -> None:
        rows, following = row_numbers(batch, inds, num_samples, self._next, len(stored.done))
        share = self._ranks.rows(len(stored.done))
        positions = np.flatnonzero((rows >= share.start) & (rows < share.stop))
        stored.claim(rows[positions])
        if stored is self._train:
            positions = positions[~stored.done[rows[positions]]]
        self._featurizer.compute(
            batch,
            positions=positions,
            rows=rows[positions],
            model_id=self._model_id,
            weighted=stored is self._train,
            write=self._write_training if stored is self._train else self._write_targets,
        )
        self._next = following

    def _write_training(self, part: Part) -> None:
        """Writes a part of the training samples, and adds it to X'X unless that is finalized already."""
        train = self._train
        assert train is not None
        assert part.weights is not None
        written = train.write(part.rows, features=part.features, weights=part.weights)
        if self._estimator.sums_while_featurizing and not self._estimator.store.is_finalized(self._model_id):
            curvature = self._estimator.curvature(written["weights"])
            self._open_sum(train).add(part.rows, written["features"], curvature)

    def _write_targets(self, part: Part) -> None:
        assert self._targets is not None
        self._targets.write(part.rows, features=part.features)

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
        """Lets `num_samples` continue from the first row."""
        self._next = 0

    def close(self) -> None:
        """Ends the recording of a checkpoint: saves the sum, and lets other processes write its rows."""
        if self._close_sum is not None:
            self._close_sum()
        for rows in (self._train, self._targets):
            if rows is not None:
                rows.release()
        self._train = self._targets = self._sum = self._close_sum = None
        self.rewind()
