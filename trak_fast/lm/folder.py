"""The folder of a run.

out/run.json          settings, and facts about the run for people
out/documents.npz     a digest of each training document, and the pieces that it was cut into
out/features/         the folder of TRAKer
out/top.jsonl, top.csv, index.html, ...      results for the queries of --query
out/<name>/...        results for other queries (--name, --ask)
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..store.files import advising_on_denied, atomic_file, read_json
from ..store.growth import stored_size
from .texts.documents import Document
from .texts.pieces import Piece

FORMAT = 2
"""The number of the format of run.json and of the features beside it."""

RESULTS = ("top.jsonl", "top.csv", "scores.npy", "index.html", "clean.jsonl", "clean.csv", "selected.jsonl")
"""Files of results."""


def digest_of(document: Document) -> int:
    """Returns 64 bits that tell the content of a document from others; its place and name do not count."""
    content = [document.text, document.prompt, document.completion, document.messages, document.label]
    text = json.dumps(content, ensure_ascii=True, sort_keys=True)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def digests_of(documents: Sequence[Document]) -> NDArray[np.uint64]:
    """Returns the digests of documents, (n,)."""
    return np.array([digest_of(document) for document in documents], np.uint64)


def digests_of_tokens(pieces: Sequence[Piece]) -> list[str]:
    """Returns a digest of the tokens and labels of each document, in the order of their first pieces."""
    hashes: dict[int, Any] = {}
    for piece in pieces:
        digest = hashes.setdefault(piece.document, hashlib.blake2b(digest_size=8))
        for array in (piece.input_ids, piece.labels):
            digest.update(len(array).to_bytes(8, "little") + array.astype("<i4").tobytes())
    return [digest.hexdigest() for digest in hashes.values()]


class RunFolder:
    """The files of a run.

    Attributes:
        path: The folder.
        name: The folder as the user wrote it, for messages.
        is_outdated: True where a run that is there counts as none: it will be deleted.
    """

    def __init__(self, out: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Takes the path; nothing is read or written.

        Args:
            out: The path.
            overwrite: Has a run that is there count as none, and `delete_outdated` delete it.

        Raises:
            ValueError: The folder is to be overwritten, and has files, but no run.
        """
        self.name = os.fspath(out).rstrip("/") or "/"
        self.path = Path(out).expanduser().resolve()
        self.is_outdated = overwrite and self.path.exists()
        if self.is_outdated and not ((self.path / "run.json").exists() or self.features.exists()):
            if any(self.path.iterdir()):
                raise ValueError(f"--overwrite must be given with a run's folder, and {self.name} has no run.json")
            self.is_outdated = False

    @property
    def features(self) -> Path:
        """The folder of the features."""
        return self.path / "features"

    def _content(self) -> dict[str, Any] | None:
        """Reads run.json; None if there is none.

        Raises:
            ValueError: It is corrupt or of another version.
        """
        file = self.path / "run.json"
        if self.is_outdated or not file.exists():
            return None
        content = read_json(file)
        parts = (content.get("settings"), content.get("facts"))
        if content.get("format") != FORMAT or not all(isinstance(part, dict) for part in parts):
            raise ValueError(f"{self.name}/run.json was written by another version; another --out, or --overwrite")
        return content

    def settings(self) -> Mapping[str, Any] | None:
        """Reads the settings of the run; None if there is no run.

        Raises:
            ValueError: run.json is corrupt or of another version.
        """
        content = self._content()
        return None if content is None else content["settings"]

    def facts(self) -> Mapping[str, Any]:
        """Reads the facts about the run; none if there is no run.

        Raises:
            ValueError: run.json is corrupt or of another version.
        """
        content = self._content()
        facts: Mapping[str, Any] = {} if content is None else content["facts"]
        return facts

    def save(self, settings: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """Writes run.json, in place of the one that is there."""
        content = {"format": FORMAT, "settings": settings, "facts": facts}
        with advising_on_denied(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            with atomic_file(self.path / "run.json") as temporary:
                temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def documents(self) -> tuple[NDArray[np.uint64], NDArray[np.int64]] | None:
        """Reads the digests of the documents and the numbers of their pieces, (n,) each; None if there are none.

        Raises:
            ValueError: The file is corrupt.
        """
        file = self.path / "documents.npz"
        if self.is_outdated or not file.exists():
            return None
        try:
            with np.load(file, allow_pickle=False) as content:
                digests, pieces = content["digests"], content["pieces"]
            if not (digests.dtype == np.uint64 and pieces.dtype == np.int64 and digests.shape == (len(pieces),)):
                raise ValueError("digests and pieces do not fit")
            return digests, pieces
        except Exception as error:  # of zipfile, zlib or NumPy
            raise ValueError(f"{self.name}/documents.npz is corrupt; another --out, or --overwrite") from error

    def save_documents(self, digests: NDArray[np.uint64], pieces: NDArray[np.int64]) -> None:
        """Writes the digests of the documents and the numbers of their pieces."""
        path = self.path / "documents.npz"
        with advising_on_denied(self.path), atomic_file(path) as temporary, temporary.open("wb") as file:
            np.savez(file, digests=digests, pieces=pieces)

    def num_stored(self) -> int | None:
        """Returns the number of pieces that the features have rows for; None if there are no features."""
        return None if self.is_outdated else stored_size(self.features)

    def results(self, name: str | None) -> Path:
        """Returns the folder of the results of queries, and makes it.

        Raises:
            ValueError: The name can be none of a folder, or is that of another one.
        """
        require_name(name)
        path = self.path if name is None else self.path / name
        with advising_on_denied(self.path):
            path.mkdir(parents=True, exist_ok=True)
        return path

    def delete_outdated(self) -> None:
        """Deletes the run that is to be overwritten; other files in its folder stay, and other runs."""
        (self.path / "run.json").unlink(missing_ok=True)  # first, as the others are nothing without it
        shutil.rmtree(self.features, ignore_errors=True)
        (self.path / "documents.npz").unlink(missing_ok=True)
        named = [file.parent for file in self.path.glob("*/top.jsonl")]
        own = (folder for folder in named if not folder.is_symlink() and not (folder / "run.json").exists())
        for folder in (self.path, *own):
            for name in RESULTS:
                (folder / name).unlink(missing_ok=True)


def require_name(name: str | None) -> None:
    """Checks the name of results.

    Raises:
        ValueError: It can be no folder's, or is that of the features.
    """
    taken = ("features", "run.json", "documents.npz", *RESULTS)
    if name is not None and (name in taken or not re.fullmatch(r"\w[\w.-]{0,99}", name)):
        raise ValueError(
            f"--name must be letters, digits, and - _ . after the first, and none of {', '.join(taken)}, not {name!r}"
        )


def check_is_prefix(
    folder: RunFolder, stored: NDArray[np.uint64], documents: Sequence[Document], found: NDArray[np.uint64]
) -> None:
    """Checks that the documents of a run are there unchanged; more of them may follow.

    Raises:
        ValueError: A row has changed, or some are missing.
    """
    common = min(len(stored), len(found))
    changed = np.flatnonzero(stored[:common] != found[:common])
    if len(changed):
        document = documents[changed[0]]
        if changed[0] == 0 and 2 * len(changed) > common:
            raise ValueError(
                f"{folder.name}/ was made of other documents than {document.file}, or in another order; --train with "
                "the old files, and new ones after them, another --out, or --overwrite"
            )
        raise ValueError(
            f"{document.file} has changed since {folder.name}/ was made (row {document.place}"
            f"{f', and {len(changed) - 1:,} more' if len(changed) > 1 else ''}); --overwrite, or the old file"
        )
    if len(found) < len(stored):
        file = documents[-1].file if documents else "--train"
        raise ValueError(
            f"{file} ends after {len(found):,} documents, by itself or by --limit, and {folder.name}/ was made of "
            f"{len(stored):,}; --overwrite, or all of these"
        )
