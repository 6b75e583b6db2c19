"""Files are whole or absent."""

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from kdlib import files


def test_tensors_come_back(tmp_path):
    tensors = {"a": torch.randn(3, 2), "b": torch.arange(4), "none": torch.zeros(0, 2)}
    files.write_tensors(tmp_path / "t.safetensors", tensors)
    back = files.read_tensors(tmp_path / "t.safetensors")
    assert back.keys() == tensors.keys() and all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_tensors_that_share_memory_are_written(tmp_path):
    base = torch.arange(6.0)
    files.write_tensors(tmp_path / "t.safetensors", {"a": base[:3], "b": base[:3], "c": base.view(2, 3).T})
    assert torch.equal(files.read_tensors(tmp_path / "t.safetensors")["c"], base.view(2, 3).T)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_a_file_that_was_read_is_not_held(tmp_path):
    """Windows refuses to replace a file that is mapped into memory."""
    path = tmp_path / "held.safetensors"
    files.write_tensors(path, {"a": torch.randn(1000)})
    tensors = files.read_tensors(path)
    assert "held.safetensors" not in Path("/proc/self/maps").read_text()
    assert len(tensors["a"]) == 1000


def test_a_file_that_another_program_holds_for_a_moment_is_replaced(tmp_path, monkeypatch):
    replace, refused = os.replace, [PermissionError(errno.EACCES, "held"), PermissionError(errno.EACCES, "held")]

    def holding(*paths):
        if refused:
            raise refused.pop()
        replace(*paths)

    monkeypatch.setattr(os, "replace", holding)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    files.write_json(tmp_path / "x.json", [1])
    assert files.read_json(tmp_path / "x.json") == [1]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.json"
    files.write_json(path, {"old": 1})
    with pytest.raises(RuntimeError), files.atomic(path) as part:
        part.write_text("half")
        raise RuntimeError("killed in the middle")
    assert files.read_json(path) == {"old": 1} and [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_full_disk_is_told_with_what_to_do(tmp_path):
    with pytest.raises(OSError, match="No space left.*MB are free.*KDLIB_HOME") as told, files.atomic(tmp_path / "big"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert told.value.errno == errno.ENOSPC and list(tmp_path.iterdir()) == []


def test_a_folder_that_may_not_be_written_is_told_with_what_to_do(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    for write in (lambda path: files.write_json(path, 1), files.lock):
        with pytest.raises(OSError, match="could not write in .*KDLIB_HOME="):
            write(tmp_path / "file" / "below" / "x.json")


def test_no_home_is_told(monkeypatch):
    def lost():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("KDLIB_HOME")
    monkeypatch.setattr(Path, "home", lost)
    with pytest.raises(OSError, match="no home folder; set KDLIB_HOME"):
        files.home()


def test_a_file_system_without_modes_will_do(tmp_path, monkeypatch):
    """CIFS, exFAT and the like refuse to change them."""

    def refused(*_, **__):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    for name in ("chmod", "fchmod"):
        monkeypatch.setattr(os, name, refused, raising=False)
    files.write_json(tmp_path / "x.json", [1])
    files.write_tensors(tmp_path / "t.safetensors", {"a": torch.ones(1)})
    assert files.read_json(tmp_path / "x.json") == [1]


def test_a_relative_home_is_that_of_the_caller_wherever_a_kernel_starts(tmp_path):
    code = (
        "import os, kdlib; from kdlib import files, scale; os.chdir('/'); print(files.home(), os.environ['KDLIB_DATA'])"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "KDLIB_HOME": "store", "KDLIB_DATA": "../data"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.stdout.split() == [str(tmp_path / "store"), str(tmp_path.parent / "data")], done.stderr


@pytest.mark.parametrize("damage", ["cut", "empty"])
def test_a_damaged_tensor_file_is_named(tmp_path, damage):
    path = tmp_path / "t.safetensors"
    files.write_tensors(path, {"a": torch.randn(64)})
    path.write_bytes(path.read_bytes()[:100] if damage == "cut" else b"")
    with pytest.raises(ValueError, match="damaged.*delete it"):
        files.read_tensors(path)


def _rewrite_for_ever(path):
    for n in range(10**9):
        files.write_json(path, [n] * 2000)


def test_a_writer_killed_at_any_moment_leaves_a_whole_file(tmp_path):
    path = tmp_path / "x.json"
    for _ in range(3):
        writer = multiprocessing.get_context("fork").Process(target=_rewrite_for_ever, args=(path,))
        writer.start()
        while not path.exists():
            time.sleep(0.01)
        time.sleep(0.05)
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        assert len(set(files.read_json(path))) == 1
        path.unlink()


def test_sha256_is_the_published_one(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert files.sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
