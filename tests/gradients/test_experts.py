"""The rule of stacked experts, against a plain loop over tokens and against autograd."""

from collections import defaultdict

import pytest
import torch
import torch.nn.functional as F
from streamed import Largest
from torch import Tensor, nn

import trak_fast
from trak_fast import GradientProjector
from trak_fast.features.sums import FeatureSums
from trak_fast.gradients.experts import ExpertsRule, experts_rule_of
from trak_fast.gradients.pieces import Block, Outer, Piece

B, T, E, K, H, WIDE = 4, 6, 5, 2, 3, 7


class TinyExperts(nn.Module):
    """Gated experts that compute a token at a time."""

    def __init__(self, experts: int = E) -> None:
        super().__init__()
        self.experts = experts
        self.gate_up_proj = nn.Parameter(torch.randn(experts, 2 * WIDE, H))
        self.down_proj = nn.Parameter(torch.randn(experts, H, WIDE))
        self.act_fn = nn.SiLU()

    def forward(self, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        rows = []
        for x, experts, factors in zip(hidden_states, index, weights, strict=True):
            row = torch.zeros_like(x)
            for expert, factor in zip(experts.tolist(), factors, strict=True):
                if expert < self.experts:
                    gate, up = (self.gate_up_proj[expert] @ x).chunk(2)
                    row = row + factor * (self.down_proj[expert] @ (self.act_fn(gate) * up))
            rows.append(row)
        return torch.stack(rows)


class UngatedExperts(nn.Module):
    """Experts without a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(E, WIDE, H))
        self.down_proj = nn.Parameter(torch.randn(E, H, WIDE))
        self.act_fn = nn.GELU()

    def forward(self, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        middle = self.act_fn(torch.einsum("nh,nkih->nki", hidden_states, self.up_proj[index]))
        return torch.einsum("nki,nkhi,nk->nh", middle, self.down_proj[index], weights)


def routed() -> tuple[Tensor, Tensor, Tensor]:
    """Makes tokens, and the experts that they are sent to: nothing to expert 1, one token to none."""
    hidden_states = torch.randn(B, T, H, dtype=torch.float64)
    index = torch.stack([torch.randperm(E - 1)[:K] for _ in range(B * T)]).view(B, T, K)
    index = torch.where(index >= 1, index + 1, index)
    index[2] = torch.tensor([0, 3])  # one sample sends all of its tokens to the same ones
    return hidden_states, index, torch.rand(B, T, K, dtype=torch.float64)


@pytest.mark.parametrize("experts", [TinyExperts, UngatedExperts])
def test_pieces_of_single_experts_add_up_to_autograds_gradient(experts: type[nn.Module]) -> None:
    layer = experts().double()
    hidden_states, index, weights = routed()
    if experts is TinyExperts:
        index[0, 1] = E
    output_grads = torch.randn_like(hidden_states)
    rule = experts_rule_of(layer)
    assert isinstance(rule, ExpertsRule)
    found: dict[str, list[Piece]] = defaultdict(list)
    for name, piece in rule.gradients(layer, hidden_states, index, weights, output_grads):
        assert isinstance(piece, Block)
        assert isinstance(piece.part, Outer)
        parameter = layer.get_parameter(name)
        assert (piece.height, piece.width) == (E * parameter.shape[1], parameter.shape[2])
        assert (piece.part.height, piece.first % piece.part.height) == (parameter.shape[1], 0)
        found[name].append(piece)
    parameters = dict(layer.named_parameters())
    for i in range(B):
        total = (layer(hidden_states[i], index[i], weights[i]) * output_grads[i]).sum()
        expected = torch.autograd.grad(total, list(parameters.values()))
        for name, gradient in zip(parameters, expected, strict=True):
            pieces = found[name]
            sums = torch.stack([piece.rows(0, piece.height)[i] for piece in pieces]).sum(0).view_as(gradient)
            torch.testing.assert_close(sums, gradient, rtol=1e-12, atol=1e-12)
            unused = sorted(set(range(E)) - set(index[i].flatten().tolist()))
            assert 1 in unused
            assert not sums[unused].any()


def test_rows_of_a_block_may_begin_and_end_anywhere() -> None:
    part = Outer(left=torch.randn(B, T, 4), right=torch.randn(B, T, 3))
    block = Block(part, first=3, height=9)
    whole = torch.zeros(B, 9, 3)
    whole[:, 3:7] = part.rows(0, 4)
    for first in range(9):
        for last in range(first, 10):
            assert torch.equal(block.rows(first, last), whole[:, first:last])


class Mixture(nn.Module):
    """A model of tokens with a router and experts."""

    def __init__(self, experts: int = E) -> None:
        super().__init__()
        self.table = nn.Embedding(11, H)
        self.router = nn.Linear(H, experts)
        self.experts = TinyExperts(experts)
        self.head = nn.Linear(H, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        flat = x.reshape(-1, H)
        weights, index = self.router(flat).softmax(1).topk(K)
        return self.head((x + self.experts(flat, index, weights).view_as(x)).mean(1))


@pytest.mark.parametrize("length", [T, B, 1])
def test_features_of_a_mixture_are_projected_gradients_of_samples_alone(
    length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Mixture().double()
    tokens, labels = torch.randint(11, (B, length)), torch.randint(3, (B,))
    largest = 0
    add_rows = FeatureSums.add_rows

    def measured(self: FeatureSums, name: str, rows: Tensor, column: int, start: int) -> None:
        nonlocal largest
        if name.startswith("experts."):
            largest = max(largest, rows[0].numel())
        add_rows(self, name, rows, column, start)

    monkeypatch.setattr(FeatureSums, "add_rows", measured)
    projector = GradientProjector(model, "image_classification", 16)
    features = projector.project([tokens, labels])
    parameters = list(model.parameters())
    rows = []
    for i in range(B):
        log_p = F.log_softmax(model(tokens[i : i + 1]), 1)[0, labels[i]]
        gradients = torch.autograd.grad(log_p - torch.log(-torch.expm1(log_p)), parameters)
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    torch.testing.assert_close(features, trak_fast.project(torch.stack(rows), 16), rtol=1e-5, atol=1e-5)
    assert projector.singly == frozenset()
    assert largest == 2 * WIDE * H  # one expert's slice and no more


def test_no_tensor_is_larger_than_the_factors_of_one_expert() -> None:
    model = Mixture(experts=200)
    batch = [torch.randint(11, (B, T)), torch.randint(3, (B,))]
    projector = GradientProjector(model, "image_classification", 16, memory_budget=B * 4 * H)
    projector.project(batch)
    projector._unchecked = -1000  # a check forms whole gradients of one sample
    with Largest() as largest:
        projector.project(batch)
    # logits of the router or the tokens of all samples between an expert's matrices; a stack of gradients has 200 times
    # B · 2 · WIDE · H numbers
    assert largest.bytes <= 4 * max(B * T * 201, B * T * 2 * WIDE)


class OddExperts(TinyExperts):
    """Experts that have the shapes and add something of their own."""

    def forward(self, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return super().forward(hidden_states, index, weights) + self.down_proj.sum(0).mean(1)


def test_experts_that_compute_something_else_are_differentiated_by_themselves() -> None:
    model = Mixture()
    model.experts = OddExperts()
    model.double()
    batch = [torch.randint(11, (B, T)), torch.randint(3, (B,))]
    projector = GradientProjector(model, "image_classification", 16)
    features = projector.project(batch)
    gradients = trak_fast.HookGradientComputer(model, trak_fast.tasks.ImageClassification())
    expected = trak_fast.project(gradients.compute_per_sample_grad(batch), 16)
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)


def test_other_layouts_have_no_rule() -> None:
    layer = TinyExperts()
    layer.is_transposed = True
    assert experts_rule_of(layer) is None
    layer = TinyExperts()
    layer.gate_up_proj_bias = nn.Parameter(torch.zeros(E, 2 * WIDE))
    assert experts_rule_of(layer) is None
    layer = TinyExperts()
    layer.down_proj = nn.Parameter(layer.down_proj.detach().mT.contiguous())
    assert experts_rule_of(layer) is None
    assert experts_rule_of(nn.Linear(2, 2)) is None
