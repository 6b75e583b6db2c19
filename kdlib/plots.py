"""One look for all figures: colours that colour-blind readers can tell apart, labelled axes, alt text, numbers kept."""

from __future__ import annotations

import base64
import io
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from kdlib import files

# Okabe & Ito (2008); yellow is left out, it cannot be read on white
# The last one, grey, is dark enough to stay apart from pink for deuteranopes.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#222222", "#6B6F74"]
BLUE, VERMILION, GREEN, ORANGE, PINK, SKY, BLACK, GREY = COLOURS
DPI = 110

plt.rcParams.update({
    "axes.prop_cycle": cycler(color=COLOURS), "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#E6E6E6",
    "axes.axisbelow": True, "axes.titlesize": 10, "axes.labelsize": 9.5, "xtick.labelsize": 8.5, "ytick.labelsize": 8.5, "legend.frameon": False,
    "legend.fontsize": 8.5, "lines.linewidth": 1.8, "font.size": 9.5, "figure.dpi": DPI,
})  # fmt: skip

_given: dict[str, str] = {}


def colour(arm: str) -> str:
    """The colour of an arm, the same in all figures of a notebook."""
    return _given.setdefault(arm, COLOURS[len(_given) % len(COLOURS)])


def show(fig: Figure, *, alt: str, name: str, data: Any = None) -> None:
    """Display a figure with alt text; keep the picture and the numbers behind it (``KDLIB_FIGURES``, else kdlib's home).

    Raises:
        ValueError: the alt text is too short to say what the figure shows, or no axis of the figure has a label.
    """
    if len(alt.strip()) < 40:
        raise ValueError(f"alt text of {name!r} has {len(alt)} characters; say in a sentence what the figure shows")
    shown = [ax for ax in fig.axes if ax.axison]
    labels = [fig.get_supxlabel(), fig.get_supylabel(), *(ax.get_xlabel() + ax.get_ylabel() for ax in shown)]
    if shown and not any(labels):
        raise ValueError(f"no axis of {name!r} has a label; use ax.set(xlabel=…, ylabel=…)")
    png = _png(fig, alt)
    plt.close(fig)
    folder = Path(os.environ.get("KDLIB_FIGURES") or files.home() / "figures")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.png").write_bytes(png)
    if data is not None:
        pandas.DataFrame(data).to_csv(folder / f"{name}.csv")
    if "IPython" in sys.modules and (shell := sys.modules["IPython"].get_ipython()):
        shown = {"image/png": base64.b64encode(png).decode(), "text/plain": alt}
        shell.display_pub.publish(shown, {"image/png": {"alt": alt}})


def _png(fig: Figure, alt: str) -> bytes:
    """In 256 colours, where no photograph needs more: a third of the bytes keeps notebooks showable."""
    drawn, small, about = io.BytesIO(), io.BytesIO(), PngInfo()
    fig.savefig(drawn, format="png", dpi=DPI, bbox_inches="tight")
    picture = Image.open(drawn)
    if not any(ax.images for ax in fig.axes):
        picture = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    about.add_text("Description", alt)
    picture.save(small, "PNG", optimize=True, dpi=(DPI, DPI), pnginfo=about)
    return small.getvalue()


def curves(frame: pandas.DataFrame, x: str, y: str, *, by: str = "arm", ax: Axes | None = None) -> Axes:
    """Mean of ``y`` over seeds against ``x``, one line a value of ``by``, with a band of one standard deviation."""
    ax = ax or plt.subplots(figsize=(6.6, 3.8))[1]
    for arm, rows in frame.groupby(by, sort=False):
        at = rows.groupby(x)[y].agg(["mean", "std"]).fillna({"std": 0})
        hue, style = colour(arm), "-" if list(_given).index(arm) < len(COLOURS) else "--"
        ax.plot(at.index, at["mean"], style, color=hue, label=arm)
        ax.fill_between(at.index, at["mean"] - at["std"], at["mean"] + at["std"], color=hue, alpha=0.15, linewidth=0)
    ax.set(xlabel=x, ylabel=y.replace("_", " "))
    ax.legend()
    return ax


def forest(
    table: pandas.DataFrame, *, xlabel: str,
    ax: Axes | None = None, rows: Sequence[Any] | None = None, widest: float | None = None,
) -> Figure:  # fmt: skip
    """Paired differences with their intervals, one line an arm (columns difference, low, high), and a line at zero.

    An interval that holds zero is grey with a hollow mark. ``rows`` names the rows to show, so that panels agree;
    ``widest`` ends the axis on either side.
    """
    known = table.dropna(subset=["difference"])
    rows = list((known if len(known) else table).index if rows is None else rows)
    ax = ax or plt.subplots(figsize=(6.6, 0.8 + 0.36 * len(rows)))[1]
    for y, name in ((y, name) for y, name in enumerate(rows) if name in known.index):
        low, high, middle = (float(known.loc[name, column]) for column in ("low", "high", "difference"))
        hue = BLUE if low * high > 0 else GREY
        ax.plot([low, high], [y, y], color=hue, linewidth=2.2)
        ax.plot(middle, y, "o", color=hue, markerfacecolor=hue if low * high > 0 else "white", markersize=6)
        for end, mark in ((low, "<"), (high, ">")):
            if widest is not None and abs(end) > widest:  # the interval goes on beyond the frame
                ax.plot(math.copysign(widest, end), y, mark, color=hue, clip_on=False)
    ax.axvline(0, color=BLACK, linewidth=1, zorder=1)
    ax.set_yticks(range(len(rows)), rows)
    ax.grid(axis="y", visible=False)
    ax.set(xlabel=xlabel, ylim=(len(rows) - 0.5, -0.5))
    if widest is not None:
        ax.set_xlim(-widest, widest)
    return ax.figure
