"""The process of one candidate, seen from the benchmark that asks it: worker.py runs in it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
from typing import Any

from .candidates import Candidate
from .case import Case
from .results import Ceilings, FirstCall, Present, Quality
from .settings import Settings


class WorkerError(RuntimeError):
    """The failure of a measurement or of its process."""


class TookTooLong(WorkerError):
    """The failure to answer in time."""


class Worker:
    """The process of one candidate.

    A request takes a `limit`, the seconds to wait for its answer. It raises WorkerError if the measurement failed or
    the process ended, and TookTooLong after the limit; the process is ended then.
    """

    def __init__(self, module: str, candidate: Candidate, settings: Settings) -> None:
        """Starts the process, which begins to import.

        Args:
            module: The module that has the candidate.
            candidate: The candidate.
            settings: Device and threads.
        """
        environment = {**os.environ, **candidate.environment, "PYTHONUNBUFFERED": "1"}
        environment["OMP_NUM_THREADS"] = environment["MKL_NUM_THREADS"] = str(settings.threads)
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (close() closes it)
        command = [sys.executable, "-W", "ignore", "-m", "trak_fast.bench.worker"]
        self.process = subprocess.Popen(
            [*command, module, settings.device, candidate.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
        )

    def open(self, limit: float) -> Present:
        """Waits until the library is imported and has run on something small."""
        return Present(**self._ask("open", limit))

    def prepare(self, case: Case, limit: float) -> FirstCall:
        """Makes gradients and projection, and projects once."""
        return FirstCall(**self._ask("prepare", limit, case=case.asdict()))

    def time(self, seconds: float, repeats: int, limit: float) -> list[float]:
        """Times calls of the projection that `prepare` made; see `worker.Session.time`."""
        times: list[float] = self._ask("time", limit, seconds=seconds, repeats=repeats)
        return times

    def check(self, case: Case, limit: float) -> Quality:
        """Checks the projection's results."""
        return Quality(**self._ask("check", limit, case=case.asdict()))

    def ceilings(self, limit: float) -> Ceilings:
        """Measures the machine's best rates."""
        return Ceilings(**self._ask("ceilings", limit))

    def release(self, limit: float) -> None:
        """Frees all that `prepare` made."""
        self._ask("release", limit)

    @property
    def alive(self) -> bool:
        """True while the process runs."""
        return self.process.poll() is None

    def close(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        self._errors.close()

    def _ask(self, op: str, limit: float, **arguments: Any) -> Any:
        """Sends a request and waits for its answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"op": op, **arguments}).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:
            raise WorkerError(self._end()) from None
        if not select.select([self.process.stdout], [], [], limit)[0]:
            self.close()
            raise TookTooLong(f"took longer than {limit:.0f} s")
        line = self.process.stdout.readline()
        if not line.endswith(b"\n"):
            raise WorkerError(self._end())
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer["result"]

    def _end(self) -> str:
        """Says how the process ended, with the last line that it printed."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"its process ended with status {self.process.poll()}" + (f": {lines[-1]}" if lines else "")
