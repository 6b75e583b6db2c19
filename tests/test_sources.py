"""Where data come from: folders in order of precedence, and a network that is asked before any library waits for it."""

from __future__ import annotations

import http.server
import subprocess
import sys
import threading

import pytest

from kdlib import files
from kdlib.data import sources


def test_the_root_is_the_argument_then_the_variable_then_home(tmp_path, monkeypatch):
    monkeypatch.delenv("KDLIB_DATA", raising=False)
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path / "home"))
    assert sources.root() == files.home() / "data"
    monkeypatch.setenv("KDLIB_DATA", str(tmp_path / "data"))
    assert sources.root() == tmp_path / "data" and sources.root(tmp_path) == tmp_path
    assert sources.local("cifar10") is None
    (tmp_path / "data" / "cifar10").mkdir(parents=True)
    assert sources.local("cifar10") == tmp_path / "data" / "cifar10"


@pytest.mark.parametrize(
    "variable, value, off",
    [("KDLIB_OFFLINE", "1", True), ("HF_HUB_OFFLINE", "1", True), ("KDLIB_OFFLINE", "0", False)],
)
def test_offline(monkeypatch, variable, value, off):
    for name in ("KDLIB_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, value)
    assert sources.offline() == off


def test_a_host_that_answers_with_any_status_is_reachable(monkeypatch):
    for name in ("KDLIB_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    class Refuses(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_error(403)

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Refuses) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert sources.reachable(url)
        thread.join()
    assert not sources.reachable(url), "nobody listens there any more"
    assert not sources.reachable("no address at all")
    monkeypatch.setenv("KDLIB_OFFLINE", "1")
    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: pytest.fail("asked while offline"))
    assert not sources.reachable(url)


def test_the_hub_may_be_a_mirror(monkeypatch):
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    assert sources.hub() == "https://huggingface.co"
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example")
    assert sources.hub() == "https://mirror.example"


def test_embedded_files_are_found_or_named():
    assert sources.embedded("toy_reviews.jsonl").is_file()
    with pytest.raises(FileNotFoundError, match="nothing.jsonl is neither at"):
        sources.embedded("nothing.jsonl")


def test_the_error_names_place_remedy_and_the_scale_that_needs_none(tmp_path):
    text = str(sources.missing("the set 'x'", "x/train", "Do this.", tmp_path))
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
