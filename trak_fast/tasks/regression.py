"""Regression on one number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from .base import BatchTask, bind


class Regression(BatchTask):
    """Regression: batches are (inputs, values), and the model returns one number a sample, (B,) or (B, 1).

    f is that number and the loss (f − y)²/2, so Q = y − f. A positive score says that the training sample raises the
    target's number.
    """

    def get_outputs(
        self, model: nn.Module, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor], batch: Sequence[Tensor]
    ) -> Tensor:
        """Computes f of each sample of a batch, (B,)."""
        output: Tensor = bind(model, weights, buffers)(*batch[:-1])
        if output.shape not in ((len(batch[0]),), (len(batch[0]), 1)):
            raise ValueError(
                f"regression: the model must return one number a sample, (B,) or (B, 1), not {tuple(output.shape)}; "
                "with more, choose one by a function of your own as the task"
            )
        return output.reshape(-1)

    def get_weightings(self, outputs: Tensor, batch: Sequence[Tensor]) -> Tensor:
        """Computes Q = y − f of each sample, (B,)."""
        return batch[-1].reshape(outputs.shape) - outputs
