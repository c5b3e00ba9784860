"""Locks on ranges of a file, which say who writes which rows.

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

_BUSY = (errno.EACCES, errno.EAGAIN)
_files: weakref.WeakValueDictionary[tuple[int, int], LockFile] = weakref.WeakValueDictionary()
logger = logging.getLogger("trak_fast")


class LockFile:
    """A file whose byte ranges are locked. Get it from `lock_file`: closing a second handle would drop every lock.

    Attributes:
        supported: False once the file system has turned out to have no locks.
    """

    def __init__(self, path: Path) -> None:
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self.supported = True

    def acquire(self, start: int, length: int = 1) -> bool:
        """Locks bytes [start, start + length), unless another process has locked one of them.

        Returns:
            True if the bytes are locked now, or the file system has no locks; then `supported` becomes False.
        """
        try:
            fcntl.lockf(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
        except OSError as error:
            if error.errno in _BUSY:
                return False
            if self.supported:
                logger.warning("no file locks here (%s): processes that write the same rows go unnoticed", error)
            self.supported = False
        return True

    def holder(self, start: int, length: int = 1) -> tuple[int, int, int] | None:
        """Returns start, length (0: no end) and process id of a lock that another process has within a range."""
        if not sys.platform.startswith("linux"):
            return None
        layout = "hhqqi4x"  # struct flock where off_t has 64 bits
        asked = struct.pack(layout, fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
        answer = fcntl.fcntl(self._handle, fcntl.F_GETLK, asked)
        lock_type, _, first, count, process = struct.unpack(layout, answer)
        return None if lock_type == fcntl.F_UNLCK else (first, count, process)

    def release(self, start: int, length: int = 1) -> None:
        """Unlocks bytes [start, start + length)."""
        if self.supported:
            fcntl.lockf(self._handle, fcntl.LOCK_UN, length, start)

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            os.close(self._handle)


def lock_file(path: Path) -> LockFile:
    """Opens the lock file at `path`, or makes it. A process has one object for each file."""
    try:
        status = path.stat()
        known = _files.get((status.st_dev, status.st_ino))
    except FileNotFoundError:
        known = None
    if known is None:
        known = LockFile(path)
        status = path.stat()
        _files[status.st_dev, status.st_ino] = known
    return known
