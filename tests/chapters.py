"""A notebook's tagged cells for tests: as sources, and run."""

import contextlib
import io
import linecache
import types

import nbformat


def tagged(path, *tags):
    """The sources of the code cells that carry one of ``tags``."""
    cells = nbformat.read(path, as_version=4).cells
    return [cell.source for cell in cells if set(tags) & set(cell.metadata.get("tags", []))]


def namespace(sources, name):
    """What ``sources`` define, run one after another as a notebook would; they stay readable for ``inspect``."""
    module = types.ModuleType("__main__")
    for index, source in enumerate(sources):
        file = f"<{name}, cell {index}>"
        linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(source, file, "exec"), module.__dict__)
    return module.__dict__
