"""The ways from a language model and a batch of texts to features, and their yardsticks, for large_models.py."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor, nn

import trak_fast
from trak_fast.projection import checks, kernels
from trak_fast.tasks import CausalLM

LORA_DIM = 8192
"""k of the way with adapters, as LESS has it."""

BUDGET = 64 << 20
"""Bytes of the way with a budget of its own."""

PATIENCE = 120.0
"""Seconds of a batch beyond which no other follows."""

MODELS: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "tiny": lambda: transformers.GPT2Config(n_layer=2, n_embd=64, n_head=4, vocab_size=1000),
    "gpt2-one-layer": lambda: transformers.GPT2Config(n_layer=1),
    "gpt2-small": transformers.GPT2Config,
    "gpt2-xl": lambda: transformers.GPT2Config(n_layer=48, n_embd=1600, n_head=25),
    "llama-1b": lambda: transformers.LlamaConfig(
        hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, intermediate_size=8192,
        vocab_size=128256, max_position_embeddings=131072, tie_word_embeddings=True,
    ),
}  # fmt: skip
"""Configurations by name. One layer of GPT-2 small is for libraries that take minutes; the last is Llama 3.2 1B."""


@dataclass(frozen=True)
class Settings:
    """The model, the batch and the machine of a measurement.

    Attributes:
        model: Its name in MODELS.
        device: The device to run on.
        dtype: The dtype of weights and gradients.
        batch: B.
        tokens: T.
        proj_dim: k.
        threads: Threads of torch and of the kernels.
    """

    model: str
    device: str
    dtype: str
    batch: int
    tokens: int
    proj_dim: int
    threads: int


class Problem:
    """A language model with random weights, and a batch of random tokens."""

    def __init__(self, settings: Settings) -> None:
        torch.manual_seed(0)
        self.settings = settings
        self.device = torch.device(settings.device)
        self.dtype: torch.dtype = getattr(torch, settings.dtype)
        config = MODELS[settings.model]()
        config.use_cache = False
        with self.device:
            self.model = transformers.AutoModelForCausalLM.from_config(
                config, dtype=self.dtype, trust_remote_code=False
            ).eval()
        tokens = torch.randint(config.vocab_size, (settings.batch, settings.tokens), device=self.device)
        self.batch = [tokens, torch.ones_like(tokens)]

    def output(self) -> Tensor:
        """Computes the sum of the samples' model outputs f."""
        return CausalLM().get_outputs(self.model, {}, {}, self.batch).sum()

    def layers(self) -> dict[str, nn.Module]:
        """Returns the linear layers in the model's blocks: those that bergson takes unless told otherwise."""
        kinds = (nn.Linear, transformers.pytorch_utils.Conv1D)
        inside = set(self.model.base_model.modules())
        return {name: m for name, m in self.model.named_modules() if isinstance(m, kinds) and m in inside}


class Meter:
    """Measures what runs inside it.

    Attributes:
        seconds: The time that passes.
        cpu_seconds: The processor time of all threads.
        mebibytes: MiB by which the peak exceeds the memory before.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self.seconds = self.cpu_seconds = self.mebibytes = 0.0

    def __enter__(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            self._before = peak_memory()
        self._start = time.perf_counter()
        self._cpu_start = time.process_time()

    def __exit__(self, *_: object) -> None:
        if self._cuda:
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self._start
        self.cpu_seconds = time.process_time() - self._cpu_start
        peak = torch.cuda.max_memory_allocated() if self._cuda else peak_memory()
        self.mebibytes = (peak - self._before) / 2**20


def peak_memory() -> int:
    """Returns the largest memory of this process in bytes since the last write to clear_refs."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


Facts = dict[str, Any]
Run = Callable[[Meter], Facts]
"""Computes one batch, the counted part of it inside the meter, and returns what else is to be known."""


@dataclass(frozen=True)
class Call:
    """A projection that the kernels were asked for.

    Attributes:
        projection: Its arguments, without the tensors.
        batch: B.
        dtype: The gradients' dtype.
        seconds: The time it took.
    """

    projection: checks.Projection
    batch: int
    dtype: torch.dtype
    seconds: float


@contextlib.contextmanager
def observed(device: torch.device) -> Iterator[list[Call]]:
    """Notes all projections; on a GPU, each is waited for."""
    calls: list[Call] = []
    project = kernels.project

    def observe(projection: checks.Projection, out: Tensor | None = None) -> Tensor:
        wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        first = projection.tensors[0]
        wait()
        start = time.perf_counter()
        result = project(projection, out)
        wait()
        seconds = time.perf_counter() - start
        calls.append(Call(projection._replace(tensors=[]), len(first), first.dtype, seconds))
        return result

    with mock.patch.object(kernels, "project", observe):
        yield calls


def run_frozen(problem: Problem) -> Run:
    """Forward and backward to the embeddings' output, without gradients of weights."""
    problem.model.requires_grad_(False)
    starts: list[Tensor] = []
    problem.model.get_input_embeddings().register_forward_hook(
        lambda layer, inputs, output: starts.append(output.requires_grad_())
    )

    def run(meter: Meter) -> Facts:
        with meter:
            torch.autograd.grad(problem.output(), starts)
        starts.clear()
        return {}

    return run


def run_training(problem: Problem) -> Run:
    """Forward and backward to the weights."""

    def run(meter: Meter) -> Facts:
        problem.model.zero_grad()
        with meter:
            problem.output().backward()
        return {"columns": sum(p.numel() for p in problem.model.parameters())}

    return run


def run_streamed(problem: Problem, only_layers: bool = False, **options: Any) -> Run:
    """Projects what the backward pass makes, layer by layer."""
    names = [f"{name}.weight" for name in problem.layers()] if only_layers else None
    projector = trak_fast.GradientProjector(
        problem.model, "causal_lm", problem.settings.proj_dim, grad_wrt=names, **options
    )

    def run(meter: Meter) -> Facts:
        with meter:
            features = projector.project(problem.batch)
        return {"columns": projector.grad_dim, "features": features.shape[1]}

    return run


def run_hooks(problem: Problem) -> Run:
    """Computes whole gradients, then projects them."""
    computer = trak_fast.HookGradientComputer(problem.model, CausalLM())

    def run(meter: Meter) -> Facts:
        with meter:
            grads = computer.compute_per_sample_grad(problem.batch)
            features = trak_fast.project(grads, problem.settings.proj_dim)
        columns = sum(p.numel() for p in problem.model.parameters())
        return {"columns": columns, "features": features.shape[1]}

    return run


def run_projection(problem: Problem, proj_type: str) -> Run:
    """Repeats the projections of a streamed batch on random numbers that are in memory already."""
    streamed = run_streamed(problem, proj_type=proj_type)
    streamed(Meter(problem.device))  # the first batch is checked, by more projections
    with observed(problem.device) as calls:
        streamed(Meter(problem.device))
    sizes = {c.dtype: max(o.batch * o.projection.columns for o in calls if o.dtype == c.dtype) for c in calls}
    buffers = {dtype: torch.randn(size, device=problem.device).to(dtype) for dtype, size in sizes.items()}
    results = {c.batch: torch.zeros(c.batch, c.projection.proj_dim, device=problem.device) for c in calls}

    def run(meter: Meter) -> Facts:
        with meter:
            for call in calls:
                columns = call.projection.columns
                grads = buffers[call.dtype][: call.batch * columns].view(call.batch, columns)
                kernels.project(call.projection._replace(tensors=[grads]), results[call.batch])
        entries = sum(call.batch * call.projection.columns for call in calls)
        return {"columns": entries / problem.settings.batch, "calls": len(calls)}

    return run


def run_adapters(problem: Problem) -> Run:
    """Streams the gradients of adapters, and finds the share of the time in which they are projected."""
    import peft

    names = {name.rpartition(".")[2] for name in problem.layers()}
    options = peft.LoraConfig(r=8, target_modules=sorted(names), task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft sets fan_in_fan_out as the layers need it, and says so
        problem.model = peft.get_peft_model(problem.model, options).eval()
    projector = trak_fast.GradientProjector(problem.model, "causal_lm", LORA_DIM)

    def run(meter: Meter) -> Facts:
        with meter:
            features = projector.project(problem.batch)
        whole = Meter(problem.device)
        with observed(problem.device) as calls, whole:
            projector.project(problem.batch)
        share = sum(call.seconds for call in calls) / whole.seconds
        return {
            "columns": projector.grad_dim,
            "features": features.shape[1],
            "share in projection": share,
        }

    return run


def run_peer(problem: Problem, name: str, **options: Any) -> Run:
    """Runs another library, which is imported only here."""
    import large_model_peers

    prepare: Callable[..., Run] = getattr(large_model_peers, name)
    return prepare(problem, **options)


FROZEN = "forward + backward, frozen"
ALONE = {"rademacher": "project alone, ±1", "sjlt": "project alone, sjlt"}
"""The floors of the streamed ways, by kind."""

WAYS: dict[str, Callable[[Problem], Run]] = {
    FROZEN: run_frozen,
    "training step": run_training,
    "streamed sjlt": functools.partial(run_streamed, proj_type="sjlt"),
    "streamed ±1": run_streamed,
    "streamed ±1, memory_budget=64 MiB": functools.partial(run_streamed, memory_budget=BUDGET),
    "streamed ±1, layers of bergson": functools.partial(run_streamed, only_layers=True),
    "two-sided 16": functools.partial(run_streamed, sketch="two_sided", sketch_side=16),
    "two-sided 64": functools.partial(run_streamed, sketch="two_sided", sketch_side=64),
    "hooks + project": run_hooks,
    ALONE["rademacher"]: functools.partial(run_projection, proj_type="rademacher"),
    ALONE["sjlt"]: functools.partial(run_projection, proj_type="sjlt"),
    f"LoRA r=8, k={LORA_DIM}, ±1": run_adapters,
    "bergson, per_module 16": functools.partial(run_peer, name="run_bergson", target="per_module", dim=16),
    "bergson, per_module 64": functools.partial(run_peer, name="run_bergson", target="per_module", dim=64),
    "bergson, global": functools.partial(run_peer, name="run_bergson", target="global"),
    "dattri-llm, logra 16": functools.partial(run_peer, name="run_dattri_llm", style="logra", dim=16),
    "dattri-llm, logra 64": functools.partial(run_peer, name="run_dattri_llm", style="logra", dim=64),
    "dattri-llm, dense": functools.partial(run_peer, name="run_dattri_llm", style="dense"),
}
"""The ways in the order of the table."""


def measure(name: str, settings: Settings, repeats: int) -> Facts:
    """Measures a way in this process.

    Args:
        name: Its name in WAYS.
        settings: The model and the batch.
        repeats: Batches that are timed after the first one, whose memory is taken. There are none, and the first one's
            time counts, where that took more than PATIENCE.

    Returns:
        Seconds and CPU seconds of a batch, MiB above the loaded model, and the way's own facts.
    """
    torch.set_num_threads(settings.threads)
    problem = Problem(settings)
    run = WAYS[name](problem)
    first = Meter(problem.device)
    facts = run(first)
    meters: list[Meter] = []
    for _ in range(repeats if first.seconds <= PATIENCE else 0):
        meters.append(Meter(problem.device))
        facts = run(meters[-1])
    timed = meters or [first]
    return {
        "seconds": statistics.median(meter.seconds for meter in timed),
        "CPU seconds": statistics.median(meter.cpu_seconds for meter in timed),
        "MiB": first.mebibytes,
        **facts,
    }
