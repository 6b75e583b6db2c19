"""Files are whole or absent."""

import errno
import multiprocessing
import os
import signal
import time

import pytest
import torch

from kdlib import files


def test_tensors_and_meta_come_back(tmp_path):
    tensors = {"a": torch.randn(3, 2), "b": torch.arange(4)}
    files.write_tensors(tmp_path / "t.safetensors", tensors, {"step": 3})
    back, meta = files.read_tensors(tmp_path / "t.safetensors")
    assert meta == {"step": 3} and all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_tensors_that_share_memory_are_written(tmp_path):
    base = torch.arange(6.0)
    files.write_tensors(tmp_path / "t.safetensors", {"a": base[:3], "b": base[:3], "c": base.view(2, 3).T})
    back, _ = files.read_tensors(tmp_path / "t.safetensors")
    assert torch.equal(back["c"], base.view(2, 3).T)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.json"
    files.write_json(path, {"old": 1})
    with pytest.raises(RuntimeError), files.atomic(path) as part:
        part.write_text("half")
        raise RuntimeError("killed in the middle")
    assert files.read_json(path) == {"old": 1} and [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_full_disk_is_told_with_what_to_do(tmp_path):
    with pytest.raises(OSError, match="MB are free.*KDLIB_HOME"), files.atomic(tmp_path / "big"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert list(tmp_path.iterdir()) == []


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
        writer = multiprocessing.get_context("spawn").Process(target=_rewrite_for_ever, args=(path,))
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
