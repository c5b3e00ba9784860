"""Files of tensors: whole, readable by others, without code, and refused where they are damaged."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from trak_fast.store.files import first_file
from trak_fast.store.tensors import read_tensors, write_tensors


def test_tensors_and_notes_come_back(tmp_path: Path) -> None:
    shared = torch.arange(6.0).view(2, 3)
    tensors = {"a": shared, "b": shared, "c": shared.T, "d": torch.tensor(True), "e:left": torch.zeros(0, 2).half()}
    notes = {"numbers": [1, 2.5], "text": "\u2028 ü", "flag": True}
    write_tensors(tmp_path / "x.safetensors", tensors, notes)
    back = read_tensors(tmp_path / "x.safetensors")
    assert back.notes == notes
    assert back.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back.tensors[name].dtype == tensor.dtype
        assert torch.equal(back.tensors[name], tensor)


def test_a_file_is_read_by_whoever_the_umask_lets_read_it(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    plain = tmp_path / "plain"
    plain.touch()
    write_tensors(path, {"a": torch.ones(2)}, {})
    assert path.stat().st_mode == plain.stat().st_mode


def test_the_first_of_two_files_stays_where_that_is_wanted(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for number in (1, 2):
        write_tensors(path, {"a": torch.tensor(number)}, {}, publish=first_file)
    assert read_tensors(path).tensors["a"] == 1
    write_tensors(path, {"a": torch.tensor(3)}, {})
    assert read_tensors(path).tensors["a"] == 3
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_damaged_files_and_those_of_others_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(FileNotFoundError):
        read_tensors(path)
    write_tensors(path, {"a": torch.ones(100)}, {"b": 1})
    content = path.read_bytes()
    for length in (0, 4, 20, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"cannot read .*x\.safetensors, it is truncated or corrupt"):
            read_tensors(path)
    for metadata in (None, {"trak_fast": "no JSON"}, {"trak_fast": json.dumps([1])}):
        save_file({"a": torch.ones(2)}, path, metadata)
        with pytest.raises(ValueError, match=r"cannot read .*x\.safetensors, it is (truncated or )?corrupt"):
            read_tensors(path)
