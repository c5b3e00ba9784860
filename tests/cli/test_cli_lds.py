"""The command `trak-fast lds`, against a plain loop over queries with SciPy's rank correlation."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr

from trak_fast import metrics
from trak_fast.cli import main

N, M, S = 9, 4, 12

Arrays = dict[str, NDArray]


@pytest.fixture
def arrays(rng: np.random.Generator) -> Arrays:
    """Scores, masks of six samples each, and losses that follow the scores with noise."""
    scores = rng.standard_normal((N, M)).astype(np.float32)
    masks = rng.permuted(np.tile(np.arange(N) < 6, (S, 1)), axis=1)
    return {"scores": scores, "masks": masks, "losses": 2 * rng.standard_normal((S, M)) - masks @ scores}


def command(folder: Path, arrays: Arrays) -> list[str]:
    """Writes arrays to files, and returns the command that reads them."""
    words = ["lds"]
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
        words += [f"--{name}", str(folder / f"{name}.npy")]
    return words


def by_hand(scores: NDArray, masks: NDArray, losses: NDArray) -> list[float]:
    """Computes each query's rank correlation of the summed scores with minus the losses."""
    correlations = []
    for query in range(scores.shape[1]):
        sums = [sum(float(score) for score in scores[mask, query]) for mask in masks]
        correlations.append(float(spearmanr(sums, [-loss for loss in losses[:, query]]).statistic))
    return correlations


def result(folder: Path, arrays: Arrays, capsys: pytest.CaptureFixture[str]) -> dict:
    """Runs the command and reads its JSON."""
    assert main([*command(folder, arrays), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def message(words: list[str], capsys: pytest.CaptureFixture[str], status: int = 2) -> str:
    """Runs a command that fails, and returns its one sentence."""
    assert main(words) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    return err.removeprefix("trak-fast: error: ").strip()


def test_the_correlations_are_those_of_a_plain_loop(
    tmp_path: Path, arrays: Arrays, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = by_hand(**arrays)
    found = result(tmp_path, arrays, capsys)
    np.testing.assert_allclose(found["per_query"], expected, rtol=1e-12)
    assert found["lds"] == pytest.approx(np.mean(expected), rel=1e-12)
    assert (found["queries"], found["left_out"], found["models"]) == (M, 0, S)
    low, high, *chance = metrics.lds_interval(arrays["scores"], arrays["masks"], -arrays["losses"])
    np.testing.assert_allclose([*found["interval_95"], *found["chance_95"]], [low, high, *chance], rtol=1e-12)


def test_the_result_is_one_line(tmp_path: Path, arrays: Arrays, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(tmp_path, arrays)) == 0
    mean = np.mean(by_hand(**arrays))
    low, high, *_ = metrics.lds_interval(arrays["scores"], arrays["masks"], -arrays["losses"])
    numbers = f"LDS {mean:.3f}, 95% interval {low:.3f} to {high:.3f} ".replace("-", "−")
    assert capsys.readouterr().out == (
        f"{numbers}(mean over {M} queries of the rank correlation with {S} retrained models)\n"
    )


@pytest.mark.parametrize(("name", "sign"), [("losses", 1), ("outputs", -1)])
def test_samples_that_lower_the_loss_help(
    tmp_path: Path, name: str, sign: int, rng: np.random.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    """If each sample lowers the loss by what it scores, the correlation with losses is exactly 1, with outputs −1."""
    scores = rng.standard_normal((N, M))
    masks = rng.random((S, N)) < 0.5
    truth = 7 - masks.astype(float) @ scores
    found = result(tmp_path, {"scores": scores, "masks": masks, name: truth}, capsys)
    np.testing.assert_allclose(found["per_query"], [sign] * M, rtol=1e-12)
    assert main(command(tmp_path, {"scores": scores, "masks": masks, name: truth})) == 0
    assert capsys.readouterr().out.startswith("LDS 1.000" if sign == 1 else "LDS −1.000, 95% interval −1.000 to −1.000")


def test_every_form_of_the_files_gives_the_same_result(
    tmp_path: Path, arrays: Arrays, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = result(tmp_path, arrays, capsys)
    numbers = np.nonzero(arrays["masks"])[1].reshape(S, -1)
    for masks in (arrays["masks"].astype(np.uint8), arrays["masks"].astype(np.float32), numbers, numbers[:, ::-1]):
        assert result(tmp_path, {**arrays, "masks": masks}, capsys) == expected
    assert result(tmp_path, {**arrays, "scores": np.asfortranarray(arrays["scores"])}, capsys) == expected
    words = ["lds", "--json"]
    for name, ending in (("scores", "pt"), ("masks", "pth"), ("losses", "PT")):
        torch.save(torch.from_numpy(arrays[name]), tmp_path / f"{name}.{ending}")
        words += [f"--{name}", str(tmp_path / f"{name}.{ending}")]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out) == expected


def test_scores_of_bfloat16_are_read(tmp_path: Path, arrays: Arrays, capsys: pytest.CaptureFixture[str]) -> None:
    rounded = torch.from_numpy(arrays["scores"]).bfloat16().requires_grad_()
    expected = result(tmp_path, {**arrays, "scores": rounded.detach().float().numpy()}, capsys)
    torch.save(rounded, tmp_path / "scores.pt")
    words = [*command(tmp_path, arrays), "--json"]
    words[2] = str(tmp_path / "scores.pt")
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out) == expected


def test_scores_are_read_in_blocks(
    tmp_path: Path, arrays: Arrays, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = result(tmp_path, arrays, capsys)
    monkeypatch.setattr("trak_fast.cli.lds.BLOCK_BYTES", 8 * (M + S) * 4)
    assert result(tmp_path, arrays, capsys)["per_query"] == expected["per_query"]
    arrays["scores"][6, 1] = np.inf
    assert message(command(tmp_path, arrays), capsys).startswith(
        "--scores must be finite, not inf in row 6, column 1 (from 0)"
    )


def test_queries_that_say_nothing_are_left_out_and_counted(
    tmp_path: Path, arrays: Arrays, capsys: pytest.CaptureFixture[str]
) -> None:
    """Equal scores, whose sums differ by rounding only, and equal losses."""
    whole = by_hand(**arrays)
    arrays["scores"] = arrays["scores"].astype(np.float64)
    arrays["scores"][:, 1] = 0.1
    arrays["losses"][:, 2] = 5
    found = result(tmp_path, arrays, capsys)
    assert [value is None for value in found["per_query"]] == [False, True, True, False]
    assert found["lds"] == pytest.approx((whole[0] + whole[3]) / 2, rel=1e-12)
    assert (found["queries"], found["left_out"]) == (2, 2)
    assert main(command(tmp_path, arrays)) == 0
    assert capsys.readouterr().out.endswith(
        f"(mean over 2 queries of the rank correlation with {S} retrained models; 2 left out, whose predictions or "
        "losses are all equal)\n"
    )
    arrays["losses"][:] = 5
    assert "must have a query with predictions and losses that differ" in message(command(tmp_path, arrays), capsys)


@pytest.mark.parametrize("turned", [["losses"], ["masks"], ["scores"], ["losses", "masks"], ["masks", "scores"]])
def test_transposed_arrays_are_named(
    tmp_path: Path, arrays: Arrays, turned: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for name in turned:
        arrays[name] = arrays[name].T
    shapes = [str(arrays[name].shape) for name in arrays]
    assert message(command(tmp_path, arrays), capsys) == (
        "--scores, --masks and --losses must have the shapes (n, m), (S, n) and (S, m), "
        f"not {shapes[0]}, {shapes[1]} and {shapes[2]}; transpose " + " and ".join(f"--{name}" for name in turned)
    )


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("scores", lambda x: x[:-1], "rows of --scores and columns of --masks, the training samples: 8 and 9"),
        ("scores", lambda x: x[:, :3], "columns of --scores and of --losses, the queries: 3 and 4"),
        ("losses", lambda x: x[:7], "rows of --masks and of --losses, the subsets: 12 and 7"),
        ("scores", lambda x: x[:, 0], r"--scores must have 2 dimensions, not shape \(9,\); reshape\(-1, 1\)"),
        ("losses", lambda x: x[None], r"--losses must have 2 dimensions, not shape \(1, 12, 4\)$"),
        ("masks", lambda x: x[0], r"--masks must have 2 dimensions, not shape \(9,\)"),
        ("scores", lambda x: x + 1j, "--scores must hold real numbers, not complex"),
        ("losses", lambda x: x > 0, "--losses must hold real numbers, not bool"),
        ("losses", lambda x: np.where(x == x[5, 2], np.nan, x), "--losses must be finite, not nan in row 5, column 2 "),
        ("masks", lambda x: x.astype(str), "--masks must hold bool, 0 and 1, or integers, not <U5"),
        ("masks", lambda x: x * 2, r"--masks must hold 0 and 1 where it is int64 \(12, 9\), not 2; 1 marks"),
        ("masks", lambda x: x * 0.5, r"--masks must hold 0 and 1 where it is float64 \(12, 9\), not 0.5; 1 marks"),
        ("masks", lambda x: np.full((S, 3), [0, 4, 9]), r"numbers of training samples in \[0, 8\].*not 9"),
        ("masks", lambda x: np.full((S, 3), [0, 4, -1]), r"numbers of training samples in \[0, 8\].*not -1"),
        ("masks", lambda x: np.full((S, 3), [0, 4, 4]), "each training sample's number once in a row.*in row 0"),
        ("masks", lambda x: np.full((3, S), 5), r"for each of 12 subsets, not shape \(3, 12\); transpose it"),
        ("masks", lambda x: np.full((5, 3), 5), r"for each of 12 subsets, not shape \(5, 3\)$"),
        ("masks", lambda x: x[:, :2].astype(int), "the training samples: 9 and 2"),
        ("masks", lambda x: np.ones_like(x), "must have a query with predictions and losses that differ"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(
    tmp_path: Path, arrays: Arrays, name: str, change: object, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert callable(change)
    assert re.search(expected, message(command(tmp_path, {**arrays, name: change(arrays[name])}), capsys))


def test_too_little_is_refused(tmp_path: Path, arrays: Arrays, capsys: pytest.CaptureFixture[str]) -> None:
    few = {**arrays, "masks": arrays["masks"][:1], "losses": arrays["losses"][:1]}
    assert message(command(tmp_path, few), capsys) == "--masks must have at least 2 subsets, not 1"
    none = {**arrays, "scores": arrays["scores"][:, :0], "losses": arrays["losses"][:, :0]}
    assert "at least 1 training sample and 1 query" in message(command(tmp_path, none), capsys)


@pytest.mark.parametrize("given", [[], ["losses", "outputs"]])
def test_losses_or_outputs_must_be_given(
    tmp_path: Path, arrays: Arrays, given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    losses = arrays.pop("losses")
    with pytest.raises(SystemExit) as exit_:
        main(command(tmp_path, {**arrays, **dict.fromkeys(given, losses)}))
    assert exit_.value.code == 2
    assert "--losses" in capsys.readouterr().err


class Harmful:
    """An object whose unpickling would run code."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('it ran')",)


@pytest.mark.parametrize(
    ("file", "content", "status", "expected"),
    [
        ("a.npy", None, 1, "cannot read --scores: .*No such file"),
        ("folder.npy/a.npy", None, 1, "cannot read --scores: .*No such file"),
        ("a.npy", b"", 1, "cannot read --scores: .*a.npy is truncated or no .npy file"),
        ("a.pt", b"", 1, "cannot read --scores: .*a.pt is truncated or no .pt file"),
        ("a.npy", b"text", 1, "cannot read --scores: .*a.npy is truncated"),
        ("a.pt", b"text", 1, "cannot read --scores: .*a.pt is truncated"),
        ("a.csv", b"target,train_index,score", 2, r"--scores must be a file of np.save \(.npy\) .* not '.*a.csv'"),
        ("a", b"", 2, r"--scores must be a file of np.save"),
    ],
)
def test_files_that_cannot_be_read(
    tmp_path: Path,
    arrays: Arrays,
    file: str,
    content: bytes | None,
    status: int,
    expected: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = command(tmp_path, arrays)
    words[2] = str(tmp_path / file)
    if content is not None:
        (tmp_path / file).write_bytes(content)
    assert re.match(expected, message(words, capsys, status))


def test_files_of_other_content(tmp_path: Path, arrays: Arrays, capsys: pytest.CaptureFixture[str]) -> None:
    """A truncated array, several arrays, no tensor, a sparse one, and objects, which are not unpickled."""
    words = command(tmp_path, arrays)
    numpy_file, torch_file = tmp_path / "scores.npy", tmp_path / "scores.pt"
    numpy_file.write_bytes(numpy_file.read_bytes()[:-1])
    assert "is truncated" in message(words, capsys, 1)
    with numpy_file.open("wb") as file:
        np.savez(file, a=arrays["scores"], b=arrays["scores"])
    assert message(words, capsys) == "--scores must hold one array, not those of np.savez; np.save writes one"
    np.save(numpy_file, np.array([[Harmful()]]), allow_pickle=True)
    assert "no .npy file of plain numbers" in message(words, capsys, 1)
    words[2] = str(torch_file)
    torch.save({"scores": torch.ones(N, M)}, torch_file)
    assert message(words, capsys) == "--scores must hold one tensor, not dict; torch.save(tensor, path) writes one"
    torch.save(torch.ones(N, M).to_sparse(), torch_file)
    assert "must hold a dense tensor, not torch.sparse_coo" in message(words, capsys)
    torch.save(Harmful(), torch_file)
    assert "no .pt file of plain numbers" in message(words, capsys, 1)
    torch.save(torch.ones(N, M), torch_file)
    torch_file.write_bytes(torch_file.read_bytes()[:-200])
    assert "is truncated" in message(words, capsys, 1)
