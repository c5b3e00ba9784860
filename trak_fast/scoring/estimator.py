"""The estimator's choices: which ridge and which weights scores are computed with, checkpoint by checkpoint.

gram.py, ridge.py and solver.py have the algebra. This file reads from the store what they need, and follows the
arguments of `TRAKer`: `lambda_reg`, `curvature`, `use_weights`, `shrink_weights` and `normalize`.
"""

from __future__ import annotations

import logging
import math
import numbers
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..scales import LARGEST_FEATURE, beyond_float32
from ..store.folder import Store
from ..store.rows import Rows
from ..tasks.base import LossCurvature
from . import partial_grams
from .gram import blocks, gram_matrix, sum_of_squares, weighted_gram
from .ridge import auto_ridge, curvature_weights, disagreement, shrunk_weights
from .scores import Checkpoint, ScoreMatrix
from .solver import InnerProducts, Solver, SubsetSolver

logger = logging.getLogger("trak_fast")

LARGEST_SYSTEM = 20_000
"""Equations of a system at most: where n and k are more, the curvature is that of so many training samples."""

AnySolver = Solver | InnerProducts | SubsetSolver


@dataclass
class EstimatorSettings:
    """The choices that `TRAKer` documents.

    Attributes:
        lambda_reg: The ridge in traker's unit; None: chosen from the features ("auto"). Infinite: scores are inner
            products of features.
        curvature: Weighs samples in X'X by the curvature of their loss, where the ridge is chosen.
        shrink_weights: Moves the weights Q toward their mean, where the ridge is chosen.
        normalize: Divides each feature by its norm.
        use_weights: Multiplies the scores of samples by their weights Q.
    """

    lambda_reg: float | None
    curvature: bool
    shrink_weights: bool
    normalize: bool
    use_weights: bool = True

    def inverts(self, has_metric: bool) -> bool:
        """Tells if scores have an inverse of X'X in them; by "auto" not if features are in a metric."""
        return not has_metric if self.lambda_reg is None else self.lambda_reg < math.inf

    def require_invertible(self, store_dtype: str, has_metric: bool) -> None:
        """Checks that features may have their X'X inverted, where scores have an inverse in them.

        Raises:
            ValueError: They are signs, whose noise the inverse would amplify.
        """
        if store_dtype == "1bit" and self.inverts(has_metric):
            raise ValueError(
                'store_dtype must be "int8", "float16" or "float32" where X\'X is inverted, not "1bit"; '
                "lambda_reg=math.inf inverts nothing"
            )


def ridge_setting(lambda_reg: float | str | None) -> float | None:
    """Checks `lambda_reg`, and returns it with None for "auto".

    Raises:
        ValueError: It is neither "auto" nor a number that is at least 0.
        TypeError: It is no number.
    """
    if lambda_reg is None or (isinstance(lambda_reg, str) and lambda_reg == "auto"):
        return None
    if not isinstance(lambda_reg, (str, numbers.Real)):
        raise TypeError(f'lambda_reg must be "auto" or a number, not {lambda_reg!r}')
    if isinstance(lambda_reg, (str, bool)) or not lambda_reg >= 0:
        raise ValueError(f'lambda_reg must be "auto" or a number >= 0 (math.inf: no inverse), not {lambda_reg!r}')
    return float(lambda_reg)


class Estimator:
    """Makes each checkpoint's solver, and the scores of an experiment, from what is stored."""

    def __init__(
        self,
        store: Store,
        settings: EstimatorSettings,
        *,
        task: object,
        grad_dim: int,
        device: torch.device,
        has_metric: bool = False,
    ) -> None:
        """Takes the store and the choices.

        Args:
            store: The features; its `num_rows` is n and its `width` k.
            settings: The choices.
            task: The task; where it is a `LossCurvature`, samples can be weighed by it.
            grad_dim: Gradient size, D.
            device: The model's device. Systems are solved there if it is a CUDA device, else on the CPU, since not all
                other devices have float64.
            has_metric: True where features are multiplied by the root of a metric already, which "auto" inverts no
                second time.
        """
        self.store = store
        self.settings = settings
        self.grad_dim = grad_dim
        self.device = device if device.type == "cuda" else torch.device("cpu")
        self._task = task
        self._has_metric = has_metric

    @property
    def inverts(self) -> bool:
        """True where scores have an inverse of X'X in them; else they are inner products of features."""
        return self.settings.inverts(self._has_metric)

    @property
    def _chooses(self) -> bool:
        """True where the ridge, and the weights that go with it, are chosen from the features."""
        return self.settings.lambda_reg is None and self.inverts

    @property
    def _loss(self) -> LossCurvature | None:
        """The task, where samples are weighed by the curvature of their loss."""
        wanted = self._chooses and self.settings.curvature
        # isinstance, from Python 3.12 on, does not see a method that a task forwards to another one by __getattr__
        return cast(LossCurvature, self._task) if wanted and hasattr(self._task, "get_loss_curvature") else None

    @property
    def sums_while_featurizing(self) -> bool:
        """True where X'X is summed while samples are featurized; where n < k, XX' is formed in the end."""
        return self.inverts and self.store.width <= min(self.store.num_rows, LARGEST_SYSTEM)

    @property
    def _chosen(self) -> NDArray[np.intp] | None:
        """The samples, evenly spread, whose curvature is taken for that of all; None where that of all is formed."""
        if min(self.store.num_rows, self.store.width) <= LARGEST_SYSTEM:
            return None
        return np.linspace(0, self.store.num_rows - 1, LARGEST_SYSTEM).astype(np.intp)

    def curvature(self, weights: NDArray[np.float32]) -> NDArray[np.float64] | None:
        """Computes the curvature ∂²ℓ/∂f² of samples from their weightings Q, (B,) each; None where it has no say."""
        loss = self._loss
        return None if loss is None else np.asarray(loss.get_loss_curvature(np.array(weights, np.float64)))

    def partial_gram(self, model_id: int, train: Rows) -> partial_grams.PartialGram:
        """Opens a sum of X'X over the rows that this process writes to `train`."""
        return partial_grams.PartialGram(
            self.store.partial_grams(model_id),
            num_rows=self.store.num_rows,
            width=self.store.width,
            device=self.device,
            locks=train.locks,
            weighted=self._loss is not None,
        )

    def gram_summand(self, model_id: int, train: Rows, rank: int, size: int) -> Tensor:
        """Computes the summand that process `rank` of `size` contributes to a checkpoint's Gram matrices.

        Returns:
            (1 or 2, s, s) float64, s = min(n, k); of XX', which is no sum over processes, the first one has all and
            the others an empty tensor. Of inner products, (1, 1, 1), the sum of squares in the same way.
        """
        if self.sums_while_featurizing:
            curvature = self.curvature(train.weights)
            return partial_grams.total(self.store.partial_grams(model_id), train, self.device, rank, size, curvature)
        if rank != 0:
            return torch.empty(0)
        if not self.inverts:
            return torch.full((1, 1, 1), sum_of_squares(train.features), dtype=torch.float64)
        return gram_matrix(train.features, self.device, rows=self._chosen).unsqueeze(0)

    def disagreement(self, model_ids: Collection[int]) -> float:
        """Measures ρ between checkpoints, where the ridge depends on it."""
        if not self._chooses:
            return 0.0
        return disagreement([self.store.train(i).features for i in model_ids], self.settings.normalize)

    def solver(self, model_id: int, num_checkpoints: int, rho: float) -> AnySolver:
        """Makes the solver of one of `num_checkpoints` checkpoints whose scores are averaged, and that differ by ρ.

        Raises:
            ValueError: The features are so small that their squares vanish.
        """
        train = self.store.train(model_id)
        features = train.features
        if not self.inverts:
            gram = self.store.gram(model_id)
            squares = gram.item() if gram.size == 1 else sum_of_squares(features)  # or finalized for another ridge
            return InnerProducts(features, squares, self.device, self.settings.normalize)
        self.settings.require_invertible(self.store.store_dtype, self._has_metric)
        curvature = self.curvature(train.weights)
        weights = None if curvature is None else curvature_weights(curvature)
        if weights is not None and self._chosen is not None:
            weights = weights[self._chosen]
        matrix = self._gram(model_id, train, curvature, weights)
        times = 1.0 if self._chosen is None else len(features) / len(self._chosen)
        trace = times * matrix.trace().item()
        if trace < 1 / LARGEST_FEATURE**2:
            if any(np.any(features[rows]) for rows in blocks(*features.shape)):
                raise ValueError(
                    f"the largest feature of model_id {model_id} must be 0 or at least {1 / LARGEST_FEATURE:.3g}, not "
                    f"{trace**0.5:.3g} or less; multiply the model output f by a constant"
                )
            logger.warning("all features of model_id %d are 0, and so are its scores; see grad_wrt", model_id)
        if self.settings.lambda_reg is None:
            ridge = auto_ridge(times * matrix, len(features), features.shape[1], num_checkpoints, rho)
        else:
            ridge = self.settings.lambda_reg * self.grad_dim
        solver: Solver | SubsetSolver
        if self._chosen is None:
            solver = Solver(features, matrix, ridge, weights, self.settings.normalize)
        else:
            solver = SubsetSolver(features, self._chosen, matrix, ridge, weights, self.settings.normalize)
        share = ridge * len(features) / (trace or 1.0)
        logger.info(
            "model_id %d: ridge %.3g, %.3g times the mean squared norm of the features; condition number %.2g",
            model_id,
            ridge,
            share,
            solver.inverse.condition,
        )
        return solver

    def _gram(
        self,
        model_id: int,
        train: Rows,
        curvature: NDArray[np.float64] | None,
        weights: NDArray[np.float64] | None,
    ) -> Tensor:
        """Returns a checkpoint's Gram matrix with its weights, from the stored ones where they suffice."""
        stored = torch.from_numpy(self.store.gram(model_id)).to(self.device)
        own = min(train.features.shape) if self._chosen is None else len(self._chosen)
        if self.settings.normalize or len(stored[0]) != own:  # finalized for inner products
            return gram_matrix(
                train.features, self.device, weights, normalize=self.settings.normalize, rows=self._chosen
            )
        if weights is None or curvature is None:
            return stored[0]
        if len(stored[0]) < self.store.width:  # XX'
            roots = torch.from_numpy(weights).to(stored).sqrt()
            return stored[0] * roots[:, None] * roots
        if len(stored) == 2:
            return weighted_gram(stored[0], stored[1], float(curvature.mean()))
        return gram_matrix(train.features, self.device, weights)  # X'CX is missing: finalized for another ridge

    def score_matrix(self, targets: Mapping[int, Rows]) -> ScoreMatrix:
        """Describes the scores of an experiment.

        Args:
            targets: The target rows of each checkpoint, by model_id.
        """
        rho = self.disagreement(targets)
        checkpoints = [
            Checkpoint(self.solver(i, len(targets), rho), self.store.train(i), rows.features)
            for i, rows in targets.items()
        ]
        return ScoreMatrix(checkpoints, self._score_weights(targets))

    def _score_weights(self, model_ids: Collection[int]) -> Tensor:
        """Computes the factors of samples in scores that are summed over checkpoints, (n,) float64."""
        weights = self.mean_weights(model_ids)
        if not self.settings.use_weights:
            weights = torch.ones_like(weights)
        elif self._chooses and self.settings.shrink_weights:
            weights = shrunk_weights(weights)
        return weights / len(model_ids)

    def direction(self, targets: Mapping[int, Rows], model_id: int, target: int) -> Tensor:
        """Computes the vector whose product with training samples' features, times `factors`, is a checkpoint's share.

        Args:
            targets: The target rows of each checkpoint, by model_id.
            model_id: The checkpoint.
            target: The target's number.

        Returns:
            (k,) float64.
        """
        solver = self.solver(model_id, len(targets), self.disagreement(targets))
        return solver.coefficients(targets[model_id].features[target : target + 1])[:, 0].cpu()

    def product_factors(self, model_ids: Collection[int], model_id: int, rows: NDArray[np.intp]) -> Tensor:
        """Computes what inner products of features are multiplied by, where scores are such, (len(rows),) float64.

        Args:
            model_ids: All checkpoints that scores are averaged over.
            model_id: The checkpoint whose features they are.
            rows: Training samples.
        """
        solver = self.solver(model_id, len(model_ids), rho=0.0)
        assert isinstance(solver, InnerProducts)
        return self._score_weights(model_ids)[torch.from_numpy(rows)] / solver.mean_square

    def require_exact_scores(self) -> None:
        """Checks that scores are inner products, which can be computed without projection.

        Raises:
            ValueError: They have an inverse of X'X in them, or norms of features.
        """
        if self.inverts:
            raise ValueError("lambda_reg must be math.inf for exact scores: the inverse of X'X is known projected only")
        if self.settings.normalize:
            raise ValueError("normalize must be False for exact scores: norms of features are known projected only")

    def factors(self, model_ids: Collection[int], model_id: int, rows: NDArray[np.intp]) -> Tensor:
        """Computes what products of features with `direction` are multiplied by, (len(rows),) float64.

        Args:
            model_ids: All checkpoints that scores are averaged over.
            model_id: The checkpoint whose features they are.
            rows: Training samples.
        """
        factors = self._score_weights(model_ids)[torch.from_numpy(rows)]
        if self.settings.normalize:
            features = self.store.train(model_id).features
            if hasattr(features, "squared_norms_of"):
                norms = torch.from_numpy(features.squared_norms_of(rows)).sqrt()
            else:
                norms = torch.from_numpy(np.array(features[rows], np.float64)).norm(dim=1)
            factors = torch.where(norms > 0, factors / norms, 0.0)  # samples without a gradient have no direction
        return factors

    def mean_weights(self, model_ids: Collection[int]) -> Tensor:
        """Averages the weightings Q of the training samples over checkpoints, (n,) float64.

        Raises:
            ValueError: The largest is beyond float32, in which they are stored.
        """
        weights = np.mean([np.array(self.store.train(i).weights, np.float64) for i in model_ids], axis=0)
        largest = np.abs(weights).max()
        if beyond_float32(largest):
            raise ValueError(
                f"the largest weight of a sample must be 0 or in [1.18e-38, 3.4e+38], not {largest:.3g}; "
                "multiply the loss by a constant, and featurize again"
            )
        if not largest:
            logger.warning("the weights of all training samples are 0, and so are all scores")
        return torch.from_numpy(weights)
