"""Models whose weights are sharded over processes that each have their own samples (FSDP2, `fully_shard`).

A process gathers the weights of a few layers at a time, in the forward and again in the backward pass, and all
processes take part in each gathering. So all must make the same passes in the same order, whatever samples they have,
however many, and whatever comes of their checks. They agree before each pass which one it is: a process that has
another one to make, or none, makes the same one on a sample of which it drops the result. Gradients are never reduced:
weights require none but where a sample is differentiated alone, and then they are taken as soon as they are whole.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")
Kind = Hashable
"""A kind of pass: two passes of a kind gather the same weights in the same order."""


_CALL_ENDED: Kind = ("call ended",)
_AT_MEETING: Kind = ("at meeting",)


def shards_of(model: nn.Module) -> list[nn.Module]:
    """Lists the modules whose weights are gathered together (FSDP2)."""
    try:
        from torch.distributed.fsdp import FSDPModule
    except ImportError:  # torch built without torch.distributed
        return []
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def mesh_of(parameters: Mapping[str, Tensor]) -> Any:
    """Returns the mesh of processes that parameters (DTensors) are spread over.

    Raises:
        ValueError: There are several.
    """
    meshes: dict[Any, str] = {}
    for name, parameter in parameters.items():
        if (mesh := getattr(parameter, "device_mesh", None)) is not None:
            meshes.setdefault(mesh, name)
    if len(meshes) > 1:
        raise ValueError(
            f"model must be sharded over one mesh of processes, not {len(meshes)} ({', '.join(meshes.values())} are on "
            "different ones); shard all of it by the same mesh"
        )
    return next(iter(meshes), None)


def gather_objects(mesh: Any, value: T) -> list[T]:
    """Collects a value of each process of a mesh, in the same order in all of them."""
    values = [value]
    for dim in reversed(range(mesh.ndim)):
        group = mesh.get_group(dim)
        parts: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(parts, values, group=group)
        values = [item for part in parts for item in part]
    return values


class WholeEntries(Mapping[str, Any]):
    """A state dict whose sharded tensors are gathered as they are read, one at a time, in all processes alike."""

    def __init__(self, state: Mapping[str, Any]) -> None:
        self._state = state

    def __getitem__(self, name: str) -> Any:
        value = self._state[name]
        return value.full_tensor() if hasattr(value, "full_tensor") else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


class Lockstep:
    """The passes of processes over a sharded model, which all of them make together.

    Attributes:
        shards: The modules whose weights are gathered together.
        dtypes: The dtypes that weights were gathered in, which mixed precision makes others than those of the shards.
    """

    def __init__(
        self, model: nn.Module, parameters: Mapping[str, Tensor], imitate: Callable[[Kind, Sequence[Tensor]], None]
    ) -> None:
        """Takes the model.

        Args:
            model: The model, with shards.
            parameters: Its parameters.
            imitate: Makes a pass of a kind on one sample, a batch of one, and drops its result.

        Raises:
            ValueError: The model is sharded over several meshes.
        """
        self.shards = shards_of(model)
        self.dtypes: set[torch.dtype] = set()
        self._modules = dict(model.named_modules())
        self._mesh = mesh_of(parameters)
        self._imitate = imitate
        self._sample: list[Tensor] | None = None  # the first one seen, to imitate the passes of others with

    @contextmanager
    def turn(self, kind: Kind, batch: Sequence[Tensor]) -> Iterator[None]:
        """Waits until it is this process's turn to make a pass of a kind in the block, together with all others.

        Args:
            kind: The kind.
            batch: The samples, (B, ...) each.
        """
        self._sample = self._sample or [x[:1].clone() for x in batch]
        while (leader := self._leader(kind)) != kind:
            self._follow(leader)
        try:
            yield
        finally:
            self.reshard()

    def finish_call(self) -> None:
        """Makes the passes that other processes have to make in their calls, until all have ended theirs."""
        while (leader := self._leader(_CALL_ENDED)) not in (_CALL_ENDED, _AT_MEETING):
            self._follow(leader)

    def finish(self) -> None:
        """Makes the passes that other processes still have to make, in any number of calls, until all are here."""
        while (leader := self._leader(_AT_MEETING)) != _AT_MEETING:
            if leader != _CALL_ENDED:
                self._follow(leader)

    def _leader(self, kind: Kind) -> Kind:
        """Agrees on the kind of the next pass: that of the first process that has one to make.

        Where none has, it is the end of calls, unless all processes have come to a meeting.
        """
        announced = gather_objects(self._mesh, (kind, self._sample is None))
        kinds = [other for other, _ in announced]
        passes = [other for other in kinds if other not in (_CALL_ENDED, _AT_MEETING)]
        if not passes:
            return _CALL_ENDED if _CALL_ENDED in kinds else _AT_MEETING
        if any(lacks for _, lacks in announced):
            self._share_sample()
        return passes[0]

    def _share_sample(self) -> None:
        """Has processes that have seen no sample yet take that of another one."""
        mine = None if self._sample is None else [x.cpu() for x in self._sample]
        given = next((sample for sample in gather_objects(self._mesh, mine) if sample is not None), None)
        self._sample = self._sample or given

    def _follow(self, leader: Kind) -> None:
        assert self._sample is not None
        try:
            self._imitate(leader, self._sample)
        finally:
            self.reshard()

    def reshard(self) -> None:
        """Frees gathered weights, so that the model's parameters are the shards again."""
        for shard in self.shards:
            shard.reshard()  # type: ignore[operator]

    @contextmanager
    def gathered(self, parameters: Mapping[str, Tensor], found: Callable[[str, Tensor], None]) -> Iterator[None]:
        """Shows the whole tensor that stands for each of some parameters, each time that a pass has gathered it.

        Args:
            parameters: Parameters of the model, by name: shards.
            found: Takes a name and its tensor, which is the same object each time and has the gradient of this process
                alone.

        Raises:
            ValueError: A gathered tensor is a shard again, by tensor parallelism (in the pass).
        """

        def look(*arguments: object) -> None:
            for name, parameter in parameters.items():
                path, _, own = name.rpartition(".")
                tensor = getattr(self._modules[path], own)
                if tensor is parameter:
                    continue
                if hasattr(tensor, "placements"):
                    raise ValueError(
                        f"model must be sharded by FSDP2 or by tensor parallelism, not by both, as {name} is; leave "
                        "one of them out"
                    )
                self.dtypes.add(tensor.dtype)
                found(name, tensor)

        handles = [shard.register_forward_pre_hook(look) for shard in self.shards]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
