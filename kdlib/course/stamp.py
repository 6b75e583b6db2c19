"""What is the same in every notebook, stamped by a command: badges, costs by scale, and the Colab cell."""

from __future__ import annotations

import functools
import re
from typing import Any

from kdlib import scoreboard
from kdlib.course import cells, rehearsals
from kdlib.course.chapters import Chapter, root

REF = "main"  # what badges and the Colab cell open; a class that wants a frozen course puts a tag here
COLAB = """\
# On Colab: fetch the course and, if you like, keep runs on your Drive. Anywhere else this cell does nothing.
import importlib.util
import os
import subprocess
import sys

if "google.colab" in sys.modules:
    KEEP_RUNS_ON_DRIVE = False  # True: a disconnected session loses nothing
    if not os.path.exists("/content/kdlib"):
        clone = ["git", "-c", "advice.detachedHead=false", "clone", "-q", "--depth", "1", "--branch", "{ref}"]
        subprocess.run([*clone, "{address}", "/content/kdlib"], check=True)
    needed = ("accelerate", "cloudpickle", "datasets", "filelock", "joblib", "rouge_score", "sacrebleu", "safetensors", "tokenizers")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:  # what is there stays as it is: torch, torchvision, transformers and numpy above all
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", *missing], check=True)
    sys.path.insert(0, "/content/kdlib")
    os.environ["PYTHONPATH"] = "/content/kdlib"
    if KEEP_RUNS_ON_DRIVE:
        from google.colab import drive

        drive.mount("/content/drive")
        os.environ["KDLIB_HOME"] = "/content/drive/MyDrive/kdlib\""""


@functools.cache
def address() -> str:
    """The repository's address, from pyproject.toml: the one place where it stands."""
    text = (root() / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'^Repository = "(https://[^"]+)"$', text, re.M)
    if not found:
        raise ValueError('pyproject.toml has no line Repository = "https://…" under [project.urls]')
    return found.group(1)


def blob(file: str, host: str = "https://github.com") -> str:
    """Where ``file`` is read: at the state that the Colab cell fetches, so that both belong together."""
    return f"{address().replace('https://github.com', host)}/blob/{REF}/{file}"


def badge(chapter: Chapter) -> str:
    """The button that opens a chapter on Colab."""
    link = blob(f"notebooks/{chapter.name}.ipynb", "https://colab.research.google.com/github")
    return f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({link})"


def between(text: str, name: str, content: str) -> str:
    """``text`` with ``content`` between ``<!-- name -->`` and ``<!-- /name -->``.

    Raises:
        ValueError: the markers are missing.
    """
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
    if not pattern.search(text):
        raise ValueError(f"no markers <!-- {name} --> … <!-- /{name} --> to write between")
    return pattern.sub(lambda m: m.group(1) + (content + "\n" if content else "") + m.group(2), text)


def header(chapter: Chapter) -> str:
    """The first cell: badge, links, what each scale costs, when the outputs were made."""
    rows = ["| scale | data | training, all runs together | memory | measured on |", "|---|---|---|---|---|"]
    found, rehearsed = {}, rehearsals.recorded(chapter)
    for result in scoreboard.committed(chapter.name):
        found.setdefault(result["scale"], result)
    for scale, data in chapter.data.items():
        rows.append(f"| `{scale}` | {data} | {_cost(found.get(scale), rehearsed.get(scale))} |")
    largest = next((found[s] for s in ("full", "lab", "smoke") if s in found), None)
    made = ""
    if largest:
        versions = ", ".join(f"{k} {largest['environment'][k]}" for k in ("python", "torch", "transformers"))
        made = f"\n\n*Outputs below: `{largest['scale']}`, {largest['hardware']}, {largest['date']}, {versions}.*"
    student = blob(f"notebooks/student/{chapter.name}.ipynb")
    links = f"{badge(chapter)} · [with open exercises]({student}) · [repository]({address()})"
    return "<!-- header -->\n" + links + "\n\n" + "\n".join(rows) + made


def _cost(result: dict[str, Any] | None, rehearsed: dict[str, Any] | None) -> str:
    """Three cells: what was measured, else what a rehearsal estimated."""
    if result is None:
        return _estimate(rehearsed) if rehearsed else "not yet measured | | "
    minutes = result["run_seconds"] / 60
    spent = f"{minutes:.1f} min" if minutes < 10 else f"{minutes:.0f} min"
    threads = " of one core" if result["hardware"].startswith("cpu") else ""
    return f"{spent}{threads} | {result['peak_memory_gb']:.1f} GB | {result['hardware']}"


def _estimate(rehearsed: dict[str, Any]) -> str:
    hours, count = rehearsed["t4_hours"], rehearsed["runs"]
    spent = f"{hours:.2g}" if hours < 10 else f"{hours:.0f}"
    runs = f"{count} run{'s' if count > 1 else ''}"
    return f"≈ {spent} h on a T4 (estimated, {runs}) | {rehearsed['memory_gb']:.1f} GB (estimated) | rehearsed only"


def stamp(chapter: Chapter, check: bool) -> bool:
    """Write the header and the Colab cell; with ``check``, only say whether they are up to date."""
    notebook = cells.read(chapter.path)
    top, colab = notebook.cells[0], cells.tagged(notebook, "colab")
    if not top.source.startswith("<!-- header -->") or len(colab) != 1:
        raise ValueError(f"{chapter.name} needs a first cell <!-- header --> and one code cell tagged 'colab'")
    new = (header(chapter), COLAB.format(address=address(), ref=REF))
    same = (top.source, colab[0].source) == new
    if not check and not same:
        top.source, colab[0].source = new
        cells.write(notebook, chapter.path)
    return same or not check
