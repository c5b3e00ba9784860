"""The learning rates of checkpoints, from files as transformers' Trainer writes them, and from its own."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from libraries import needs
from torch import nn
from torch.utils.data import Dataset

from trak_fast.lm.models.learning_rates import learning_rates


def write_log(folder: Path, step: int, rates: dict[int, float]) -> Path:
    """Writes trainer_state.json with rates by their steps, among other entries, and returns the folder."""
    folder.mkdir(parents=True)
    entries: list[dict[str, Any]] = [{"loss": 2.0, "learning_rate": rate, "step": at} for at, rate in rates.items()]
    entries.insert(1, {"eval_loss": 3.0, "step": 1})
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": entries}))
    return folder


def stepped(rate: float, folder: Path) -> Path:
    """Writes optimizer.pt with a rate, and returns its path."""
    optimizer = torch.optim.AdamW(nn.Linear(2, 1).parameters(), lr=rate)
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    return folder / "optimizer.pt"


RATES = {2: 0.5, 4: 0.25, 6: 0.125, 8: 0.0625}


def test_a_checkpoint_alone_has_the_last_rate_up_to_its_step(tmp_path: Path) -> None:
    assert learning_rates([write_log(tmp_path / "a", 6, RATES)], [None]) == [0.125]
    assert learning_rates([write_log(tmp_path / "b", 7, RATES)], [None]) == [0.125]


def test_checkpoints_of_a_run_have_the_mean_since_the_one_before(tmp_path: Path) -> None:
    folders = [write_log(tmp_path / str(step), step, RATES) for step in (8, 4)]
    assert learning_rates(folders, [None, None]) == [(0.125 + 0.0625) / 2, (0.5 + 0.25) / 2]


def test_a_checkpoint_without_a_log_since_the_one_before_has_the_last_rate(tmp_path: Path) -> None:
    folders = [write_log(tmp_path / str(step), step, RATES) for step in (4, 5)]
    assert learning_rates(folders, [None, None]) == [(0.5 + 0.25) / 2, 0.25]


def test_checkpoints_of_other_runs_do_not_count(tmp_path: Path) -> None:
    folders = [write_log(tmp_path / run / str(step), step, RATES) for run, step in (("a", 4), ("b", 8))]
    assert learning_rates(folders, [None, None]) == [0.25, 0.0625]


def test_the_scheduler_and_then_the_optimizer_have_the_rate_without_a_log(tmp_path: Path) -> None:
    optimizer = stepped(0.75, tmp_path)
    assert learning_rates([tmp_path], [optimizer]) == [0.75]
    torch.save({"_last_lr": [0.5, 0.25], "last_epoch": 3}, tmp_path / "scheduler.pt")
    assert learning_rates([tmp_path], [optimizer]) == [0.5]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 4, "log_history": []}))
    assert learning_rates([tmp_path], [optimizer]) == [0.5]


@pytest.mark.parametrize("text", ["{", "[]", '{"log_history": 3}', '{"log_history": [{"learning_rate": "high"}]}'])
def test_files_that_cannot_be_read_have_no_rate(text: str, tmp_path: Path) -> None:
    (tmp_path / "trainer_state.json").write_text(text)
    for name in ("scheduler.pt", "optimizer.pt"):
        (tmp_path / name).write_bytes(b"nothing")
    assert learning_rates([tmp_path], [tmp_path / "optimizer.pt"]) == [None]


class Sentences(Dataset[dict[str, torch.Tensor]]):
    """Eight sequences of one token each."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.full((5,), index), "labels": torch.full((5,), index)}


@pytest.mark.parametrize("logged", [True, False])
def test_the_files_of_the_trainer_have_the_rates_of_its_schedule(logged: bool, tmp_path: Path) -> None:
    transformers = needs("transformers")
    needs("accelerate")
    config = transformers.GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        learning_rate=0.5,
        lr_scheduler_type="linear",
        per_device_train_batch_size=4,
        save_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="steps" if logged else "no",
        logging_steps=1,
        dataloader_pin_memory=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs
        transformers.Trainer(
            model=transformers.GPT2LMHeadModel(config), args=arguments, train_dataset=Sentences()
        ).train()
    folders = [tmp_path / "checkpoint-4", tmp_path / "checkpoint-2"]
    found = learning_rates(folders, [folder / "optimizer.pt" for folder in folders])
    # the rate falls from 0.5 to 0 in four steps; steps 1 to 4 are made with 0.5, 0.375, 0.25, 0.125
    expected = [(0.25 + 0.125) / 2, (0.5 + 0.375) / 2] if logged else [0.0, 0.25]
    assert found == expected
