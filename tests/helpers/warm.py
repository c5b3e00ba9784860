"""A Python that starts at once: its processes are forks of one that has imported torch and trak_fast before.

`python()` is the path of a program that takes a script, `-m` or `-c` like `python` itself. It is a client of a server
that belongs to this process: it hands over its arguments, folder, environment and streams, passes signals on, and ends
as the fork ends. What is read while torch is imported cannot be set by the environment; the number of threads can.
Tests of how Python starts, of what an import does, and of processes that are killed take `sys.executable`.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

IMPORTED = ("torch.distributed.run", "scipy.stats", "trak_fast", "trak_fast.bench.runner")

CLIENT = """#!{python} -ISE
import json, os, signal, socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect({address!r})
given = dict(arguments=sys.argv[1:], folder=os.getcwd(), environment=dict(os.environ))
request = json.dumps(given).encode()
socket.send_fds(connection, [len(request).to_bytes(8, "big")], [0, 1, 2])
connection.sendall(request)
answers = connection.makefile()
child = int(answers.readline())
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: os.kill(child, number))
status = int(answers.readline())
if status < 0:
    if -status != signal.SIGKILL:
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
os._exit(status)
"""


@functools.cache
def python() -> str:
    """The path of the program, whose server is started by the first call and ends with this process."""
    folder = Path(tempfile.mkdtemp())
    address = str(folder / "server")
    program = folder / "python"
    program.write_text(CLIENT.format(python=sys.executable, address=address))
    program.chmod(0o700)
    command = [sys.executable, __file__, address, str(program)]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert server.stdout is not None
    assert server.stdout.readline() == b"ready\n"

    @atexit.register
    def end() -> None:
        server.communicate()
        shutil.rmtree(folder)

    return str(program)


def serve(address: str) -> dict[str, Any]:
    """Forks for each request, and returns it in the fork; ends when the process that started the server has ended."""
    for name in IMPORTED:
        importlib.import_module(name)
    torch = sys.modules["torch"]
    torch.func.vmap(torch.func.grad(torch.sum))(torch.ones(1, 1))  # imports as much again
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    gc.freeze()  # or each fork's collections would copy what it shares with the others
    print("ready", flush=True)
    while True:
        over = sys.stdin in select.select([listener, sys.stdin], [], [])[0]
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if over:
            os._exit(0)
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            return answer(connection)
        connection.close()


def answer(connection: socket.socket) -> dict[str, Any]:
    """Forks once more, returns the request in that fork, and tells the client the fork's number and how it ended.

    If the client has gone, the fork is killed.
    """
    size, streams, _, _ = socket.recv_fds(connection, 8, 3)
    with connection.makefile("rb") as file:
        request: dict[str, Any] = json.loads(file.read(int.from_bytes(size, "big")))
    child = os.fork()
    if child == 0:
        connection.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        return request
    os.closerange(0, 3)
    for stream in streams:
        os.close(stream)
    connection.sendall(b"%d\n" % child)
    ended = os.pidfd_open(child)
    if ended not in select.select([ended, connection], [], [])[0]:
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with contextlib.suppress(OSError):
        connection.sendall(b"%d\n" % status)
    os._exit(0)


def execute(arguments: list[str]) -> None:
    """Does what Python does with these arguments."""
    arguments = arguments.copy()
    while arguments[0] in ("-u", "-W"):
        if arguments.pop(0) == "-W":
            warnings.simplefilter(arguments.pop(0))  # type: ignore[arg-type]
    if arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        sys.path.insert(0, "")
        exec(compile(arguments[1], "<string>", "exec"), main.__dict__)
    elif arguments[0] == "-m":
        sys.argv = arguments[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
        runpy.run_path(arguments[0], run_name="__main__")


def end(run: Callable[[], None]) -> None:
    """Runs something and ends as Python does after it, but does not clear the modules first, which takes a second."""
    status: Any = 0
    try:
        run()
    except SystemExit as error:
        status = error.code or 0
    except BaseException:
        status = 1
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    if not isinstance(status, int):
        print(status, file=sys.stderr)
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main() -> None:
    """The server, and then each of its forks."""
    address, program = sys.argv[1:]
    del sys.path[0]  # this file's folder
    request = serve(address)
    os.chdir(request["folder"])
    environment = request["environment"]
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.executable = program
    sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
    if "OMP_NUM_THREADS" in environment:
        sys.modules["torch"].set_num_threads(int(environment["OMP_NUM_THREADS"]))
    end(lambda: execute(request["arguments"]))


if __name__ == "__main__":
    main()
