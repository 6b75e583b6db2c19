"""Figures carry alt text, labels and their numbers."""

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
from nbclient import NotebookClient
from PIL import Image

import kdlib as kd
from kdlib import plots

ALT = "A straight line that rises from zero to one, for a test."


def line():
    fig, ax = plt.subplots(figsize=(2, 1.5))
    ax.plot([0, 1], [0, 1])
    ax.set(xlabel="x", ylabel="y")
    return fig


def test_picture_alt_text_and_numbers_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("KDLIB_FIGURES", str(tmp_path))
    fig = line()
    kd.show(fig, alt=ALT, name="line", data={"x": [0, 1]})
    assert Image.open(tmp_path / "line.png").info["Description"] == ALT
    assert pd.read_csv(tmp_path / "line.csv", index_col=0)["x"].tolist() == [0, 1]
    assert not plt.fignum_exists(fig.number)


def test_a_notebook_output_has_alt_text():
    code = f"import kdlib as kd, matplotlib.pyplot as plt\nfig, ax = plt.subplots()\nax.set(xlabel='x', ylabel='y')\nkd.show(fig, alt={ALT!r}, name='n')"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    NotebookClient(notebook, kernel_name="python3").execute()
    (output,) = [o for o in notebook.cells[0].outputs if "data" in o]
    assert output.metadata["image/png"]["alt"] == ALT and output.data["text/plain"] == ALT


def test_short_alt_text_and_bare_axes_are_refused():
    with pytest.raises(ValueError, match="alt text"):
        kd.show(line(), alt="a line", name="line")
    with pytest.raises(ValueError, match="alt text"):
        kd.show(line(), alt=" " * 50, name="line")
    with pytest.raises(ValueError, match="no axis of 'bare' has a label"):
        kd.show(plt.subplots()[0], alt=ALT, name="bare")
    plt.close("all")


def picture(ax):
    ax.imshow([[0, 1]])
    ax.axis("off")


def shared(fig):
    for ax in fig.subplots(2, 2, sharex=True, sharey=True).flat:
        ax.plot([0, 1])
        ax.set(xlabel="x", ylabel="y")
        ax.label_outer()


def shared_words(fig):
    for ax in fig.subplots(1, 2, sharey=True):
        ax.set_yticks([0, 1], ["labels only", "KD"])
        ax.set(xlabel="x")


def heat_map(ax):
    ax.figure.colorbar(ax.imshow([[0, 1]]), label="share")
    ax.set(xlabel="x", ylabel="y")


@pytest.mark.parametrize("draw", [
    lambda fig: picture(fig.subplots()),
    shared,
    shared_words,
    lambda fig: heat_map(fig.subplots()),
    lambda fig: fig.subplots().barh(["labels only", "KD"], [1, 2]) and fig.gca().set(xlabel="x"),
    lambda fig: [fig.subplots(1, 2), fig.supxlabel("x"), fig.supylabel("y")],
], ids=["picture", "shared axes", "shared words", "colour bar", "ticks that are words", "labels of the figure"])  # fmt: skip
def test_axes_that_a_reader_understands_pass(draw):
    fig = plt.figure()
    draw(fig)
    kd.show(fig, alt=ALT, name="fine")


def test_line_figures_are_small_and_pictures_keep_their_colours(tmp_path, monkeypatch):
    monkeypatch.setenv("KDLIB_FIGURES", str(tmp_path))
    kd.show(line(), alt=ALT, name="line")
    assert Image.open(tmp_path / "line.png").mode == "P"
    fig, ax = plt.subplots()
    ax.imshow(np.random.default_rng(0).random((8, 8, 3)))
    ax.axis("off")
    kd.show(fig, alt=ALT, name="photo")
    assert Image.open(tmp_path / "photo.png").mode == "RGBA"


def test_colours_can_be_told_apart_also_by_colour_blind_readers():
    """Simulated dichromats (Machado et al. 2009, severity 1): CIELAB distance, where 2.3 is just noticeable."""
    kinds = {
        "deuteranopia": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
        "protanopia": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
        "tritanopia": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
    }
    rgb = np.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in plots.COLOURS]) ** 2.2
    for kind, matrix in kinds.items():
        seen = lab(np.clip(rgb @ np.array(matrix).T, 0, 1))
        gaps = {(i, j): float(np.linalg.norm(seen[i] - seen[j])) for i in range(len(seen)) for j in range(i)}
        assert min(gaps.values()) > 15, (kind, min(gaps, key=gaps.get))


def lab(rgb):
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    t = rgb @ to_xyz.T / np.array([0.9505, 1.0, 1.089])
    f = np.where(t > (6 / 29) ** 3, np.cbrt(t), t / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)


def test_an_arm_keeps_its_colour():
    assert plots.colour("an arm") == plots.colour("an arm") != plots.colour("another arm")


def test_curves_and_forest_draw_what_they_are_given():
    frame = pd.DataFrame({"arm": ["a"] * 4, "seed": [0, 0, 1, 1], "epoch": [0, 1, 0, 1], "acc": [0.1, 0.5, 0.3, 0.7]})
    ax = plots.curves(frame, "epoch", "acc")
    assert np.allclose(ax.lines[0].get_ydata(), [0.2, 0.6])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a"]
    table = pd.DataFrame(
        {"difference": [np.nan, 0.1], "low": [np.nan, 0.05], "high": [np.nan, 0.15]}, index=["base", "kd"]
    )
    axes = plots.forest(table, xlabel="difference").axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["kd"]
    plt.close("all")


def test_more_arms_than_colours_are_dashed(monkeypatch):
    monkeypatch.setattr(plots, "_given", {})
    frame = pd.DataFrame([{"arm": f"arm {i}", "epoch": e, "acc": i} for i in range(10) for e in (0, 1)])
    ax = plots.curves(frame, "epoch", "acc")
    looks = {(line.get_color(), line.get_linestyle()) for line in ax.lines}
    assert len(looks) == 10
    plt.close("all")


def test_an_interval_that_holds_zero_is_hollow():
    table = pd.DataFrame({"difference": [0.1, 0.1, 0.1], "low": [0.05, -0.1, -np.inf], "high": [0.15, 0.3, np.inf]},
                         index=["clear", "not", "one seed"])  # fmt: skip
    marks = [line for line in plots.forest(table, xlabel="d").axes[0].lines if line.get_marker() == "o"]
    assert [mark.get_markerfacecolor() == "white" for mark in marks] == [False, True, True]
    plt.close("all")


def test_panels_of_forests_agree_on_their_rows_and_cut_what_is_too_wide():
    whole = pd.DataFrame({"difference": [1.0, 2.0], "low": [0.5, -9.0], "high": [1.5, 13.0]}, index=["a", "b"])
    fig, axes = plt.subplots(1, 2, sharey=True)
    for ax, table in zip(axes, (whole, whole.loc[["b"]]), strict=True):
        plots.forest(table, xlabel="points", ax=ax, rows=["a", "b", "c"], widest=10)
    assert [text.get_text() for text in axes[0].get_yticklabels()] == ["a", "b", "c"]
    assert axes[0].get_ylim() == (2.5, -0.5) and axes[1].get_xlim() == (-10, 10)  # the first row is on top in both
    heights = [[float(line.get_ydata()[0]) for line in ax.lines if line.get_marker() == "o"] for ax in axes]
    assert heights == [[0, 1], [1]]
    arrows = {line.get_marker(): tuple(line.get_xydata()[0]) for line in axes[1].lines if line.get_marker() in "<>"}
    assert arrows == {">": (10, 1)}
    plt.close("all")


def test_outside_a_notebook_nothing_is_printed(capsys):
    kd.show(line(), alt=ALT, name="quiet")
    assert capsys.readouterr().out == ""


def test_a_forest_without_a_value_still_names_its_rows():
    nothing = pd.DataFrame({"difference": [float("nan")] * 2, "low": 0.0, "high": 0.0}, index=["a − b", "a − c"])
    fig = kd.plots.forest(nothing, xlabel="difference, points")
    assert [label.get_text() for label in fig.axes[0].get_yticklabels()] == ["a − b", "a − c"]
    plt.close(fig)
