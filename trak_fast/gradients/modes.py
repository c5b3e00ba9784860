"""The modes that torch is put into while a model is differentiated."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from torch.utils import checkpoint
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

T = TypeVar("T")


def unfused_attention() -> AbstractContextManager[Any]:
    """Selects attention that vmap can batch: fused kernels would fall back to a loop over samples, with a warning."""
    return sdpa_kernel(SDPBackend.MATH)


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """Returns the dtype that the caller has torch compute in on "cpu" or "cuda" (torch.autocast); None: as given."""
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


@contextmanager
def no_fast_path() -> Iterator[None]:
    """Keeps transformer layers from their fused inference, which calls no submodules."""
    mha = torch.backends.mha
    before = mha.get_fastpath_enabled()
    mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        mha.set_fastpath_enabled(before)


class SharedMode:
    """A setting of the whole process, which the first of several threads to enter changes and the last restores."""

    def __init__(self, make: Callable[[], AbstractContextManager[Any]]) -> None:
        """Takes a function that makes the context manager of the setting."""
        self._make = make
        self._lock = threading.Lock()
        self._inside = 0
        self._mode: AbstractContextManager[Any] | None = None

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._mode = self._make()
                self._mode.__enter__()
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside and self._mode is not None:
                self._mode.__exit__(None, None, None)


_UNFUSED_ATTENTION = SharedMode(unfused_attention)
_NO_FAST_PATH = SharedMode(no_fast_path)
# cuDNN has gradients of recurrent layers in training mode only
_NO_CUDNN = SharedMode(lambda: torch.backends.cudnn.flags(enabled=False))


class _Thread(threading.local):
    """The state of a thread.

    Attributes:
        differentiates: True while the thread differentiates a model.
        checkpoints: True while it runs what torch checkpoints, without gradients.
    """

    differentiates = False
    checkpoints = False


_THREAD = _Thread()


class _CompleteCheckpoints:
    """Takes the place of torch's autograd function of reentrant activation checkpointing.

    That runs layers without gradients first, and again in the backward pass if a tensor that it was given itself
    requires gradients; otherwise gradients of their parameters are silently 0. And tensors that it returns in lists or
    dicts never have gradients. In threads that differentiate it is given one more tensor, and tensors in lists and
    dicts one by one.
    """

    def __init__(self, original: Any) -> None:
        """Takes torch's function."""
        self._original = original

    def apply(self, function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        """Computes `function(*args)`, as torch's does."""
        if not (_THREAD.differentiates and torch.is_grad_enabled()):
            return self._original.apply(function, preserve_rng_state, *args)
        tensors, given = tree_flatten(args, is_leaf=_is_no_container)
        first = [args]  # until the first run, so that autograd alone keeps the tensors afterwards
        structures = []

        def compute(extra: Tensor, *tensors: Any) -> tuple[Any, ...]:
            # lists that a model adds to are its own in the first run alone
            own = first.pop() if first else tree_unflatten(tensors, given)
            before = _THREAD.checkpoints
            _THREAD.checkpoints = not torch.is_grad_enabled()
            try:
                with _complete_checkpoints():  # autograd may run this in another thread
                    outputs, structure = tree_flatten(function(*own), is_leaf=_is_no_container)
            finally:
                _THREAD.checkpoints = before
            if not torch.is_grad_enabled():
                structures.append(structure)
                # what has a history keeps it
                outputs = [x.detach() if isinstance(x, Tensor) and x.requires_grad else x for x in outputs]
            return extra, *outputs  # the extra one, as torch refuses a part none of whose outputs requires gradients

        extra = torch.zeros((), device="cpu", requires_grad=True)
        _, *outputs = self._original.apply(compute, preserve_rng_state, extra, *tensors)
        return tree_unflatten(outputs, structures[0])


def _is_no_container(value: Any) -> bool:
    """Recognises all but plain containers: others, such as caches of keys, have to stay the objects that they are."""
    return not isinstance(value, tuple) and type(value) not in (list, dict, OrderedDict)


@contextmanager
def _checkpoints_replaced() -> Iterator[None]:
    """Puts `_CompleteCheckpoints` in the place of torch's function."""
    before = checkpoint.CheckpointFunction
    checkpoint.CheckpointFunction = _CompleteCheckpoints(before)  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        checkpoint.CheckpointFunction = before  # type: ignore[misc]


_COMPLETE_CHECKPOINTS = SharedMode(_checkpoints_replaced)


@contextmanager
def _complete_checkpoints() -> Iterator[None]:
    """Gives parameters under torch's reentrant activation checkpointing their gradients, in this thread."""
    before = _THREAD.differentiates
    _THREAD.differentiates = True
    try:
        with _COMPLETE_CHECKPOINTS:
            yield
    finally:
        _THREAD.differentiates = before


_LOCKS: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_LOCKING = threading.Lock()


def lock_of(model: nn.Module) -> threading.RLock:
    """Returns the lock of a model, for one thread at a time to put hooks on it and change what requires gradients."""
    with _LOCKING:
        return _LOCKS.setdefault(model, threading.RLock())


@contextmanager
def no_caches() -> Iterator[None]:
    """Keeps weights from being used that were cast or computed before: by autocast, or by `parametrize.cached`."""
    autocast = torch.is_autocast_cache_enabled()
    parametrized = getattr(parametrize, "_cache_enabled", 0)
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    parametrize._cache_enabled = 0
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(autocast)
        parametrize._cache_enabled = parametrized


@contextmanager
def differentiable(model: nn.Module, fused: bool = False) -> Iterator[None]:
    """Lets autograd record all operations, whatever mode the caller is in, none of them from a cache.

    Args:
        model: The model.
        fused: Leaves attention fused.
    """
    with ExitStack() as modes:
        modes.enter_context(no_caches())
        modes.enter_context(torch.inference_mode(False))
        modes.enter_context(torch.enable_grad())
        if not fused:
            modes.enter_context(_UNFUSED_ATTENTION)
        modes.enter_context(_NO_FAST_PATH)
        modes.enter_context(_complete_checkpoints())
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            modes.enter_context(_NO_CUDNN)
        yield


@contextmanager
def no_key_caches(model: nn.Module) -> Iterator[None]:
    """Keeps language models from caching keys and values, to which activation checkpointing would add twice."""
    configs = {id(config): config for module in model.modules() if (config := vars(module).get("config")) is not None}
    caching = [config for config in configs.values() if getattr(config, "use_cache", False) is True]
    try:
        for config in caching:
            config.use_cache = False
        yield
    finally:
        for config in caching:
            config.use_cache = True


@contextmanager
def checkpointing(model: nn.Module) -> Iterator[None]:
    """Has the layers of transformers checkpoint their activations where the user has enabled that.

    They do so in training mode only. Their own flag is set and not that of what is in them: dropout stays off.
    """
    layers = [
        module
        for module in model.modules()
        if getattr(module, "gradient_checkpointing", False) is True
        and any(base.__name__ == "GradientCheckpointingLayer" for base in type(module).__mro__)
    ]
    before = [layer.training for layer in layers]
    try:
        for layer in layers:
            layer.training = True
        yield
    finally:
        for layer, mode in zip(layers, before, strict=True):
            layer.training = mode


class CheckpointInputs:
    """Has the inputs of reentrant activation checkpointing that is not torch's require gradients.

    Functions of a model's own run layers without gradients first too, and again in the backward pass if a tensor that
    they were given requires gradients. As such tensors make autograd go back to the model's first layer, none are made
    to before a module is called without gradients.

    Attributes:
        are_needed: True once a module was called without gradients, but by torch's checkpointing, in a pass with them.
    """

    def __init__(self, model: nn.Module) -> None:
        """Takes the model."""
        self.are_needed = False
        self._model = model

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Looks for such calls in the block, a pass with gradients, and has tensors require them once there was one."""
        devices = {parameter.device for parameter in self._model.parameters()}
        # -0.0 and no other zero leaves every number as it is
        zeros = {device: torch.full((), -0.0, device=device, requires_grad=True) for device in devices}

        def required(value: Any) -> Any:
            fits = isinstance(value, Tensor) and value.is_floating_point() and value.ndim and value.device in zeros
            # a sum, as a model may change it in place
            return value + zeros[value.device] if fits and not value.requires_grad else value

        def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
            return tree_map(required, (args, kwargs)) if self.are_needed and torch.is_grad_enabled() else None

        def after(module: nn.Module, args: Any, output: Any) -> Any:
            if not torch.is_grad_enabled():
                self.are_needed |= not _THREAD.checkpoints
                return None
            has_weights = next(module.parameters(), None) is not None
            return tree_map(required, output) if self.are_needed and has_weights else None

        handles = [module.register_forward_hook(after) for module in self._model.modules()]
        handles.append(self._model.register_forward_pre_hook(before, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def provided_to(self, compute: Callable[[], T]) -> T:
        """Calls `compute`, which runs the model while this is attached; once more if that has shown the need."""
        known = self.are_needed
        result = compute()
        if known or not self.are_needed:
            return result
        del result
        return compute()


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Runs what torch.compile has compiled in a model as it was before: compiled modules call no hooks."""
    is_compiled = any(
        type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )
    with torch.compiler.set_stance("force_eager") if is_compiled else nullcontext():
        yield


@contextmanager
def requiring_grad(parameters: Iterable[Tensor], chosen: Iterable[Tensor]) -> Iterator[None]:
    """Lets the `chosen` ones of some parameters require gradients and no others, and restores all at the end.

    The model's own parameters are changed rather than copies swapped in: activation checkpointing runs parts of the
    model again in the backward pass, after swapped parameters would have left.
    """
    parameters = list(parameters)
    before = [parameter.requires_grad for parameter in parameters]
    wanted = {id(parameter) for parameter in chosen}
    try:
        for parameter in parameters:
            parameter.requires_grad_(id(parameter) in wanted)
        yield
    finally:
        for parameter, required in zip(parameters, before, strict=True):
            parameter.requires_grad_(required)
