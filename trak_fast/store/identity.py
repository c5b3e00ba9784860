"""A description of what a task is, so that folders of features tell two tasks of one name apart.

Values are written out line by line: numbers, strings, arrays by their digest, the arguments of partial functions, and
of functions the defaults, the variables that they close over and the global ones that they read. The code of
functions is digested beside: it depends on the version of Python, so only runs of the same version compare it. What
cannot be described, an object of some other library for example, counts by its class.
"""

from __future__ import annotations

import dataclasses
import dis
import enum
import functools
import hashlib
import sys
import sysconfig
import types
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

PLAIN = (type(None), bool, int, float, complex, str, bytes, range, torch.dtype, enum.Enum)
"""The types of values that their representation tells everything about."""

KNOWN_PACKAGES = ("trak_fast", "trak", "torch", "numpy")
"""Packages whose functions and classes are known by their names, wherever they are installed."""


NAMESPACES = ("Namespace", "SimpleNamespace")
"""Classes of Python (argparse, types) whose objects are nothing but what they hold."""


class Description:
    """The lines that describe some values.

    Attributes:
        lines: A line for each value, "name = value".
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        """Starts without lines; `model` and its modules, whose weights the checkpoints have, count by their class."""
        self.lines: list[str] = []
        self._code = hashlib.sha256()
        self._model = {id(module) for module in model.modules()} if model is not None else set()
        self._seen: dict[int, Any] = {}  # by identity; the values are kept, so that no other gets theirs

    @property
    def code(self) -> dict[str, str]:
        """The digest of the functions' code, with the version of Python that made it."""
        return {"python": f"{sys.version_info[0]}.{sys.version_info[1]}", "digest": self._code.hexdigest()}

    def add(self, name: str, value: Any) -> None:
        """Describes a value, and what it is made of."""
        if isinstance(value, torch.device):
            return  # results do not depend on it
        if isinstance(value, PLAIN):
            self.lines.append(f"{name} = {value!r}")
        elif isinstance(value, np.generic):
            self.lines.append(f"{name} = {value.item()!r}")
        elif isinstance(value, (Tensor, np.ndarray)):
            self._add_array(name, torch.as_tensor(value) if value.dtype != object else torch.empty(0))
        elif id(value) in self._seen:
            return
        else:
            self._seen[id(value)] = value
            self._add_composite(name, value)

    def add_class(self, name: str, kind: type) -> None:
        """Describes the code of a class and of those that it inherits from, apart from known ones."""
        for base in kind.__mro__:
            if base is not object and not _is_known(base):
                for attribute, value in vars(base).items():
                    if isinstance(value, (staticmethod, classmethod, property)):
                        value = value.fget if isinstance(value, property) else value.__func__
                    is_constant = isinstance(value, (*PLAIN, list, dict, tuple, set, Tensor)) and attribute[0] != "_"
                    if is_constant or isinstance(value, types.FunctionType):
                        self.add(f"{name}.{attribute}", value)

    def _add_composite(self, name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, entry in value.items():
                self.add(f"{name}[{key!r}]", entry)
        elif isinstance(value, (list, tuple)):
            for i, entry in enumerate(value):
                self.add(f"{name}[{i}]", entry)
        elif isinstance(value, (set, frozenset)):
            self.lines.append(f"{name} = {sorted(map(repr, value))}")
        elif isinstance(value, functools.partial):
            self.add(name, value.func)
            self.add(f"{name}.args", value.args)
            self.add(f"{name}.keywords", value.keywords)
        elif isinstance(value, types.MethodType):
            self.add(name, value.__func__)
            self.add(f"{name}.self", value.__self__)
        elif isinstance(value, types.FunctionType):
            self._add_function(name, value)
        elif isinstance(value, type) or not hasattr(value, "__dict__"):
            self.lines.append(f"{name} = {getattr(value, '__qualname__', type(value).__qualname__)}")
        else:
            self._add_object(name, value)

    def _add_object(self, name: str, value: Any) -> None:
        """Describes an object by its class; dataclasses and modules, such as those of losses, by what they hold."""
        self.lines.append(f"{name} = {type(value).__qualname__}")
        if id(value) in self._model:
            return
        if isinstance(value, nn.Module):
            attributes = {k: v for k, v in vars(value).items() if not k.startswith("_") and k != "training"}
            self.add(name, attributes)
            self.add(name, dict(value.named_parameters()) | dict(value.named_buffers()))
        elif dataclasses.is_dataclass(value):
            self.add(name, {field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
        elif type(value).__name__ in NAMESPACES or not _is_known(type(value)):
            self.add_class(name, type(value))
            self.add(name, {k: v for k, v in vars(value).items() if not k.startswith("_")})

    def _add_array(self, name: str, array: Tensor) -> None:
        array = array.detach().cpu()
        content = array.to_dense() if array.layout != torch.strided else array
        digest = hashlib.sha256(content.contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()[:16]
        self.lines.append(f"{name} = {array.dtype} {tuple(array.shape)} {digest}")

    def _add_function(self, name: str, function: types.FunctionType) -> None:
        self.lines.append(f"{name} = {function.__qualname__}")
        if _is_known(function):
            return
        code = function.__code__
        self._add_code(code, function.__doc__)
        self.add(f"{name}.defaults", function.__defaults__ or ())
        self.add(f"{name}.defaults", function.__kwdefaults__ or {})
        counters = _read(code, "STORE_DEREF")
        for variable, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            if variable in counters:  # it changes as the function runs
                continue
            try:
                self.add(f"{name}.{variable}", cell.cell_contents)
            except ValueError:  # not assigned yet
                continue
        for variable in sorted(_read(code, "LOAD_GLOBAL", "LOAD_NAME") - _read(code, "STORE_GLOBAL")):
            value = function.__globals__.get(variable)
            if isinstance(value, types.ModuleType):
                self._add_module(variable, value, code.co_names)
            elif value is not None and not isinstance(value, type) and not _is_known(value):
                self.add(f"global {variable}", value)

    def _add_module(self, name: str, module: types.ModuleType, attributes: Iterable[str]) -> None:
        """Describes what a function may read of a module of the user's own."""
        if _is_own(module):
            for attribute in attributes:
                value = getattr(module, attribute, None)
                if value is not None and not isinstance(value, (type, types.ModuleType)) and not _is_known(value):
                    self.add(f"{name}.{attribute}", value)

    def _add_code(self, code: types.CodeType, documentation: str | None = None) -> None:
        """Digests what code does, which its documentation has no part in."""
        self._code.update(repr((code.co_code, code.co_names, code.co_varnames)).encode())
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self._add_code(constant)
            elif documentation is None or constant != documentation:
                self._code.update(repr(sorted(constant) if isinstance(constant, frozenset) else constant).encode())


def _is_known(value: Any) -> bool:
    """Tells if a function or a class belongs to a library, whose names say enough."""
    if not isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType, types.MethodType)):
        return False
    module = sys.modules.get(getattr(value, "__module__", None) or "")
    return module is not None and not _is_own(module)


@functools.cache
def _library_folders() -> tuple[str, ...]:
    return tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})


def _is_own(module: types.ModuleType) -> bool:
    """Tells if a module is the user's, and neither Python's nor that of an installed library or of this package."""
    if module.__name__.partition(".")[0] in KNOWN_PACKAGES:
        return False
    path = getattr(module, "__file__", None)
    if path is None:
        return module.__name__ == "__main__"
    return "site-packages" not in path and "dist-packages" not in path and not path.startswith(_library_folders())


def _read(code: types.CodeType, *operations: str) -> set[str]:
    """Collects the names that code, and functions made in it, use in some kinds of operations."""
    names = {entry.argval for entry in dis.get_instructions(code) if entry.opname in operations}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _read(constant, *operations)
    return names
