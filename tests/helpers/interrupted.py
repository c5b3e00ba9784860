"""A program that is interrupted while a kernel works."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest


def interrupt(program: str, folder: Path) -> tuple[str, int]:
    """Runs a program that prints "working" and then computes for minutes, and sends it Ctrl-C after a second.

    Returns:
        The rest of its output, and its exit status.
    """
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=folder) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "working\n"
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(1)
            process.send_signal(signal.SIGINT)
            output, _ = process.communicate(timeout=30)  # far less than is left to do
        finally:
            process.kill()
        return output, process.returncode
