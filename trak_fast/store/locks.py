"""Locks on ranges of a file, which say who writes which rows, and who reads them all.

They are POSIX record locks, because these also work between machines on shared file systems (NFS among them), and
because the system drops them when their process ends, killed or not. They belong to a process: two objects of one
process never exclude each other.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import struct
import sys
import weakref
from pathlib import Path
from typing import NamedTuple

WHOLE = 2**62
"""The byte that stands for the folder that a lock file is in: who computes with its rows shares it, and who deletes the
folder locks it, and all bytes before it, for himself."""

_BUSY = (errno.EACCES, errno.EAGAIN)
_files: weakref.WeakValueDictionary[tuple[int, int], LockFile] = weakref.WeakValueDictionary()
logger = logging.getLogger("trak_fast")


class BusyError(RuntimeError):
    """The error that another process works with the same rows."""


class Holder(NamedTuple):
    """A lock that another process has.

    Attributes:
        start: Its first byte.
        length: The number of its bytes; 0: no end.
        process: The process's id; 0 where it runs on another machine.
        shared: True if the process shares it, to read; False if it has it for itself.
    """

    start: int
    length: int
    process: int
    shared: bool


class LockFile:
    """A file whose byte ranges are locked. Get it from `lock_file`: closing a second handle would drop every lock.

    Attributes:
        supported: False once the file system has turned out to have no locks.
        identity: The numbers of its device and of the file on it.
    """

    def __init__(self, path: Path) -> None:
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self.supported = True
        self._told = False  # that it is not supported
        self._path = path
        status = os.fstat(self._handle)
        self.identity = status.st_dev, status.st_ino

    def acquire(self, start: int, length: int = 1, shared: bool = False) -> bool:
        """Locks bytes [start, start + length), unless another process has locked one of them.

        Args:
            start: The first byte.
            length: The number of bytes.
            shared: Lets other processes share the lock.

        Returns:
            True if the bytes are locked now, or the file system has no locks; then `supported` becomes False.
        """
        try:
            fcntl.lockf(self._handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB, length, start)
        except OSError as error:
            if error.errno in _BUSY:
                return False
            if not (shared or self._told):
                logger.warning("no file locks here (%s): processes that write the same rows go unnoticed", error)
                self._told = True
            self.supported = False
        return True

    def holder(self, start: int, length: int = 1, shared: bool = False) -> Holder | None:
        """Returns a lock by which another process keeps this one from locking a range, or from sharing it."""
        if not sys.platform.startswith("linux"):
            return None
        layout = "hhqqi4x"  # struct flock where off_t has 64 bits
        asked = struct.pack(layout, fcntl.F_RDLCK if shared else fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
        answer = fcntl.fcntl(self._handle, fcntl.F_GETLK, asked)
        lock_type, _, first, count, process = struct.unpack(layout, answer)
        if lock_type == fcntl.F_UNLCK:
            return None
        return Holder(first, count, max(process, 0), shared=lock_type == fcntl.F_RDLCK)

    def release(self, start: int, length: int = 1) -> None:
        """Unlocks bytes [start, start + length)."""
        if self.supported:
            fcntl.lockf(self._handle, fcntl.LOCK_UN, length, start)

    def in_place(self) -> bool:
        """Tells if the file is still where it was opened, and was not deleted."""
        try:
            status = self._path.stat()
        except FileNotFoundError:
            return False
        return (status.st_dev, status.st_ino) == self.identity

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            os.close(self._handle)


def let_go(path: Path) -> None:
    """Unlocks all that this process has locked in the lock file at `path`."""
    if (known := _known(path)) is not None:
        known.release(0, WHOLE + 1)


def _known(path: Path) -> LockFile | None:
    """Returns this process's object for the lock file at `path`, if it has one."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return _files.get((status.st_dev, status.st_ino))


def lock_file(path: Path) -> LockFile:
    """Opens the lock file at `path`, or makes it. A process has one object for each file."""
    known = _known(path)
    if known is None:
        known = LockFile(path)
        _files[known.identity] = known
    return known
