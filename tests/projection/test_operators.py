"""The projection under torch.compile and autograd: same bits, right shapes, and P'y as the derivative."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import trak_fast
from trak_fast import project, project_adjoint

EVERY_KIND = [("rademacher", None, 40), ("normal", None, 40), ("sjlt", None, 64), ("sjlt", 2, 64)]
"""Kinds with their nonzeros and a k that fits."""

SEEDS = [0, 1, 2**63 - 1, 2**63, 2**64 - 1]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def of_tensor(g: Tensor) -> Tensor:
    return project(g * 2, 7, seed=2**64 - 1, precision="medium") + 1


def of_parts(g: Tensor) -> Tensor:
    parts = {"a": g.view(-1, 5, 10), "b": g[:, 0], "c": g.T.contiguous().T.bfloat16(), "d": g.double()}
    return project(parts, 7, proj_type="normal", model_id=2**32 - 1, offset=2**40) * 2


def into_out(g: Tensor) -> Tensor:
    out = torch.ones(len(g), 7)
    assert project([g, g.half()], 7, out=out) is out
    return out * 2


def of_projector(g: Tensor) -> Tensor:
    projector = trak_fast.Projector(50, 7, seed=3, device="cpu")
    return projector.adjoint(projector.project(g * 3, model_id=2))


def sparse(g: Tensor) -> Tensor:
    projector = trak_fast.Projector(100, 128, seed=3, proj_type="sjlt", nonzeros=8)
    accumulator = projector.accumulator(len(g))
    accumulator.add(g, 50)
    y = project([g, g.half()], 64, proj_type="sjlt", offset=5) + accumulator.result()[:, :64]
    return projector.adjoint(projector.project(torch.cat([g, g], 1))) + project_adjoint(y, 100, proj_type="sjlt")


def adjoint_into_out(y: Tensor) -> Tensor:
    out = torch.ones(len(y), 20)
    assert project_adjoint(y, 20, proj_type="normal", seed=2**63, out=out) is out
    return project_adjoint(y, 20) + out


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("function", [of_tensor, of_parts, into_out, of_projector, sparse, adjoint_into_out])
def test_compiled_whole(function: Callable[[Tensor], Tensor], backend: str, dynamic: bool) -> None:
    compiled = torch.compile(function, fullgraph=True, backend=backend, dynamic=dynamic)
    for batch in (3, 2):
        g = random(batch, 50)
        assert torch.equal(compiled(g), function(g))
        recording = g.clone().requires_grad_()
        assert not function(recording).requires_grad
        assert not compiled(recording).requires_grad


def test_compiled_for_seeds_that_change() -> None:
    compiled = torch.compile(lambda g, seed, m: project(g, 7, seed=seed, model_id=m), fullgraph=True, backend="eager")
    g = random(3, 50)
    for n, seed in enumerate(SEEDS):
        assert torch.equal(compiled(g, seed, n), project(g, 7, seed=seed, model_id=n))


def test_compiled_for_sizes_of_the_sparse_kind_that_change() -> None:
    def back_and_forth(g: Tensor, k: int, nonzeros: int) -> Tensor:
        y = project(g, k, proj_type="sjlt", nonzeros=nonzeros)
        return project_adjoint(y, 50, proj_type="sjlt", nonzeros=nonzeros)

    compiled = torch.compile(back_and_forth, fullgraph=True, backend="eager", dynamic=True)
    g = random(3, 50)
    for k, nonzeros in [(64, 4), (128, 4), (256, 2), (16, 1)]:
        assert torch.equal(compiled(g, k, nonzeros), back_and_forth(g, k, nonzeros))


def test_operators_check_the_tensors_that_they_are_given() -> None:
    """Operators can be called by hand, and a trace may have seen less of a tensor than matters."""
    ops, matrix = torch.ops.trak_fast, ("rademacher", 0, 0, 0)
    with pytest.raises(ValueError, match="out has elements that share memory"):
        ops.project_into(torch.zeros(3, 1).expand(3, 7), [random(3, 5)], *matrix, None, None)
    memory = torch.ones(50)
    with pytest.raises(ValueError, match="out shares its storage with grads"):
        ops.project_into(memory[20:41].view(3, 7), [memory[:15].view(3, 5)], *matrix, None, None)
    with pytest.raises(ValueError, match="out shares its storage with y"):
        ops.project_adjoint_into(memory[20:41].view(3, 7), memory[:15].view(3, 5), *matrix, None)
    with pytest.raises(TypeError, match=r"grads\[0\] must have one of the dtypes .*, not torch.int64"):
        ops.project([torch.ones(3, 5, dtype=torch.int64)], 7, *matrix, None, None)


# opcheck of torch 2.14 reads it
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(("proj_type", "nonzeros", "k"), EVERY_KIND)
def test_operators_keep_torch_s_rules(proj_type: str, nonzeros: int | None, k: int) -> None:
    """opcheck: schema, mutation, fake shapes, autograd and AOT dispatch, with static and with dynamic shapes."""
    ops, matrix = torch.ops.trak_fast, (proj_type, -3, 2**32 - 1, 2**40)
    grads = [random(3, 5, 4), random(3).double()]
    recording = [g.clone().requires_grad_() for g in grads]
    for given in (grads, recording):
        torch.library.opcheck(ops.project.default, (given, k, *matrix, "highest", nonzeros))
    torch.library.opcheck(ops.project_into.default, (torch.ones(3, k), grads, *matrix, None, nonzeros))
    for y in (random(3, k), random(3, k).requires_grad_()):
        torch.library.opcheck(ops.project_adjoint.default, (y, 21, *matrix, nonzeros))
    torch.library.opcheck(ops.project_adjoint_into.default, (torch.ones(3, 21), random(3, k), *matrix, nonzeros))


@pytest.mark.parametrize("compile_with", [None, "aot_eager"])
@pytest.mark.parametrize(("proj_type", "nonzeros", "k"), EVERY_KIND)
def test_derivatives_are_the_adjoint_and_the_projection(
    proj_type: str, nonzeros: int | None, k: int, compile_with: str | None
) -> None:
    shapes = {"w": ((3, 7, 9), torch.float32), "b": ((3,), torch.bfloat16), "v": ((3, 11), torch.float64)}
    grads = {name: random(*shape, dtype=dtype).requires_grad_() for name, (shape, dtype) in shapes.items()}
    options: dict[str, Any] = {"proj_type": proj_type, "seed": 5, "model_id": 6, "offset": 700, "nonzeros": nonzeros}

    def forward(grads: dict[str, Tensor]) -> Tensor:
        return project(grads, k, differentiable=True, **options)

    run = forward if compile_with is None else torch.compile(forward, fullgraph=True, backend=compile_with)
    y = run(grads)
    assert torch.equal(y, project({name: g.detach() for name, g in grads.items()}, k, **options))
    upstream = random(3, k, seed=1)
    y.backward(upstream)
    columns = range(700, 700 + 63 + 1 + 11)
    P = trak_fast.matrix(proj_type, 5, 6, range(k), columns, proj_dim=k, nonzeros=nonzeros).double()
    expected = (upstream.double() @ P).split([63, 1, 11], dim=1)
    for (name, (shape, dtype)), part in zip(shapes.items(), expected, strict=True):
        assert grads[name].grad.dtype == dtype
        tolerance = 2.0**-8 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(grads[name].grad.double(), part.reshape(shape), rtol=tolerance, atol=1e-4)

    back = upstream.clone().requires_grad_()
    project_adjoint(back, 75, differentiable=True, **options).backward(random(3, 75, seed=2))
    torch.testing.assert_close(back.grad.double(), random(3, 75, seed=2).double() @ P.T, rtol=1e-5, atol=1e-4)


def test_derivatives_of_derivatives() -> None:
    """f(g) = ‖P g‖⁴: its gradient 4 ‖Pg‖² P'Pg and its Hessian-vector product need both operators in both roles."""
    g = random(2, 30).requires_grad_()
    y = project(g, 500, differentiable=True)
    (gradient,) = torch.autograd.grad((y.square().sum(1) ** 2).sum(), g, create_graph=True)
    v = random(2, 30, seed=1)
    (product,) = torch.autograd.grad((gradient * v).sum(), g)
    P = trak_fast.matrix("rademacher", 0, 0, range(500), range(30)).double()
    for b in range(2):
        x = g[b].detach().double()
        A = P.T @ P
        torch.testing.assert_close(gradient[b].detach().double(), 4 * (x @ A @ x) * (A @ x), rtol=1e-4, atol=1e-2)
        hessian = 8 * torch.outer(A @ x, A @ x) + 4 * (x @ A @ x) * A
        torch.testing.assert_close(product[b].double(), hessian @ v[b].double(), rtol=1e-4, atol=1.0)


def test_nothing_is_recorded_without_asking_or_when_gradients_are_off() -> None:
    g = random(3, 20).requires_grad_()
    assert not project(g, 7).requires_grad
    assert not project_adjoint(g, 7).requires_grad
    with torch.no_grad():
        assert not project(g, 7, differentiable=True).requires_grad
    assert not project(g.detach(), 7, differentiable=True).requires_grad


def test_recording_and_out_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="out cannot be combined with differentiable=True"):
        project(random(3, 5), 4, out=torch.zeros(3, 4), differentiable=True)
    with pytest.raises(ValueError, match="out cannot be combined with differentiable=True"):
        project_adjoint(random(3, 5), 4, out=torch.zeros(3, 4), differentiable=True)
