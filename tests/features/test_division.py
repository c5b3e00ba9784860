"""Divisions of models, with a group of one process: their columns, and what is refused."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from sharded_models import SEED, TASK, K, build, samples
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import trak_fast
from trak_fast.checkpoints import load_checkpoint
from trak_fast.features import tensor_parallel
from trak_fast.features.streaming import GradientProjector


@pytest.fixture
def group() -> Iterator[None]:
    """Makes a group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def split(model: nn.Module, mesh: dist.DeviceMesh) -> nn.Module:
    """Splits the last block's first and last linear layers."""
    plan = {"blocks.1.up": ColwiseParallel(), "blocks.1.down": RowwiseParallel()}
    return parallelize_module(model, mesh, plan)


@pytest.mark.parametrize("long_row", [1, 4096])
@pytest.mark.parametrize(("height", "width", "pitch"), [(5, 3, 11), (4, 6, 6), (1, 4, 9), (7, 5, 8)])
def test_rows_with_gaps_are_projected_as_the_whole_matrix_with_zeros(
    monkeypatch: pytest.MonkeyPatch, long_row: int, height: int, width: int, pitch: int
) -> None:
    monkeypatch.setitem(tensor_parallel.LONG_ROW, "cpu", long_row)
    rows = torch.randn(2, height, width)
    whole = torch.zeros(2, height, pitch)
    whole[:, :, 2 : 2 + width] = rows if pitch > width else 0
    first = 2 if pitch > width else 0
    if pitch == width:
        whole = rows
    total = torch.zeros(2, 16)
    for block, column in tensor_parallel.spread(rows, first, pitch):
        trak_fast.project([block], 16, seed=SEED, offset=column, out=total)
    torch.testing.assert_close(total, trak_fast.project([whole], 16, seed=SEED), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("group")
class TestRefusals:
    """Errors for what would otherwise wait without end, or give wrong numbers."""

    def test_a_mesh_of_two_dimensions_is_refused(self) -> None:
        model = build("untied")
        mesh = init_device_mesh("cpu", (1, 1))
        weight = nn.Parameter(dist.tensor.distribute_tensor(model.head.weight.detach(), mesh))
        model.head.weight = weight
        with pytest.raises(ValueError, match=r"split over a mesh of one dimension, not 2 as head\.weight is"):
            GradientProjector(model, TASK, K)

    def test_meshes_that_differ_are_refused(self) -> None:
        model = build("untied")
        for mesh, layer in ((init_device_mesh("cpu", (1,)), model.head), (init_device_mesh("cpu", (1, 1)), model.norm)):
            layer.weight = nn.Parameter(dist.tensor.distribute_tensor(layer.weight.detach(), mesh))
        with pytest.raises(ValueError, match="model must be sharded over one mesh of processes, not 2"):
            GradientProjector(model, TASK, K)

    def test_both_divisions_at_once_are_refused(self) -> None:
        mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("data", "model"))
        model = split(build("untied"), mesh["model"])
        for part in (*model.blocks, model):
            fully_shard(part, mesh=mesh["data"])
        with pytest.raises(ValueError, match=r"by FSDP2 or by tensor parallelism, not by both|one mesh of processes"):
            GradientProjector(model, TASK, K).project(samples(2))

    def test_a_driver_refuses_what_it_does_not_share_among_processes(self, tmp_path: Path) -> None:
        mesh = init_device_mesh("cpu", (1,))
        with pytest.raises(ValueError, match="not split by tensor parallelism"):
            trak_fast.TRAKer(split(build("untied"), mesh), TASK, 3, tmp_path / "split", proj_dim=K)
        model = build("untied")
        fully_shard(model, mesh=mesh)
        for options in ({"gradient_computer": trak_fast.HookGradientComputer}, {"proj_dim": 0}):
            with pytest.raises(ValueError, match="a sharded model must have its gradients projected layer by layer"):
                trak_fast.TRAKer(model, TASK, 3, tmp_path / "sharded", **{"proj_dim": K, **options})

    def test_memory_that_runs_out_is_an_error_that_says_what_to_do(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = build("untied")
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        projector = GradientProjector(model, TASK, K, seed=SEED)

        def fail(*arguments: object) -> None:
            raise MemoryError

        monkeypatch.setattr(projector, "_outputs", fail)
        with pytest.raises(RuntimeError, match=r"memory ran out in a pass over 2 samples.*give smaller batches"):
            projector.project(samples(2))


@pytest.mark.usefixtures("group")
def test_whole_checkpoints_are_cut_into_shards_and_tied_weights_found() -> None:
    model = build("tied")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    del state["head.weight"]
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    load_checkpoint(model, state)
    for name, value in model.state_dict().items():
        assert torch.equal(value.full_tensor(), state.get(name, state["embedding.weight"]))


@pytest.mark.usefixtures("group")
def test_parts_of_uneven_sizes_are_where_chunks_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven rows among four processes: two, two, two and one; the columns of all are those of the whole, once each."""
    for shape, dim in (((7, 3), 0), ((3, 7), 1), ((7,), 0), ((5, 7, 2), 1), ((2, 3), 0)):
        columns = []
        for rank in range(4):
            parameter = _Parameter(torch.Size(shape), dim, rank)
            part = tensor_parallel.part_of(parameter, "weight")
            assert part is not None
            whole = torch.arange(int(torch.tensor(shape).prod())).view(shape)
            chunks = whole.chunk(4, dim)
            own = chunks[rank].flatten().tolist() if rank < len(chunks) else []
            places = [
                part.first + row * part.pitch + column for row in range(part.height) for column in range(part.width)
            ]
            assert places == own
            columns += places
        assert sorted(columns) == whole.flatten().tolist()


class _Parameter:
    """The shape and placement of a tensor that is split among four processes, of which this is one."""

    def __init__(self, shape: torch.Size, dim: int, rank: int) -> None:
        self.shape = shape
        self.placements = [dist.tensor.Shard(dim)]
        self.device_mesh = self
        self._rank = rank

    def size(self) -> int:
        return 4

    def get_local_rank(self) -> int:
        return self._rank
