"""Two-sided sketches of language models from transformers, against their definition."""

import copy

import libraries
import pytest
import torch
import two_sided_reference as definition
from torch import nn

from trak_fast.features.streaming import GradientProjector
from trak_fast.projection import reference
from trak_fast.tasks import CausalLM

transformers = libraries.needs("transformers")


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


@pytest.mark.parametrize(
    ("make", "others"), [(gpt2, ("wpe.weight",)), (llama, ("embed_tokens.weight",))], ids=["gpt2", "llama"]
)
def test_features_of_language_models_are_those_of_the_definition(make, others) -> None:  # type: ignore[no-untyped-def]
    model = make()
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, 5:] = 0
    batch = [torch.randint(40, (3, 9)), mask]
    projector = GradientProjector(model, "causal_lm", 32, seed=5, sketch="two_sided", sketch_side=8)
    found = projector.project(batch, model_id=1)
    # by the definition's words: matrices, but for the tables of embeddings that no linear layer shares
    sketched = [name for name, p in model.named_parameters() if p.ndim == 2 and not name.endswith(others)]
    samples = definition.gradients_alone(copy.deepcopy(model).double(), CausalLM(), batch)
    blocks = definition.flattened([definition.blocks(one, sketched, 8, 5, 1) for one in samples])
    expected = torch.from_numpy(reference.project(blocks, 32, "rademacher", 5, 1))
    assert not projector.singly
    assert blocks.shape[1] == projector.sketched_dim
    # about a thousand float32 operations on the way to each number
    assert ((found - expected).norm(dim=1) <= 1000 * 2.0**-24 * expected.norm(dim=1)).all()
