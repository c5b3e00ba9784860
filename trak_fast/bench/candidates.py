"""The projections to measure: ours for each instruction set or kernel, torch, and those of other libraries.

Each is found by import, and is a function from gradients (B, D) to (B, k) once it is made for a `Case`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import projection
from ..projection.checks import SPARSE
from ..projection.kernels import ISA_VARIABLE, KERNEL_VARIABLE
from .case import DENSE_TYPES, DEVICES, DTYPES, NONZEROS, PROJ_TYPES, Case

Project = Callable[[Tensor], Tensor]

CHUNK = 1 << 24
"""Entries of the matrix that "torch, in chunks" draws at a time."""


@dataclass(frozen=True)
class Candidate:
    """A projection to benchmark if its library is installed.

    Attributes:
        name: Its name in results.
        module: The module that must be importable.
        make: Makes the projection for a case.
        package: The packages to give to pip, if not named as the module.
        devices: Devices that it runs on.
        proj_types: Kinds of matrix that it has.
        dtypes: Dtypes of gradients that it takes.
        environment: Environment variables of its process.
        scaled: True if its results keep norms on average, because the matrix is divided by √k, or a sparse one by the
            root of a column's entries.
        stored_bytes: Memory that its matrix takes, from the case.
        proj_dim_step: Number that k must be a multiple of.
        ours: True if its matrix is trak_fast's, which reference.py states again.
    """

    name: str
    module: str
    make: Callable[[Case], Project]
    package: str = ""
    devices: tuple[str, ...] = DEVICES
    proj_types: tuple[str, ...] = DENSE_TYPES
    dtypes: tuple[str, ...] = DTYPES
    environment: Mapping[str, str] = field(default_factory=dict)
    scaled: bool = False
    stored_bytes: Callable[[Case], int] = lambda case: 0
    proj_dim_step: int = 1
    ours: bool = False

    def missing(self) -> str | None:
        """Returns the reason why it cannot be imported, or None."""
        try:
            if importlib.util.find_spec(self.module) is not None:
                return None
        except (ImportError, ValueError):
            pass
        return f"{self.module} is not installed: pip install {self.package or self.module}"

    def refusal(self, case: Case, free_bytes: int) -> str | None:
        """Returns the reason why this candidate cannot run `case`, or None.

        Args:
            case: The shape.
            free_bytes: Memory that its matrix may take.
        """
        for name, value, allowed in (
            ("device", case.device, self.devices),
            ("kind", case.proj_type, self.proj_types),
            ("dtype", case.dtype, self.dtypes),
        ):
            if value not in allowed:
                return f"{name} {value}: it has {', '.join(allowed)}"
        if case.proj_dim % self.proj_dim_step:
            return f"k = {case.proj_dim}: it needs a multiple of {self.proj_dim_step}"
        if self.ours and (reason := case.misfit()) is not None:
            return reason
        needed = self.stored_bytes(case)
        if needed > free_bytes:
            return f"its matrix takes {needed / 2**30:.1f} GiB, {free_bytes / 2**30:.1f} are to be had"
        return None


def matrix_bytes(case: Case, itemsize: int = 0) -> int:
    """Returns the size of the whole matrix, by default in the gradients' dtype."""
    return case.matrix_entries * (itemsize or case.torch_dtype.itemsize)


def gradients(case: Case, batch: int = 0) -> Tensor:
    """Draws standard normal gradients (B, D), the same ones in every process; `batch` replaces the case's B."""
    generator = torch.Generator(case.device).manual_seed(1)
    shape = (batch or case.batch, case.grad_dim)
    return torch.randn(shape, generator=generator, device=case.device).to(case.torch_dtype)


def draw(case: Case, columns: int, generator: torch.Generator) -> Tensor:
    """Draws entries (columns, k) of a matrix in the gradients' dtype."""
    entries = torch.empty(columns, case.proj_dim, dtype=case.torch_dtype, device=case.device)
    if case.proj_type == "normal":
        return entries.normal_(generator=generator)
    return entries.random_(0, 2, generator=generator).mul_(2).sub_(1)  # 3 times as fast as bernoulli_


def _ours(case: Case) -> Project:
    """Makes trak_fast's projection; the environment of the process forces the kernel."""
    return functools.partial(projection.project, proj_dim=case.proj_dim, proj_type=case.proj_type)


def _index_add(case: Case) -> Project:
    """Makes torch's sums by indexes and signs that are drawn once, c of each for a column."""
    generator = torch.Generator(case.device).manual_seed(0)
    shape = (NONZEROS, case.grad_dim)
    rows = torch.randint(case.proj_dim, shape, generator=generator, device=case.device)
    signs = torch.randint(2, shape, generator=generator, device=case.device, dtype=torch.int8).mul_(2).sub_(1)

    def project(grads: Tensor) -> Tensor:
        total = torch.zeros(len(grads), case.proj_dim, device=case.device)
        for places, sign in zip(rows, signs, strict=True):
            total.index_add_(1, places, (grads * sign).float())
        return total

    return project


def _index_bytes(case: Case) -> int:
    """Returns the size of stored indexes, in int64, and of signs."""
    return case.grad_dim * NONZEROS * 9


def _stored(case: Case) -> Project:
    """Makes torch's product with a matrix that is drawn once."""
    matrix = draw(case, case.grad_dim, torch.Generator(case.device).manual_seed(0))
    return lambda grads: grads @ matrix


def _chunks(case: Case) -> Project:
    """Makes torch's product with a matrix of which each call draws a chunk at a time."""
    step = max(1, CHUNK // case.proj_dim)

    def project(grads: Tensor) -> Tensor:
        generator = torch.Generator(case.device).manual_seed(0)
        total = torch.zeros(len(grads), case.proj_dim, device=case.device)
        for start in range(0, case.grad_dim, step):
            part = grads[:, start : start + step]
            total += part @ draw(case, part.shape[1], generator)
        return total

    return project


def _traker(case: Case, name: str) -> Project:
    """Makes one of traker's projectors."""
    module = importlib.import_module("trak.projectors")
    options: dict[str, Any] = {"max_batch_size": 32} if name == "CudaProjector" else {"dtype": case.torch_dtype}
    projector = getattr(module, name)(
        case.grad_dim, case.proj_dim, 0, module.ProjectionType(case.proj_type), torch.device(case.device), **options
    )
    return lambda grads: projector.project(grads, model_id=0)  # type: ignore[no-any-return]


def _fast_jl(case: Case) -> Project:
    """Finds the function of fast_jl that traker would call: for 8, 16 or 32 rows at a time."""
    module = importlib.import_module("fast_jl")
    multiprocessors = torch.cuda.get_device_properties(case.device).multi_processor_count
    rows = next((size for size in (8, 16) if case.batch <= size), 32)
    function = getattr(module, f"project_{case.proj_type}_{rows}")
    return lambda grads: function(grads, case.proj_dim, 0, multiprocessors)  # type: ignore[no-any-return]


def _dattri(case: Case) -> Project:
    """Makes dattri's random projection."""
    module = importlib.import_module("dattri.func.projection")
    shape = torch.empty(case.batch, case.grad_dim, dtype=case.torch_dtype, device="meta")
    project: Project = module.random_project(
        shape, case.batch, case.proj_dim, 32, proj_seed=0, proj_type=case.proj_type, device=case.device
    )
    return project


def _block_bytes(case: Case) -> int:
    """Returns the size of the 100 columns of the matrix that the BasicProjector of traker and of dattri keeps."""
    return matrix_bytes(case) * min(100, case.proj_dim) // case.proj_dim


def _dattri_bytes(case: Case) -> int:
    """Returns the size of dattri's matrix: on a GPU dattri keeps the whole one, which its first call makes."""
    return matrix_bytes(case) if case.device == "cuda" else _block_bytes(case)


def _bergson(case: Case) -> Project:
    """Makes bergson's projection, whose matrix has a name."""
    project_global = importlib.import_module("bergson.collector.collector").project_global
    return lambda grads: project_global("bench", grads, case.proj_dim, case.proj_type)  # type: ignore[no-any-return]


def _sjlt(case: Case) -> Project:
    """Makes the projection of sjlt, with as many entries a column as ours has."""
    torch.manual_seed(0)  # it has no seed of its own
    project: Project = importlib.import_module("sjlt").SJLTProjection(case.grad_dim, case.proj_dim, c=NONZEROS)
    return project


def _sklearn(case: Case, name: str) -> Project:
    """Makes one of scikit-learn's transformers."""
    transformer = getattr(importlib.import_module("sklearn.random_projection"), name)(case.proj_dim, random_state=0)
    transformer.fit(torch.zeros(1, case.grad_dim).expand(2, -1).numpy())
    return lambda grads: torch.from_numpy(transformer.transform(grads.numpy()))


def everything(device: str) -> list[Candidate]:
    """Lists all candidates on a device, installed or not; ours first.

    Args:
        device: "cpu" or "cuda".
    """
    facts = projection.info()
    if device == "cuda":
        kernels = facts["cuda_devices"][0]["kernels"] if facts["cuda_devices"] else []
        variable = KERNEL_VARIABLE
    else:
        kernels, variable = facts["instruction_sets"], ISA_VARIABLE
    own = [
        Candidate(
            f"trak_fast {kernel}",
            "trak_fast",
            _ours,
            devices=(device,),
            proj_types=PROJ_TYPES,
            environment={variable: kernel},
            ours=True,
        )
        for kernel in kernels
    ]
    others = [
        Candidate("torch, matrix in memory", "torch", _stored, stored_bytes=matrix_bytes),
        Candidate("torch, in chunks", "torch", _chunks),
        Candidate(
            "traker BasicProjector", "trak", functools.partial(_traker, name="BasicProjector"), "traker",
            stored_bytes=_block_bytes,
        ),
        Candidate(
            "traker CudaProjector", "fast_jl", functools.partial(_traker, name="CudaProjector"), "traker fast_jl",
            devices=("cuda",), dtypes=("float32", "float16"), proj_dim_step=512,
        ),
        Candidate(
            "fast_jl", "fast_jl", _fast_jl, devices=("cuda",), dtypes=("float32", "float16"), proj_dim_step=512
        ),
        Candidate("dattri", "dattri", _dattri, scaled=True, stored_bytes=_dattri_bytes),
        Candidate("bergson", "bergson", _bergson, scaled=True),
        Candidate("torch, index_add_", "torch", _index_add, proj_types=(SPARSE,), stored_bytes=_index_bytes),
        Candidate(
            "sjlt", "sjlt", _sjlt, devices=("cuda",), proj_types=(SPARSE,), scaled=True, stored_bytes=_index_bytes
        ),
        Candidate(  # one entry a column
            "dattri sjlt", "sjlt", _dattri, "dattri sjlt", devices=("cuda",), proj_types=(SPARSE,), scaled=True,
            stored_bytes=_index_bytes,
        ),
        Candidate(
            "scikit-learn Gaussian", "sklearn", functools.partial(_sklearn, name="GaussianRandomProjection"),
            "scikit-learn", devices=("cpu",), proj_types=("normal",), dtypes=("float32",), scaled=True,
            stored_bytes=functools.partial(matrix_bytes, itemsize=24),  # float64 draws and their scaled copies
        ),
        Candidate(
            "scikit-learn sparse", "sklearn", functools.partial(_sklearn, name="SparseRandomProjection"),
            "scikit-learn", devices=("cpu",), proj_types=(SPARSE,), dtypes=("float32",), scaled=True,
        ),
    ]  # fmt: skip
    return own + others
