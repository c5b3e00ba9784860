"""Bad input: one error of the right type, whose message names the argument, what was given and what is allowed."""

import enum
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import warm

import trak_fast
from trak_fast import Projector, matrix, project
from trak_fast.projection import kernels

GOOD = torch.ones(3, 5)
AVAILABLE = trak_fast.info()["instruction_sets"]


def refused(error: type[Exception], call: Callable[[], object], *words: str) -> None:
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert type(caught.value) is error
    assert all(word in message for word in words), message


def test_the_first_normal_projection_on_a_device_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    refused(
        RuntimeError,
        lambda: kernels._device_table(torch.device("cuda", 3)),
        "proj_type='normal'",
        "cuda:3",
        "make a Projector",
        "before the capture",
    )


@pytest.mark.parametrize("shape", [(), (7,), (2, 3, 4)])
def test_a_tensor_alone_is_a_matrix(shape: tuple[int, ...]) -> None:
    refused(ValueError, lambda: project(torch.zeros(shape), 4), "grads", "(B, D)", str(shape))


def test_a_part_needs_a_batch_dimension() -> None:
    refused(ValueError, lambda: project({"scale": torch.tensor(1.0)}, 4), "grads['scale']", "(B, ...)")


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn]
)
def test_dtypes_that_are_no_gradients(dtype: torch.dtype) -> None:
    bad = torch.zeros(3, 5).to(dtype)
    allowed = ("float32", "bfloat16", "float16", "float64")
    refused(TypeError, lambda: project(bad, 4), "grads", str(dtype), *allowed)
    refused(TypeError, lambda: project([GOOD, bad], 4), "grads[1]", str(dtype), *allowed)


@pytest.mark.filterwarnings("ignore")  # torch's own, about sparse and quantised tensors
def test_layouts_without_plain_memory() -> None:
    refused(TypeError, lambda: project(GOOD.to_sparse(), 4), "grads", "sparse_coo", "dense")
    refused(TypeError, lambda: project(GOOD.to_sparse_csr(), 4), "grads", "sparse_csr", "dense")
    nested = torch.nested.nested_tensor([torch.ones(3), torch.ones(2)])
    refused(TypeError, lambda: project(nested, 4), "grads", "nested")
    quantised = torch.quantize_per_tensor(GOOD, 0.1, 0, torch.qint8)
    refused(TypeError, lambda: project(quantised, 4), "grads", "qint8", "float32")


def test_tensors_without_memory() -> None:
    meta = torch.zeros(3, 5, device="meta")
    refused(TypeError, lambda: project(meta, 4), "grads", "meta", "cpu")
    refused(TypeError, lambda: project(GOOD, 4, out=torch.zeros(3, 4, device="meta")), "out", "meta", "cpu")
    refused(TypeError, lambda: Projector(5, 4).project(meta), "grads", "meta")


def test_tensors_whose_memory_is_elsewhere_or_gone(tmp_path: Path) -> None:
    """Starts a process of its own: reading through such a pointer would end the tests."""
    command = [warm.python(), "-W", "ignore", Path(__file__).resolve().parents[1] / "programs/without_memory.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    names = ["freed", "part of freed", "shrunk", "fake", "zero", "functional", "out"]
    assert (done.returncode, done.stdout.splitlines()) == (0, [f"{name} True" for name in names]), done.stderr


def test_memory_that_runs_out_is_an_error(tmp_path: Path) -> None:
    """Whatever the limit: threads have all their memory before they start, as they could not say that it is missing."""
    command = [warm.python(), Path(__file__).resolve().parents[1] / "programs/scarce_memory.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    expected = [f"{name}, MemoryError, passed" for name in ("dense", "sparse", "sparse adjoint")]
    assert (done.returncode, done.stdout.splitlines()) == (0, expected), done.stderr


def test_tensors_inside_transforms() -> None:
    stack = torch.ones(2, 3, 5)
    refused(TypeError, lambda: torch.func.vmap(lambda g: project(g, 4))(stack), "grads", "vmap")
    refused(TypeError, lambda: torch.func.vmap(lambda g: project({"w": g}, 4))(stack), "grads['w']", "vmap")
    refused(TypeError, lambda: torch.func.vmap(lambda o: project(GOOD, 4, out=o))(torch.zeros(2, 3, 4)), "out", "vmap")


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu), "meta"])
def test_mixed_devices(device: str) -> None:
    other = torch.zeros(3, 2, device=device)
    error = TypeError if device == "meta" else ValueError
    refused(error, lambda: project({"a": GOOD, "b": other}, 4), "grads['b']", device, "cpu")
    refused(error, lambda: project(GOOD, 4, out=torch.zeros(3, 4, device=device)), "out", device, "cpu")


def test_a_projector_for_another_device() -> None:
    refused(ValueError, lambda: Projector(5, 4, device="cuda:0").project(GOOD), "grads", "cpu", "cuda:0")


def test_things_that_are_no_tensors() -> None:
    refused(TypeError, lambda: project(GOOD.numpy(), 4), "grads", "ndarray", "tensor")
    refused(TypeError, lambda: project(None, 4), "grads", "NoneType", "tensor")
    refused(TypeError, lambda: project("gradients", 4), "grads", "str", "tensor")
    refused(TypeError, lambda: project([[1.0, 2.0]], 4), "grads[0]", "list", "tensor")
    refused(TypeError, lambda: project({"w": GOOD, "b": None}, 4), "grads['b']", "NoneType", "tensor")
    refused(TypeError, lambda: project(GOOD, 4, out=np.zeros((3, 4), np.float32)), "out", "ndarray", "tensor")


def test_nothing_to_project() -> None:
    for nothing in ({}, [], ()):
        refused(ValueError, lambda nothing=nothing: project(nothing, 4), "grads", "empty", "at least one")


def test_batch_sizes_that_differ() -> None:
    parts = {"weight": GOOD, "bias": torch.ones(4)}
    refused(ValueError, lambda: project(parts, 4), "grads['bias']", "4", "grads['weight']", "3")


def test_columns_that_do_not_fit_the_projector() -> None:
    refused(ValueError, lambda: Projector(6, 4).project(GOOD), "grads", "5", "grad_dim", "6")
    refused(ValueError, lambda: Projector(6, 4).project({"w": GOOD, "b": GOOD}), "grads", "10", "grad_dim", "6")
    projector = Projector(6, 4)
    accumulator = projector.accumulator(3)
    accumulator.add(GOOD[:, :0], 0)  # makes the sum
    projector.proj_dim = 5
    refused(ValueError, lambda: accumulator.add(GOOD, 0), "out", "(3, 5)", "(3, 4)")
    projector.proj_dim = 4
    refused(ValueError, lambda: accumulator.add(GOOD, 2), "2 to 7", "grad_dim", "6")
    refused(ValueError, lambda: accumulator.add(GOOD, -1), "offset", "-1")
    refused(ValueError, lambda: accumulator.add(torch.ones(2, 5), 0), "grads", "2", "batch_size", "3")
    assert torch.equal(accumulator.result(), torch.zeros(3, 4))  # a refused slice leaves no trace


INTEGERS = {
    "proj_dim": (lambda x: project(GOOD, x), 0, 2**32 + 1, "in [1, 2**32]"),
    "seed": (lambda x: project(GOOD, 4, seed=x), -1, 2**64, "in [0, 2**64 - 1]"),
    "model_id": (lambda x: project(GOOD, 4, model_id=x), -1, 2**32, "in [0, 2**32 - 1]"),
    "offset": (lambda x: project(GOOD, 4, offset=x), -1, 2**48 + 1, "in [0, 2**48]"),
    "grad_dim": (lambda x: Projector(x, 4), -1, 2**48 + 1, "in [0, 2**48]"),
    "batch_size": (lambda x: Projector(5, 4).accumulator(x), -1, 2**63, "in [0, 2**"),
}
SAME = [
    ("proj_dim", lambda x: Projector(5, x)),
    ("seed", lambda x: Projector(5, 4, seed=x)),
    ("model_id", lambda x: Projector(5, 4).project(GOOD, model_id=x)),
    ("model_id", lambda x: Projector(5, 4).accumulator(3, model_id=x)),
    ("seed", lambda x: matrix("normal", x, 0, [0], [0])),
    ("model_id", lambda x: matrix("normal", 0, x, [0], [0])),
]


@pytest.mark.parametrize(
    ("name", "call"), [*((name, case[0]) for name, case in INTEGERS.items()), *SAME], ids=lambda x: str(x)[:10]
)
def test_numbers(name: str, call: Callable[[object], object]) -> None:
    _, low, high, allowed = INTEGERS[name]
    for number in (low, high, -(2**70), 2**70):
        refused(ValueError, lambda number=number: call(number), name, str(number), allowed)
    for wrong, kind in [(2.0, "float"), ("2", "str"), (None, "NoneType"), (True, "bool"), (np.float32(2), "float32")]:
        refused(TypeError, lambda wrong=wrong: call(wrong), name, "integer", kind)


def test_columns_end_at_2_to_the_48() -> None:
    last = project(GOOD, 4, offset=2**48 - 5)
    assert torch.equal(last[0], matrix("rademacher", 0, 0, range(4), range(2**48 - 5, 2**48)).sum(1))
    refused(ValueError, lambda: project(GOOD, 4, offset=2**48 - 4), "offset + D", str(2**48 + 1), "2**48")


def test_indexes_of_the_matrix() -> None:
    refused(ValueError, lambda: matrix("normal", 0, 0, [0, 2**32], [0]), "rows", str(2**32), "[0, 2**32 - 1]")
    refused(ValueError, lambda: matrix("normal", 0, 0, [0], [-1]), "cols", "-1", "[0, 2**48 - 1]")
    refused(ValueError, lambda: matrix("normal", 0, 0, [0], [2**48]), "cols", str(2**48), "[0, 2**48 - 1]")
    refused(TypeError, lambda: matrix("normal", 0, 0, [0.5], [0]), "rows", "integers", "float64")
    refused(TypeError, lambda: matrix("normal", 0, 0, [0], [[0]]), "cols", "one-dimensional", "(1, 1)")
    refused(TypeError, lambda: matrix("normal", 0, 0, [0], 7), "cols", "one-dimensional", "()")


class Kind(enum.Enum):
    gaussian = "gaussian"


@pytest.mark.parametrize("call", [lambda x: project(GOOD, 4, proj_type=x), lambda x: Projector(5, 4, proj_type=x)])
def test_unknown_kinds(call: Callable[[object], object]) -> None:
    refused(ValueError, lambda: call("gaussian"), "proj_type", "'gaussian'", "rademacher", "normal")
    refused(ValueError, lambda: call(Kind.gaussian), "proj_type", "'gaussian'", "rademacher", "normal")
    refused(TypeError, lambda: call(1), "proj_type", "int", "rademacher", "normal")


@pytest.mark.parametrize("call", [lambda x: project(GOOD, 4, precision=x), lambda x: Projector(5, 4, precision=x)])
def test_unknown_precisions(call: Callable[[object], object]) -> None:
    refused(ValueError, lambda: call("low"), "precision", "'low'", "highest", "high", "medium")
    refused(TypeError, lambda: call(16), "precision", "int", "highest", "high", "medium")


def test_out_that_cannot_take_the_result() -> None:
    def with_out(out: object, grads: torch.Tensor = GOOD) -> Callable[[], object]:
        return lambda: project(grads, 4, out=out)

    refused(ValueError, with_out(torch.zeros(4, 3)), "out", "(4, 3)", "(3, 4)")
    refused(ValueError, with_out(torch.zeros(12)), "out", "(12,)", "(3, 4)")
    for dtype in (torch.float64, torch.bfloat16, torch.int32):
        refused(TypeError, with_out(torch.zeros(3, 4, dtype=dtype)), "out", str(dtype), "float32")
    refused(ValueError, with_out(torch.zeros(3, 4, requires_grad=True)), "out", "requires grad", "detach")
    refused(ValueError, with_out(torch.zeros(3, 1).expand(3, 4)), "out", "share memory", "(1, 0)")
    refused(ValueError, with_out(torch.zeros(9).as_strided((3, 4), (1, 2))), "out", "share memory", "(1, 2)")
    memory = torch.ones(50)
    refused(ValueError, with_out(memory[:12].view(3, 4), memory[5:20].view(3, 5)), "out", "shares", "grads")


def test_out_with_gaps_and_strides_is_welcome() -> None:
    expected = project(GOOD, 4)
    memory = torch.zeros(4, 9)
    out = memory[:, 1:7:2].T
    assert project(GOOD, 4, out=out) is out
    assert torch.equal(out, expected)
    memory[:, 1:7:2] = 0
    assert not memory.any()  # nothing beside it was touched


@pytest.mark.parametrize("name", ["neon9", "AMX", " amx", "auto", *sorted({"amx", "avx512", "avx2"} - set(AVAILABLE))])
def test_instruction_sets_that_cannot_be_forced(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAK_FAST_ISA", name)
    refused(ValueError, lambda: project(GOOD, 4), "TRAK_FAST_ISA", repr(name), *AVAILABLE)
    monkeypatch.delenv("TRAK_FAST_ISA")
    project(GOOD, 4)  # read at each call
