"""The loss of tokens against Python's own arithmetic, number by number, and the memory that it takes."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trak_fast.gradients import FunctionalGradientComputer
from trak_fast.tasks import CausalLM, tokens
from trak_fast.tasks.tokens import token_losses

B, T, V = 3, 5, 40
LABELS = torch.tensor([[3, -100, 39, 0, 7], [-100] * 5, [11, 12, -100, -100, 5]])


def logits_of(dtype: torch.dtype, requires_grad: bool = True) -> Tensor:
    """Makes logits of which a label's p is close to 1, another's to 0, and the rest are ordinary."""
    logits = torch.randn(B, T, V, dtype=torch.float64) * 3
    logits[0, 0, 3] += 60
    logits[0, 2, 39] -= 90
    return logits.to(dtype).requires_grad_(requires_grad)


def expected(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Computes losses and the gradient of their sum, in float64, for each token alone.

    p is 1/(1 + r) with r the sum of exp(logit − the label's) over the others, so the loss is log1p(r).
    """
    losses = torch.zeros(labels.shape, dtype=torch.float64)
    slopes = torch.zeros(logits.shape, dtype=torch.float64)
    for b, t in (labels >= 0).nonzero().tolist():
        label = int(labels[b, t])
        row = logits[b, t].tolist()
        ratios = [0.0 if v == label else math.exp(x - row[label]) for v, x in enumerate(row)]
        rest = math.fsum(ratios)
        losses[b, t] = math.log1p(rest)
        slopes[b, t] = torch.tensor([ratio / (1 + rest) for ratio in ratios], dtype=torch.float64)
        slopes[b, t, label] = -rest / (1 + rest)
    return losses, slopes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_losses_and_gradients_have_relative_accuracy_where_p_is_close_to_0_or_1(dtype: torch.dtype) -> None:
    logits = logits_of(dtype)
    losses = token_losses(logits, LABELS)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert losses.dtype == wide
    exact, slopes = expected(logits, LABELS)
    # a logit near 70 is rounded relative to itself before exp, and a sum of V numbers is
    rtol = (2 * 100 + V) * torch.finfo(wide).eps
    torch.testing.assert_close(losses.detach().double(), exact, rtol=rtol, atol=0)
    found = torch.autograd.grad(losses.sum(), logits)[0]
    assert found.dtype == dtype
    # half precision rounds the gradient once, and float16 has numbers down to 6e-8 only
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), slopes, rtol=rtol + torch.finfo(dtype).eps, atol=tiny)
    assert (found[LABELS == -100] == 0).all()


def test_half_precision_logits_give_f_as_precisely_as_others() -> None:
    logits = logits_of(torch.bfloat16)[:1]
    mask = torch.ones(1, T, dtype=torch.long)
    model = Logits(logits)
    ids = torch.tensor([[0, 3, 1, 39, 0]])
    labels = torch.tensor([[-100, 3, -100, 39, 0]])
    f = CausalLM().get_outputs(model, dict(model.named_parameters()), {}, [ids, mask, labels])
    losses, _ = expected(logits, torch.tensor([[3, -100, 39, 0, -100]]))
    mean = losses.sum() / 3
    torch.testing.assert_close(f[0].double(), -mean - torch.log(-torch.expm1(-mean)), rtol=1e-5, atol=0)


def test_torch_func_and_autograd_give_the_same_numbers() -> None:
    logits = logits_of(torch.float32)
    factors = torch.randn(B, T)
    plain = torch.autograd.grad((token_losses(logits, LABELS) * factors).sum(), logits)[0]

    def weighted(rows: Tensor, labels: Tensor, own: Tensor) -> Tensor:
        return (token_losses(rows[None], labels[None])[0] * own).sum()

    detached = logits.detach()
    assert torch.equal(vmap(grad(weighted))(detached, LABELS, factors), plain)
    swapped = vmap(grad(weighted), in_dims=(2, 1, 0))(detached.permute(1, 2, 0), LABELS.T, factors)
    assert torch.equal(swapped, plain)
    shared = vmap(grad(weighted), in_dims=(None, 0, 0))(detached[0], LABELS, factors)
    for b in range(B):
        assert torch.equal(shared[b], grad(weighted)(detached[0], LABELS[b], factors[b]))
    nested = vmap(vmap(grad(weighted)))(detached[None], LABELS[None], factors[None])
    assert torch.equal(nested[0], plain)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = logits_of(torch.float32)
    whole = token_losses(logits, LABELS)
    slopes = torch.autograd.grad(whole.sum(), logits)[0]
    for size in (1, 2 * 4 * V):  # rows of 160 bytes: one at a time, two at a time
        monkeypatch.setattr(tokens, "CHUNK_BYTES", size)
        parts = token_losses(logits, LABELS)
        assert torch.equal(parts, whole)
        assert torch.equal(torch.autograd.grad(parts.sum(), logits)[0], slopes)


def test_positions_without_labels_are_not_looked_at() -> None:
    logits = logits_of(torch.float32, requires_grad=False)
    exact = token_losses(logits, LABELS)
    logits[LABELS == -100] = torch.nan
    logits.requires_grad_()
    losses = token_losses(logits, LABELS)
    assert torch.equal(losses, exact)
    assert torch.autograd.grad(losses.sum(), logits)[0].isfinite().all()


def test_infinite_logits_give_the_limits() -> None:
    logits = torch.zeros(1, 2, 3, dtype=torch.float64)
    logits[0, 0, 1:] = -torch.inf  # the only possible token
    logits[0, 1, 0] = -torch.inf  # an impossible one
    logits.requires_grad_()
    losses = token_losses(logits, torch.zeros(1, 2, dtype=torch.long))
    assert losses.tolist() == [[0, math.inf]]
    slopes = torch.autograd.grad(losses, logits, torch.ones(1, 2, dtype=torch.float64))[0]
    assert slopes.tolist() == [[[0, 0, 0], [-1, 0.5, 0.5]]]


def test_the_gradient_is_that_of_finite_differences() -> None:
    logits = torch.randn(B, T, V, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: token_losses(x, LABELS), logits)


def test_a_second_derivative_is_refused() -> None:
    logits = logits_of(torch.float64)
    slopes = torch.autograd.grad(token_losses(logits, LABELS).sum(), logits, create_graph=True)[0]
    with pytest.raises(RuntimeError, match=r"must be differentiated once, not twice; a function of your own"):
        torch.autograd.grad(slopes.sum(), logits)

    def total(x: Tensor) -> Tensor:
        return token_losses(x, LABELS).sum()

    with pytest.raises(RuntimeError, match=r"must be differentiated once, not twice"):
        grad(lambda x: grad(total)(x).sum())(logits.detach())


@pytest.mark.parametrize(
    ("logits", "labels", "error", "message"),
    [
        (torch.zeros(1, 2, 3).long(), torch.zeros(1, 2).long(), TypeError, "floating-point numbers, not torch.int64"),
        (torch.zeros(1, 2, 1), torch.zeros(1, 2).long(), ValueError, r"\(B, T, V\) with V >= 2, not \(1, 2, 1\)"),
        (torch.zeros(2, 3), torch.zeros(2).long(), ValueError, r"\(B, T, V\) with V >= 2, not \(2, 3\)"),
        (torch.zeros(1, 2, 3), torch.zeros(2).long(), ValueError, r"labels must have shape \(B, T\), .* not \(2,\)"),
        (torch.zeros(1, 2, 3), torch.zeros(1, 2), TypeError, "labels must be integers, not torch.float32"),
        (torch.zeros(1, 2, 3), torch.tensor([[1, 3]]), ValueError, r"labels must be in \[0, 2\], .* 3 classes, not 1"),
        (torch.zeros(1, 2, 3), torch.tensor([[1, -1]]), ValueError, r"labels must be in \[0, 2\], .* not -1 to 1"),
    ],
)
def test_bad_input_is_named(logits: Tensor, labels: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        token_losses(logits, labels)


class Logits(nn.Module):
    """A model whose logits are its parameter."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits.detach())

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.logits


class Live(TorchDispatchMode):
    """Measures the most bytes of tensors made inside that exist at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}
        self._before: set[int] = set()

    def know(self, *tensors: Tensor) -> None:
        """Leaves out tensors that existed before."""
        self._before |= {x.untyped_storage()._cdata for x in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in self._before:
                storage = x.untyped_storage()
                self._made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._made = {key: (ref, size) for key, (ref, size) in self._made.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self._made.values()))
        return result


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_beside_the_logits_there_is_one_chunk_and_then_one_gradient(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    chunk, length, words = 2**16, 128, 2048
    monkeypatch.setattr(tokens, "CHUNK_BYTES", chunk)
    model = Logits(torch.randn(2, length, words).to(dtype))
    ids = torch.randint(words, (2, length))
    weights = dict(model.named_parameters())
    of_tokens = 2 * length * 200  # two dozen numbers of 8 bytes for each token
    forward, backward = Live(), Live()
    for mode in (forward, backward):
        mode.know(model.logits, ids)
    with forward:
        f = CausalLM().get_outputs(model, weights, {}, [ids, torch.ones_like(ids)])
    assert forward.peak <= chunk + of_tokens
    with backward:
        torch.autograd.grad(f.sum(), model.logits)
    size = model.logits.numel() * model.logits.element_size()
    assert size <= backward.peak <= size + chunk + of_tokens


def test_vmap_takes_one_gradient_for_each_sample_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks are made of the rows of all samples: a chunk for each would be as many of them."""
    chunk, count, length, words = 2**15, 16, 8, 1024
    monkeypatch.setattr(tokens, "CHUNK_BYTES", chunk)
    logits = torch.randn(count, length, words)
    labels = torch.randint(words, (count, length))
    live = Live()
    live.know(logits, labels)
    with live:
        vmap(grad(lambda x, y: token_losses(x[None], y[None]).sum()))(logits, labels)
    assert live.peak <= logits.numel() * 4 + chunk + count * length * 200


def test_gradient_computers_take_models_in_half_precision() -> None:
    model = Logits(torch.randn(1, T, V).bfloat16())
    batch = [torch.randint(V, (2, T)), torch.ones(2, T, dtype=torch.long)]
    grads = FunctionalGradientComputer(model, CausalLM()).compute_per_sample_grad(batch)["logits"]
    assert grads.dtype == torch.bfloat16
    for b in range(2):
        labels = torch.cat([batch[0][b : b + 1, 1:], torch.tensor([[-100]])], dim=1)
        losses, slopes = expected(model.logits, labels)
        mean = losses.sum() / (T - 1)
        # df/dloss = −1/(1 − p)
        exact = slopes / (T - 1) / torch.expm1(-mean)
        torch.testing.assert_close(grads[b].double(), exact, rtol=torch.finfo(torch.bfloat16).eps, atol=1e-12)
