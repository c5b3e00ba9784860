"""A small attribution and its closed form: gradients by a loop, P from the reference, explicit inverses."""

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trak_fast.projection import reference
from trak_fast.traker import TRAKer

N, M, SEED = 12, 4, 5
EPS = 2.0**-24


def network() -> nn.Sequential:
    """Makes a net of 131 parameters in float64, with modules that training and evaluation mode tell apart."""
    return nn.Sequential(
        nn.Linear(12, 8), nn.BatchNorm1d(8, affine=False), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3)
    ).double()


def data(size: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(size, 12, dtype=torch.float64, generator=generator)
    return [inputs, torch.randint(3, (size,), generator=generator)]


TRAIN, TARGETS = data(N, 46), data(M, 99)  # of some seeds, the one whose gradients are the least dependent


def checkpoint(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    model = network()
    for tensor in (*model.parameters(), model[1].running_mean):
        nn.init.normal_(tensor, std=0.3, generator=generator)
    nn.init.uniform_(model[1].running_var, 0.5, 2, generator=generator)
    return copy.deepcopy(model.state_dict())


CHECKPOINTS = [checkpoint(0), checkpoint(1)]


def build(save_dir: Path, **options: Any) -> TRAKer:
    options = {"proj_dim": 8, "projector_seed": SEED, **options}
    return TRAKer(network(), "image_classification", N, save_dir, **options)


def run(traker: TRAKer, batch_size: int = 5) -> NDArray[np.float32]:
    """Featurizes and scores with the loops of traker's users, and returns the scores."""
    for model_id, state in enumerate(CHECKPOINTS):
        traker.load_checkpoint(state, model_id=model_id)
        for start in range(0, N, batch_size):
            batch = [x[start : start + batch_size] for x in TRAIN]
            traker.featurize(batch, num_samples=len(batch[0]))
    traker.finalize_features()
    for model_id, state in enumerate(CHECKPOINTS):
        traker.start_scoring_checkpoint("test", state, model_id, num_targets=M)
        for inds in ([3, 0], [1, 2]):
            traker.score([x[inds] for x in TARGETS], inds=inds)
    return traker.finalize_scores("test")


def featurize(folder: Path) -> None:
    """Featurizes the training set for the first checkpoint in batches of two."""
    traker = build(folder)
    traker.load_checkpoint(CHECKPOINTS[0], 0)
    for start in range(0, N, 2):
        traker.featurize([x[start : start + 2] for x in TRAIN], num_samples=2)


def by_hand(
    state: dict[str, Tensor], batch: list[Tensor], names: Iterable[str] | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Computes ∇f (B, D) and 1 − p (B,) in float64, one sample at a time."""
    model = network()
    model.load_state_dict(state)
    model.eval()
    parameters = [p for name, p in model.named_parameters() if names is None or name in names]
    gradients, weights = [], []
    for sample, label in zip(*batch, strict=True):
        p = torch.softmax(model(sample.unsqueeze(0)), 1)[0, label]
        parts = torch.autograd.grad(torch.log(p / (1 - p)), parameters)
        gradients.append(torch.cat([part.reshape(-1) for part in parts]))
        weights.append((1 - p).detach())
    return torch.stack(gradients).numpy(), torch.stack(weights).numpy()


def projected(gradients: NDArray[np.float64], proj_dim: int, model_id: int) -> tuple[NDArray, NDArray]:
    """Computes P g, and the error of a projection that takes 24 bits of float64 gradients and sums in float32."""
    entries = reference.matrix("rademacher", SEED, model_id, np.arange(proj_dim), np.arange(gradients.shape[1]))
    bound = (gradients.shape[1] + 2) * EPS * np.abs(gradients).sum(1, keepdims=True)
    return gradients @ entries.T, np.broadcast_to(bound, (len(gradients), proj_dim))


def projected_sparsely(
    gradients: NDArray[np.float64], proj_dim: int, model_id: int, nonzeros: int
) -> tuple[NDArray, NDArray]:
    """Computes √(k/c) P g of the sparse kind, which has the dense kinds' scale, and the error of its features."""
    columns = np.arange(gradients.shape[1])
    P = reference.matrix("sjlt", SEED, model_id, np.arange(proj_dim), columns, proj_dim, nonzeros)
    scale = np.sqrt(proj_dim / nonzeros)
    bound = (gradients.shape[1] + 4) * EPS * scale * np.abs(gradients) @ np.abs(P).T
    return scale * gradients @ P.T.astype(np.float64), bound


def apart(features: list[NDArray]) -> float:
    """Computes ρ, the disagreement of two checkpoints' features, each (N, k)."""
    first, second = (x @ x.T * (N / (x * x).sum()) for x in features)
    size = ((first**2).sum() + (second**2).sum()) / 2
    of_projection = (N**2 + size) / features[0].shape[1]
    return float(np.sqrt(max(0, size - (first * second).sum() - of_projection) / size))


class ClosedForm:
    """τ as the paper writes it, from features in float64 that may be off by a little.

    Attributes:
        scores: (N, M).
        rounding: Bound on what the float32 arithmetic after the features adds to the norm of the scores' error.
        perturbation: Bound on what the features' own errors add, to first order.
    """

    def __init__(
        self,
        grad_dim: int,
        proj_dim: int,
        lambda_reg: float | str,
        features: list[NDArray],
        curvature: bool = True,
        shrink: bool = True,
    ) -> None:
        self.grad_dim, self.proj_dim, self.lambda_reg = grad_dim, proj_dim, lambda_reg
        self.curvature, self.shrink = curvature, shrink and lambda_reg == "auto"
        self.rho = apart(features)
        self.terms: list[NDArray] = []
        self.weights: list[NDArray] = []
        self.rounding = self.perturbation = 0.0

    def add(self, weights: NDArray, x: NDArray, targets: NDArray, x_error: float = 0, targets_error: float = 0) -> None:
        """Adds a checkpoint; errors are bounds on the Frobenius norm."""
        norm, r = np.linalg.norm, np.ones(N)
        if self.lambda_reg == "auto":
            if self.curvature:  # p (1 − p), with the mean 1, and a tenth of it uniform
                r = weights * (1 - weights)
                r = (r / r.mean() + 0.1) / 1.1
            kernel = np.sqrt(r)[:, None] * (x @ x.T) * np.sqrt(r)
            values, count = np.linalg.eigvalsh(kernel), len(CHECKPOINTS)
            apart = np.sqrt(max(0, 0.2**2 - self.rho**2) + self.rho**2 / count)
            ridge = 2 * apart * np.sqrt((values**2).mean()) + values.sum() / self.proj_dim / np.sqrt(count)
        else:
            ridge = float(self.lambda_reg) * self.grad_dim
        if ridge == 0 and self.proj_dim > N:  # least-norm
            left = np.linalg.inv(x @ x.T) @ x
            solved = x.T @ np.linalg.inv(x @ x.T) @ left @ targets.T
            inverse_norm = norm(left, 2) ** 2
        else:
            inverse = np.linalg.inv(x.T @ (r[:, None] * x) + ridge * np.eye(self.proj_dim))
            left, solved, inverse_norm = x @ inverse, inverse @ targets.T, norm(inverse, 2)
        self.terms.append(left @ targets.T)
        self.weights.append(weights)
        self.rounding += (self.proj_dim + 4) * EPS * norm(x) * norm(solved)  # sums of k terms
        # S = L Φ' with L = X K⁻¹: dS = (I − L X') dX K⁻¹ Φ' − L dX' L Φ' + L dΦ', and for the pseudo-inverse of k > N
        # also (XX')⁻¹ dX (I − X⁺X) Φ', of norm at most ‖L‖² ‖dX‖ ‖Φ‖ as the second term
        outer = norm(np.eye(N) - left @ x.T * r, 2) * inverse_norm + 2 * norm(left, 2) ** 2
        self.perturbation += outer * x_error * norm(targets) + norm(left, 2) * targets_error

    @property
    def scores(self) -> NDArray[np.float64]:
        weights = np.mean(self.weights, 0)
        if self.shrink:
            weights = 2 / 3 * weights + weights.mean() / 3
        return weights[:, None] * np.mean(self.terms, 0)

    def check(self, scores: NDArray[np.float32]) -> None:
        error = np.linalg.norm(scores - self.scores)
        bound = (self.rounding + 1.5 * self.perturbation) / len(self.terms)  # half more for higher orders
        assert bound < 0.1 * np.linalg.norm(self.scores)  # else the comparison would say nothing
        assert error <= bound


def from_gradients(proj_dim: int, lambda_reg: float | str, curvature: bool = True, shrink: bool = True) -> ClosedForm:
    """Computes the closed form with nothing taken from the package."""
    parts = []
    for model_id, state in enumerate(CHECKPOINTS):
        gradients, weights = by_hand(state, TRAIN)
        x, x_error = projected(gradients, proj_dim, model_id)
        targets, targets_error = projected(by_hand(state, TARGETS)[0], proj_dim, model_id)
        parts.append((weights, x, targets, float(np.linalg.norm(x_error)), float(np.linalg.norm(targets_error))))
    expected = ClosedForm(131, proj_dim, lambda_reg, [part[1] for part in parts], curvature, shrink)
    for part in parts:
        expected.add(*part)
    return expected
