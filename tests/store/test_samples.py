"""Digests of samples."""

import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from trak_fast.store.samples import StoredSamples, digest_samples
from trak_fast.tasks import CausalLM, CausalLMPerToken, MaskedLM, Seq2SeqLM, TextClassification


def digests(*batch: Tensor) -> list[int]:
    return digest_samples(batch, np.arange(len(batch[0]))).tolist()


def test_a_digest_is_the_crc_of_dtypes_and_bytes_without_zeros_at_the_end() -> None:
    x, y = torch.tensor([[1.5, 0.0, 2.0, 0.0]]), torch.tensor([7])
    content = x.numpy().tobytes().rstrip(b"\0")
    expected = zlib.crc32(content, zlib.crc32(b"torch.float32"))
    expected = zlib.crc32(y.numpy().tobytes().rstrip(b"\0"), zlib.crc32(b"torch.int64", expected))
    assert digests(x, y) == [expected]


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.bool, torch.complex64]
)
def test_samples_that_differ_in_one_number_have_other_digests(dtype: torch.dtype) -> None:
    x = torch.ones(6, 2, 3).to(dtype)
    for i in range(6):
        x[i].view(-1)[i] = 0
    assert len(set(digests(x))) == 6
    assert digests(x.flip(0)) == digests(x)[::-1]
    strided = torch.stack([x, x], dim=-1)[..., 0]
    assert not strided.is_contiguous()
    assert digests(strided) == digests(x)
    assert digest_samples([x], np.array([4, 1])).tolist() == [digests(x)[4], digests(x)[1]]


def test_the_place_of_a_number_and_its_dtype_count() -> None:
    x = torch.tensor([[1, 0], [0, 1]])
    assert digests(x)[0] != digests(x)[1]
    assert digests(x, x) != digests(x)
    assert digests(torch.ones(1)) != digests(torch.ones(1).view(torch.int32))


@pytest.mark.parametrize(("task", "fields"), [(CausalLM(), "im"), (MaskedLM(), "iml"), (TextClassification(), "itmc")])
def test_padding_has_no_part_in_a_text(task: MaskedLM, fields: str) -> None:
    def batch(length: int, filling: int) -> list[Tensor]:
        mask = (torch.arange(length) < torch.tensor([[3], [5]])).long()
        given = {"i": torch.where(mask > 0, torch.arange(length) + 4, filling), "m": mask}
        given |= {"l": torch.where(mask > 0, torch.arange(length) + 1, -100), "t": torch.zeros(2, length).long()}
        given["c"] = torch.arange(2)
        return [given[field] for field in fields]

    short, long = (digests(*task.clear_padding(batch(length, filling))) for length, filling in ((5, 1), (9, 2)))
    assert short == long
    assert short[0] != short[1]
    moved = batch(7, 3)
    for x in moved:  # padding on the left
        x[0] = x[0].roll(4)
        x[1] = x[1].roll(2)
    assert digests(*task.clear_padding(moved)) == short


def test_padding_has_no_part_in_the_place_of_a_token() -> None:
    ids, mask, position = torch.arange(1, 5).view(1, 4), torch.ones(1, 4, dtype=torch.long), torch.tensor([2])
    task = CausalLMPerToken()
    alone = digests(*task.clear_padding([ids, mask, position]))
    moved = [nn.functional.pad(ids, (3, 1), value=7), nn.functional.pad(mask, (3, 1)), position + 3]
    assert digests(*task.clear_padding(moved)) == alone
    assert digests(*task.clear_padding([ids, mask, position + 1])) != alone


def test_padding_has_no_part_in_an_output() -> None:
    ids, labels = torch.arange(1, 5).view(1, 4), torch.tensor([[3, -100, 0]])
    mask = torch.ones_like(ids)
    task = Seq2SeqLM()
    alone = digests(*task.clear_padding([ids, mask, labels]))
    for sides in ((0, 2), (2, 0), (1, 3)):
        padded = nn.functional.pad(labels, sides, value=-100)
        assert digests(*task.clear_padding([ids, mask, padded])) == alone
    assert digests(*task.clear_padding([ids, mask, labels[:, :2]])) != alone  # without the token 0
    assert digests(*task.clear_padding([ids, mask, labels[:, 1:]])) != alone


def test_stored_samples_come_back(tmp_path: Path) -> None:
    path = tmp_path / "samples.safetensors"
    assert StoredSamples.load(path) is None
    ids = torch.arange(3)
    batch = [
        torch.randn(3, 2).bfloat16(),
        ids,
        ids,  # labels often are the very tensor of the inputs
        torch.randn(2, 3).T,
        torch.randn(3, 2, dtype=torch.complex128).conj(),
        torch.tensor([[0.0, 2.0], [0.0, 0.0], [1.0, 0.0]]).to_sparse(),
        torch.zeros(3, 0),
    ]
    StoredSamples(batch=batch, outputs=torch.ones(3).double(), weightings=torch.zeros(3).double()).save(path)
    back = StoredSamples.load(path)
    assert back is not None
    assert len(back.batch) == len(batch)
    for found, expected in zip(back.batch, batch, strict=True):
        assert (found.dtype, found.layout, found.shape) == (expected.dtype, expected.layout, expected.shape)
        assert torch.equal(found.to_dense(), expected.to_dense())
    assert torch.equal(back.outputs, torch.ones(3).double())
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"cannot read .*samples\.safetensors, it is truncated or corrupt"):
        StoredSamples.load(path)


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_samples_that_the_format_lacks_are_refused_and_leave_no_file(tmp_path: Path) -> None:
    rows = torch.eye(2).to_sparse_csr()
    with pytest.raises(ValueError, match=r"."):
        StoredSamples([rows], torch.ones(2), torch.ones(2)).save(tmp_path / "samples.safetensors")
    assert not list(tmp_path.iterdir())
