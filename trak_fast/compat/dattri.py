"""dattri 0.3's random projections (`dattri.func.projection`) of kind "normal", "rademacher", "sjlt" and "grass".

Call `patch()` to put them into dattri, or use `from trak_fast.compat.dattri import random_project`. dattri's TRAK makes
a new projector for each batch, which costs nothing here: a projector holds a few numbers and no matrix. "sjlt" and
"grass" work on the CPU too, and need no other package. The kinds "random_mask" and "identity" are left to dattri.
"""

from __future__ import annotations

import enum
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, SupportsIndex

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..arguments import integer
from ..projection.checks import SPARSE, gradient_tensors, width
from ..projection.projector import Projector
from .patching import Patch, bits, fitting_nonzeros

__all__ = ["make_random_projector", "patch", "random_project"]
_KINDS = ("normal", "rademacher", SPARSE)
_GRASS = "grass"
_MULTIPLIER = 4
"""The columns that "grass" keeps for each projected value, unless a number is given."""
_patch: Patch | None = None


class DattriProjector:
    """A projector with dattri's protocol, whose results have the features' dtype, and their norms on average.

    Results are scaled by 1/√k, those of "sjlt" by 1/√nonzeros.

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
        sparse = _name(proj_type) == SPARSE
        self._projector = Projector(
            feature_dim,
            proj_dim,
            bits("proj_seed", seed, 64),
            proj_type,
            nonzeros=fitting_nonzeros(proj_dim) if sparse else None,
        )

    def project(self, features: Tensor | Mapping[str, Tensor], ensemble_id: SupportsIndex = 0) -> Tensor:
        """Projects (B, D), or a mapping of (B, ...), to a new tensor (B, k) of the features' dtype."""
        if isinstance(features, Mapping):
            features = {name: feature.to(self.device) for name, feature in features.items()}
            dtype = next(iter(features.values())).dtype
        else:
            features = features.to(self.device)
            dtype = features.dtype
        result = self._projector.project(features, bits("ensemble_id", ensemble_id, 32))
        return result.div_((self._projector.nonzeros or self.proj_dim) ** 0.5).to(dtype)

    dict_project = project

    def free_memory(self) -> None:
        """Does nothing: there is no matrix to free."""


class GrassProjector(DattriProjector):
    """A projector of dattri's kind "grass": keeps random columns of the features, and projects these by "sjlt".

    As with dattri, results are as large as the kept columns, not as all: E‖result‖² = (columns kept / D) · ‖features‖².
    The columns depend on D, their number, the seed and the ensemble only.

    Attributes:
        feature_dim: D.
        proj_dim: k.
        seed: The seed, as it was given.
        proj_type: The kind, as it was given.
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
        grass_multiplier: SupportsIndex = _MULTIPLIER,
    ) -> None:
        kept = min(feature_dim, integer("grass_multiplier", grass_multiplier, 1) * proj_dim)
        super().__init__(kept, proj_dim, seed, SPARSE, device, dtype)
        self.feature_dim = feature_dim
        self.proj_type = proj_type
        self._columns: tuple[int, NDArray[np.int64]] | None = None

    def project(self, features: Tensor | Mapping[str, Tensor], ensemble_id: SupportsIndex = 0) -> Tensor:
        """Projects (B, D), or a mapping of (B, ...), to a new tensor (B, k) of the features' dtype."""
        parts = gradient_tensors(features)
        sizes = [width(part) for part in parts]
        if sum(sizes) != self.feature_dim:
            raise ValueError(f"grads has {sum(sizes)} columns, but grad_dim is {self.feature_dim}")
        columns = self._kept(bits("ensemble_id", ensemble_id, 32))
        ends = np.cumsum(sizes)
        chosen = np.split(columns, np.searchsorted(columns, ends[:-1]))
        kept = [
            part.reshape(len(part), size)[:, torch.from_numpy(inside - end + size).to(part.device)]
            for part, size, end, inside in zip(parts, sizes, ends, chosen, strict=True)
        ]
        return super().project(torch.cat(kept, 1), ensemble_id).to(parts[0].dtype)

    dict_project = project

    def free_memory(self) -> None:
        """Forgets the kept columns, which are drawn again when they are needed."""
        self._columns = None

    def _kept(self, ensemble: int) -> NDArray[np.int64]:
        """Returns the columns that an ensemble keeps, in increasing order."""
        if self._columns is None or self._columns[0] != ensemble:
            generator = np.random.default_rng([bits("proj_seed", self.seed, 64), ensemble])
            drawn = generator.choice(self.feature_dim, self._projector.grad_dim, replace=False, shuffle=False)
            self._columns = ensemble, np.sort(drawn)
        return self._columns[1]


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
        proj_type: "normal", "rademacher", "sjlt" or "grass", as a string or an enum member; other kinds are left to
            dattri.
        dtype: Has no influence: results have the features' dtype.
        **kwargs: `grass_multiplier`, the columns that "grass" keeps for each projected value (4), and further
            arguments of dattri's function, for kinds that are left to it.

    Returns:
        An object with `project(features, ensemble_id)` and `free_memory()`.

    Raises:
        ValueError: A number is out of range, or `proj_dim` is no power of two for "sjlt" or "grass".
        TypeError: Something has the wrong type.
    """
    kind = _name(proj_type)
    if kind == _GRASS:
        multiplier = kwargs.get("grass_multiplier", _MULTIPLIER)
        return GrassProjector(sum(param_shape_list), proj_dim, proj_seed, proj_type, device, dtype, multiplier)
    if kind not in _KINDS:
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
    """Makes a function that projects features and keeps norms, from the arguments of dattri's `random_project`.

    Args:
        feature: Features of the size and dtype that will be projected: (B, D), or a mapping of (B, ...).
        feature_batch_size: B of `feature`.
        proj_dim: k.
        proj_max_batch_size: Has no influence.
        proj_seed: Any integer; its low 64 bits count.
        proj_type: "normal", "rademacher", "sjlt", "grass" or "grass_N", as a string or an enum member; other kinds are
            left to dattri. "grass_N" leaves out all but N k columns (4 k without N), and their share of norms.
        device: The device that features are moved to.

    Returns:
        A function of (features, ensemble_id=0).

    Raises:
        ValueError: A number is out of range, or `proj_dim` is no power of two for "sjlt" or "grass".
        TypeError: Something has the wrong type.
    """
    kind, options = _parsed(proj_type)
    if kind not in (*_KINDS, _GRASS):
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
        proj_type=kind,
        dtype=parts[0].dtype,
        **options,
    )

    def random_project_func(feature: Tensor | Mapping[str, Tensor], ensemble_id: SupportsIndex = 0) -> Tensor:
        result: Tensor = projector.project(feature, ensemble_id)
        return result

    return random_project_func


def _name(proj_type: str | enum.Enum) -> str:
    """Returns the name of a kind that is given as a string or an enum member."""
    return str(getattr(proj_type, "value", proj_type))


def _parsed(proj_type: str | enum.Enum) -> tuple[str, dict[str, int]]:
    """Returns the name of a kind, and the options that are written behind it: "grass_8"."""
    name = _name(proj_type)
    number = name.removeprefix(_GRASS)
    if number in (name, ""):
        return name, {}
    if not (number.startswith("_") and number.isascii() and number[1:].isdecimal()):
        raise ValueError(f"proj_type must be 'grass' or 'grass_N' with an integer N, not {name!r}")
    return _GRASS, {"grass_multiplier": int(number[1:])}


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
