"""The moments in checkpoints of transformers' Trainer, by the parameters' names, against its live optimizer's."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from libraries import needs
from moments import assert_moments, moments
from torch import nn
from torch.utils.data import Dataset

transformers = needs("transformers")
peft = needs("peft")
needs("accelerate")

# peft asks transformers for it
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

WORDS, LENGTH = 11, 5


class Sentences(Dataset[dict[str, torch.Tensor]]):
    """Random sequences, the same in each run."""

    ids = torch.randint(WORDS, (8, LENGTH), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def gpt2() -> nn.Module:
    """Builds a GPT-2 with two blocks; its linear layers are Conv1D, its head is tied."""
    torch.manual_seed(0)
    model: nn.Module = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=WORDS, n_positions=8, n_embd=8, n_layer=2, n_head=2)
    )
    return model


def llama() -> nn.Module:
    """Builds a LLaMA with two blocks, RMS norms and square weights of one shape."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=WORDS,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
    )
    model: nn.Module = transformers.LlamaForCausalLM(config)
    return model


def lora() -> nn.Module:
    """Puts adapters on the GPT-2."""
    config = peft.LoraConfig(
        r=2, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    model: nn.Module = peft.get_peft_model(gpt2(), config)
    return model


def train(model: nn.Module, folder: Path) -> tuple[Path, Any]:
    """Trains for three steps; returns the folder of the checkpoint after them, and the Trainer."""
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=4,
        save_steps=3,
        weight_decay=0.1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
        dataloader_pin_memory=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Sentences())
        trainer.train()
    return folder / "checkpoint-3", trainer


@pytest.mark.parametrize("build", [gpt2, llama, lora])
def test_a_checkpoint_has_the_moments_of_each_parameter(build: Any, tmp_path: Path) -> None:
    model = build()
    checkpoint, trainer = train(model, tmp_path)
    found = moments(checkpoint, model)
    assert_moments(found, model, trainer.optimizer)
    assert found.digest() == moments(trainer.optimizer, model).digest()


def test_adapters_that_are_loaded_for_inference_find_theirs(tmp_path: Path) -> None:
    """Their parameters require no gradients then, and have to be selected by name."""
    trained = lora()
    checkpoint, trainer = train(trained, tmp_path)
    model = peft.PeftModel.from_pretrained(gpt2(), checkpoint)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert moments(checkpoint, model, ["*lora_*"]).digest() == moments(trainer.optimizer, trained).digest()
