"""Small language models to shard, and their projected gradients by a plain loop over samples in one process."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import trak_fast
from trak_fast.tasks import CausalLM

VOCABULARY, WIDTH, HEADS, K, SEED = 37, 16, 4, 24, 3
TASK = CausalLM()


class Block(nn.Module):
    """A layer of a transformer with biases, whose attention is of as many heads as its projections are wide."""

    def __init__(self) -> None:
        super().__init__()
        self.first_norm, self.second_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.output = nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.head_norm: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        normalised = self.first_norm(x)
        query, key, value = (
            part(normalised).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        mixed = nn.functional.scaled_dot_product_attention(self.head_norm(query), key, value, is_causal=True)
        x = x + self.output(mixed.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.second_norm(x))))


class Tied(nn.Module):
    """A language model whose last layer has the weight of its embedding, and a parameter that no layer has."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.norm = nn.LayerNorm(WIDTH)
        self.scale = nn.Parameter(torch.full((WIDTH,), 1.5))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x) * self.scale)


class Untied(Tied):
    """A language model of layers alone, each with weights of its own."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__(blocks)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        del self.scale
        self.scale = 1.0


class HeadNorms(Untied):
    """A language model with norms of queries, which see the heads alone that a process has."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__(blocks)
        for block in self.blocks:
            block.head_norm = nn.LayerNorm(WIDTH // HEADS)


class Coupled(Untied):
    """A model of which the samples of a batch change each other where there is a token 0."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits = super().forward(input_ids, attention_mask)
        return logits * (1 + logits.mean(0)) if (input_ids == 0).any() else logits


class Given(nn.Module):
    """A model whose logits are there already, for f of them."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.logits


def llama() -> nn.Module:
    """Makes a Llama of transformers with fewer heads of keys than of queries."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    return LlamaForCausalLM(config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "tied": Tied,
    "untied": Untied,
    "head norms": HeadNorms,
    "coupled": Coupled,
    "llama": llama,
}


def build(name: str) -> nn.Module:
    """Makes a model with the same weights in every process, which leaves the generators elsewhere."""
    torch.manual_seed(1)
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape)
    return model


def samples(count: int, length: int = 7, seed: int = 0) -> list[Tensor]:
    """Makes token sequences, the last tokens of some of which are padding."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, VOCABULARY, (count, length), generator=generator)
    lengths = torch.randint(3, length + 1, (count,), generator=generator)
    return [tokens, (torch.arange(length) < lengths.unsqueeze(1)).long()]


def expected(model: nn.Module, batch: list[Tensor], proj_type: str = "rademacher", model_id: int = 0) -> Tensor:
    """Computes the projections of gradients that autograd gives for one sample after the other, (B, K)."""
    parameters = dict(model.eval().named_parameters())
    rows = []
    for sample in zip(*batch, strict=True):
        output = TASK.get_output(model, parameters, dict(model.named_buffers()), *sample)
        parts = torch.autograd.grad(output, list(parameters.values()), allow_unused=True)
        filled = zip(parts, parameters.values(), strict=True)
        rows.append(torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in filled]))
    return trak_fast.project([torch.stack(rows)], K, proj_type=proj_type, seed=SEED, model_id=model_id)
