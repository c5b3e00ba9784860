"""Measures the cost of what guards gradients and stores: the check of each batch by hooks, the digests of samples.

    python benchmarks/checks.py [--repeats N] [--threads T]

Gradients are computed with and without the check, in turn, and figures are medians of the process's CPU time, which
other programs disturb little. The projection to k = 2048 follows every gradient in use, so shares of both are printed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import trak_fast
from trak_fast.gradients import evaluation_mode
from trak_fast.store.samples import digest_samples
from trak_fast.tasks import CausalLM, ImageClassification, Task


class Unchecked(trak_fast.HookGradientComputer):
    """Gradients by hooks that are taken as they come."""

    def _sum_by_autograd(self, outputs: Tensor, factors: Tensor, names: list[str]) -> dict[str, Tensor]:
        return {}

    def _are_their_own(self, batch: Any, outputs: Tensor, grads: dict[str, Tensor]) -> bool:
        return True

    def _compare(self, grads: dict[str, Tensor], factors: Tensor, sums: dict[str, Tensor]) -> set[str]:
        return set()


class Block(nn.Module):
    """A layer of a language model."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(size), nn.LayerNorm(size)
        self.mixed, self.out = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.up, self.down = nn.Linear(size, 4 * size), nn.Linear(4 * size, size)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(2, (4, -1)).transpose(1, 2) for part in self.mixed(self.first(x)).chunk(3, 2))
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.second(x))))


class LanguageModel(nn.Module):
    """A small language model."""

    def __init__(self, words: int = 2000, size: int = 128, depth: int = 4, length: int = 128) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, size), nn.Embedding(length, size)
        self.blocks = nn.Sequential(*[Block(size) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(size), nn.Linear(size, words)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.words(input_ids) + self.places(torch.arange(input_ids.shape[1])[None])
        return self.head(self.norm(self.blocks(x)))


def convolutions(width: int) -> nn.Module:
    """Makes the network of attribution.py."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(4), nn.Flatten(), nn.Linear(1024, width), nn.ReLU(), nn.Linear(width, 10),
    )  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model with a batch.

    Attributes:
        title: Its name in the table.
        model: The model.
        task: The task.
        batch: The batch.
    """

    title: str
    model: nn.Module
    task: Task
    batch: list[Tensor]


def make_cases() -> list[Case]:
    """Makes the models of the table."""
    images = [torch.randn(32, 3, 32, 32), torch.randint(10, (32,))]
    texts = [torch.randint(2000, (8, 128)), torch.ones(8, 128, dtype=torch.long)]
    return [
        Case("convolutions, D = 119 k, B = 32", convolutions(96), ImageClassification(), images),
        Case("convolutions, D = 1.01 M, B = 32", convolutions(960), ImageClassification(), images),
        Case("language model, D = 1.32 M, B = 8, T = 128", LanguageModel(), CausalLM(), texts),
    ]


def seconds(call: Callable[..., object], *arguments: Any) -> float:
    """Returns the CPU time of a call."""
    start = time.process_time()
    call(*arguments)
    return time.process_time() - start


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print("| gradients by hooks | without the check, ms | with it, ms | more | more of gradients and projection |")
    print("| --- | --- | --- | --- | --- |")
    for case in make_cases():
        computers = [kind(case.model, case.task) for kind in (Unchecked, trak_fast.HookGradientComputer)]
        projector = trak_fast.Projector(sum(p.numel() for p in case.model.parameters()), 2048)
        times: list[list[float]] = [[], [], []]
        with evaluation_mode(case.model):
            grads = [computer.compute_per_sample_grad(case.batch) for computer in computers][1]
            for _ in range(options.repeats):
                for computer, measured in zip(computers, times, strict=False):
                    measured.append(seconds(computer.compute_per_sample_grad, case.batch))
                times[2].append(seconds(projector.project, grads))
        without, checked, projected = (statistics.median(measured) for measured in times)
        more = checked - without
        print(
            f"| {case.title} | {1e3 * without:.1f} | {1e3 * checked:.1f} | {more / without:.0%} | "
            f"{more / (without + projected):.0%} |"
        )
    print("\n| digest of a sample | us | GB/s |\n| --- | --- | --- |")
    for title, batch in (
        ("28 x 28 bytes", [torch.randint(1, 256, (256, 28, 28), dtype=torch.uint8)]),
        ("3 x 32 x 32 float32", [torch.randn(256, 3, 32, 32)]),
        ("3 x 224 x 224 float32", [torch.randn(64, 3, 224, 224)]),
        ("1024 tokens", [torch.randint(1, 50000, (64, 1024)), torch.ones(64, 1024, dtype=torch.long)]),
    ):
        positions = np.arange(len(batch[0]))
        measured = [seconds(digest_samples, batch, positions) for _ in range(options.repeats)]
        per_sample = statistics.median(measured) / len(positions)
        size = sum(x[0].numel() * x.element_size() for x in batch)
        print(f"| {title} | {1e6 * per_sample:.1f} | {size / per_sample / 1e9:.1f} |")


if __name__ == "__main__":
    main()
