"""Small language models with layers of several kinds, and one that has weights of its own for each token."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
import two_sided_reference as definition
from torch import Tensor, nn

from trak_fast.tasks import CausalLM

WORDS, WIDTH, B, T = 23, 10, 5, 7


class Conv1D(nn.Module):
    """A linear layer whose weight is (in, out), as that of transformers."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Scaled(nn.Linear):
    """A subclass of a linear layer that the rule of linear layers does not fit."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x).tanh()


class Language(nn.Module):
    """A language model whose head is its table of words, with layers of several kinds."""

    def __init__(self, middle: Callable[[int, int], nn.Module] = Conv1D, tied: bool = True) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 6)
        self.middle = middle(6, 5)
        self.few = nn.Linear(5, 3, bias=False)
        self.down = nn.Linear(3, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.words(input_ids)
        x = x + F.pad(self.norm(x)[:, :-1], (0, 0, 1, 0))
        return self.head(x + self.down(self.few(self.middle(torch.tanh(self.up(x))))))


LINEAR = ["words.weight", "up.weight", "middle.weight", "few.weight", "down.weight"]


def texts() -> list[Tensor]:
    mask = torch.ones(B, T, dtype=torch.long)
    mask[1, 4:] = 0
    return [torch.randint(WORDS, (B, T)), mask]


class LanguageByToken(nn.Module):
    """A `Language` whose weights are as many times there as tokens, so that autograd tells the tokens' parts apart."""

    def __init__(self, model: Language) -> None:
        super().__init__()
        for name, parameter in model.named_parameters():
            copies = parameter.detach().double().expand(T, *parameter.shape).clone()
            self.register_parameter(name.replace(".", "_"), nn.Parameter(copies))
        self.tied = not hasattr(self, "head_weight")

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        ids = input_ids[0]
        x = self.words_weight[torch.arange(T), ids]
        normed = F.layer_norm(x, (WIDTH,)) * self.norm_weight + self.norm_bias
        x = x + F.pad(normed[:-1], (0, 0, 1, 0))
        y = torch.einsum("thw,tw->th", self.up_weight, x) + self.up_bias
        y = torch.einsum("twh,tw->th", self.middle_weight, torch.tanh(y)) + self.middle_bias
        y = torch.einsum("thw,tw->th", self.few_weight, y)
        y = torch.einsum("thw,tw->th", self.down_weight, y) + self.down_bias
        head = self.words_weight if self.tied else self.head_weight
        return torch.einsum("thw,tw->th", head, x + y).unsqueeze(0)


def gradients_by_token(model: Language, batch: Sequence[Tensor]) -> list[list[definition.Arrays]]:
    """Differentiates f of each sample by the weights of each token, in float64."""
    names = [name for name, _ in model.named_parameters()]
    samples = definition.gradients_alone(LanguageByToken(model), CausalLM(), batch)
    return [
        [{name: value[t] for name, value in zip(names, sample.values(), strict=True)} for t in range(T)]
        for sample in samples
    ]
