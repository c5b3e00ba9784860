"""The metric that each checkpoint's features are in: made once, kept beside the features, taken by all that follow."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence

from torch import Tensor

from .features.featurizer import Featurizer
from .features.metric import Metric
from .features.streaming import GradientProjector
from .store.files import advising_on_denied, first_file, read_json
from .store.folder import Store
from .store.tensors import read_tensors, write_tensors

MOST_SAMPLES = 256
"""Samples of a first batch at most that a metric is made of."""

FEW_SAMPLES = 64
"""A metric of fewer samples than these is warned of."""

AGAIN = "featurize again, by load_checkpoint(..., _allow_featurizing_already_registered=True) or in another save_dir"

logger = logging.getLogger("trak_fast")


class CheckpointMetrics:
    """Has features computed in the metric of the checkpoint that is loaded."""

    def __init__(self, streaming: GradientProjector | None, store: Store, featurizer: Featurizer) -> None:
        """Takes the parts.

        Args:
            streaming: Computes features; None where whole gradients are projected, which have no metric.
            store: Keeps the metrics.
            featurizer: Knows how many samples fit into memory.
        """
        self._streaming = streaming if streaming is not None and streaming.has_metric else None
        self._store = store
        self._featurizer = featurizer

    @property
    def is_missing(self) -> bool:
        """True where features are to have a metric that was not made yet."""
        return self._streaming is not None and self._streaming.metric is None

    def fit(self, batch: Sequence[Tensor], model_id: int, chunk_size: int | None = None) -> None:
        """Makes and keeps the metric of a checkpoint, unless there is one, which may be another process's.

        Args:
            batch: Some training samples' tensors, (B, ...) each.
            model_id: The checkpoint, whose weights the model has.
            chunk_size: Samples at a time; by default as many as fit into memory.

        Raises:
            ValueError: Features have no metric, gradients are not finite, or the metric of stored features is missing.
        """
        if self._streaming is None:
            raise ValueError('metric must be "kfac" for fit_metric, or "auto" for a task and model that have one')
        path = self._store.metric_file(model_id)
        if not path.exists():
            self._require_no_rows(model_id)
            if len(batch[0]) < min(FEW_SAMPLES, self._store.num_rows):
                logger.warning(
                    "the metric of model_id %d is made of %d samples, and is the better the more there are, up to some "
                    "hundreds: give a larger first batch to featurize, or some to fit_metric before",
                    model_id,
                    len(batch[0]),
                )
            self._streaming.fit_metric(batch, chunk_size or self._featurizer.count_at_a_time(batch))
            assert self._streaming.metric is not None
            roots = self._streaming.metric.state_dict()
            with advising_on_denied(self._store.path):
                write_tensors(path, roots, {"checkpoint": self._mark(model_id)}, publish=first_file)
        else:
            logger.info("the metric of model_id %d is there already, and stays", model_id)
        self.take(model_id)

    def take(self, model_id: int) -> None:
        """Has features computed in the metric that is kept for a checkpoint, if there is one.

        Raises:
            ValueError: The file is damaged, or there is none although features are stored.
        """
        if self._streaming is None:
            return
        path = self._store.metric_file(model_id)
        if not path.exists():
            self._require_no_rows(model_id)
            return
        try:
            roots, notes = read_tensors(path)
            metric = Metric.from_state_dict(roots)
        except (ValueError, LookupError) as error:
            raise ValueError(f"{path} is damaged: {AGAIN}") from error
        if notes.get("checkpoint") != self._mark(model_id) or metric.names != set(self._streaming.selected):
            raise ValueError(f"{path} is the metric of another checkpoint: {AGAIN}")
        self._streaming.metric = metric

    def _mark(self, model_id: int) -> str:
        """Returns what a checkpoint's folder is known by."""
        return json.dumps(read_json(self._store.checkpoint(model_id) / "checkpoint.json"), sort_keys=True)

    def _require_no_rows(self, model_id: int) -> None:
        """Refuses a checkpoint that has features, whose metric is missing."""
        if self._store.train(model_id).done.any():
            raise ValueError(f"{self._store.metric_file(model_id)} is missing: {AGAIN}")
