"""Two-sided sketches of language models from transformers, against their definition."""

import copy
from collections.abc import Callable

import libraries
import pytest
import torch
import two_sided_reference as definition
from torch import Tensor, nn

from trak_fast.features.streaming import GradientProjector
from trak_fast.projection import reference
from trak_fast.tasks import CausalLM

transformers = libraries.needs("transformers")

ROUNDING = 1000 * 2.0**-24
"""The relative error of numbers that about a thousand float32 operations have led to."""


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=40, n_positions=12, n_embd=16, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config).eval()


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
    )
    return transformers.LlamaForCausalLM(config).eval()


def texts() -> list[Tensor]:
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, 5:] = 0
    return [torch.randint(40, (3, 9)), mask]


@pytest.mark.parametrize(
    ("make", "others"), [(gpt2, ("wpe.weight",)), (llama, ("embed_tokens.weight",))], ids=["gpt2", "llama"]
)
def test_features_of_language_models_are_those_of_the_definition(
    make: Callable[[], nn.Module], others: tuple[str, ...]
) -> None:
    model = make()
    batch = texts()
    projector = GradientProjector(model, "causal_lm", 32, seed=5, sketch="two_sided", sketch_side=8)
    found = projector.project(batch, model_id=1)
    # by the definition's words: matrices, but for the tables of embeddings that no linear layer shares
    sketched = [name for name, p in model.named_parameters() if p.ndim == 2 and not name.endswith(others)]
    samples = definition.gradients_alone(copy.deepcopy(model).double(), CausalLM(), batch)
    blocks = definition.flattened([definition.blocks(one, sketched, 8, 5, 1) for one in samples])
    expected = torch.from_numpy(reference.project(blocks, 32, "rademacher", 5, 1))
    assert not projector.singly
    assert blocks.shape[1] == projector.sketched_dim
    assert ((found - expected).norm(dim=1) <= ROUNDING * expected.norm(dim=1)).all()


@pytest.mark.parametrize("make", [gpt2, llama])
def test_tokens_of_language_models_add_up_to_samples(make: Callable[[], nn.Module]) -> None:
    model = make()
    batch = texts()
    sketch = {"sketch": "two_sided", "sketch_side": 8}
    samples = GradientProjector(model, "causal_lm", 32, **sketch).project(batch)
    tokens = GradientProjector(model, "causal_lm", 32, per="token", **sketch).project(batch)
    assert tokens.shape == (3, 9, 32)
    assert ((tokens.sum(1) - samples).norm(dim=1) <= ROUNDING * samples.norm(dim=1)).all()
    # the padding at the end has no part in what comes before it
    assert not tokens[1, 5:].any()
    direction = torch.randn(32)
    whole = GradientProjector(model, "causal_lm", 32)
    features = whole.project(batch)
    error = whole.token_products(batch, direction).sum(1) - features @ direction
    assert (error.abs() <= ROUNDING * features.norm(dim=1) * direction.norm()).all()
