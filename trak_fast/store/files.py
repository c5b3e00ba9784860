"""Files and folders that are on disk whole or not at all, and messages that say what is wrong with them."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import io
import json
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap

DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)
"""Numbers of the errors of files and folders that may not be written."""

LEFTOVER_SECONDS = 86_400.0
"""Seconds without a change after which a temporary file or folder of another machine is taken for a leftover."""

_MAGIC = b"\x93NUMPY\x01\x00"
_START = len(_MAGIC) + 2  # bytes of a .npy file before the text of its header: the last two have its length

_TEMPORARY = re.compile(r"(?P<place>[0-9a-f]{8})-(?P<process>\d+)-[0-9a-f]{12}")


@functools.cache
def _place() -> str:
    """Names where numbers of processes are unique: a machine since its start, or a container on it."""
    facts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # not Linux: the machine's name has to do
        facts += [Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:8]


def is_file_name(name: object) -> bool:
    """Tells if a value that a file holds, or a user gave, names something in a folder, and nothing outside of it."""
    return isinstance(name, str) and name not in ("", ".", "..") and not any(c in "/\\\0" for c in name)


def temporary_name(path: Path) -> Path:
    """Names a hidden temporary beside `path` that no other process uses, and that says which process it belongs to."""
    return path.with_name(f".{path.name}.{_place()}-{os.getpid()}-{uuid.uuid4().hex[:12]}")


def remove_leftovers(path: Path) -> None:
    """Removes the temporaries of `path` (see `temporary_name`) that killed processes have left."""
    prefix = f".{path.name}."
    with contextlib.suppress(OSError):  # a folder that may not be listed, or a file that may not be removed
        for entry in list(path.parent.iterdir()):
            name = _TEMPORARY.fullmatch(entry.name.removeprefix(prefix)) if entry.name.startswith(prefix) else None
            if name is None or not _is_left(entry, name["place"], int(name["process"])):
                continue
            if entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)


def _is_left(path: Path, place: str, process: int) -> bool:
    """Tells if a temporary's process has ended; of another machine's, if nothing has changed it for a day."""
    try:
        if place != _place():
            return time.time() - path.stat().st_mtime > LEFTOVER_SECONDS
        os.kill(process, 0)
    except (FileNotFoundError, ProcessLookupError):
        return True
    except OSError:
        return False  # a process of another user
    return False


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Yields a new folder beside `path` that belongs to this process, and is deleted at the end of the block."""
    remove_leftovers(path)
    temporary = temporary_name(path)
    temporary.mkdir()
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sync(handle: int) -> None:
    """Flushes a file's data to the disk, and its size, without which they could not be read."""
    getattr(os, "fdatasync", os.fsync)(handle)


def write_at(handle: int, data: memoryview, offset: int) -> None:
    """Writes all of `data`, however little the system takes at a time."""
    while data:
        count = os.pwrite(handle, data, offset)
        data = data[count:]
        offset += count


@contextmanager
def advising_on_full_disk(path: Path) -> Iterator[None]:
    """Adds to the error of a full disk that everything stored is safe, and the way to go on."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(
                error.errno,
                f"{os.strerror(error.errno)}; everything stored before is safe: make room and run the same again",
                str(path),
            ) from error
        raise


@contextmanager
def advising_on_denied(path: Path) -> Iterator[None]:
    """Turns the error of a part of save_dir that may not be written into one that names the part and the fix."""
    try:
        yield
    except OSError as error:
        if error.errno in DENIED:
            raise PermissionError(
                error.errno,
                f"{os.strerror(error.errno)}; make this part of save_dir writable, or use a writable copy of save_dir, "
                "or another one",
                str(path),
            ) from error
        raise


def sync_folder(path: Path) -> None:
    """Flushes the names of a folder's files to the disk."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields the name of a temporary file, which becomes `path` at the end of the block unless something was raised."""
    with _published(path, lambda temporary: temporary.replace(path)) as temporary:
        yield temporary


@contextmanager
def first_file(path: Path) -> Iterator[Path]:
    """Yields the name of a temporary file as `atomic_file`; it is dropped if there is a `path` by the end."""

    def link(temporary: Path) -> None:
        with suppress(FileExistsError):
            path.hardlink_to(temporary)

    with _published(path, link) as temporary:
        yield temporary


@contextmanager
def _published(path: Path, publish: Callable[[Path], object]) -> Iterator[Path]:
    """Yields the name of a temporary file, and publishes it as `path` once it is on the disk."""
    remove_leftovers(path)
    temporary = temporary_name(path)
    try:
        with advising_on_full_disk(path):
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            publish(temporary)
            sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder, which becomes `path` at the end of the block unless something was raised."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(path) as temporary:
        yield temporary
        temporary.chmod(path.parent.stat().st_mode & 0o777)  # whoever may enter the one may enter the other
        sync_folder(temporary)
        try:
            temporary.rename(path)
        except OSError:
            if not path.exists():  # otherwise another process was quicker, and the folder it made is as good
                raise
        sync_folder(path.parent)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object, unless `path` exists by then: where several processes write, the first one wins."""
    remove_leftovers(path)
    temporary = temporary_name(path)
    try:
        with advising_on_full_disk(path):
            with temporary.open("w") as file:
                file.write(json.dumps(content, indent=1) + "\n")
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(temporary, path)
            except FileExistsError:
                return
            except OSError:  # a file system without hard links
                temporary.replace(path)
            sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        ValueError: The file is missing, truncated or corrupt.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"cannot read {path}, it is missing, truncated or corrupt ({error}); use another save_dir, "
            "or delete this one to start again"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is corrupt: it must hold a JSON object, not {type(content).__name__}")
    return content


def create_array(path: Path, shape: tuple[int, ...], dtype: type[np.generic]) -> None:
    """Makes a .npy file of zeros that take no space yet."""
    with path.open("wb") as file:
        file.write(_header(shape, dtype))
        file.truncate(file.tell() + np.dtype(dtype).itemsize * int(np.prod(shape, dtype=np.int64)))
        file.flush()
        os.fsync(file.fileno())


def _header(shape: tuple[int, ...], dtype: type[np.generic]) -> bytes:
    """Returns what a .npy file begins with."""
    buffer = io.BytesIO()
    description = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, description)
    return buffer.getvalue()


def grow_array(path: Path, shape: tuple[int, ...], dtype: type[np.generic]) -> None:
    """Gives a file of `create_array` more rows, of zeros that take no space yet; those that it has stay where they are.

    The header is padded, so that a larger shape fits in its place. Nothing of the old one is read but its length, which
    stays: the call can be repeated after a kill at any moment, also one that has cut the header in two.

    Args:
        path: The file.
        shape: The new shape.
        dtype: Its dtype, the same as before.

    Raises:
        ValueError: The file has no header of this kind, or too short a one.
    """
    with path.open("r+b", buffering=0) as file:
        start = file.read(_START)
        text = _header(shape, dtype)[_START:].rstrip()
        room = int.from_bytes(start[-2:], "little")
        if len(start) < _START or start[:-2] != _MAGIC or len(text) >= room:
            raise ValueError(f"{path} must be a .npy file with room for {len(text)} bytes in its header")
        size = _START + room + np.dtype(dtype).itemsize * int(np.prod(shape, dtype=np.int64))
        if path.stat().st_size < size:
            os.ftruncate(file.fileno(), size)
            os.fsync(file.fileno())  # before the header says that the rows are there
        write_at(file.fileno(), memoryview(start + text.ljust(room - 1) + b"\n"), 0)
        os.fsync(file.fileno())


def read_array(path: Path) -> np.memmap:
    """Opens a .npy file as a read-only memory map.

    Raises:
        ValueError: The file is missing, truncated or corrupt.
    """
    try:
        return open_memmap(path, "r")
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"cannot open {path}, it is missing, truncated or corrupt ({error})") from error


def open_array(path: Path, shape: tuple[int, ...], dtype: type[np.generic]) -> np.memmap:
    """Opens a .npy file of a known shape and dtype as a read-only memory map.

    Raises:
        ValueError: The file is missing, truncated or corrupt, or holds another array.
    """
    stored = read_array(path)
    if stored.shape != shape or stored.dtype != dtype:
        raise ValueError(f"{path} must hold {np.dtype(dtype)} {shape}, not {stored.dtype} {stored.shape}")
    return stored
