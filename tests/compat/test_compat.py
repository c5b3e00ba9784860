"""fast_jl's functions, LESS's call sequence, and the ways to put layers into programs without changing them."""

import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import warm
from torch import Tensor, nn

import trak_fast
from trak_fast import compat
from trak_fast.compat import fast_jl
from trak_fast.compat.patching import Patch
from trak_fast.projection import reference

PROGRAMS = Path(__file__).resolve().parents[1] / "programs"
FUNCTIONS = [f"project_{kind}_{batch}" for kind in ("rademacher", "normal") for batch in (8, 16, 32)]


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16, torch.float64])
def test_fast_jl(name: str, dtype: torch.dtype) -> None:
    function: Callable[..., Tensor] = getattr(fast_jl, name)
    kind = name.split("_")[1]
    for batch, columns, n in [(0, 5, 512), (1, 700, 512), (8, 700, 512), (45, 1049, 100)]:
        x = torch.randn(columns, batch, generator=torch.Generator().manual_seed(0)).to(dtype).T
        y = function(x, n, 17, 108)
        assert (y.shape, y.dtype) == ((batch, n), torch.float32)
        expected = reference.project(x.double().numpy(), n, kind, 17)
        np.testing.assert_allclose(y.numpy(), expected, rtol=0, atol=2e-5 * 4 * columns**0.5)
        for tiles in (1, 84, 132):
            assert torch.equal(function(x, n, 17, tiles), y)


def test_seeds_of_fast_jl_as_they_are_passed() -> None:
    x = torch.randn(3, 50)

    def with_seed(seed: Any) -> Tensor:
        return fast_jl.project_normal_8(x, 20, seed, 108)

    for seed in (0, 2**64 - 1, 12345 + 10_000 * 70_000):
        assert torch.equal(with_seed(seed), trak_fast.project(x, 20, proj_type="normal", seed=seed))
    assert torch.equal(with_seed(-1), with_seed(2**64 - 1))
    assert torch.equal(with_seed(2**64 + 5), with_seed(5))
    for integer in (np.int64(-7), np.int32(-7), torch.tensor(-7)):
        assert torch.equal(with_seed(integer), with_seed(2**64 - 7))
    assert len({float(with_seed(np.int64(3) + 10_000 * model_id)[0, 0]) for model_id in range(50)}) == 50
    for wrong in (1.0, "1", None, True):
        with pytest.raises(TypeError, match="seed must be an integer"):
            with_seed(wrong)


def test_fast_jl_is_imported_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fast_jl", None)  # type: ignore[arg-type]
    with pytest.raises(ImportError):
        import fast_jl as missing  # noqa: F401
    assert compat.install_fast_jl() is fast_jl
    import fast_jl as found

    # the probes of its callers, which take an exception for a reason to use a slow projector
    assert found.project_rademacher_8(torch.zeros(8, 1_000), 512, 0, 108).abs().max() == 0
    assert found.project_rademacher_8(torch.ones(1, 7850), 2048, 0, 108).shape == (1, 2048)


def less_collect_grads(model: nn.Module, batches: list[Tensor], proj_dims: list[int]) -> dict[int, Tensor]:
    """The calls that LESS makes in its gradient collection step, in their order."""
    try:
        device = next(model.parameters()).device
        num_sms = torch.cuda.get_device_properties(device.index).multi_processor_count
        import fast_jl

        fast_jl.project_rademacher_8(torch.zeros(8, 1_000, device=device), 512, 0, num_sms)
        from trak_fast.compat.traker import CudaProjector as Chosen
    except Exception:
        from trak_fast.compat.traker import BasicProjector as Chosen
    from trak_fast.compat.traker import ProjectionType

    projectors = [
        Chosen(
            grad_dim=sum(p.numel() for p in model.parameters() if p.requires_grad),
            proj_dim=dim,
            seed=0,
            proj_type=ProjectionType.rademacher,
            device=device,
            dtype=next(model.parameters()).dtype,
            block_size=128,
            max_batch_size=16,
        )
        for dim in proj_dims
    ]
    parts: dict[int, list[Tensor]] = {dim: [] for dim in proj_dims}
    full: list[Tensor] = []
    for count, batch in enumerate(batches, 1):
        model(batch).square().mean().backward()
        full.append(torch.cat([p.grad.view(-1) for p in model.parameters() if p.grad is not None]))
        model.zero_grad()
        if count % 16 == 0 or count == len(batches):
            stacked = torch.stack(full).to(torch.float16)
            for dim, projector in zip(proj_dims, projectors, strict=True):
                parts[dim].append(projector.project(stacked, model_id=0).cpu())
            full = []
    return {dim: torch.nn.functional.normalize(torch.cat(parts[dim]), dim=1) for dim in proj_dims}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_less(dtype: torch.dtype) -> None:
    """Cosines between projected gradients are those between the gradients, within 5/√k."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 60), nn.Tanh(), nn.Linear(60, 5)).to(dtype)
    batches = [torch.randn(4, 20, dtype=dtype) for _ in range(37)]
    features = less_collect_grads(model, batches, [8192, 1000])
    grads = []
    for batch in batches:
        parts = torch.autograd.grad(model(batch).square().mean(), list(model.parameters()))
        grads.append(torch.cat([part.reshape(-1) for part in parts]).half().double())
    exact = nn.functional.normalize(torch.stack(grads), dim=1)
    for dim, projected in features.items():
        assert (projected.shape, projected.dtype) == ((37, dim), torch.float32)
        error = projected.double() @ projected.double().T - exact @ exact.T
        assert error.abs().max() < 5 / dim**0.5


def test_a_patch_finds_names_wherever_they_went_and_comes_off_again(monkeypatch: pytest.MonkeyPatch) -> None:
    library, user, bystander = (type(sys)(name) for name in ("library", "user", "bystander"))
    old, new = object(), object()
    library.name = user.renamed = old  # type: ignore[attr-defined]
    bystander.name = "another"  # type: ignore[attr-defined]
    for module in (library, user, bystander):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    with Patch(library, {"name": new}) as patch:
        assert library.name is user.renamed is new  # type: ignore[attr-defined]
        assert patch.originals == {"name": old}
        assert bystander.name == "another"  # type: ignore[attr-defined]
    assert library.name is user.renamed is old  # type: ignore[attr-defined]


PROGRAM = """
import sys
assert not any(name == "torch" or name.startswith("trak_fast.projection") for name in sys.modules), "imported too early"
import fast_jl, torch
y = fast_jl.project_rademacher_32(torch.ones(2, 10, dtype=torch.bfloat16), 7, -1, 108)
from sjlt import SJLTProjection  # which is not installed
x = torch.eye(10)
assert torch.equal(SJLTProjection(10, 16, seed=1, device="cpu")(x).norm(dim=1), torch.ones(10))
print(sys.argv[1:], __name__, tuple(y.shape), fast_jl.__name__)
import subprocess
if "child" not in sys.argv:
    subprocess.run([sys.executable, sys.argv[0], "child"], check=True)
"""


def run(*command: object, cwd: Path, **environment: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, cwd=cwd, check=False,
        env={**os.environ, **environment},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def test_programs_run_with_everything_in_place(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(PROGRAM.replace("assert not any", "any"))  # the command has imported torch itself
    told = ["--flag", "1"]
    expected = [f"{told} __main__ (2, 7) fast_jl", "['child'] __main__ (2, 7) fast_jl"]
    assert run("-m", "trak_fast.compat", script, *told, cwd=tmp_path) == expected
    assert run("-m", "trak_fast.compat", "-m", "script", *told, cwd=tmp_path) == expected


def test_programs_find_our_class_in_an_installed_sjlt(tmp_path: Path) -> None:
    (tmp_path / "sjlt").mkdir()
    (tmp_path / "sjlt" / "__init__.py").write_text("from .core import SJLTProjection\n")
    (tmp_path / "sjlt" / "core.py").write_text("class SJLTProjection: pass\n")
    (tmp_path / "script.py").write_text(
        "import sjlt, sjlt.core, torch\n"
        "print(sjlt.SJLTProjection.__module__, *sjlt.core.SJLTProjection(5, 16)(torch.ones(2, 5)).shape)\n"
    )
    assert run("-m", "trak_fast.compat", "script.py", cwd=tmp_path) == ["trak_fast.compat.sjlt 2 16"]


def test_a_folder_in_the_environment_is_enough(tmp_path: Path) -> None:
    (folder,) = run("-m", "trak_fast.compat", "--path", cwd=tmp_path)
    (tmp_path / "sitecustomize.py").write_text("print('the other sitecustomize')")
    (tmp_path / "script.py").write_text(PROGRAM)
    lines = run(tmp_path / "script.py", "child", cwd=tmp_path, PYTHONPATH=f"{folder}{os.pathsep}{tmp_path}")
    assert lines == ["the other sitecustomize", "['child'] __main__ (2, 7) fast_jl"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a program to run"),
        (["missing.py"], "PROGRAM must be the path of a script, not 'missing.py'"),
        (["-m", "missing"], "PROGRAM must be the name of a module, not 'missing'"),
        (["-m", "json.missing.part"], "PROGRAM must be the name of a module, not 'json.missing.part'"),
    ],
)
def test_the_command_says_what_is_missing(tmp_path: Path, arguments: list[str], message: str) -> None:
    command = [warm.python(), "-m", "trak_fast.compat", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert done.stderr.endswith(f"error: {message}\n")


def test_layers_import_no_library_before_they_are_asked_to(tmp_path: Path) -> None:
    assert run(PROGRAMS / "without_libraries.py", cwd=tmp_path) == [
        "No module named 'trak'",
        "No module named 'dattri'",
        "No module named 'bergson'",
        "sjlt is not installed: write `from trak_fast.compat.sjlt import SJLTProjection` in its place",
    ]


def test_names_in_the_page_for_newcomers_exist() -> None:
    page = (Path(__file__).parents[2] / "docs" / "coming-from.md").read_text()
    names = set(re.findall(r"\btrak_fast(?:\.\w+)+", page))
    names |= {
        f"{module}.{name}"
        for module, imported in re.findall(r"^from (trak_fast[.\w]*) import ([\w, ]+)", page, re.MULTILINE)
        for name in imported.replace(" ", "").split(",")
    }
    assert len(names) > 15
    for name in names:
        pkgutil.resolve_name(name)
