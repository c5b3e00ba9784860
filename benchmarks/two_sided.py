"""Measures how well two-sided sketches keep the cosines of a language model's gradients, beside the dense projection.

    python benchmarks/two_sided.py [--steps N] [--output benchmarks/results/NAME.json]

A byte-level language model of four layers is trained on the sources of Python's standard library. Gradients of 128
documents, one from each of 128 files, are compared, 64 by 64: the exact cosines with those of features. "error" is the
root mean square of the difference, "rank" the mean over the 64 columns of Spearman's correlation. Figures are means
over seeds of the projection. Times are processor seconds for the 128 features, with the forward and backward pass.
"""

from __future__ import annotations

import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from record import make_parser, save
from scipy.stats import spearmanr
from torch import Tensor, nn

from trak_fast.features.streaming import GradientProjector
from trak_fast.gradients import HookGradientComputer
from trak_fast.tasks import CausalLM

WIDTH, HEADS, LAYERS, LENGTH = 128, 4, 4, 128
HALF = 64
SEEDS = 3
SIDES = (8, 16, 32, 64)


class Block(nn.Module):
    """A layer of a transformer: causal attention and two linear layers, each behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.queries_keys_values = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.queries_keys_values(self.norms[0](x)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class Model(nn.Module):
    """A language model of bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, WIDTH)
        self.places = nn.Parameter(torch.randn(LENGTH, WIDTH) / 50, requires_grad=False)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 256, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.bytes(input_ids) + self.places[: input_ids.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def texts() -> list[Tensor]:
    """Reads the standard library's sources, one a file."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in sorted(folder.glob("*.py")) if path.stat().st_size > 8 * LENGTH]
    return [torch.tensor(list(path.read_bytes())) for path in files]


def train(model: Model, sources: list[Tensor], steps: int) -> float:
    """Trains on random pieces of the sources; returns the last loss."""
    everything = torch.cat(sources)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    loss = torch.zeros(())
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        starts = torch.randint(len(everything) - LENGTH, (32, 1))
        batch = everything[starts + torch.arange(LENGTH)]
        loss = F.cross_entropy(model(batch, batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def cosines(features: Tensor) -> NDArray[np.float64]:
    rows = F.normalize(features.double(), dim=1)
    return (rows @ rows.mT)[HALF:, :HALF].numpy()


def measure(make: Callable[[int], Tensor], exact: NDArray[np.float64]) -> dict[str, float]:
    """Measures features that a function makes for a seed."""
    errors, ranks, seconds, size = [], [], [], 0
    for seed in range(SEEDS):
        started = time.process_time()
        features = make(seed)
        seconds.append(time.process_time() - started)
        size = features.shape[1]
        found = cosines(features)
        errors.append(np.sqrt(((found - exact) ** 2).mean()))
        ranks.append(np.mean([spearmanr(found[:, j], exact[:, j])[0] for j in range(HALF)]))
    return {
        "numbers": size,
        "error": float(np.mean(errors)),
        "rank": float(np.mean(ranks)),
        "seconds": float(min(seconds)),
    }


def main() -> None:
    parser = make_parser(__doc__ or "")
    parser.add_argument("--steps", type=int, default=400, help="training steps")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    sources = texts()
    model = Model()
    loss = train(model, sources, options.steps)
    chosen = [sources[i] for i in np.linspace(0, len(sources) - 1, 2 * HALF).astype(int)]
    ids = torch.stack([source[4 * LENGTH : 5 * LENGTH] for source in chosen])
    batch = [ids, torch.ones_like(ids)]
    computer = HookGradientComputer(model.eval(), CausalLM())
    parts = [computer.compute_per_sample_grad([x[i : i + 16] for x in batch]) for i in range(0, 2 * HALF, 16)]
    grads = torch.cat([torch.cat([g.flatten(1) for g in part.values()], 1) for part in parts])
    exact = cosines(grads)
    print(f"{grads.shape[1]:,} parameters, loss {loss:.2f}, cosines {exact.mean():.3f} ± {exact.std():.3f}")

    def features(seed: int, k: int, **sketch: Any) -> Tensor:
        projector = GradientProjector(model, "causal_lm", k, seed=seed, **sketch)
        return torch.cat([projector.project([x[i : i + 32] for x in batch]) for i in range(0, 2 * HALF, 32)])

    results: dict[str, dict[str, float]] = {}
    for k in (1024, 4096):
        results[f"dense, {k}"] = measure(lambda seed, k=k: features(seed, k), exact)  # type: ignore[misc]
        for side in SIDES:
            results[f"two-sided {side}, then {k}"] = measure(
                lambda seed, k=k, side=side: features(seed, k, sketch="two_sided", sketch_side=side),  # type: ignore[misc]
                exact,
            )
    for side in SIDES[:2]:
        results[f"two-sided {side}, kept"] = measure(
            lambda seed, side=side: features(seed, 0, sketch="two_sided", sketch_side=side),  # type: ignore[misc]
            exact,
        )
    for name, found in results.items():
        print(
            f"{name:24} {found['numbers']:7.0f} numbers  error {found['error']:.4f}  rank {found['rank']:.3f}  "
            f"{found['seconds']:6.1f} s"
        )
    save(options.output, {"parameters": grads.shape[1], "loss": loss, "results": results})


if __name__ == "__main__":
    main()
