"""Tells right from wrong for every compiled CUDA kernel, in the first two minutes on a GPU.

    python benchmarks/gpu_smoke.py [--device cuda|cpu] [--limit 8] [--kernels sm90,sm90_wide,sm80,sparse,adjoint]

Some 600 short cases cover each kernel, width, kind and dtype, in every form that gradients have in memory, the smallest
first. Each case is computed twice, which must give the same bits, and is compared with a product in float64. For a
wrong result, the columns and rows of P are named that came out as others. Cases run in a worker process: a worker that
hangs is killed after `--limit` seconds, the last lines of one that crashes are noted, and the next case gets a fresh
worker. Prints the cases that are not right, then a table, then "ALL OK" (exit status 0) or "NOT ALL OK" (2); writes
$OUT/smoke.json.

On a CPU, instruction sets stand in for kernels, to rehearse this file.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import functools
import importlib
import itertools
import json
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
SPARSE, ADJOINT = "sparse", "adjoint"  # among the names of kernels: the sparse kind has kernels of its own
NO_TILES = (SPARSE, ADJOINT)
KINDS = ("rademacher", "normal", "sjlt")
HALVES = ("bfloat16", "float16")
SINGLE_AND_HALVES = ("bfloat16", "float16", "float32")
WIDTHS = (3, 16, 32, 64, 128, 256)  # batch sizes, one for each width of a tile
BATCHES = (*WIDTHS, 1, 300)  # 300: more than one pass

SEED = 2**40 + 5
MODEL_ID = 3
# Rows of P: more than one tile of rows, the last one not full; sjlt: four blocks, and several chunks in a stage.
ROWS = {"rademacher": 300, "normal": 300, "sjlt": 512}
BOUND = 2e-4  # error as a part of a gradient's norm; rounding gives some 4e-5 at most, a lost column some 2e-2

START_SECONDS = 60  # seconds in which a worker must be ready: imports and the device's context
FAILURES = 2  # workers that a kernel and kind may hang or crash before the rest of its cases is skipped
PIECE = 1 << 15  # columns that are made, or multiplied in float64, at once
TRACE_SECONDS = 2  # seconds for one-hot gradients after a wrong result
TRACED = 640  # the most one-hot gradients after a wrong result
LISTED = 8  # the most places that one message lists

# Path of a Python file that the worker imports before its first case, so that tests can plant faults.
PLANT_VARIABLE = "TRAK_FAST_SMOKE_PLANT"


class Form(NamedTuple):
    """The sizes and the memory layout of gradients: columns of each tensor, and the column of P of the first one."""

    widths: tuple[int, ...]
    offset: int
    before: int = 0  # elements of each row in memory before its first column
    behind: int = 0  # and after its last


# The number after "@" is the offset. Kernels read 16-bit tensors of "direct" and "long" in place if rows and columns
# begin at multiples of 8 (TMA is then asked for columns below zero too), and pack all others.
FORMS = {
    "direct@0": Form((600,), 0),
    "packed@77": Form((2100,), 77),
    "direct@8": Form((600,), 8),
    "direct@72": Form((600,), 72),
    "direct@77": Form((600,), 77),
    "slice@512": Form((1000,), 512, before=3, behind=5),
    "odd_stride@0": Form((1000,), 0, behind=1),
    "adjoint@0": Form((1100,), 0),
    "adjoint@77": Form((2100,), 77),
    "long@512": Form((40_000,), 512),
    "list@5": Form((3, 70_000, 7, 65_536, 1, 513), 5),
    "segments@0": Form((300_000,), 0),  # longer than the tensor cores' own sums are kept
}

# Forms, dtypes and batch sizes that are combined with all kernels and kinds, in the order in which they run.
PLAN: tuple[tuple[tuple[str, ...], tuple[str, ...], tuple[int, ...]], ...] = (
    (("direct@0",), HALVES, BATCHES),
    (("packed@77",), SINGLE_AND_HALVES, BATCHES),
    (("direct@8", "direct@72", "direct@77"), HALVES, WIDTHS),
    (("slice@512", "odd_stride@0"), SINGLE_AND_HALVES, (3, 256)),
    (("packed@77",), ("float64",), (3, 64)),
    (("adjoint@0", "adjoint@77"), (*SINGLE_AND_HALVES, "float64"), (3, 40)),
    (("long@512",), HALVES, WIDTHS),
    (("list@5",), SINGLE_AND_HALVES, (3, 64, 300)),
    (("segments@0",), ("bfloat16",), (3, 64, 128, 256)),
    (("segments@0",), ("float16", "float32"), (16,)),
)


class Case(NamedTuple):
    """One call of a kernel: a projection, or its adjoint."""

    kernel: str  # or an instruction set, SPARSE or ADJOINT
    kind: str
    dtype: str
    B: int
    form: str

    def __str__(self) -> str:
        return f"{self.kernel} {self.kind} {self.dtype} B={self.B} {self.form}"


class Outcome(NamedTuple):
    """A case and its verdict: "ok", "wrong", "unrepeatable", "hung", "crashed" or "skipped"."""

    case: Case
    verdict: str
    detail: str
    seconds: float

    def as_json(self) -> dict[str, object]:
        """Returns the fields of the case and of its form, the verdict and the detail."""
        form = FORMS[self.case.form]
        found = {"verdict": self.verdict, "detail": self.detail, "seconds": round(self.seconds, 3)}
        return {**self.case._asdict(), "D": sum(form.widths), "offset": form.offset, "k": ROWS[self.case.kind], **found}


def list_cases(kernels: Sequence[str]) -> list[Case]:
    """Lists the cases of some kernels in the order in which they run: the smallest first.

    Args:
        kernels: Names of tile kernels or instruction sets; SPARSE and ADJOINT among them stand for theirs.
    """
    return [
        case
        for forms, dtypes, batches in PLAN
        for form, kernel, kind, dtype, B in itertools.product(forms, kernels, KINDS, dtypes, batches)
        if concerns_kernel(case := Case(kernel, kind, dtype, B, form))
    ]


def concerns_kernel(case: Case) -> bool:
    """Tells whether a case runs code that is its kernel's own."""
    if (case.kernel == ADJOINT) != case.form.startswith(ADJOINT):
        return False
    if case.kernel != ADJOINT and (case.kernel == SPARSE) != (case.kind == "sjlt"):
        return False
    return case.kernel != "sm90_wide" or (case.kind == "rademacher" and case.B > 128)  # elsewhere it is sm90


# In the worker.


class Matrix:
    """The leading columns of P of one kind on the device, from the plain definition; more are made when asked for."""

    def __init__(self, kind: str, device: str) -> None:
        self._kind = kind
        self._entries = torch.empty(ROWS[kind], 0, device=device)

    def columns(self, first: int, count: int, alive: Callable[[], None]) -> Tensor:
        """Returns columns `first` to `first + count`, (rows, count); calls `alive` after each piece that it makes."""
        trak_fast = importlib.import_module("trak_fast")
        pieces = [self._entries]
        for start in range(self._entries.shape[1], first + count, PIECE):
            columns = torch.arange(start, start + PIECE)
            rows = ROWS[self._kind]
            piece = trak_fast.matrix(self._kind, SEED, MODEL_ID, range(rows), columns, proj_dim=rows)
            pieces.append(piece.to(self._entries.device))
            alive()
        if len(pieces) > 1:
            self._entries = torch.cat(pieces, dim=1)
        return self._entries[:, first : first + count]


def lay_out(values: Tensor, form: Form) -> Tensor | list[Tensor]:
    """Copies gradients (B, D) into the tensors of a form; what lies between their rows in memory is NaN."""
    tensors = []
    for part in values.split(form.widths, dim=1):
        batch, width = part.shape
        room = torch.full((batch, form.before + width + form.behind), math.nan, dtype=part.dtype, device=part.device)
        tensors.append(room[:, form.before : form.before + width].copy_(part))
    return tensors if len(tensors) > 1 else tensors[0]


def compute(case: Case, values: Tensor) -> Tensor:
    """Projects gradients (B, D) as a case says, or takes projections (B, rows) back by the adjoint."""
    trak_fast = importlib.import_module("trak_fast")
    form = FORMS[case.form]
    matrix = {"proj_type": case.kind, "seed": SEED, "model_id": MODEL_ID, "offset": form.offset}
    if case.kernel == ADJOINT:
        return trak_fast.project_adjoint(values, sum(form.widths), **matrix)
    return trak_fast.project(lay_out(values, form), ROWS[case.kind], **matrix)


def relative_errors(result: Tensor, values: Tensor, truth: Tensor) -> Tensor:
    """Returns for each sample its largest error against `values @ truth` in float64, in units of the sample's norm."""
    exact = torch.zeros(result.shape, dtype=torch.float64, device=result.device)
    for part, entries in zip(values.split(PIECE, dim=1), truth.split(PIECE), strict=True):
        exact += part.double() @ entries.double()
    norms = torch.linalg.vector_norm(values, dim=1, dtype=torch.float64)
    return (result.double() - exact).abs().amax(dim=1) / norms


def judge(case: Case, truth: Tensor, alive: Callable[[], None]) -> str:
    """Computes a case twice and compares with float64.

    Args:
        case: The case.
        truth: P' (D, rows), or P (rows, D) for the adjoint: `values @ truth` is the result.
        alive: Called after each step, so that a long explanation is not taken for a hang.

    Returns:
        "ok", or a verdict, a colon and an explanation, in one line.
    """
    generator = torch.Generator(truth.device).manual_seed(zlib.crc32(str(case).encode()))
    dtype = getattr(torch, case.dtype)
    drawn = torch.float64 if dtype == torch.float64 else torch.float32
    values = torch.randn(case.B, len(truth), generator=generator, device=truth.device, dtype=drawn).to(dtype)
    alive()
    result, again = compute(case, values), compute(case, values)
    differing = int((result.view(torch.int32) != again.view(torch.int32)).sum())
    alive()
    errors = relative_errors(result, values, truth)
    repeats = f"{differing} of {result.numel()} numbers differ between two calls"
    if not bool((errors < BOUND).all()):  # NaN too
        print(f"{case}: off by {errors.max().item():.2g} of the norm", flush=True)  # seen if the explanation hangs
        explanation = explain(case, values, truth, errors, alive)
        return f"wrong: {explanation}{f'; {repeats}' if differing else ''}"
    return f"unrepeatable: {repeats}" if differing else "ok"


def explain(case: Case, values: Tensor, truth: Tensor, errors: Tensor, alive: Callable[[], None]) -> str:
    """Says in one line where a result is wrong: in which samples, and which columns and rows of P came out as others.

    Gradients that are zero outside of a few columns show in which columns to look; there, one-hot gradients give single
    columns of P. Those that resemble another column more than their own are named, and rows in the same way.
    """
    input_word, output_word = ("row", "column") if case.kernel == ADJOINT else ("column", "row")
    samples = torch.arange(case.B)[~(errors < BOUND).cpu()].tolist()
    facts = [f"off by {errors.max().item():.2g} of the norm in samples {spans(samples)}"]
    blocks = torch.arange(len(truth)).chunk(32)
    bad = []
    for block in blocks:
        first, end = int(block[0]), int(block[-1]) + 1
        part = torch.zeros_like(values)
        part[:, first:end] = values[:, first:end]
        if not bool((relative_errors(compute(case, part), part[:, first:end], truth[first:end]) < BOUND).all()):
            bad.append(block)
        alive()
    if bad and len(bad) < len(blocks):
        facts.append(f"from {input_word}s {spans(torch.cat(bad).tolist())}")
    others = [block for block in blocks if all(block is not other for other in bad)]
    inputs, answers = one_hot_answers(case, values, torch.cat([*bad, *others])[:TRACED], alive)
    expected = truth[inputs.to(truth.device)]
    found = [
        (input_word, name_mismatches(answers, truth, inputs.tolist())),
        (output_word, name_mismatches(answers.T, expected.T, list(range(truth.shape[1])))),
    ]
    facts += [f"{word}s {mismatches}" for word, mismatches in found if mismatches]
    differing = (answers != expected).cpu()
    if not differing.any():
        facts.append(f"one-hot gradients give the right {input_word}s {spans(sorted(inputs.tolist()))}")
    elif not any(mismatches for _, mismatches in found):
        places = {
            input_word: sorted(inputs[differing.any(dim=1)].tolist()),
            output_word: torch.arange(truth.shape[1])[differing.any(dim=0)].tolist(),
        }
        text = " and ".join(f"{word}s {spans(numbers)}" for word, numbers in places.items())
        facts.append(f"entries of P that differ: {int(differing.sum())}, in {text}")
    return "; ".join(facts)


def one_hot_answers(case: Case, like: Tensor, inputs: Tensor, alive: Callable[[], None]) -> tuple[Tensor, Tensor]:
    """Computes one-hot gradients in batches as wide as the case's, until the time for it is over.

    Args:
        case: The case.
        like: Gradients whose shape, dtype and device the one-hot gradients take.
        inputs: Column of each one.
        alive: Called after each batch.

    Returns:
        The columns that there was time for, and the answer to each.
    """
    answers = []
    end = time.monotonic() + TRACE_SECONDS
    for part in inputs.split(case.B):
        values = torch.zeros_like(like)
        values[torch.arange(len(part)), part] = 1
        answers.append(compute(case, values)[: len(part)])
        alive()
        if time.monotonic() > end:
            break
    found = torch.cat(answers)
    return inputs[: len(found)], found


def name_mismatches(answers: Tensor, candidates: Tensor, own: list[int]) -> str:
    """Names the answers that resemble another candidate more than their own, or none.

    Args:
        answers: (n, m).
        candidates: (N, m), all that an answer could be by mistake.
        own: The candidate that each answer should be.

    Returns:
        For example "5->6, 6->5" (exchanged), "8..15->16..23" (shifted), "9->-1*9" (with the wrong sign), "4->zero", or
        "4->none" (like no candidate), "4->nan". "" if all resemble their own.
    """
    norms = candidates.square().sum(dim=1)
    empty = norms == 0  # rows of the sparse kind among few columns
    norms = norms.where(~empty, 1)
    finite = answers.isfinite()
    answers = answers.where(finite, 0)
    scores = (answers * candidates[own]).sum(dim=1) / norms[own]
    strange = torch.arange(len(own))[~(((scores - 1).abs() < 0.5) | (empty[own] & ~answers.any(dim=1))).cpu()]
    matches: list[tuple[int, int | None, str]] = []  # own number, the other's less that, a name if there is no other
    for part in strange.split(64):
        likeness = answers[part] @ candidates.T / norms
        for i, best in zip(part.tolist(), likeness.abs().argmax(dim=1).tolist(), strict=True):
            factor = (answers[i] @ candidates[best] / norms[best]).item()
            if abs(factor) >= 0.5:
                matches.append((own[i], best - own[i], "" if abs(factor - 1) < 0.25 else f"{factor:.2g}*"))
            else:
                matches.append((own[i], None, "nan" if not finite[i].all() else "none" if answers[i].any() else "zero"))
    matches.sort()
    texts = []
    for (_, shift, label), group in itertools.groupby(
        enumerate(matches), key=lambda item: (item[1][0] - item[0], item[1][1], item[1][2])
    ):
        members = [match[0] for _, match in group]
        other = label if shift is None else label + spans([number + shift for number in members])
        texts.append(f"{spans(members)}->{other}")
    return shorten(texts)


def spans(numbers: Sequence[int]) -> str:
    """Writes ascending numbers as ranges: "0..2, 5"."""
    texts = []
    for _, group in itertools.groupby(enumerate(numbers), key=lambda item: item[1] - item[0]):
        members = [number for _, number in group]
        texts.append(str(members[0]) if len(members) == 1 else f"{members[0]}..{members[-1]}")
    return shorten(texts)


def shorten(texts: list[str]) -> str:
    """Joins the first texts by commas, and counts the others if there are any."""
    more = len(texts[LISTED:])
    return ", ".join([*texts[:LISTED], *([f"and {more} more"] if more else [])])


def work(device: str, kernels: str | None) -> None:
    """Checks the cases that the standard input brings, one a line, until it ends or a case raises an exception.

    Prints "ready KERNELS", and for each case "begin NUMBER", "alive NUMBER" while it takes long, "end NUMBER VERDICT".
    """
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a hung worker must not outlive its parent
    sys.path.append(str(ROOT))  # last: PYTHONPATH can bring another build
    trak_fast = importlib.import_module("trak_fast")
    if plant := os.environ.get(PLANT_VARIABLE):
        sys.path.append(str(Path(plant).parent))
        importlib.import_module(Path(plant).stem)
    info = trak_fast.info()
    names = choose_kernels(info, device, kernels)
    if device == "cuda":
        require_own_kernels(torch.cuda.get_device_capability(0), info["cuda_devices"][0]["kernels"])
    matrices = {kind: Matrix(kind, device) for kind in KINDS}
    one = torch.ones(1, 1, dtype=torch.float64, device=device)
    (one @ one).item()  # the context and cuBLAS take seconds to load, which no case must be blamed for
    print("ready", *names, flush=True)
    variable = "TRAK_FAST_CUDA_KERNEL" if device == "cuda" else "TRAK_FAST_ISA"
    for line in sys.stdin:
        number, *fields = json.loads(line)
        case = Case(*fields)
        form = FORMS[case.form]
        print("begin", number, flush=True)
        alive = functools.partial(print, "alive", number, flush=True)
        os.environ.pop(variable, None)
        if case.kernel not in NO_TILES:
            os.environ[variable] = case.kernel
        try:
            P = matrices[case.kind].columns(form.offset, sum(form.widths), alive)
            verdict = judge(case, P if case.kernel == ADJOINT else P.T, alive)
        except Exception:
            # The device's context is lost, and an orderly end of the process may hang.
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        print("end", number, verdict, flush=True)


def choose_kernels(info: dict[str, Any], device: str, wanted: str | None) -> list[str]:
    """Returns the kernels to check: those that are wanted, or else all that the device has, and those of NO_TILES.

    On a CPU these are the best instruction set and the portable one. Ends the process where there are none.
    """
    devices = info["cuda_devices"]
    if device == "cuda" and not devices:
        sys.exit("trak_fast finds no CUDA device; is it built with CUDA, and the driver no older than nvcc?")
    found = devices[0]["kernels"] if device == "cuda" else info["instruction_sets"]
    names = [*found, *NO_TILES]
    if wanted is None:
        return names if device == "cuda" else list(dict.fromkeys([found[0], *names[-3:]]))
    for name in wanted.split(","):
        if name not in names:
            sys.exit(f"{name!r} is no kernel of this device, which has {', '.join(names)}")
    return wanted.split(",")


def require_own_kernels(capability: tuple[int, int], kernels: Sequence[str]) -> None:
    """Ends the process where a Hopper device is given a module that was built without its kernels."""
    if capability == (9, 0) and "sm90" not in kernels:
        sys.exit(f"this device is a Hopper GPU, but the module has only {', '.join(kernels)} for it: build for 90a")


# In its parent.


class WorkerFailed(Exception):
    """The failure of a worker to answer: "hung" or "crashed", and the last lines that it printed."""

    def __init__(self, verdict: str, detail: str) -> None:
        super().__init__(f"{verdict}: {detail}")
        self.verdict = verdict
        self.detail = detail


class Worker:
    """A process that checks cases until one hangs or crashes.

    Attributes:
        pid: The process's number, and its group's.
        kernels: Names that the worker found or was told to check.
    """

    def __init__(self, device: str, kernels: str | None = None) -> None:
        """Starts the process and waits until it is ready.

        Raises:
            WorkerFailed: The process hung or crashed before.
        """
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", "--device", device]
        self._process = subprocess.Popen(
            [*command, "--kernels", kernels] if kernels else command,
            text=True,
            errors="replace",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.pid = self._process.pid
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._last_lines: collections.deque[str] = collections.deque(maxlen=6)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            self.kernels = self._wait_for("ready", START_SECONDS).split()
        except BaseException:
            self.stop()
            raise

    def check(self, number: int, case: Case, limit: float) -> tuple[str, str]:
        """Lets the process check a case.

        Args:
            number: The case's number.
            case: The case.
            limit: Seconds without a sign of life after which the case counts as hung.

        Returns:
            The verdict and its explanation.

        Raises:
            WorkerFailed: There was no answer.
        """
        self._last_lines.clear()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps([number, *case]) + "\n")
            self._process.stdin.flush()
        verdict, _, explanation = self._wait_for(f"end {number}", limit).partition(": ")
        return verdict, explanation

    def stop(self) -> None:
        """Ends the process and its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a process may outlive SIGKILL while a GPU hangs
            self._process.wait(timeout=10)
        self._reader.join(timeout=1)
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._lines.put(line.rstrip())
        self._lines.put(None)

    def _wait_for(self, words: str, seconds: float) -> str:
        """Waits for a line that begins with some words, and returns the rest of it. Signs of life extend the wait."""
        end = time.monotonic() + seconds
        while True:
            try:
                line = self._lines.get(timeout=max(0, end - time.monotonic()))
            except queue.Empty:
                raise WorkerFailed("hung", self._describe(f"silent for {seconds:g} s")) from None
            if line is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(timeout=10)
                raise WorkerFailed("crashed", self._describe(f"exit status {self._process.returncode}"))
            if line.startswith(f"{words} "):
                return line[len(words) + 1 :]
            if line.startswith(("begin ", "alive ")):
                end = time.monotonic() + seconds
            else:
                self._last_lines.append(line)

    def _describe(self, fact: str) -> str:
        return "\n".join([fact, *self._last_lines])


def check_cases(
    device: str = "cuda",
    limit: float = 8,
    kernels: str | None = None,
    only: str = "",
    seconds: float = math.inf,
    report: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Checks all cases of some kernels, each in a process that may hang or crash.

    Args:
        device: "cuda" or "cpu".
        limit: Seconds without a sign of life after which a case counts as hung.
        kernels: Names with commas between them, SPARSE and ADJOINT for theirs; None: all that the device has.
        only: Part of the names of the cases to check.
        seconds: For everything; cases that come later are skipped.
        report: Called with each outcome.

    Returns:
        One outcome for each case, in order.

    Raises:
        WorkerFailed: The first process hung or crashed before it knew its kernels.
    """
    end = time.monotonic() + seconds
    worker: Worker | None = Worker(device, kernels)
    cases = [case for case in list_cases(worker.kernels) if only in str(case)]
    if not cases:
        print(f"no case's name holds {only!r}; such as: {list_cases(worker.kernels)[0]}")
    failures: collections.Counter[tuple[str, str]] = collections.Counter()
    outcomes: list[Outcome] = []
    lost = ""  # the reason why no worker is there any more
    try:
        for number, case in enumerate(cases):
            variant = case.kernel, case.kind
            begin = time.monotonic()
            if begin > end:
                lost = lost or "no time left"
            spoilt = f"{FAILURES} cases of {' '.join(variant)} hung or crashed"
            reason = spoilt if failures[variant] == FAILURES else lost
            if worker is None and not reason:
                try:
                    worker = Worker(device, kernels)
                except WorkerFailed as failure:
                    reason = lost = f"no further worker starts: {failure}"
            if worker is None or reason:
                verdict, detail = "skipped", reason
            else:
                try:
                    verdict, detail = worker.check(number, case, limit)
                except WorkerFailed as failure:
                    verdict, detail = failure.verdict, failure.detail
                    failures[variant] += 1
                    worker.stop()
                    worker = None
            outcomes.append(Outcome(case, verdict, detail, time.monotonic() - begin))
            report(outcomes[-1])
    finally:
        if worker is not None:
            worker.stop()
    return outcomes


class Reporter:
    """A printer of outcomes that are not "ok" as they come; each reason for skipping is printed once."""

    def __init__(self) -> None:
        self._reasons: set[str] = set()

    def __call__(self, outcome: Outcome) -> None:
        """Prints an outcome."""
        if outcome.verdict == "ok" or (outcome.verdict == "skipped" and outcome.detail in self._reasons):
            return
        if outcome.verdict == "skipped":
            self._reasons.add(outcome.detail)
        detail = outcome.detail.replace("\n", "\n    ")
        print(f"{outcome.case}: {outcome.verdict}: {detail}", flush=True)


def tabulate(outcomes: Iterable[Outcome]) -> str:
    """Counts the verdicts, in one line for each kernel, kind and dtype."""
    counts: dict[tuple[str, str, str], collections.Counter[str]] = {}
    for outcome in outcomes:
        case = outcome.case
        counts.setdefault((case.kernel, case.kind, case.dtype), collections.Counter())[outcome.verdict] += 1
    return "\n".join(
        f"{kernel:13}{kind:12}{dtype:10}{', '.join(f'{n} {verdict}' for verdict, n in found.items())}"
        for (kernel, kind, dtype), found in sorted(counts.items())
    )


def summarize(outcomes: Sequence[Outcome], seconds: float) -> str:
    """Writes the last line: all right or not."""
    counts = collections.Counter(outcome.verdict for outcome in outcomes)
    ok = counts.pop("ok", 0)
    others = f" ({', '.join(f'{n} {verdict}' for verdict, n in counts.items())})" if counts else ""
    head = "ALL OK" if outcomes and not counts else "NOT ALL OK"
    return f"{head}: {ok} of {len(outcomes)} in {seconds:.0f} s{others}"


def write_json(outcomes: Iterable[Outcome]) -> None:
    """Writes $OUT/smoke.json, a list with one case a line; nothing without $OUT."""
    if folder := os.environ.get("OUT"):
        lines = [json.dumps(outcome.as_json()) for outcome in outcomes]
        Path(folder, "smoke.json").write_text("[\n" + ",\n".join(lines) + "\n]\n")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status, 0 if all cases are right and 2 if not."""
    parser = argparse.ArgumentParser(description="Says for each CUDA kernel whether it is right, within two minutes.")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="(default cuda)")
    parser.add_argument("--limit", type=float, default=8, help="seconds until a silent case counts as hung (default 8)")
    parser.add_argument("--kernels", help=f"with commas between them, also {SPARSE} and {ADJOINT} (default: all)")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="only cases whose names hold this, such as 'B=3 long'"
    )
    parser.add_argument("--seconds", type=float, default=math.inf, help="for everything; later cases are skipped")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        work(options.device, options.kernels)
        return 0
    begin = time.monotonic()
    outcomes: list[Outcome] = []
    try:
        outcomes = check_cases(
            options.device, options.limit, options.kernels, options.only, options.seconds, report=Reporter()
        )
    except WorkerFailed as failure:
        print(f"no worker starts: {failure}")
    write_json(outcomes)
    summary = summarize(outcomes, time.monotonic() - begin)
    print(*filter(None, [tabulate(outcomes), summary]), sep="\n", flush=True)
    return 0 if summary.startswith("ALL OK") else 2


if __name__ == "__main__":
    sys.exit(main())
