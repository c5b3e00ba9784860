"""Projections among threads, processes and signals: the same bits always, no hanging, Ctrl-C obeyed."""

import concurrent.futures
import multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from interrupted import interrupt

import trak_fast

KINDS = ["rademacher", "normal"]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def two_threads(monkeypatch: pytest.MonkeyPatch, restore_threads: None) -> None:
    """Lets a second thread help, here and in processes, whatever the number of processors."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    torch.set_num_threads(2)


@pytest.mark.parametrize("proj_type", KINDS)
def test_same_bits_for_any_thread_count(isa: str, proj_type: str) -> None:
    for shape, k in [((33, 70001), 40), ((70, 1000), 1000)]:
        grads = random(*shape)
        results = []
        for threads in (1, 2, 3, 5, 1):
            torch.set_num_threads(threads)
            results.append(trak_fast.project(grads, k, proj_type=proj_type))
        assert all(torch.equal(y, results[0]) for y in results)


def test_same_bits_from_several_python_threads(isa: str) -> None:
    work = [(random(20 + n, 3000, seed=n), 30 + n, KINDS[n % 2]) for n in range(12)]

    def project(arguments: tuple[torch.Tensor, int, str]) -> torch.Tensor:
        grads, k, proj_type = arguments
        return trak_fast.project(grads, k, proj_type=proj_type)

    alone = [project(arguments) for arguments in work]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        together = list(pool.map(project, work * 3))
    assert all(torch.equal(y, alone[n % len(work)]) for n, y in enumerate(together))


def test_same_bits_if_the_caller_flushes_subnormal_numbers(isa: str) -> None:
    """The threads that help the caller may or may not inherit its mode: the bits are the same."""
    grads = random(33, 3000) * 1e-39
    sizes = [("normal", 100), ("sjlt", 128)]
    expected = [trak_fast.project(grads, k, proj_type=proj_type) for proj_type, k in sizes]
    if not torch.set_flush_denormal(True):
        pytest.skip("torch has no such mode on this processor")
    try:
        results = [trak_fast.project(grads, k, proj_type=proj_type) for proj_type, k in sizes]
    finally:
        torch.set_flush_denormal(False)
    assert all(torch.equal(y, other) for y, other in zip(results, expected, strict=True))
    assert results[1].any()  # bfloat16 products of the other kind may end at 0


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # Python 3.12 on fork
def test_forked_child_projects_too() -> None:
    grads = random(33, 5000)
    expected = trak_fast.project(grads, 64)

    def child(results: Connection) -> None:
        results.send(torch.equal(trak_fast.project(grads, 64), expected))

    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(sender,))
    process.start()
    try:
        assert receiver.poll(60), "the child hangs"
        assert receiver.recv()
    finally:
        process.kill()


INTERRUPTED = """
import torch, trak_fast
grads = torch.ones(1, 1).expand({batch}, 2**36)
print("working", flush=True)
try:
    trak_fast.project(grads, 512, proj_type="{proj_type}")
except KeyboardInterrupt:
    print("interrupted", float(trak_fast.project(torch.ones(2, 1), 1).abs().sum()))
"""


# In the sparse kind, threads have whole groups of samples of their own, or share one and wait for each other.
@pytest.mark.parametrize(("proj_type", "batch"), [("rademacher", 32), ("sjlt", 32), ("sjlt", 16)])
def test_control_c_stops_a_long_projection(tmp_path: Path, proj_type: str, batch: int) -> None:
    program = INTERRUPTED.format(proj_type=proj_type, batch=batch)
    assert interrupt(program, tmp_path) == ("interrupted 2.0\n", 0)
