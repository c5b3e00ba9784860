"""dattri 0.3's random projections (`dattri.func.projection`) of kind "normal" and "rademacher".

Call `patch()` to put them into dattri, or use `from trak_fast.compat.dattri import random_project`. dattri's TRAK makes
a new projector for each batch, which costs nothing here: a projector holds a few numbers and no matrix. Other kinds
("sjlt", "random_mask", "grass", "identity") are left to dattri.
"""

from __future__ import annotations

import enum
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from ..projection.projector import Projector
from .patching import Patch, bits

__all__ = ["make_random_projector", "patch", "random_project"]
_KINDS = ("normal", "rademacher")
_patch: Patch | None = None


class DattriProjector:
    """A projector with dattri's protocol, whose results are scaled by 1/√k and have the features' dtype.

    Attributes:
        feature_dim: D.
        proj_dim: k.
        seed: The seed, as it was given.
        proj_type: The kind of matrix, as it was given.
        device: The device that features are moved to.
        dtype: Kept for dattri; has no influence.
    """

    def __init__(
        self,
        feature_dim: int,
        proj_dim: int,
        seed: SupportsIndex,
        proj_type: str | enum.Enum,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.feature_dim = feature_dim
        self.proj_dim = proj_dim
        self.seed = seed
        self.proj_type = proj_type
        self.device = torch.device(device)
        self.dtype = dtype
        self._projector = Projector(feature_dim, proj_dim, bits("proj_seed", seed, 64), proj_type)

    def project(self, features: Tensor | Mapping[str, Tensor], ensemble_id: SupportsIndex = 0) -> Tensor:
        """Projects (B, D), or a mapping of (B, ...), to a new tensor (B, k) of the features' dtype."""
        if isinstance(features, Mapping):
            features = {name: feature.to(self.device) for name, feature in features.items()}
            dtype = next(iter(features.values())).dtype
        else:
            features = features.to(self.device)
            dtype = features.dtype
        result = self._projector.project(features, bits("ensemble_id", ensemble_id, 32))
        return result.div_(self.proj_dim**0.5).to(dtype)

    dict_project = project

    def free_memory(self) -> None:
        """Does nothing: there is no matrix to free."""


def make_random_projector(
    param_shape_list: Sequence[int],
    feature_batch_size: int,
    proj_dim: int,
    proj_max_batch_size: int,
    device: torch.device | str,
    proj_seed: SupportsIndex = 0,
    proj_type: str | enum.Enum = "sjlt",
    *,
    dtype: torch.dtype = torch.float32,
    **kwargs: Any,
) -> Any:
    """Makes a projector from the arguments of dattri's `make_random_projector`.

    Args:
        param_shape_list: Sizes of the features' parts; D is their sum.
        feature_batch_size: Has no influence.
        proj_dim: k.
        proj_max_batch_size: Has no influence: the projector takes any batch.
        device: The device that features are moved to.
        proj_seed: Any integer; its low 64 bits count.
        proj_type: "normal" or "rademacher", as a string or an enum member; other kinds are left to dattri.
        dtype: Has no influence: results have the features' dtype.
        **kwargs: Further arguments of dattri's function, for kinds that are left to it.

    Returns:
        An object with `project(features, ensemble_id)` and `free_memory()`.
    """
    if getattr(proj_type, "value", proj_type) not in _KINDS:
        return _original("make_random_projector")(
            param_shape_list=param_shape_list,
            feature_batch_size=feature_batch_size,
            proj_dim=proj_dim,
            proj_max_batch_size=proj_max_batch_size,
            device=device,
            proj_seed=proj_seed,
            proj_type=proj_type,
            dtype=dtype,
            **kwargs,
        )
    return DattriProjector(sum(param_shape_list), proj_dim, proj_seed, proj_type, device, dtype)


def random_project(
    feature: Tensor | Mapping[str, Tensor],
    feature_batch_size: int,
    proj_dim: int,
    proj_max_batch_size: int,
    proj_seed: SupportsIndex = 0,
    proj_type: str | enum.Enum = "normal",
    *,
    device: torch.device | str = "cpu",
) -> Callable[..., Tensor]:
    """Makes a function that projects features and scales by 1/√k, from the arguments of dattri's `random_project`.

    Args:
        feature: Features of the size and dtype that will be projected: (B, D), or a mapping of (B, ...).
        feature_batch_size: B of `feature`.
        proj_dim: k.
        proj_max_batch_size: Has no influence.
        proj_seed: Any integer; its low 64 bits count.
        proj_type: "normal" or "rademacher", as a string or an enum member; other kinds are left to dattri.
        device: The device that features are moved to.

    Returns:
        A function of (features, ensemble_id=0).
    """
    if getattr(proj_type, "value", proj_type) not in _KINDS:
        original: Callable[..., Tensor] = _original("random_project")(
            feature=feature,
            feature_batch_size=feature_batch_size,
            proj_dim=proj_dim,
            proj_max_batch_size=proj_max_batch_size,
            proj_seed=proj_seed,
            proj_type=proj_type,
            device=device,
        )
        return original
    parts = list(feature.values()) if isinstance(feature, Mapping) else [feature]
    sizes = [part.numel() // max(feature_batch_size, 1) for part in parts]
    projector = make_random_projector(
        param_shape_list=sizes,
        feature_batch_size=feature_batch_size,
        proj_dim=proj_dim,
        proj_max_batch_size=proj_max_batch_size,
        device=device,
        proj_seed=proj_seed,
        proj_type=proj_type,
        dtype=parts[0].dtype,
    )

    def random_project_func(feature: Tensor | Mapping[str, Tensor], ensemble_id: SupportsIndex = 0) -> Tensor:
        result: Tensor = projector.project(feature, ensemble_id)
        return result

    return random_project_func


def _original(name: str) -> Callable[..., Any]:
    """Returns dattri's own function of a name, also while dattri is patched."""
    if _patch is not None and _patch.active:
        replaced: Callable[..., Any] = _patch.originals[name]
        return replaced
    found: Callable[..., Any] = getattr(importlib.import_module("dattri.func.projection"), name)
    return found


def patch() -> Patch:
    """Puts these functions into an installed dattri, and into all modules that have imported dattri's own.

    Returns:
        The patch, which can be undone.

    Raises:
        ImportError: dattri is not installed.
    """
    global _patch
    if _patch is None or not _patch.active:
        projection = importlib.import_module("dattri.func.projection")
        functions = {"random_project": random_project, "make_random_projector": make_random_projector}
        _patch = Patch(projection, functions)
    return _patch
