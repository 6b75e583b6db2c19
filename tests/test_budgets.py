"""kdlib stays small: each room within its number of code lines, and imports only go down."""

import ast
import io
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WHOLE = 2666  # it may reach 2,800 when chapters 04 to 06 are there; a room may become smaller, and then its number here does too
BUDGETS = {
    "__init__": 32, "__main__": 43, "course": 197, "scale": 81, "files": 66, "rehearsal": 63,
    "fingerprint": 185, "losses": 82, "metrics": 86, "models": 119, "seq2seq": 78, "teacher": 152,
    "training": 224, "runs": 232, "contract": 82, "scoreboard": 112, "plots": 86, "data/__init__": 15,
    "data/sources": 100, "data/rows": 202, "data/images": 160, "data/text": 269,
}  # fmt: skip
ORDER = (  # who stands further down may import who stands further up
    "scale", "files", "data.sources", "losses", "data.rows", "rehearsal", "data.images", "data.text", "data", "models",
    "metrics", "fingerprint", "seq2seq", "training", "teacher", "contract", "runs", "scoreboard", "plots",
    "exercises", "course", "__main__",
)  # fmt: skip
MODULES = sorted((ROOT / "kdlib").rglob("*.py"))
EMPTY = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}


def name(path):
    return path.relative_to(ROOT / "kdlib").with_suffix("").as_posix()


def code_lines(path):
    """Lines with a token that is no comment and no docstring."""
    source = path.read_text(encoding="utf-8")
    bodies = [
        node for node in ast.walk(ast.parse(source)) if isinstance(getattr(node, "body", None), list) and node.body
    ]
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = [node.body[0] for node in bodies if isinstance(node, documented) and ast.get_docstring(node, False)]
    without = {line for node in docstrings for line in range(node.lineno, node.end_lineno + 1)}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return len({n for t in tokens if t.type not in EMPTY for n in range(t.start[0], t.end[0] + 1)} - without)


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_a_room_is_within_its_budget(path):
    assert code_lines(path) <= BUDGETS[name(path)]


def test_the_whole_is_within_its_budget():
    assert sum(map(code_lines, MODULES)) <= WHOLE


def imports(path):
    """The rooms of kdlib that ``path`` names when it is imported or when it runs."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "kdlib":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kdlib."):
            room = node.module.removeprefix("kdlib.")
            inner = [f"{room}.{alias.name}" for alias in node.names]
            yield from [name for name in inner if name in ORDER] or [room]
        elif isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("kdlib.") for alias in node.names if alias.name.startswith("kdlib."))


@pytest.mark.parametrize(
    "path", [path for path in MODULES if path.parent.name != "kdlib" or path.stem != "__init__"], ids=name
)
def test_imports_only_go_down(path):
    room = name(path).removesuffix("/__init__").replace("/", ".")
    for other in set(imports(path)) - {room}:
        known = other if other in ORDER else other.rpartition(".")[0]
        assert ORDER.index(known) < ORDER.index(room), f"{room} imports {other}"


def test_importing_kdlib_pulls_in_torch_and_numpy_only():
    heavy = (
        "pandas",
        "sklearn",
        "scipy",
        "matplotlib",
        "torchvision",
        "transformers",
        "datasets",
        "joblib",
        "safetensors",
        "nbformat",
    )
    ask = f"import sys, kdlib; print(*[name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    assert not done.stdout.strip()
