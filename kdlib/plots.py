"""One look for all figures: colours that colour-blind readers can tell apart, labelled axes, alt text, numbers kept."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler
from matplotlib.category import StrCategoryFormatter
from matplotlib.ticker import FixedFormatter, FuncFormatter
from PIL import Image, PngImagePlugin

from kdlib import files

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# Okabe & Ito (2008); yellow is left out, it cannot be read on white
BLUE, ORANGE, GREEN, PINK, SKY, VERMILION, BLACK = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#222222",
)  # fmt: skip
GREY = "#6B6F74"  # dark enough to stay apart from pink for deuteranopes
COLOURS = [BLUE, VERMILION, GREEN, ORANGE, PINK, SKY, BLACK, GREY]
DASHES = ["-", "--", ":"]
DPI = 110

plt.rcParams.update({
    "axes.prop_cycle": cycler(color=COLOURS), "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "#E6E6E6", "grid.linewidth": 0.8, "axes.axisbelow": True,
    "axes.titlesize": 10, "axes.labelsize": 9.5, "xtick.labelsize": 8.5, "ytick.labelsize": 8.5,
    "legend.frameon": False, "legend.fontsize": 8.5, "lines.linewidth": 1.8, "font.size": 9.5,
    "figure.facecolor": "white", "savefig.facecolor": "white", "figure.dpi": DPI,
})  # fmt: skip

_given: dict[str, str] = {}


def colour(arm: str) -> str:
    """The colour of an arm, the same in all figures of a notebook."""
    return _given.setdefault(arm, COLOURS[len(_given) % len(COLOURS)])


def show(fig: Figure, *, alt: str, name: str, data: Any = None) -> None:
    """Display a figure with alt text, and keep the picture and the numbers behind it.

    Args:
        fig: closed afterwards.
        alt: what a reader who cannot see it should know, at least 40 characters.
        name: file name, without ending, in the figure folder (``KDLIB_FIGURES``, else ``figures`` in kdlib's home).
        data: a DataFrame (or what makes one) with the numbers, saved as CSV.

    Raises:
        ValueError: the alt text is too short, or an axis lacks a label. An axis may leave its label to another one
            of the same range in its row or column, to the figure, or to ticks that are words; a picture with its
            axes off needs none.
    """
    if len(alt.strip()) < 40:
        raise ValueError(f"alt text of {name!r} has {len(alt)} characters; say in a sentence what the figure shows")
    for ax in fig.axes:
        for which in "xy":
            if not _labelled(ax, which):
                where = f"the {which} axis of {name!r} (title {ax.get_title()!r})"
                raise ValueError(f"{where} has no label; use ax.set({which}label=…)")
    png = _png(fig, alt)
    plt.close(fig)
    _keep(name, png, data)
    _display(png, alt)


def _labelled(ax: Axes, which: str) -> bool:
    axis = getattr(ax, f"{which}axis")
    if not (ax.axison and ax.get_visible()) or axis.get_label_text() or _has_words(axis):
        return True
    if getattr(ax.figure, f"get_sup{which}label")():
        return True
    if ax.get_label() == "<colorbar>":
        return bool(ax.get_xlabel() or ax.get_ylabel())
    span, limits = {"x": "colspan", "y": "rowspan"}[which], f"get_{which}lim"
    place = ax.get_subplotspec()
    for other in ax.figure.axes:
        spot = other.get_subplotspec()
        if place and spot and getattr(spot, span) == getattr(place, span):
            if getattr(other, f"get_{which}label")() and getattr(other, limits)() == getattr(ax, limits)():
                return True
    return False


def _has_words(axis: Axis) -> bool:
    """Whether the ticks are words, such as the names of arms, which explain themselves."""
    formatter = axis.get_major_formatter()
    if not isinstance(formatter, FixedFormatter | FuncFormatter | StrCategoryFormatter):
        return False
    # not get_ticklabels(), which leaves out the hidden ones of an inner axis
    return any(re.search(r"[^\W\d_]{2}", text) for text in formatter.format_ticks(axis.get_majorticklocs()))


def _png(fig: Figure, alt: str) -> bytes:
    full, small = io.BytesIO(), io.BytesIO()
    fig.savefig(full, format="png", dpi=DPI, bbox_inches="tight", metadata={"Description": alt, "Software": None})
    if any(ax.images for ax in fig.axes):
        return full.getvalue()
    # lines and text lose nothing in 256 colours, and a third of the bytes keeps notebooks showable
    about = PngImagePlugin.PngInfo()
    about.add_text("Description", alt)
    picture = Image.open(full).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    picture.save(small, "PNG", optimize=True, dpi=(DPI, DPI), pnginfo=about)
    return small.getvalue()


def _keep(name: str, png: bytes, data: Any) -> None:
    folder = Path(os.environ.get("KDLIB_FIGURES") or files.home() / "figures")
    with files.atomic(folder / f"{name}.png") as part:
        part.write_bytes(png)
    if data is not None:
        import pandas

        with files.atomic(folder / f"{name}.csv") as part:
            pandas.DataFrame(data).to_csv(part)


def _display(png: bytes, alt: str) -> None:
    try:
        from IPython import get_ipython
        from IPython.display import display
    except ImportError:
        return
    if get_ipython() is not None:
        display({"image/png": png, "text/plain": alt}, raw=True, metadata={"image/png": {"alt": alt}})


def curves(frame: pandas.DataFrame, x: str, y: str, *, by: str = "arm", ax: Axes | None = None) -> Axes:
    """Mean of ``y`` over seeds against ``x``, one line a value of ``by``, with a band of one standard deviation.

    Each line carries its name at its end. From the ninth arm on colours repeat, dashed.
    """
    ax = ax or plt.subplots(figsize=(6.6, 3.8))[1]
    ends = []
    for arm, rows in frame.groupby(by, sort=False):
        at = rows.groupby(x)[y]
        mean, sd = at.mean(), at.std().fillna(0)
        hue = colour(arm)
        dash = DASHES[list(_given).index(arm) // len(COLOURS) % len(DASHES)]
        ax.plot(mean.index, mean, color=hue, linestyle=dash, label=arm)
        ax.fill_between(mean.index, mean - sd, mean + sd, color=hue, alpha=0.15, linewidth=0)
        ends.append((str(arm), mean.index[-1], mean.iloc[-1], hue))
    ax.set(xlabel=x, ylabel=y.replace("_", " "))
    _name_ends(ax, [end for end in ends if np.isfinite(end[2])])
    return ax


def _name_ends(ax: Axes, ends: Sequence[tuple[str, float, float, str]], gap: float = 11.0) -> None:
    """Write names beside the ends (name, x, y, colour) of lines, moved apart to ``gap`` points."""
    from sklearn.isotonic import isotonic_regression

    if not ends:
        return
    ends = sorted(ends, key=lambda end: end[2])
    heights = ax.transData.transform([end[1:3] for end in ends])[:, 1] * 72 / ax.figure.dpi
    steps = gap * np.arange(len(ends))
    moved = isotonic_regression(heights - steps) + steps - heights  # the least squares that keeps the gap
    for (name, x, y, hue), move in zip(ends, moved, strict=True):
        ax.annotate(
            name, (x, y), (16, move), textcoords="offset points", va="center", fontsize=8.5, color=BLACK,
            arrowprops={"arrowstyle": "-", "color": hue, "linewidth": 1.2, "shrinkA": 1, "shrinkB": 2, "relpos": (0, 0.5)},
        )  # fmt: skip


def forest(
    table: pandas.DataFrame,
    *,
    xlabel: str,
    ax: Axes | None = None,
    rows: Sequence[Any] | None = None,
    widest: float | None = None,
) -> Figure:
    """Paired differences with their intervals, one line an arm (columns difference, low, high), and a line at zero.

    An interval that holds zero is grey with a hollow mark.

    Args:
        table: a row an arm; those without a difference (a baseline) are left out.
        xlabel: what the differences are, with their unit.
        ax: to draw into; None makes a figure.
        rows: the rows to show, in this order; one that ``table`` lacks stays empty, so panels side by side agree.
        widest: the end of the axis on either side; an arrow marks an interval that goes on beyond it.
    """
    known = table.dropna(subset=["difference"])
    if rows is None:
        rows = (known if len(known) else table).index  # a rehearsal knows none, and still shows what will be compared
    table, rows = known, list(rows)
    if ax is None:
        _, ax = plt.subplots(figsize=(6.6, 0.8 + 0.36 * len(rows)))
    for y, name in enumerate(rows):
        if name not in table.index:
            continue
        low, high, middle = (float(table.loc[name, column]) for column in ("low", "high", "difference"))
        clear = low * high > 0
        hue = BLUE if clear else GREY
        if widest is not None:
            for beyond, end, mark in ((low < -widest, -widest, "<"), (high > widest, widest, ">")):
                if beyond:
                    ax.plot(end, y, mark, color=hue, markersize=6, clip_on=False)
        ax.plot([low, high], [y, y], color=hue, linewidth=2.2)
        ax.plot(middle, y, "o", color=hue, markerfacecolor=hue if clear else "white", markersize=6)
    ax.axvline(0, color=BLACK, linewidth=1, zorder=1)
    ax.set_yticks(range(len(rows)), rows)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)
    ax.set(xlabel=xlabel)
    if widest is not None:
        ax.set_xlim(-widest, widest)
    return ax.figure
