"""One look for all figures: colours that colour-blind readers can tell apart, labelled axes, alt text, numbers kept."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
from cycler import cycler

from kdlib import files

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito (2008); yellow is left out, it cannot be read on white
BLUE, ORANGE, GREEN, PINK, SKY, VERMILION, BLACK = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#222222",
)  # fmt: skip
GREY = "#9AA0A6"
COLOURS = [BLUE, VERMILION, GREEN, ORANGE, PINK, SKY, BLACK, GREY]

plt.rcParams.update({
    "axes.prop_cycle": cycler(color=COLOURS), "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "#E6E6E6", "grid.linewidth": 0.8, "axes.axisbelow": True,
    "axes.titlesize": 10, "axes.labelsize": 9.5, "xtick.labelsize": 8.5, "ytick.labelsize": 8.5,
    "legend.frameon": False, "legend.fontsize": 8.5, "lines.linewidth": 1.8, "font.size": 9.5,
    "figure.facecolor": "white", "savefig.facecolor": "white", "figure.dpi": 100,
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
        name: file name, without ending, in the figure folder (``KDLIB_FIGURES``, else in kdlib's home).
        data: a DataFrame (or what makes one) with the numbers, saved as CSV.

    Raises:
        ValueError: the alt text is too short, or axes lack a label.
    """
    if len(alt) < 40:
        raise ValueError(f"alt text of {name!r} has {len(alt)} characters; say in a sentence what the figure shows")
    for ax in fig.axes:
        if ax.axison and ax.get_visible() and not (ax.get_xlabel() or ax.get_ylabel()):
            raise ValueError(
                f"axes of {name!r} (title {ax.get_title()!r}) have no label; use ax.set(xlabel=…, ylabel=…)"
            )
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=110, bbox_inches="tight", metadata={"Description": alt, "Software": None})
    plt.close(fig)
    _keep(name, buffer.getvalue(), data)
    _display(buffer.getvalue(), alt)


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
    """Mean of ``y`` over seeds against ``x``, one line a value of ``by``, with a band of one standard deviation."""
    ax = ax or plt.subplots(figsize=(6.6, 3.8))[1]
    for arm, rows in frame.groupby(by, sort=False):
        at = rows.groupby(x)[y]
        mean, sd = at.mean(), at.std().fillna(0)
        ax.plot(mean.index, mean, color=colour(arm), label=arm)
        ax.fill_between(mean.index, mean - sd, mean + sd, color=colour(arm), alpha=0.15, linewidth=0)
    ax.set(xlabel=x, ylabel=y.replace("_", " "))
    ax.legend()
    return ax


def forest(table: pandas.DataFrame, *, xlabel: str, ax: Axes | None = None) -> Figure:
    """Paired differences with their intervals, one line an arm (columns difference, low, high), and a line at zero."""
    rows = table.dropna(subset=["difference"])
    if ax is None:
        _, ax = plt.subplots(figsize=(6.6, 0.8 + 0.36 * len(rows)))
    for y, (_, row) in enumerate(rows.iterrows()):
        clear = row["low"] * row["high"] > 0
        ax.plot([row["low"], row["high"]], [y, y], color=BLUE if clear else GREY, linewidth=2.2)
        ax.plot(row["difference"], y, "o", color=BLUE if clear else GREY, markersize=6)
    ax.axvline(0, color=BLACK, linewidth=1)
    ax.set_yticks(range(len(rows)), rows.index)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.set(xlabel=xlabel, ylabel="arm")
    return ax.figure
