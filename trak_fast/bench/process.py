"""The process of one candidate, seen from the benchmark that asks it: worker.py is what runs in it."""

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
from .settings import Settings


class WorkerError(RuntimeError):
    """A measurement failed, or its process did."""


class TookTooLong(WorkerError):
    """There was no answer in time."""


class Worker:
    """The process of one candidate."""

    def __init__(self, module: str, candidate: Candidate, settings: Settings) -> None:
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

    def ask(self, op: str, limit: float, **arguments: Any) -> dict[str, Any]:
        """Sends a request and waits for its answer.

        Raises:
            WorkerError: It failed or ended.
            TookTooLong: It took longer than `limit` seconds; it is ended then.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"op": op, **arguments}).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:
            raise WorkerError(self._ended()) from None
        if not select.select([self.process.stdout], [], [], limit)[0]:
            self.close()
            raise TookTooLong(f"took longer than {limit:.0f} s")
        line = self.process.stdout.readline()
        if not line.endswith(b"\n"):
            raise WorkerError(self._ended())
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        result: dict[str, Any] = answer["result"]
        return result

    @property
    def alive(self) -> bool:
        """Whether the process is still there."""
        return self.process.poll() is None

    def _ended(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"its process ended with status {self.process.poll()}" + (f": {lines[-1]}" if lines else "")

    def close(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        self._errors.close()
