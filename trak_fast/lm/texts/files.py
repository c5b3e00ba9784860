"""Rows of files: JSON lines, JSON, CSV, parquet, plain text, folders of them, and what `save_to_disk` writes.

Text is UTF-8, with or without a byte order mark; lines end by LF or CRLF.
"""

from __future__ import annotations

import csv
import importlib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ...store.files import is_file_name

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")
"""File names' endings that are read."""

_ROWS_AT_ONCE = 1000


class Row(NamedTuple):
    """A row of a file: `place` is its line in .jsonl and .txt, its number among the rows elsewhere, both from 1."""

    file: str
    place: int
    values: dict[str, object]


class Sources(NamedTuple):
    """Files, and folders of `save_to_disk`, in the order in which they are read; `skipped` are of another kind."""

    paths: tuple[Path, ...]
    skipped: tuple[Path, ...]


def find_sources(paths: Iterable[str | Path]) -> Sources:
    """Lists the files to read: those given, and those in folders, sorted by name; hidden ones are left out.

    Raises:
        FileNotFoundError: A path does not exist.
        ValueError: A file given, or every file of a folder, is of a kind that is not read; or a folder holds splits.
    """
    found: list[Path] = []
    skipped: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist")
        if path.is_dir():
            count = len(found)
            _search(path, found, skipped, set())
            if len(found) == count:
                raise ValueError(f"{path} has no file that is read: {', '.join(SUFFIXES)}")
        elif path.suffix.lower() in SUFFIXES:
            found.append(path)
        else:
            raise ValueError(f"{path} must end in {', '.join(SUFFIXES)}, or be a folder; rename or convert it")
    if not found:
        raise ValueError("no file of documents was given")
    return Sources(tuple(found), tuple(skipped))


def read_rows(sources: Sequence[Path], *, by_file: bool = False) -> Iterator[Row]:
    """Reads the rows of files in order.

    Args:
        sources: As `find_sources` lists them.
        by_file: Takes a .txt file as one row, not each line that is not blank.

    Raises:
        ValueError: A file is empty or malformed, `by_file` was given for files of rows, or a package is missing.
    """
    for path in sources:
        if by_file and path.suffix.lower() != ".txt":
            raise ValueError(f"--by-file is for .txt files, and {path} is none; leave it out")
        empty = True
        for row in _rows(path, by_file):
            empty = False
            yield row
        if empty:
            raise ValueError(f"{path} has no documents")


def kind_of(value: object) -> str:
    """Returns a JSON value's kind in words, with its article."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return "a string"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, list):
        return "an array"
    return "an object" if isinstance(value, dict) else f"a {type(value).__name__}"


def _search(folder: Path, found: list[Path], skipped: list[Path], searched: set[Path]) -> None:
    if folder.resolve() in searched:  # a link leads here, perhaps from within
        return
    searched.add(folder.resolve())
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(path.name for path in folder.iterdir() if path.is_dir())
        names = " or ".join(str(folder / name) for name in splits)
        raise ValueError(f"{folder} holds several splits; give {names}")
    if _is_saved(folder):
        found.append(folder)
        return
    for path in sorted(folder.iterdir(), key=lambda path: path.name):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            _search(path, found, skipped, searched)
        else:
            (found if path.suffix.lower() in SUFFIXES else skipped).append(path)


def _is_saved(folder: Path) -> bool:
    """Returns True for what `datasets.Dataset.save_to_disk` wrote."""
    return (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file()


def _rows(path: Path, by_file: bool) -> Iterator[Row]:
    suffix = path.suffix.lower()
    if path.is_dir():
        yield from _saved_rows(path)
    elif suffix == ".jsonl":
        yield from _json_lines(path)
    elif suffix == ".json":
        yield from _json_rows(path)
    elif suffix == ".csv":
        yield from _csv_rows(path)
    elif suffix == ".parquet":
        yield from _parquet_rows(path)
    elif by_file:
        text = "".join(_lines(path)).replace("\r\n", "\n")
        if text.strip():
            yield Row(str(path), 1, {"text": text})
    else:
        for number, line in enumerate(_lines(path), 1):
            if line.strip():
                yield Row(str(path), number, {"text": line.removesuffix("\n").removesuffix("\r")})


def _lines(path: Path) -> Iterator[str]:
    """Reads lines with their ends: only LF ends one, as other characters that Python splits at stand inside texts."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                place = f"byte 0x{line[error.start]:02x} is number {error.start + 1} of the line"
                raise ValueError(f"{path}:{number} is not UTF-8 ({place}); save the file as UTF-8") from None


def _parsed(text: str, path: Path, line: int) -> Any:
    """Parses JSON that begins at a line of a file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = line + error.lineno - 1
        raise ValueError(f"{path}:{place} is not JSON ({error.msg}: column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # numbers of more digits, and nesting deeper, than Python reads
        raise ValueError(f"{path}:{line} is JSON that cannot be read ({error})") from None


def _json_lines(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            yield _object(_parsed(line.rstrip("\r\n"), path, number), path, number)


def _object(value: object, path: Path, place: int) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f"{path}:{place} must be a JSON object, with a field for the text, not {kind_of(value)}")
    return Row(str(path), place, value)


def _json_rows(path: Path) -> Iterator[Row]:
    text = "".join(_lines(path))
    if not text.strip():
        return
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and error.lineno > 1:  # JSON lines by another name
            yield from _json_lines(path)
            return
        value = _parsed(text, path, 1)
    except (ValueError, RecursionError):
        value = _parsed(text, path, 1)
    if isinstance(value, dict):
        arrays = [name for name, rows in value.items() if isinstance(rows, list)]
        if not arrays or arrays[0] in ("messages", "conversations"):
            value = [value]
        elif len(arrays) == 1:
            value = value[arrays[0]]
        else:
            names = ", ".join(f'"{name}"' for name in arrays)
            raise ValueError(
                f"{path} must be one array of objects, not an object of several: {names}; save one of them"
            )
    if not isinstance(value, list):
        raise ValueError(f"{path} must be an array of objects, or an object of one array, not {kind_of(value)}")
    for number, row in enumerate(value, 1):
        yield _object(row, path, number)


def _csv_rows(path: Path) -> Iterator[Row]:
    limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # documents are longer than the default of 128 KiB
    try:
        rows = csv.reader(_lines(path), strict=True)
        header: list[str] | None = None
        number = 0
        try:
            for values in rows:
                if not values:
                    continue
                if header is None:
                    header = _checked_header(values, path)
                    continue
                number += 1
                if len(values) != len(header):
                    raise ValueError(f"{path}:{number} has {len(values)} values, and the header {len(header)} names")
                yield Row(str(path), number, dict(zip(header, values, strict=True)))
        except csv.Error as error:
            raise ValueError(f"{path} is not CSV ({error}: line {rows.line_num})") from None
    finally:
        csv.field_size_limit(limit)


def _checked_header(names: list[str], path: Path) -> list[str]:
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f'{path} has the field "{twice[0]}" twice in its header; rename one')
    return names


def _parquet_rows(path: Path) -> Iterator[Row]:
    parquet = _package("pyarrow.parquet", "parquet")
    try:
        file = parquet.ParquetFile(path)
    except ValueError as error:  # pyarrow's own is a ValueError
        raise ValueError(f"{path} is not parquet ({error})") from None
    with file:
        yield from _table_rows(file.iter_batches(_ROWS_AT_ONCE), path)


def _saved_rows(folder: Path) -> Iterator[Row]:
    _require_own_files(folder)
    datasets = _package("datasets", "a folder of save_to_disk")
    saved = datasets.load_from_disk(str(folder)).with_format("arrow")  # as stored: images stay bytes
    yield from _table_rows(saved.iter(_ROWS_AT_ONCE), folder)


def _require_own_files(folder: Path) -> None:
    """Refuses what looks like a folder of `save_to_disk`, and names files that are elsewhere.

    Raises:
        ValueError: It does, or state.json is none that `save_to_disk` writes.
    """
    state = _parsed((folder / "state.json").read_text(encoding="utf-8"), folder / "state.json", 1)
    files = state.get("_data_files") if isinstance(state, dict) else None
    if not isinstance(files, list) or not all(isinstance(file, dict) for file in files):
        raise ValueError(f"{folder}/state.json must list files of data, as save_to_disk writes it")
    for file in files:
        if not is_file_name(name := file.get("filename")):
            raise ValueError(f"{folder}/state.json must name files in its folder, not {name!r}")


def _table_rows(tables: Iterable[Any], path: Path) -> Iterator[Row]:
    number = 0
    for table in tables:
        for values in table.to_pylist():
            number += 1
            yield Row(str(path), number, values)


def _package(module: str, what: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        name = module.partition(".")[0]
        raise ValueError(f"reading {what} needs {name}: pip install {name}") from None
