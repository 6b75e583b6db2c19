"""One hash of what makes a run: its settings, its data, and the code that it reaches.

Own code (a notebook's, kdlib's, your files') counts as it is in memory, function by function and as compiled: what runs
is what counts, also after an edit, a reload or a patch, and comments, layout, docstrings and annotations are nothing. Of
an installed library only the names count of what is taken from it, and what was patched into its classes.
"""

from __future__ import annotations

import contextlib
import copyreg
import dis
import hashlib
import importlib.util
import os
import random
import sys
import sysconfig
import types
from collections.abc import Iterator
from functools import _lru_cache_wrapper, cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdlib.scale import Settings

SCALARS = (type(None), bool, int, float, complex, str, bytes, type(...), type(NotImplemented))
# These may change, and a run stays what it was: how runs are kept, counted, rehearsed and shown.
ABOUT_RUNS = {f"kdlib.{room}" for room in "course files fingerprint plots rehearsal runs scoreboard".split()}
# Of the process, not of a run: the grid seeds these generators, and what is read from the environment is not seen.
AMBIENT = {id(os.environ), id(random._inst), id(np.random.mtrand._rand), id(torch.default_generator)}
# Of a class, what Python makes; of a module, what changes with its use and not with what it computes.
MADE = "__module__ __dict__ __weakref__ __doc__ __firstlineno__ __static_attributes__ __slotnames__ _abc_impl".split()
LIBRARIES = ("site-packages", "dist-packages", sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"))
PLAIN = {Tensor, nn.Parameter, getattr(nn, "Buffer", Tensor)}  # classes of tensors that are nothing but their values
WRAPPERS = (staticmethod, classmethod, types.MethodType, property, cached_property, _lru_cache_wrapper)
WRAPPED = ("__func__", "__self__", "__wrapped__", "fget", "fset", "func")
FILLS = {"append", "extend", "add", "update", "clear"}  # a list that a run only writes to is no part of what it reads
MODE = {
    "training",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_is_full_backward_hook",
    "_flat_weight_refs",
}


def fingerprint(*values: Any, memo: dict[int, Any] | None = None) -> str:
    """Hex SHA-256 of ``values``, the same in every process.

    An object counts with all that it holds and with its class; one with a string ``fingerprint`` by that. A model counts
    without its mode. What a function reads from files, from the environment or by a name made at run time is not seen.

    Args:
        memo: shared by calls between which nothing changes, so that each object is read once.

    Raises:
        ValueError: something has no fingerprint.
    """
    return _Walk({} if memo is None else memo).of(values).hex()


def _hash(*parts: str | bytes | memoryview) -> bytes:
    whole = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        whole.update(len(data).to_bytes(8, "little"))
        whole.update(data)
    return whole.digest()


class _Walk:
    """Follows what values hold; ``memo`` keeps each object that was seen, so that its id stays its own."""

    def __init__(self, memo: dict[int, Any]) -> None:
        self.memo, self.path = memo, {}

    def of(self, value: Any) -> bytes:
        if isinstance(value, SCALARS):
            return _hash(type(value).__name__, repr(value))
        key = id(value)
        if key in AMBIENT:
            return _hash("ambient")
        if key in self.path:  # an object that holds itself: how far up
            return _hash("cycle", str(len(self.path) - self.path[key]))
        if key not in self.memo:
            self.path[key] = len(self.path)
            self.memo[key] = (self.parts(value), value)
            del self.path[key]
        return self.memo[key][0]

    def parts(self, value: Any) -> bytes:
        kind = type(value)
        if kind in (list, tuple):
            return _hash(kind.__name__, *map(self.of, value))
        if kind in (set, frozenset):
            return _hash("set", *sorted(map(self.of, value)))
        if kind in (dict, types.MappingProxyType):
            return _hash("dict", *sorted(self.of(name) + self.of(item) for name, item in value.items()))
        if isinstance(value, Settings):  # which runs are made, and where, is not how one is made
            return self.of({name: item for name, item in vars(value).items() if name not in ("scale", "seeds", "jobs")})
        if kind in PLAIN and value.layout is torch.strided and not value.is_quantized and not value.is_meta:
            data = value.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
            return _hash(str(value.dtype), str(tuple(value.shape)), data.numpy().data)
        if isinstance(value, Tensor) and value.is_quantized:
            return self.of([str(value.qscheme()), value.int_repr(), value.dequantize()])
        if kind is np.ndarray and not value.dtype.hasobject:
            return _hash(value.dtype.str, str(value.shape), np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
        if isinstance(value, types.ModuleType):
            return _hash(value.__name__, self.of(dict(_made_in(value)) if _own(value.__name__) else {}))
        if isinstance(value, type):
            return self.class_(value)
        if isinstance(value, types.FunctionType):
            return self.function(value)
        if isinstance(getattr(value, "fingerprint", None), str):
            return _hash(value.fingerprint, self.of(kind))
        if isinstance(value, WRAPPERS):
            return self.of([kind, *(getattr(value, name, None) for name in WRAPPED)])
        if isinstance(value, nn.Module):  # all that it holds; of hooks the functions, without their numbers
            held = {name: item for name, item in vars(value).items() if name not in MODE and item is not None}
            hooks = {name: list(item.values()) for name, item in held.items() if name.endswith("hooks")}
            return _hash("module", self.of(kind), self.of(_held(kind, held | hooks)))
        try:
            parts = copyreg.dispatch_table.get(kind, lambda value: value.__reduce_ex__(2))(value)
        except (TypeError, RuntimeError, NotImplementedError) as error:
            remedy = "give its class a 'fingerprint' string, or make it inside the function that uses it"
            raise ValueError(f"{error}, so what a run uses of it has no fingerprint; {remedy}") from error
        if isinstance(parts, str):
            return _hash(str(getattr(value, "__module__", kind)), parts)
        state = [list(part) if n > 2 and part is not None else part for n, part in enumerate(parts)]
        if len(parts) > 2 and isinstance(parts[2], dict):
            state[2] = _held(kind, parts[2])
        return self.of([kind, state])

    def class_(self, cls: type) -> bytes:
        """A notebook's or a file's class with all that it has now; a library's by name, with what was patched in."""
        if _own(cls.__module__):
            held = {name: item for name, item in vars(cls).items() if not (name in MADE or name.startswith("__annot"))}
            return _hash("class", cls.__qualname__, self.of(cls.__bases__), self.of(held))
        return _hash("class", cls.__module__, cls.__qualname__, self.of([dict(_patched(base)) for base in cls.__mro__]))

    def function(self, function: types.FunctionType) -> bytes:
        module = function.__globals__.get("__name__", "")  # where its code was written, whatever a decorator says
        given = [function.__defaults__, function.__kwdefaults__]
        closure = [cell.cell_contents for cell in function.__closure__ or () if cell != types.CellType()]
        if _own(module):
            return _hash("function", self.code(function), self.of(given), self.of(closure))
        made = "<locals>" in function.__qualname__ or _own(function.__module__ or "")  # by a call, or by a decorator
        # a library may wrap its own functions later on, under their names
        named = module if _own(function.__module__ or "") else function.__module__
        return _hash("function", named, function.__qualname__, self.of([given, closure] if made else None))

    def code(self, function: types.FunctionType) -> bytes:
        """Instructions with their names and constants, and what they read from outside."""
        reads, imports = [], []
        parts = [self.instructions(function.__code__, reads, imports)]
        space = function.__globals__
        for name, *attributes in sorted(read for read in reads if read[0] in space):
            parts += [name, self.taken(space[name], attributes)]
        for name, *attributes in sorted(imports):
            parts += [name, self.taken(_module(name, space.get("__package__")), attributes)]
        return _hash(*parts)

    def taken(self, value: Any, attributes: list[str]) -> bytes:
        """What is read from a value: of modules and settings only that, of a library its name if it is no code."""
        library = False
        for attribute in attributes:
            if type(value) in (list, dict, set) and attribute in FILLS:
                return _hash("filled")
            if isinstance(value, (Settings, types.ModuleType)):
                library |= isinstance(value, types.ModuleType) and not _own(value.__name__)
                value = getattr(value, attribute, value)
        return self.of(attributes if library and not isinstance(value, (type, types.FunctionType)) else value)

    def instructions(self, code: types.CodeType, reads: list[list[str]], imports: list[list[str]]) -> bytes:
        names = (code.co_varnames, code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount)
        parts = [getattr(code, "co_exceptiontable", b""), repr((names, code.co_flags & 0xFF))]
        chained: list[str] | None = None  # the read that an attribute goes on with
        for step in dis.get_instructions(code):
            value = step.argval
            if step.opname in ("LOAD_GLOBAL", "LOAD_NAME", "IMPORT_NAME"):
                chained = [value]
                (imports if step.opname == "IMPORT_NAME" else reads).append(chained)
            elif step.opname == "IMPORT_FROM":
                imports[:] = [read for read in imports if read != imports[-1][:1]] + [[imports[-1][0], value]]
            elif chained and step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
                chained.append(value)
            else:
                chained = None
            inner = isinstance(value, types.CodeType)
            parts += [step.opname, self.instructions(value, reads, imports) if inner else self.of(value)]
        return _hash(*parts)


def _held(kind: type, state: dict[str, Any]) -> dict[str, Any]:
    """What an object holds, without what it may compute again, and without a hash that is another in each process."""
    kept = {k: item for k, item in state.items() if k != "_original_object_hash"}  # of transformers' GenerationConfig
    return {k: item for k, item in kept.items() if not isinstance(getattr(kind, str(k), None), cached_property)}


def _module(name: str, package: str | None) -> Any:
    """The module that a function imports, if it is an own one (imported for this, if it can be); else its name."""
    for full in (name, f"{package}.{name}".strip(".")):
        with contextlib.suppress(Exception):  # an optional import that fails is passed over, here as there
            if full not in sys.modules:
                spec = importlib.util.find_spec(full.partition(".")[0])
                if spec and spec.has_location and not _library(spec.origin or ""):
                    importlib.import_module(full)
            if full in sys.modules and _own(full):
                return sys.modules[full]
    return name


def _library(file: str) -> bool:
    return any(part in file for part in LIBRARIES)


def _own(module: str) -> bool:
    """Whether a module is a notebook, kdlib's or your own file, and no installed library, nor about how runs are kept."""
    found = sys.modules.get(module)
    if found is None or module == "__main__" or module.partition(".")[0] == "kdlib":
        return module not in ABOUT_RUNS
    file = getattr(found, "__file__", None)
    return not _library(file) if file else getattr(found, "__spec__", None) is None


def _made_in(module: types.ModuleType) -> Iterator[tuple[str, Any]]:
    """The functions, classes and constants that are a module's own, without its imports."""
    for name, item in vars(module).items():
        code = isinstance(item, (type, types.FunctionType)) and item.__module__ == module.__name__
        if code or (isinstance(item, (*SCALARS, tuple)) and not name.startswith("__")):
            yield name, item


def _patched(cls: type) -> Iterator[tuple[str, Any]]:
    """Methods of a library's class that were written elsewhere, and a model's attributes that can be set."""
    for name, item in vars(cls).items():
        function = getattr(item, "__func__", item)
        if isinstance(function, types.FunctionType):
            if _own(function.__globals__.get("__name__", "")) or _own(function.__module__ or ""):  # or decorated
                yield name, function
        elif issubclass(cls, nn.Module) and isinstance(item, SCALARS) and name not in MADE and "cache" not in name:
            yield name, item
