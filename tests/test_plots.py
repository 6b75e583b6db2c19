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
    fig, _ = plt.subplots()
    with pytest.raises(ValueError, match="label"):
        kd.show(fig, alt=ALT, name="bare")


def test_colours_can_be_told_apart_also_by_colour_blind_readers():
    """Simulated deuteranopia and protanopia (Machado et al. 2009): no two of the first six colours fall together."""
    deutan = np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]])
    protan = np.array([[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]])
    rgb = np.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in plots.COLOURS[:6]]) ** 2.2
    for matrix in (deutan, protan):
        seen = np.clip(rgb @ matrix.T, 0, 1) ** (1 / 2.2)
        gaps = [np.abs(a - b).max() for i, a in enumerate(seen) for b in seen[:i]]
        assert min(gaps) > 0.1


def test_an_arm_keeps_its_colour():
    assert plots.colour("an arm") == plots.colour("an arm") != plots.colour("another arm")


def test_curves_and_forest_draw_what_they_are_given():
    frame = pd.DataFrame({"arm": ["a"] * 4, "seed": [0, 0, 1, 1], "epoch": [0, 1, 0, 1], "acc": [0.1, 0.5, 0.3, 0.7]})
    ax = plots.curves(frame, "epoch", "acc")
    assert np.allclose(ax.lines[0].get_ydata(), [0.2, 0.6])
    table = pd.DataFrame(
        {"difference": [np.nan, 0.1], "low": [np.nan, 0.05], "high": [np.nan, 0.15]}, index=["base", "kd"]
    )
    axes = plots.forest(table, xlabel="difference").axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["kd"]
    plt.close("all")


def test_footprint_counts_parameters_and_bytes():
    from kdlib.data import images

    model = kd.models.small_cnn(10, channels=(4,), in_channels=1)
    table = kd.footprint.compare({"a": (model, images("digits").test), "b": (model, images("digits").test)}, calls=3)
    assert table.loc["a", "parameters"] * 1e6 == kd.models.parameters(model) and table.loc["b / a", "megabytes"] == 1
    assert (table.loc["a", ["latency_p50_ms", "per_second"]] > 0).all()
