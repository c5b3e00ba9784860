"""Models with the layers that have rules, and with uses of layers that break the rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trak_fast.tasks import CausalLM, ImageClassification, Task
from trak_fast.tasks.base import BatchTask, bind

B, LABELS, WORDS = 5, 4, 11


def images(*shape: int) -> list[Tensor]:
    """Makes a batch of images of a shape with labels."""
    return [torch.randn(B, *shape, dtype=torch.float64), torch.randint(LABELS, (B,))]


def words() -> list[Tensor]:
    """Makes a batch of token sequences with a mask, one of them shorter."""
    mask = torch.ones(B, 7, dtype=torch.long)
    mask[1, 4:] = 0
    return [torch.randint(WORDS, (B, 7)), mask]


def convolutions() -> nn.Module:
    """Convolutions and norms with many of their options; the statistics of the batch norm are those after training."""
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 4, (2, 1), dilation=(1, 2), bias=False),
        nn.GroupNorm(2, 4),
        nn.Flatten(2),
        nn.Conv1d(4, 3, 2, padding="valid"),
        nn.Tanh(),
        nn.Flatten(),
        nn.LazyLinear(LABELS),
    )
    model(torch.zeros(2, 4, 7, 8))
    nn.init.normal_(model[1].running_mean)
    nn.init.uniform_(model[1].running_var, 0.5, 2)
    return model


def volumes() -> nn.Module:
    return nn.Sequential(nn.Conv3d(1, 2, 2), nn.BatchNorm3d(2), nn.Flatten(), nn.Linear(16, LABELS))


class Attention(nn.Module):
    """Multi-head attention by linear layers, with a layer norm over two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.keys, self.values = (nn.Linear(6, 6) for _ in range(3))
        self.norm, self.head = nn.LayerNorm((4, 6)), nn.Linear(6, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(2, (2, 3)).transpose(1, 2) for f in (self.queries, self.keys, self.values))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return self.head(self.norm(x + attended)).mean(1)


class Encoder(nn.Module):
    """PyTorch's own layer, in which two parameters belong to no layer that hooks see."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), nn.Linear(6, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[:, 0])


class Shared(nn.Module):
    """A layer called twice, two layers with one weight, a parameter of the model itself and an unused layer."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.scale, self.unused, self.head = nn.Parameter(torch.tensor(1.5)), nn.Linear(2, 2), nn.Linear(6, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.twice(torch.tanh(self.twice(x)))) * self.scale
        return self.head(self.second(torch.tanh(self.first(x))))


class SequenceFirst(nn.Module):
    """Layers whose inputs have the batch in their second dimension, as many of the first as samples."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(3, 6), nn.LayerNorm(6), nn.Linear(6, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(torch.tanh(self.body(x.transpose(0, 1)))).sum(0))


class ChangedInput(nn.Module):
    """The input of a layer is changed in place after the call, which autograd refuses too."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, LABELS), nn.Linear(6, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        before = self.body(x)
        return before + self.head(x.mul_(2))


class Tied(nn.Module):
    """A language model whose last layer uses the embedding's weight outside of the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, 6, padding_idx=0), nn.Embedding(7, 6)
        self.body, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.words(input_ids) + self.places(torch.arange(input_ids.shape[1]).expand(input_ids.shape))
        x = torch.tanh(self.norm(self.body(x * attention_mask.unsqueeze(2))))
        return self.decode(x.cumsum(1))

    def decode(self, x: Tensor) -> Tensor:
        return F.linear(x, self.words.weight)


class Conv1D(nn.Module):
    """A linear layer as transformers' GPT-2 has it."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


class OwnRMSNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.randn(size)), 1e-3

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


class OtherRMSNorm(OwnRMSNorm):
    """Has the name, but does something else."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight.exp() * x


class ScaleRMSNorm(nn.Module):
    """Has the name, but its parameter has another one."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))


class OtherLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + input @ self.weight.T**2


class Transformer(nn.Module):
    """Layers of transformers' kinds: positions in a batch of one, an attention whose key bias changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, 6), nn.Embedding(7, 6)
        self.before, self.after, self.other = OwnRMSNorm(6), nn.RMSNorm(6), OtherRMSNorm(6)
        self.inner, self.outer = Conv1D(18, 6), OtherLinear(6, 6)
        self.key, self.head = nn.Linear(6, 6), nn.Linear(6, WORDS)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.words(input_ids) + self.places(torch.arange(input_ids.shape[1]).unsqueeze(0))
        q, k, v = self.inner(self.before(x)).chunk(3, 2)
        attended = F.scaled_dot_product_attention(q, self.key(k), v, is_causal=True)
        return self.head(self.after(x + self.outer(self.other(attended))))


class Untied(Tied):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, WORDS)

    def decode(self, x: Tensor) -> Tensor:
        return self.head(x)


class Opaque(torch.autograd.Function):
    """A square that torch.func cannot transform."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grad


class Untransformable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 5), nn.Linear(5, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(Opaque.apply(self.body(x)))


class OwnEmbedding(nn.Embedding):
    """A subclass that changes nothing."""


def single_words() -> nn.Module:
    """A model of samples that are one word each."""
    return nn.Sequential(OwnEmbedding(WORDS, 6), nn.Linear(6, LABELS))


class Example(NamedTuple):
    """A model with a batch and a task."""

    model: nn.Module
    batch: list[Tensor]
    task: Task


class Case(NamedTuple):
    """The parts of an example, in float64.

    Attributes:
        model: Makes the model.
        batch: Makes the batch.
        task: Makes the task.
        per_sample: The parameters that no layer explains.
    """

    model: Callable[[], nn.Module]
    batch: Callable[[], list[Tensor]]
    task: Callable[[], Task] = ImageClassification
    per_sample: frozenset[str] = frozenset()

    def make(self) -> Example:
        return Example(self.model().double(), self.batch(), self.task())


IN_ATTENTION = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
CASES = {
    "convolutions": Case(convolutions, lambda: images(4, 7, 8)),
    "volumes": Case(volumes, lambda: images(1, 3, 3, 3)),
    "attention": Case(Attention, lambda: images(4, 6)),
    "encoder": Case(
        Encoder,
        lambda: images(4, 6),
        per_sample=frozenset(f"layer.self_attn.{name}" for name in IN_ATTENTION),
    ),
    "shared": Case(Shared, lambda: images(6), per_sample=frozenset({"scale"})),
    "sequence first": Case(
        SequenceFirst,
        lambda: images(B, 3),
        per_sample=frozenset({"body.weight", "body.bias", "norm.weight", "norm.bias"}),
    ),
    "tied": Case(Tied, words, CausalLM, frozenset({"words.weight"})),
    "transformer": Case(Transformer, words, CausalLM, frozenset({"other.weight", "outer.weight"})),
    "embedding": Case(Untied, words, CausalLM),
    "single words": Case(single_words, lambda: [torch.randint(WORDS, (B,)), torch.randint(LABELS, (B,))]),
}


class SumOfSines(BatchTask):
    """The sum of the sines of all that a model returns for a sample."""

    def get_outputs(
        self, model: nn.Module, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor], batch: Sequence[Tensor]
    ) -> Tensor:
        output: Tensor = bind(model, weights, buffers)(*batch)
        return output.flatten(1).sin().sum(1)
