"""Measures `trak-fast lm`: its speed beside `GradientProjector` alone, its predictions, and the time of `--ask`.

    python benchmarks/language_command.py [--only speed plan ask] [--output benchmarks/results/NAME.json]

speed   Tokens in a second of the whole command in its training phase, which is its time less that of the same command
        on the finished run, beside `GradientProjector.project` alone with the same options on the same batches. Both
        run in processes of their own, one after the other in each round. The metric is made by both; its time is told
        apart. CPU seconds stand beside wall time, as other programs may share the machine.
plan    The prediction of `trak-fast plan --model` beside the run: time, peak memory of the process, disk. Time is
        judged in CPU seconds, by a prediction that counts these too.
ask     Seconds of `--ask` on a finished run, by its parts.

Models are GPT-2 with random weights, documents random tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import record
import torch

MODELS = {"small": (128, 4, 2048), "large": (384, 6, 24000), "tiny": (16, 1, 300)}
"""Width, layers and vocabulary."""

POSITIONS = 512
SHORTEST = 50
TIME_MARGIN, MEMORY_MARGIN = 0.25, 0.20
SPEED = 0.85
ASK_SECONDS = 10.0


@dataclass(frozen=True)
class Usage:
    """The resources that a process took.

    Attributes:
        seconds: Wall time.
        cpu: Processor seconds, of all threads.
        memory: Bytes at the peak.
        output: Standard output.
    """

    seconds: float
    cpu: float
    memory: int
    output: str


def run(arguments: Sequence[str], threads: int) -> Usage:
    """Runs Python with arguments, in a process whose resources are measured."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen([sys.executable, *arguments], stdout=output, stderr=errors, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        errors.seek(0)
        if process.returncode:
            raise RuntimeError(f"{' '.join(arguments)} failed: {errors.read()[-2000:]}")
        return Usage(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, output.read())


def command(*arguments: str | Path, threads: int) -> Usage:
    """Runs `trak-fast` with arguments."""
    return run(["-m", "trak_fast", *map(str, arguments)], threads)


def make_model(name: str, folder: Path) -> Path:
    """Saves a model with random weights and a tokenizer of numbers, each a token; returns its folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    width, layers, vocabulary = MODELS[name]
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocabulary, n_embd=width, n_layer=layers, n_head=4, n_positions=POSITIONS, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    inner = Tokenizer(models.WordLevel({str(i): i for i in range(vocabulary)}, unk_token="0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with contextlib.redirect_stderr(io.StringIO()):
        GPT2LMHeadModel(config).save_pretrained(folder / name)
        PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="0").save_pretrained(folder / name)
    return folder / name


def make_documents(path: Path, count: int, vocabulary: int, seed: int = 0) -> Path:
    """Writes documents of 50 to 512 tokens, whose frequencies fall as those of words do."""
    generator = random.Random(seed)
    weights = [1 / (i + 10) for i in range(vocabulary)]
    with path.open("w") as file:
        for _ in range(count):
            words = generator.choices(range(vocabulary), weights, k=generator.randint(SHORTEST, POSITIONS))
            file.write(json.dumps({"text": " ".join(map(str, words))}) + "\n")
    return path


def alone(model: Path, train: Path, options: Sequence[str]) -> None:
    """Prints the seconds of `GradientProjector` alone: of its metric, and of all batches."""
    from trak_fast import GradientProjector
    from trak_fast.cli import lm
    from trak_fast.lm.compute import metric_pieces
    from trak_fast.lm.machine import Machine
    from trak_fast.lm.run import open_run
    from trak_fast.lm.texts.encoding import make_batches
    from trak_fast.tasks import resolve_task

    commands = argparse.ArgumentParser().add_subparsers()
    lm.add(commands)
    arguments = commands.choices["lm"].parse_args([str(model), "--train", str(train), *options])
    given = {name: getattr(arguments, name) for name in lm.SETTINGS}
    machine = Machine(device="cpu")
    found = open_run(train.parent / "never-written", given, machine)
    with tempfile.TemporaryDirectory() as folder:  # which knows all options by their values
        traker = found.make_traker(Path(folder), len(found.encoded.pieces))
        task = resolve_task(found.models.task)
        projector = traker.projector
        choice = found.choice.arguments
        streaming = GradientProjector(
            found.model,
            task,
            traker.proj_dim,
            proj_type=projector.proj_type,
            seed=projector.seed,
            nonzeros=projector.nonzeros,
            grad_wrt=choice["grad_wrt"],
            sketch=choice.get("sketch", "full"),
            sketch_side=choice.get("sketch_side"),
            metric=choice["metric"],
        )
    begun, cpu = time.perf_counter(), time.process_time()
    if choice["metric"] is not None:
        pieces = metric_pieces(found)
        batch = found.batch(pieces)
        streaming.fit_metric(batch, chunk_size=max(1, machine.tokens // len(pieces[0].input_ids)))
    fitted, cpu_fitted = time.perf_counter(), time.process_time()
    for batch_rows in make_batches(found.encoded.lengths, machine.tokens):
        streaming.project(found.batch([found.encoded.pieces[i] for i in batch_rows]))
    end, cpu_end = time.perf_counter(), time.process_time()
    print(
        json.dumps(
            {
                "metric": fitted - begun,
                "project": end - fitted,
                "metric_cpu": cpu_fitted - cpu,
                "project_cpu": cpu_end - cpu_fitted,
                "tokens": found.encoded.tokens,
            }
        )
    )


def measure_speed(folder: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Compares the command with `GradientProjector` alone, in turns."""
    for name, count, flags in options.speed_cases:
        model = make_model(name, folder)
        train = make_documents(folder / "train.jsonl", count, MODELS[name][2])
        rounds = []
        for number in range(options.rounds):
            out = folder / f"run-{name}-{number}-{len(flags)}"
            whole = command("lm", model, "--train", train, "--out", out, *flags, threads=options.threads)
            again = command("lm", "--out", out, threads=options.threads)
            other = run(
                [__file__, "--alone", str(model), str(train), *flags], options.threads
            )  # fmt: skip
            rounds.append(
                {
                    "whole": whole.seconds, "whole_cpu": whole.cpu, "again": again.seconds, "again_cpu": again.cpu,
                    **json.loads(other.output),
                }
            )  # fmt: skip
        yield speed_row(name, count, flags, rounds)


def speed_row(name: str, count: int, flags: Sequence[str], rounds: list[dict[str, float]]) -> dict[str, Any]:
    """Computes the medians of some rounds, and prints them."""
    row: dict[str, Any] = {"model": name, "documents": count, "flags": list(flags), "rounds": rounds}
    row["tokens"] = rounds[0]["tokens"]
    for unit in ("", "_cpu"):
        training = [own[f"whole{unit}"] - own[f"again{unit}"] for own in rounds]
        metric = [own[f"metric{unit}"] for own in rounds]
        project = [own[f"project{unit}"] for own in rounds]
        triples = list(zip(training, metric, project, strict=True))
        row[f"training{unit}"] = statistics.median(training)
        row[f"alone{unit}"] = statistics.median(m + p for _, m, p in triples)
        # both with the making of the metric, and both without it
        row[f"ratio{unit}"] = statistics.median((m + p) / t for t, m, p in triples)
        row[f"ratio_without_metric{unit}"] = statistics.median(p / (t - m) for t, m, p in triples)
        row[f"ratio_of_everything{unit}"] = statistics.median(
            (m + p) / own[f"whole{unit}"] for own, (_, m, p) in zip(rounds, triples, strict=True)
        )
    print(
        f"speed {name} n={count} {' '.join(flags)}: training {row['training']:.1f} s ({row['tokens']:,} tokens, "
        f"{row['tokens'] / row['training']:,.0f} a second), alone {row['alone']:.1f} s; alone / training "
        f"{row['ratio']:.2f}, CPU {row['ratio_cpu']:.2f}; without the metric {row['ratio_without_metric']:.2f}, CPU "
        f"{row['ratio_without_metric_cpu']:.2f}; alone / everything {row['ratio_of_everything']:.2f}, CPU "
        f"{row['ratio_of_everything_cpu']:.2f}",
        flush=True,
    )
    return row


def measure_plans(folder: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Compares predictions with runs."""
    for name, count, flags in options.plan_cases:
        model = make_model(name, folder)
        train = make_documents(folder / "train.jsonl", count, MODELS[name][2])
        query = make_documents(folder / "query.jsonl", 4, MODELS[name][2], seed=1)
        files = ("--train", train, "--query", query)
        plans, runs = [], []
        for number in range(options.rounds):  # interleaved, as a busy machine slows both
            out = folder / f"planned-{name}-{number}"
            wanted = [str(x) for x in ("plan", "--model", model, *files, *flags, "--json")]
            plan = run(["-m", "trak_fast", *wanted], options.threads)
            in_cpu = run(["-c", CPU_CLOCK, *wanted], options.threads)
            cpu = json.loads(in_cpu.output)["seconds"]["total"]
            plans.append(json.loads(plan.output) | {"took": plan.seconds, "cpu": cpu})
            runs.append(command("lm", model, *files, *flags, "--out", out, "--overwrite", threads=options.threads))
            disk = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        seconds = statistics.median(plan["seconds"]["total"] for plan in plans)
        peak = statistics.median(plan["memory_bytes"]["peak"] for plan in plans)
        stored = statistics.median(plan["disk_bytes"]["total"] for plan in plans)
        row = {
            "model": name,
            "documents": count,
            "flags": list(flags),
            "time": [seconds, statistics.median(found.seconds for found in runs)],
            "cpu": [statistics.median(plan["cpu"] for plan in plans), statistics.median(found.cpu for found in runs)],
            "memory": [peak, statistics.median(found.memory for found in runs)],
            "disk": [stored, disk],
            "plans": plans,
        }
        row |= {f"{key}_ratio": row[key][0] / row[key][1] for key in ("time", "cpu", "memory", "disk")}
        print(
            f"plan {name} n={count} {' '.join(flags)}: time {seconds:.1f} of {row['time'][1]:.1f} s "
            f"({row['time_ratio']:.2f}), CPU {row['cpu'][0]:.1f} of {row['cpu'][1]:.1f} s "
            f"({row['cpu_ratio']:.2f}), memory {peak / 1e6:.0f} of {row['memory'][1] / 1e6:.0f} MB "
            f"({row['memory_ratio']:.2f}), disk {stored / 1e6:.1f} of {disk / 1e6:.1f} MB ({row['disk_ratio']:.2f})",
            flush=True,
        )
        yield row


CPU_CLOCK = """
import sys, time
from trak_fast.lm import forecast
class Clock:
    perf_counter = staticmethod(time.process_time)
forecast.time, forecast._seconds_of_process = Clock, time.process_time
from trak_fast.cli import main
sys.exit(main(sys.argv[1:]))
"""
"""`trak-fast` with predictions in processor seconds, which other programs change less."""

PARTS = """
import json, sys, time
begun = time.perf_counter()
parts = {}
def timed(module, name, label):
    import importlib
    owner = importlib.import_module(module)
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    inner = getattr(owner, last)
    def call(*args, **kwargs):
        start = time.perf_counter()
        try:
            return inner(*args, **kwargs)
        finally:
            parts[label] = parts.get(label, 0.0) + time.perf_counter() - start
    setattr(owner, last, call)
import trak_fast.cli, trak_fast.lm.run, trak_fast.lm.answer, trak_fast.lm.view, transformers
from transformers import AutoTokenizer, AutoModelForCausalLM
parts["imports"] = time.perf_counter() - begun
timed("trak_fast.lm.run", "open_run", "opening")
timed("trak_fast.lm.compute", "compute", "gradients of the question")
timed("trak_fast.lm.answer", "token_parts", "tokens")
timed("trak_fast.lm.results", "write_scores", "scores")
timed("trak_fast.lm.answer", "page_content", "page")
timed("trak_fast.lm.answer", "render", "page")
status = trak_fast.cli.main(sys.argv[1:])
parts["all in Python"] = time.perf_counter() - begun
print("PARTS" + json.dumps(parts))
sys.exit(status)
"""


def measure_ask(folder: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Times a question to a finished run."""
    for name, count, flags in options.ask_cases:
        model = make_model(name, folder)
        train = make_documents(folder / "train.jsonl", count, MODELS[name][2])
        out = folder / f"asked-{name}"
        command("lm", model, "--train", train, "--out", out, *flags, threads=options.threads)
        rounds = []
        for number in range(max(3, options.rounds)):
            question = ("--ask", f"{number} 1 2 3 4 5 6 7", "8 9 10 11 12 13")
            plain = command("lm", "--out", out, *question, threads=options.threads)
            other = ("--ask", f"{number} 7 6 5 4 3 2 1", "13 12 11 10 9 8")
            told = run(["-c", PARTS, "lm", "--out", str(out), *other], options.threads)
            parts = json.loads(told.output.rpartition("PARTS")[2])
            rounds.append({"seconds": plain.seconds, "cpu": plain.cpu, "parts": parts})
        seconds = statistics.median(own["seconds"] for own in rounds)
        parts = {key: statistics.median(own["parts"].get(key, 0.0) for own in rounds) for key in rounds[0]["parts"]}
        listed = ", ".join(f"{key} {value:.2f}" for key, value in parts.items())
        cpu = statistics.median(own["cpu"] for own in rounds)
        print(f"ask {name} n={count}: {seconds:.1f} s, CPU {cpu:.1f} ({listed})", flush=True)
        yield {"model": name, "documents": count, "seconds": seconds, "cpu": cpu, "parts": parts, "rounds": rounds}


TINY = [("tiny", 12, ())]


def main() -> int:
    if sys.argv[1:2] == ["--alone"]:
        alone(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
        return 0
    checks: dict[str, Callable[[Path, argparse.Namespace], Iterator[dict[str, Any]]]] = {
        "speed": measure_speed,
        "plan": measure_plans,
        "ask": measure_ask,
    }
    parser = record.make_parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=list(checks), default=list(checks))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--documents", type=int, default=300, help="documents of the small model")
    parser.add_argument("--tiny", action="store_true", help="one small case of each, once: does it run?")
    options = parser.parse_args()
    count = options.documents
    options.speed_cases = [("small", count, ()), ("small", count, ("--method", "cosine")), ("large", count // 4, ())]
    options.plan_cases = [("small", count, ()), ("small", 2 * count, ("--method", "cosine")), ("large", count // 4, ())]
    options.ask_cases = [("small", 4 * count, ("--method", "cosine", "--max-tokens", "64"))]
    if options.tiny:
        options.rounds = 1
        options.speed_cases = options.plan_cases = options.ask_cases = TINY
    found: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.only:
            found[name] = list(checks[name](Path(folder), options))
    record.save(options.output, found)
    slow = [row for row in found.get("speed", []) if row["ratio_cpu"] < SPEED]
    off = [
        row
        for row in found.get("plan", [])
        if abs(row["cpu_ratio"] - 1) > TIME_MARGIN or abs(row["memory_ratio"] - 1) > MEMORY_MARGIN
    ]
    late = [row for row in found.get("ask", []) if row["seconds"] > ASK_SECONDS]
    print(f"below {SPEED:.0%}: {len(slow)}; predictions that are off: {len(off)}; answers that are late: {len(late)}")
    return 1 if (slow or off or late) and not options.tiny else 0


if __name__ == "__main__":
    sys.exit(main())
