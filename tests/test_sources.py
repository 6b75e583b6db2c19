"""Where data come from: folders in order of precedence, encodings, packages that may be missing."""

from __future__ import annotations

import subprocess
import sys

import pytest

import kdlib as kd
from kdlib import files
from kdlib.data import sources


def test_the_root_is_the_variable_then_home(tmp_path, monkeypatch):
    monkeypatch.delenv("KDLIB_DATA", raising=False)
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path / "home"))
    assert sources.root() == files.home() / "data"
    monkeypatch.setenv("KDLIB_DATA", str(tmp_path / "data"))
    assert sources.root() == tmp_path / "data"


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16"])
def test_a_file_in_another_encoding_is_named(tmp_path, encoding):
    file = tmp_path / "train.jsonl"
    file.write_bytes('{"text": "schön"}\n'.encode(encoding))
    with pytest.raises(ValueError, match=r"train\.jsonl is not UTF-8 .*convert it.*iconv"):
        sources.json_lines(file)
    file.write_bytes('\ufeff{"text": "schön"}\r\n'.encode())
    assert sources.json_lines(file) == [{"text": "schön"}]


def test_a_package_that_is_missing_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ModuleNotFoundError, match=r"sacrebleu.*pip install 'kdlib\[text\]'"):
        kd.metrics.bleu(["a"], ["a"])
    assert sources.optional("json").loads("1") == 1


@pytest.mark.parametrize(
    "variable, value, off",
    [("KDLIB_OFFLINE", "1", True), ("HF_HUB_OFFLINE", "1", True), ("KDLIB_OFFLINE", "0", False)],
)
def test_offline(monkeypatch, variable, value, off):
    for name in ("KDLIB_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, value)
    assert sources.offline() == off


def test_embedded_files_are_found_or_named():
    assert sources.embedded("toy_reviews.jsonl").is_file()
    with pytest.raises(FileNotFoundError, match="nothing.jsonl is neither at"):
        sources.embedded("nothing.jsonl")


def test_the_error_names_place_remedy_and_the_scale_that_needs_none(tmp_path, monkeypatch):
    monkeypatch.setenv("KDLIB_DATA", str(tmp_path))
    text = str(sources.missing("the set 'x'", "x/train", "Do this."))
    for part in (
        "the set 'x'",
        str(tmp_path / "x/train"),
        "Do this.",
        "KDLIB_DATA",
        "data/README.md",
        "KDLIB_SCALE=smoke",
    ):
        assert part in text


def test_importing_kdlib_and_its_data_stays_light():
    code = (
        "import sys, kdlib, kdlib.data; "
        "heavy = {'torchvision', 'datasets', 'transformers', 'tokenizers', 'sklearn', 'pandas'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
