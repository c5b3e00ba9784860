"""Features on disk: folders that are refused, and the files that are left after a failure at any moment."""

import hashlib
import io
import json
import os
import time
from collections.abc import Callable
from enum import Enum
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from trak_fast.store import columns, files
from trak_fast.store import folder as store
from trak_fast.store.files import atomic_file
from trak_fast.store.folder import Store
from trak_fast.store.manifest import digest, manifest_of
from trak_fast.store.rows import Rows

N, K = 6, 3
MANIFEST: dict[str, Any] = {"seed": 0, "proj_dim": K, "parameters": ["a torch.float32 (2,)", "b torch.float32 (3,)"]}
WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(1, dtype=torch.int64)}


def tree(path: Path) -> set[str]:
    return {str(p.relative_to(path)) for p in path.rglob("*")}


def failing(error: BaseException) -> Callable[..., None]:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    return fail


@pytest.fixture
def opened(tmp_path: Path) -> Store:
    opened = Store(tmp_path, MANIFEST, N, K)
    opened.register(0, WEIGHTS)
    return opened


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed: stored 0, given 1"),
        ({"proj_dim": 4}, "proj_dim: stored 3, given 4"),
        ({"parameters": ["a torch.float32 (2,)"]}, r"parameters\[1\]: stored 'b torch.float32 \(3,\)', given None"),
        ({"parameters": MANIFEST["parameters"][::-1]}, r"parameters\[0\]: stored 'a torch.float32 \(2,\)', given 'b "),
        ({"extra": 2.5}, "extra: stored None, given 2.5"),
        ({"format": 99}, r"format: stored 6, given 99\n  .another version of trak_fast made the folder"),
    ],
)
def test_another_manifest_is_refused_by_what_differs(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    Store(tmp_path, MANIFEST, N, K)
    Store(tmp_path, MANIFEST, N, K)
    with pytest.raises(ValueError, match=message) as caught:
        Store(tmp_path, {**MANIFEST, **change}, N, K)
    assert str(tmp_path) in str(caught.value)


def test_a_long_list_of_differences_is_cut(tmp_path: Path) -> None:
    names = [str(i) for i in range(100)]
    Store(tmp_path, {"parameters": names}, N, K)
    with pytest.raises(ValueError, match="and 92 more") as caught:
        Store(tmp_path, {"parameters": names[::-1]}, N, K)
    assert str(caught.value).count("stored") == 8


@pytest.mark.parametrize("file", ["manifest.json", "checkpoint_0/checkpoint.json"])
def test_json_truncated_anywhere_is_an_error_that_names_it(opened: Store, file: str) -> None:
    path = opened.path / file
    content = path.read_bytes()
    for length in range(len(content.rstrip())):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=file):
            Store(opened.path, MANIFEST, N, K).register(0, WEIGHTS)
    path.write_text("[1, 2]")
    with pytest.raises(ValueError, match=f"{file} is corrupt"):
        Store(opened.path, MANIFEST, N, K).register(0, WEIGHTS)
    path.unlink()
    with pytest.raises(ValueError, match=f"{file}, it is missing"):
        Store(opened.path, MANIFEST, N, K).register(0, WEIGHTS)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_file_is_replaced_whole_or_not_at_all(opened: Store, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    opened.save_gram(0, np.eye(2))
    before = tree(opened.path)
    with monkeypatch.context() as patch:
        patch.setattr(os if step == "fsync" else Path, step, failing(OSError("disk")))
        with pytest.raises(OSError, match="disk"):
            opened.save_gram(0, np.zeros((2, 2)))
        with pytest.raises(OSError, match="disk"), atomic_file(opened.path / "manifest.json") as temporary:
            temporary.write_text("{}")
    assert (opened.gram(0) == np.eye(2)).all()
    assert tree(opened.path) == before


def test_json_is_on_disk_before_it_takes_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    fsync, link = os.fsync, os.link
    monkeypatch.setattr(os, "fsync", lambda number: (synced.append(os.fstat(number).st_ino), fsync(number)))

    def checked(source: Path, target: Path) -> None:
        assert source.stat().st_ino in synced
        assert json.loads(source.read_text())["seed"] == 0
        link(source, target)

    monkeypatch.setattr(os, "link", checked)
    Store(tmp_path, MANIFEST, N, K)
    assert (tmp_path / "manifest.json").stat().st_ino in synced


def test_a_flag_is_set_only_after_its_row_is_on_disk(opened: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = opened.train(0)
    inds = np.array([4, 1])
    rows.write(inds, features=np.ones((2, K)), weights=np.ones(2))
    flags = []
    fdatasync = os.fdatasync

    def watch(handle: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{handle}")).name
        flags.append((name, opened.train(0).done[[4, 1]].tolist()))
        fdatasync(handle)

    monkeypatch.setattr(os, "fdatasync", watch)
    rows.write(inds, features=np.full((2, K), 2), weights=np.full(2, 3))
    down, up = [False, False], [True, True]
    files = ("done.npy", "features.npy", "weights.npy", "digests.npy")
    assert flags == [*((name, down) for name in files), ("done.npy", up)]
    assert (opened.train(0).features[[4, 1]] == 2).all()
    assert (opened.train(0).weights[[4, 1]] == 3).all()
    assert opened.train(0).done.tolist() == [False, True, False, False, True, False]
    with pytest.raises(RuntimeError, match="4 of 6 rows left: 0, 2, 3, 5"):
        rows.require_all("rows left")


def test_rows_that_cannot_be_written_keep_their_flags_down(opened: Store) -> None:
    rows = opened.train(0)
    with pytest.raises(ValueError, match="broadcast"):
        rows.write(np.array([0, 1]), features=np.ones((2, K)), weights=np.ones(5))
    assert not opened.train(0).done.any()


@pytest.mark.parametrize("damage", ["truncate", "empty", "text", "missing", "shape", "dtype"])
@pytest.mark.parametrize("file", ["features.npy", "weights.npy", "done.npy"])
def test_damaged_arrays_are_an_error_that_names_them(opened: Store, file: str, damage: str) -> None:
    path = opened.checkpoint(0) / "train" / file
    match damage:
        case "truncate":
            path.write_bytes(path.read_bytes()[:-1])
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_text("nonsense" * 40)
        case "missing":
            path.unlink()
        case "shape":
            np.save(path, np.zeros((N + 1, 2), np.load(path).dtype))
        case "dtype":
            np.save(path, np.load(path).astype(np.float64))
    with pytest.raises(ValueError, match=file):
        opened.train(0)


def test_a_checkpoint_that_fails_halfway_leaves_nothing(opened: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tree(opened.path)
    with monkeypatch.context() as patch:
        patch.setattr(store, "write_json", failing(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            opened.register(1, WEIGHTS)
    assert opened.model_ids() == [0]
    assert tree(opened.path) == before


def test_of_two_processes_that_make_a_checkpoint_one_wins(opened: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    create = Rows.create

    def overtaken(*args: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Rows, "create", staticmethod(create))
            Store(opened.path, MANIFEST, N, K).register(1, WEIGHTS)
            opened.train(1).write(np.array([2]), features=np.ones((1, K)), weights=np.ones(1))
        create(*args)

    monkeypatch.setattr(Rows, "create", staticmethod(overtaken))
    opened.register(1, WEIGHTS)
    assert opened.train(1).done.tolist() == [False, False, True, False, False, False]
    names = ["checkpoint_0", "checkpoint_1", "manifest.json", "scores", "writers.lock"]
    assert sorted(p.name for p in opened.path.iterdir()) == names


def test_too_little_disk_space_is_an_error_before_anything_is_made(
    opened: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = columns.shutil.disk_usage(opened.path)
    needed = 4 * N * K + 2 * N + 4 * N + 4 * N + N  # features, their powers of two, weights, digests, flags
    monkeypatch.setattr(columns.shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    with pytest.raises(OSError, match="free"):
        opened.register(1, WEIGHTS)
    assert opened.model_ids() == [0]
    monkeypatch.setattr(columns.shutil, "disk_usage", lambda _: usage._replace(free=needed))
    opened.register(1, WEIGHTS)


@pytest.mark.parametrize(
    "other",
    [
        {**WEIGHTS, "a": WEIGHTS["a"] + 1e-6},
        {**WEIGHTS, "a": WEIGHTS["a"].reshape(3, 2)},
        {**WEIGHTS, "a": WEIGHTS["a"].view(torch.int32)},
        {**WEIGHTS, "b": torch.tensor(2)},
        {"c": WEIGHTS["a"], "b": WEIGHTS["b"]},
    ],
)
def test_other_weights_are_refused(opened: Store, other: dict[str, torch.Tensor]) -> None:
    opened.register(0, {**WEIGHTS, "a": WEIGHTS["a"].T.contiguous().T, "_extra_state": None})
    for check in (opened.register, opened.check_weights):
        with pytest.raises(ValueError, match=r"model_id 0 .* belong to other weights"):
            check(0, other)
    assert digest(other) != digest(WEIGHTS)


def test_digest_takes_any_dtype() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.bool, torch.complex64, torch.uint8):
        a, b = torch.zeros(3, dtype=dtype), torch.zeros(3, dtype=dtype)
        b[1] = 1
        assert digest({"x": a}) != digest({"x": b})
    assert digest({"x": torch.zeros(0)}) != digest({"x": torch.zeros(0, 1)})


def test_the_digest_of_dense_tensors_is_what_folders_have() -> None:
    """Folders of earlier versions are opened again only if the digest of their weights is as it was."""
    expected = hashlib.sha256()
    for name, value in WEIGHTS.items():
        expected.update(f"{name} {value.dtype} {tuple(value.shape)}".encode() + value.numpy().tobytes())
    assert digest({**WEIGHTS, "a": WEIGHTS["a"].T.contiguous().T, "_extra_state": None}) == expected.hexdigest()


def quantised(values: Tensor, scale: float, zero_point: int = 0) -> Tensor:
    return torch.quantize_per_tensor(values, scale, zero_point, torch.qint8)


def channelwise(values: Tensor, scales: list[float]) -> Tensor:
    return torch.quantize_per_channel(values, torch.tensor(scales), torch.zeros(len(scales)), 0, torch.qint8)


DENSE = torch.tensor([[0.0, 2, 0, 1], [3, 0, 0, 0]])


def coo(rows: list[int], columns: list[int], values: list[float]) -> Tensor:
    places = torch.tensor([rows, columns])
    return torch.sparse_coo_tensor(places, torch.tensor(values), (2, 4), check_invariants=True)


def entries() -> list[tuple[Any, Any, list[Any]]]:
    """Entries of a state dict, another with the same content for each, and some with another content."""
    first = coo([0, 1], [3, 0], [1, 3])
    return [
        (
            first,
            coo([1, 0, 1], [0, 3, 0], [1, 1, 2]),
            [2 * first, first.T, first.double(), first.to_dense(), DENSE.to_sparse()],
        ),
        (
            DENSE.to_sparse_csr(),
            DENSE.to_sparse().to_sparse_csr(),
            [DENSE.to_sparse_csc(), DENSE.flip(0).to_sparse_csr()],
        ),
        (
            DENSE.to_sparse_csc(),
            DENSE.clone().to_sparse_csc(),
            [DENSE.flip(1).to_sparse_csc(), 2 * DENSE.to_sparse_csc()],
        ),
        (
            DENSE.to_sparse_bsr((1, 2)),
            DENSE.clone().to_sparse_bsr((1, 2)),
            [DENSE.to_sparse_bsr((2, 2)), DENSE.to_sparse_csr()],
        ),
        (DENSE.to_sparse_bsc((1, 2)), DENSE.clone().to_sparse_bsc((1, 2)), [DENSE.to_sparse_bsc((2, 2))]),
        (
            quantised(DENSE, 0.5),
            quantised(DENSE.clone(), 0.5),
            [quantised(DENSE, 0.25), quantised(DENSE, 0.5, 1), DENSE],
        ),
        (
            channelwise(DENSE, [0.5, 0.25]),
            channelwise(DENSE.clone(), [0.5, 0.25]),
            [channelwise(DENSE, [0.5, 0.5]), quantised(DENSE, 0.5)],
        ),
        (torch.tensor([1 - 2j]).conj(), torch.tensor([1 + 2j]), [torch.tensor([1 + 2j]).conj()]),
        (torch.tensor([1 - 2j]).conj().imag, torch.tensor([2.0]), [torch.tensor([-2.0])]),
        (torch.tensor(1.5), torch.tensor([1.5, 2.0])[0], [torch.tensor(2.5), torch.tensor([1.5])]),
        (torch.ones(0, 3), torch.zeros(0, 3), [torch.zeros(0), torch.zeros(0, 3, dtype=torch.int8)]),
        (torch.arange(6.0).view(2, 3).T, torch.tensor([[0.0, 3], [1, 4], [2, 5]]), [torch.arange(6.0).view(3, 2)]),
        (5, 5, [6, 5.0, "5", True, [5]]),
        (
            {"a": [1, DENSE]},
            {"a": (1, DENSE.clone())},
            [{"a": [1, 2 * DENSE]}, {"b": [1, DENSE]}, {"a": [DENSE, 1]}, {}],
        ),
        (np.arange(3), np.arange(3), [np.arange(3.0), np.arange(1, 4)]),
        (np.float64(2), np.float64(2), [np.float64(3), np.float32(2)]),
        ({"x", "yy", "z"}, {"z", "yy", "x"}, [{"x"}]),
        (io.BytesIO(b"abc"), io.BytesIO(b"abc"), [io.BytesIO(b"abd")]),
        (torch.float32, torch.float32, [torch.float64]),
        (Fraction(1, 3), Fraction(1, 3), [Fraction(2, 3)]),
    ]


@pytest.mark.filterwarnings("ignore:Sparse", "ignore:.*quant")
def test_the_digest_of_any_entry_is_that_of_its_content() -> None:
    for value, same, others in entries():
        found = digest({"x": value, "y": DENSE})
        assert digest({"x": same, "y": DENSE}) == found
        different = {digest({"x": other, "y": DENSE}) for other in [*others, None]}
        assert len(different) == len(others) + 1
        assert found not in different


def test_entries_without_content_are_named() -> None:
    with pytest.raises(ValueError, match=r"checkpoint\['w'\] must have numbers, not be on the device \"meta\""):
        digest({"w": torch.ones(3, device="meta")})
    with pytest.raises(TypeError, match=r"checkpoint\['f\[0\]'\] must be a tensor or .* pickle takes, not function"):
        digest({"f": [lambda: 0]})


def test_a_manifest_of_any_projector_can_be_written(tmp_path: Path) -> None:
    """A projector of one's own may have its settings from numpy, or none that JSON has."""

    class Kind(Enum):
        NORMAL = "normal"

    class Own:
        proj_type, seed, definition = Kind.NORMAL, np.int32(3), np.float32(1.5)

    class Odd:
        proj_type, seed, definition = np.str_("normal"), torch.tensor(4), object()

    model = nn.Linear(1, 1)
    parameters = dict(model.named_parameters())
    for place, (projector, expected) in enumerate([(Own(), ("normal", 3, 1.5)), (Odd(), ("normal", 4, "object"))]):
        manifest = manifest_of(projector, 8, "task", model, parameters, 5)
        assert (manifest["proj_type"], manifest["seed"], manifest["matrix_definition"]) == expected
        for _ in range(2):
            Store(tmp_path / str(place), manifest, N, K)


def test_forgetting_a_checkpoint_removes_it_and_no_other(opened: Store) -> None:
    opened.register(1, WEIGHTS)
    opened.save_gram(0, np.eye(2))
    opened.targets(0, "test", 4)
    opened.forget(0)
    opened.forget(7)
    assert opened.model_ids() == [1]
    assert not any("checkpoint_0" in name for name in tree(opened.path))
    opened.register(0, {"a": torch.zeros(1)})
    assert not opened.is_finalized(0)


def test_targets_are_kept_by_experiment(opened: Store) -> None:
    opened.targets(0, "a b-1.x", 4).write(np.array([3]), features=np.ones((1, K)))
    assert opened.targets(0, "a b-1.x").done.tolist() == [False, False, False, True]
    assert opened.targets(0, "other", 2).done.tolist() == [False, False]
    with pytest.raises(ValueError, match=r"'a b-1\.x' has 4 targets for model_id 0, not 5"):
        opened.targets(0, "a b-1.x", 5)
    with pytest.raises(ValueError, match="'third' has no targets for model_id 0"):
        opened.targets(0, "third")
    for name in ("", ".", "..", "../up", "a/b", "a\\b", ".hidden", "a\0"):
        with pytest.raises(ValueError, match="exp_name must be a file name"):
            opened.targets(0, name, 4)
    for other in (5, None, b"test"):
        with pytest.raises(TypeError, match=rf"exp_name must be a string, not {type(other).__name__}"):
            opened.targets(0, other, 4)  # type: ignore[arg-type]


def test_a_manifest_says_what_features_depend_on() -> None:
    class Enumerated:
        value = "normal"

    class Foreign:
        proj_type, seed = Enumerated(), np.int64(5)

    class Numbered:
        proj_type, seed, definition = "rademacher", 7, 1

    parameters = {"w": torch.zeros(2, 3, dtype=torch.bfloat16), "b": torch.zeros(())}
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    manifest = manifest_of(Foreign(), 8, Enumerated(), model, parameters, 100)
    assert manifest == {
        "matrix_definition": manifest["matrix_definition"],
        "proj_type": "normal",
        "nonzeros": None,
        "seed": 5,
        "proj_dim": 8,
        "grad_dim": 7,
        "train_set_size": 100,
        "task": manifest["task"],
        "task_settings": ["task.value = 'normal'"],
        "task_code": manifest["task_code"],
        "dtype": "float32",
        "modules": ["Sequential", "0 Linear", "1 ReLU"],
        "parameters": ["w torch.bfloat16 (2, 3)", "b torch.float32 ()"],
    }
    assert manifest["matrix_definition"].endswith("Foreign")
    assert manifest["task"].endswith("Enumerated")
    assert json.loads(json.dumps(manifest)) == manifest
    assert manifest_of(Numbered(), 8, Enumerated(), model, parameters, 100)["matrix_definition"] == 1
    assert manifest_of(Numbered(), 8, Enumerated(), model, parameters, 100, store_dtype="int8")["dtype"] == "int8"


def ended_process() -> int:
    """Returns the number of a process that has ended."""
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return child


def test_temporaries_of_ended_processes_are_removed_and_no_others(tmp_path: Path) -> None:
    target = tmp_path / "a[1].npy"
    mine = files.temporary_name(target)
    assert mine != files.temporary_name(target)
    place, process, number = mine.name.removeprefix(".a[1].npy.").split("-")
    assert int(process) == os.getpid()
    ended = ended_process()
    left = [
        tmp_path / f".a[1].npy.{place}-{ended}-{number}",
        tmp_path / f".a[1].npy.{'0' * 8}-1-{number}",  # of another machine, old
        tmp_path / f".a[1].npy.{place}-{ended}-{'0' * 12}",  # a folder
    ]
    others = [
        mine,
        tmp_path / f".a[1].npy.{'0' * 8}-2-{number}",  # of another machine, new
        tmp_path / f".a[1].npy.more.{place}-{ended}-{number}",
        tmp_path / f".a1.npy.{place}-{ended}-{number}",
        tmp_path / f"a[1].npy.{place}-{ended}-{number}",
        tmp_path / ".a[1].npy.notes",
    ]
    for path in (*left[:2], *others):
        path.touch()
    left[2].mkdir()
    (left[2] / "x.npy").touch()
    day_before = time.time() - files.LEFTOVER_SECONDS - 60
    os.utime(left[1], (day_before, day_before))
    with atomic_file(target) as temporary:
        temporary.touch()
    assert set(tmp_path.iterdir()) == {target, *others}


def test_runs_that_are_killed_again_and_again_leave_one_temporary_at_most(opened: Store) -> None:
    """Each is killed while it makes or deletes a checkpoint, and an experiment."""
    opened.targets(0, "test", 4)
    opened.register(2, WEIGHTS)
    for _ in range(3):
        for step in ("register", "forget", "delete", "gram"):
            child = os.fork()
            if child == 0:
                os.rename = store.shutil.rmtree = lambda *args, **kwargs: os._exit(1)  # type: ignore[assignment]
                os.replace = os.rename
                match step:
                    case "register":
                        opened.register(1, WEIGHTS)
                    case "forget":
                        opened.forget(2)
                    case "delete":
                        opened.delete_experiment("test")
                    case "gram":
                        opened.save_gram(0, np.eye(2))
                os._exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    hidden = [path.name for path in opened.path.rglob(".*")]
    assert len(hidden) <= 4, hidden
    opened.register(1, WEIGHTS)
    opened.forget(2)
    opened.save_gram(0, np.eye(2))
    opened.delete_experiment("test")
    assert not list(opened.path.rglob(".*"))


def test_other_folders_are_not_taken_for_checkpoints(opened: Store) -> None:
    (opened.path / "checkpoint_best").mkdir()
    opened.register(10, WEIGHTS)
    opened.register(9, WEIGHTS)
    assert opened.model_ids() == [0, 9, 10]
