"""One hash of everything that made a result: values, tensors, models, and functions with all they reach."""

from __future__ import annotations

import ast
import builtins
import contextlib
import copyreg
import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import linecache
import symtable
import sys
import sysconfig
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .scale import Settings

_SCALARS = (type(None), bool, int, float, complex, str, bytes, type(...))
_NOT_OF_A_RUN = {"scale", "seeds", "jobs"}  # they say which runs are made and where, not how one is made
# What says how runs are counted and what they cost: it may change, and a run stays what it was.
_ABOUT_RUNS = {"kdlib.fingerprint", "kdlib.rehearsal"}


def fingerprint(*values: Any) -> str:
    """Hex SHA-256 of ``values``, the same in every process and on every machine.

    Takes scalars, containers, tensors, arrays, models (weights, classes, plain attributes), settings, objects that
    have a ``fingerprint`` string, whatever pickle can take apart, and functions and classes. A function from a
    notebook, from kdlib or from a module that is not installed counts by its source without comments, docstrings and
    annotations, by its defaults and closure, and by everything that it reaches; one from an installed package counts
    by its name, and so does what measures a rehearsal or makes a fingerprint. Of a module and of a notebook's
    settings, only the attributes that are read count: a changed ``run.epochs`` matters to a function that reads
    ``run.epochs``.

    Raises:
        ValueError: something has no fingerprint, or its source is gone or was edited after it was imported.
    """
    return _Walk().named("this value", values).hex()


class _NoFingerprint(Exception):
    """Something that pickle cannot take apart: a lock, an open file, a generator."""


class _Walk:
    """One traversal: remembers what it has hashed and stops at what it is in the middle of."""

    def __init__(self) -> None:
        self.done: dict[int, tuple[bytes, Any]] = {}  # the object is kept so that its id stays its own
        self.under_way: set[int] = set()

    def of(self, value: Any) -> bytes:
        if isinstance(value, _SCALARS):
            return _hash(type(value).__name__, repr(value))
        if id(value) in self.done:
            return self.done[id(value)][0]
        if id(value) in self.under_way:
            return _hash("cycle", getattr(value, "__qualname__", type(value).__qualname__))
        self.under_way.add(id(value))
        try:
            digest = self._of(value)
        finally:
            self.under_way.discard(id(value))
        self.done[id(value)] = (digest, value)
        return digest

    def _of(self, value: Any) -> bytes:
        if type(value) in (list, tuple):
            return _hash(type(value).__name__, *map(self.of, value))
        if type(value) in (set, frozenset):
            return _hash("set", *sorted(map(self.of, value)))
        if type(value) in (dict, types.MappingProxyType):
            items = sorted(value.items(), key=lambda item: repr(item[0]))
            return _hash("dict", *sorted(self.of(key) + self.of(item) for key, item in items))
        if isinstance(value, Settings):
            return self.of({name: item for name, item in vars(value).items() if name not in _NOT_OF_A_RUN})
        if isinstance(value, torch.Tensor):
            flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            return _hash("tensor", str(value.dtype), str(tuple(value.shape)), flat.numpy().data)
        if isinstance(value, np.ndarray) and value.dtype != object:
            return _hash("array", str(value.dtype), str(value.shape), value.tobytes())
        if isinstance(value, types.ModuleType):
            return self._module(value)
        if isinstance(value, type):
            return self._class(value)
        if isinstance(getattr(value, "fingerprint", None), str):
            return _hash("fingerprint", value.fingerprint, self.of(type(value)))
        if isinstance(value, types.MethodType):
            return _hash("method", value.__name__, self.of(value.__self__), self.of(value.__func__))
        if isinstance(value, (staticmethod, classmethod)):
            return _hash(type(value).__name__, self.of(value.__func__))
        if isinstance(value, property):
            return _hash("property", self.of(value.fget), self.of(value.fset))
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if hasattr(value, "__wrapped__") and callable(value):  # functools.lru_cache
            return _hash("wrapped", self.of(value.__wrapped__))
        if isinstance(value, nn.Module):
            return self._model(value)
        return self._by_parts(value)

    def _by_parts(self, value: Any) -> bytes:
        """What pickle would store of an object, without its dependence on order and identity."""
        try:
            reduce = copyreg.dispatch_table.get(type(value))
            parts = reduce(value) if reduce else value.__reduce_ex__(2)
        except Exception as error:
            raise _NoFingerprint(f"a {type(value).__qualname__} has no fingerprint ({error})") from error
        if isinstance(parts, str):
            return _hash("name", type(value).__qualname__, _name(value, parts))
        items = [list(part) if isinstance(part, Iterable) and n > 2 else part for n, part in enumerate(parts)]
        return _hash("object", *map(self.of, items))

    def _model(self, model: nn.Module) -> bytes:
        parts = []
        for name, module in model.named_modules():
            plain = {key: item for key, item in vars(module).items() if key != "training" and _plain(item)}
            parts += [name, self.of(type(module)), self.of(plain)]
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            parts += [name, self.of(tensor)]
        return _hash("model", *parts)

    def _module(self, module: types.ModuleType) -> bytes:
        if not _ours(module.__name__) or not getattr(module, "__file__", None):
            return _hash("name", module.__name__)
        return self._source(module.__name__, [_source(module.__file__).tree], vars(module), {})

    def _function(self, function: types.FunctionType) -> bytes:
        original = getattr(function, "__wrapped__", None)  # functools.wraps, torch.no_grad()
        if not _ours(function.__globals__.get("__name__")):
            return _hash("name", _name(function, function.__qualname__), *([self.of(original)] if original else []))
        nodes = _find(function)
        defaults = [function.__defaults__, function.__kwdefaults__, original]
        extra = [self.named(f"a default of {function.__qualname__}", defaults)]
        if len(nodes) > 1:  # lambdas that share a line: the code says which this is
            code = function.__code__
            extra.append(_hash(code.co_code, repr(code.co_consts), repr(code.co_names), repr(code.co_varnames)))
        closure = _closure(function)
        return _hash("function", self._source(function.__qualname__, nodes, function.__globals__, closure), *extra)

    def _class(self, cls: type) -> bytes:
        if not _ours(cls.__module__):
            return _hash("name", _name(cls, cls.__qualname__))
        bases = [self.of(base) for base in cls.__mro__[1:] if _ours(base.__module__)]
        methods = _methods(cls)
        node = _find_class(cls, methods)
        if node is None:  # a notebook's class without methods: what it holds is all there is
            return _hash("class", cls.__qualname__, *bases, self._attributes(cls))
        scope = methods[0].__globals__ if methods else vars(sys.modules[cls.__module__])
        closure = {name: item for method in methods for name, item in _closure(method).items()}
        return _hash("class", *bases, self._source(cls.__qualname__, [node], scope, closure))

    def _attributes(self, cls: type) -> bytes:
        held = {name: item for name, item in vars(cls).items() if not name.startswith("__")}
        fields = vars(cls).get("__dataclass_fields__", {}).values()
        factories = {field.name: field.default_factory for field in fields}
        annotations = {name: str(item) for name, item in vars(cls).get("__annotations__", {}).items()}
        return self.named(f"something in the class {cls.__qualname__}", [held, factories, annotations])

    def _source(self, owner: str, nodes: list[ast.AST], scope: dict[str, Any], closure: dict[str, Any]) -> bytes:
        """Hash some source and, by name, everything that it reaches."""
        parts: list[Any] = []
        for node in nodes:
            text, uses = _normal(node)
            parts.append(text)
            imported = _imports(node, scope)
            for name, chain in uses:
                for space in (imported, closure, scope):
                    if name in space:
                        dotted = ".".join((name, *chain))
                        parts += [dotted, self._reach(owner, dotted, space[name], name, chain, scope)]
                        break
        return _hash("source", *parts)

    def _reach(self, owner: str, dotted: str, value: Any, name: str, chain: tuple[str, ...], scope: dict) -> bytes:
        """Follow ``name.a.b`` through modules and settings as far as they go, and hash what is there."""
        module = scope.get("__name__", "")
        for attribute in chain:
            if isinstance(value, types.ModuleType) and _ours(value.__name__):
                module = value.__name__
            elif not isinstance(value, Settings):
                break
            if not hasattr(value, attribute):
                return _hash("absent")
            value, name = getattr(value, attribute), attribute
        kept = isinstance(value, (*_SCALARS, type, types.FunctionType, types.ModuleType, Settings))
        if module != "__main__" and not kept and _ours(module) and module in sys.modules:
            # A module's own list or cache may fill up as it works: the statement that makes it counts.
            if statement := _assignment(module, name):
                return self._statement(f"{module}.{name}", statement, vars(sys.modules[module]))
        return self.named(f"{owner} uses {dotted!r}, which", value)

    def _statement(self, owner: str, statement: ast.stmt, scope: dict[str, Any]) -> bytes:
        if id(statement) not in self.done:
            self.done[id(statement)] = (_hash("cycle", owner), statement)  # while it is under way
            self.done[id(statement)] = (self._source(owner, [statement], scope, {}), statement)
        return self.done[id(statement)][0]

    def named(self, what: str, value: Any) -> bytes:
        """Hash ``value``; where that cannot be, say what it is and what to do."""
        try:
            return self.of(value)
        except _NoFingerprint as error:
            raise ValueError(
                f"{what} cannot be fingerprinted: {error}; hand it over as an argument that has a "
                "'fingerprint' string, or make it inside the function that uses it"
            ) from error


def _hash(*parts: Any) -> bytes:
    """SHA-256 of the parts, each with its length before it."""
    whole = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        whole.update(len(data).to_bytes(8, "little"))
        whole.update(data)
    return whole.digest()


def _name(value: Any, qualified: str) -> str:
    return f"{getattr(value, '__module__', None)}.{qualified}"


def _plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_plain, value))
    return isinstance(value, (*_SCALARS, types.FunctionType, types.BuiltinFunctionType))


@functools.cache
def _ours(module: str | None) -> bool:
    """Whether a module counts by its source: a notebook, kdlib, or a file that no installer put there."""
    if not module or module in _ABOUT_RUNS:
        return False
    if module == "__main__" or module.split(".")[0] == "kdlib":
        return True
    if module in sys.modules:
        file = getattr(sys.modules[module], "__file__", None)
    else:
        spec = importlib.util.find_spec(module.split(".")[0])
        file = spec.origin if spec and spec.has_location else None
    if not file:
        return False
    path = Path(file).resolve()
    installed = {"site-packages", "dist-packages"} & set(path.parts)
    return not installed and Path(sysconfig.get_path("stdlib")).resolve() not in path.parents


# Source -----------------------------------------------------------------------------------------------------


class _Source:
    """A file or a notebook cell, parsed: its functions and classes by name and line."""

    def __init__(self, text: str) -> None:
        self.tree = ast.parse(text)
        self.functions: dict[tuple[str, int], list[ast.AST]] = {}
        self.class_of: dict[tuple[str, int], ast.ClassDef] = {}
        self.classes: dict[str, ast.ClassDef] = {}
        self.statements: dict[str, ast.stmt] = {}
        self.text, self._codes = text, None
        self._walk(self.tree, "")
        for statement in self.tree.body:
            targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
            for name in (n for target in targets if target for n in ast.walk(target)):
                if isinstance(name, ast.Name):
                    self.statements[name.id] = statement

    def _walk(self, node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            inner = prefix
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                key = (child.name, min([child.lineno, *(d.lineno for d in child.decorator_list)]))
                inner = f"{prefix}{child.name}."
                if isinstance(child, ast.ClassDef):
                    self.classes[prefix + child.name] = child
                else:
                    inner += "<locals>."
                    self.functions.setdefault(key, []).append(child)
                    if isinstance(node, ast.ClassDef):
                        self.class_of[key] = node
            elif isinstance(child, ast.Lambda):
                self.functions.setdefault(("<lambda>", child.lineno), []).append(child)
            self._walk(child, inner)

    def compiles_to(self, code: types.CodeType, file: str) -> bool:
        """Whether this source is the one that ``code`` was made of."""
        if self._codes is None:
            self._codes = list(_codes(compile(self.text, file, "exec", dont_inherit=True)))
        return code in self._codes


def _codes(code: types.CodeType) -> Iterable[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


@functools.lru_cache(maxsize=512)
def _parsed(text: str) -> _Source:
    return _Source(text)


def _source(file: str) -> _Source:
    return _parsed("".join(linecache.getlines(file)))


def _find(function: types.FunctionType) -> list[ast.AST]:
    """The node of a function; several where lambdas share a line."""
    code, loader = function.__code__, function.__globals__.get("__loader__")
    # A test runner that rewrites assertions, and a notebook, compile something else than the bare text.
    compare = type(loader).__name__ == "SourceFileLoader" and function.__globals__.get("__file__") == code.co_filename
    for _ in range(2):
        try:
            source = _source(code.co_filename)
        except SyntaxError:
            source = _parsed("")
        nodes = source.functions.get((code.co_name, code.co_firstlineno), [])
        if nodes and (not compare or source.compiles_to(code, code.co_filename)):
            return nodes
        linecache.checkcache(code.co_filename)  # reloaded, perhaps: read the file as it is now
    if linecache.getlines(code.co_filename):
        raise ValueError(
            f"{code.co_filename} was edited after {function.__qualname__} was read from it; restart the "
            "kernel so that what runs is what is written"
        )
    raise ValueError(
        f"the source of {function.__qualname__} is not at hand; define it in a notebook cell or in a file, not by exec"
    )


def _methods(cls: type) -> list[types.FunctionType]:
    """The functions that a class's own body defines (not those that a decorator generates)."""
    found = []
    for member in vars(cls).values():
        inner = [member.fget, member.fset] if isinstance(member, property) else [getattr(member, "func", member)]
        for function in inner:
            while hasattr(function, "__wrapped__") or isinstance(function, (staticmethod, classmethod)):
                function = getattr(function, "__wrapped__", None) or function.__func__
            if isinstance(function, types.FunctionType) and not _generated(cls, function):
                found.append(function)
    return found


def _generated(cls: type, function: types.FunctionType) -> bool:
    """Whether ``dataclass`` wrote a method, so that there is no source of it."""
    written = linecache.getlines(function.__code__.co_filename)
    return dataclasses.is_dataclass(cls) and function.__name__.startswith("__") and not written


def _find_class(cls: type, methods: list[types.FunctionType]) -> ast.ClassDef | None:
    for method in methods:
        if method.__qualname__.startswith(f"{cls.__qualname__}.") and method.__code__.co_name != "<lambda>":
            _find(method)
            key = (method.__code__.co_name, method.__code__.co_firstlineno)
            if node := _source(method.__code__.co_filename).class_of.get(key):
                return node
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    return _source(file).classes.get(cls.__qualname__) if file else None


def _assignment(module: str, name: str) -> ast.stmt | None:
    file = getattr(sys.modules[module], "__file__", None)
    return _source(file).statements.get(name) if file else None


def _closure(function: types.FunctionType) -> dict[str, Any]:
    found = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # not yet assigned
            continue
    return found


def _imports(node: ast.AST, scope: dict[str, Any]) -> dict[str, Any]:
    """What the import statements inside a function bring, where it is code that counts by its source."""
    found: dict[str, Any] = {}
    for statement in ast.walk(node):
        if isinstance(statement, ast.Import):
            names = [(alias.asname or alias.name.split(".")[0], alias) for alias in statement.names]
            for name, alias in names:
                if _ours(alias.name):
                    with contextlib.suppress(ImportError):  # an optional one that is not there
                        found[name] = importlib.import_module(alias.name if alias.asname else name)
        elif isinstance(statement, ast.ImportFrom):
            package = scope.get("__package__") or ""
            path = "." * statement.level + (statement.module or "")
            path = importlib.util.resolve_name(path, package) if statement.level else path
            if not _ours(path):
                continue
            for alias in statement.names:
                with contextlib.suppress(ImportError):
                    module = importlib.import_module(path)
                    if not hasattr(module, alias.name):
                        importlib.import_module(f"{path}.{alias.name}")
                    found[alias.asname or alias.name] = getattr(module, alias.name)
    return found


# Normal form ------------------------------------------------------------------------------------------------


class _Strip(ast.NodeTransformer):
    """Takes away what does not act: docstrings and the annotations of functions."""

    def visit(self, node: ast.AST) -> ast.AST:
        node = self.generic_visit(node)
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            if ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:] or [ast.Pass()]
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            node.returns = None
        if isinstance(node, ast.arg):
            node.annotation = None
        return node


_normal_of: dict[int, tuple[str, list, ast.AST]] = {}


def _normal(node: ast.AST) -> tuple[str, list[tuple[str, tuple[str, ...]]]]:
    """A node's source without comments, docstrings and annotations, and the outer names that it uses."""
    if id(node) not in _normal_of:
        bare = _Strip().visit(ast.parse(ast.unparse(node)))
        text = ast.unparse(bare)
        outer = _outer(text, bare)
        uses = sorted({use for use in _uses(bare) if use[0] in outer})
        whole = {name for name, chain in uses if not chain}
        uses = [use for use in uses if not use[1] or use[0] not in whole]
        _normal_of[id(node)] = (text, uses, node)
    return _normal_of[id(node)][:2]


def _outer(text: str, bare: ast.AST) -> set[str]:
    """The names that some source reads from outside itself, or imports."""
    for node in ast.walk(bare):  # taken out of its function, a nested one has no such outer scope any more
        if isinstance(node, ast.Nonlocal):
            text = ast.unparse(_NonlocalToGlobal().visit(ast.parse(text)))
            break
    found, tables = set(), [symtable.symtable(text, "<fingerprint>", "exec")]
    while tables:
        table = tables.pop()
        tables += table.get_children()
        top = table.get_type() == "module"
        for symbol in table.get_symbols():
            if symbol.is_imported() or (symbol.is_referenced() and (symbol.is_global() or top)):
                found.add(symbol.get_name())
    return found - set(dir(builtins))


class _NonlocalToGlobal(ast.NodeTransformer):
    def visit_Nonlocal(self, node: ast.Nonlocal) -> ast.AST:
        return ast.Global(names=node.names)


def _uses(node: ast.AST) -> Iterable[tuple[str, tuple[str, ...]]]:
    """Every name in a tree with what is read of it: ``kd.losses.x`` is ``("kd", ("losses", "x"))``."""
    chain: list[str] = []
    inner = node
    while isinstance(inner, ast.Attribute):
        chain.append(inner.attr)
        inner = inner.value
    if isinstance(inner, ast.Name):
        yield inner.id, tuple(reversed(chain))
    else:
        for child in ast.iter_child_nodes(inner):
            yield from _uses(child)
