"""A target written with ``atomic_write`` is always the old file or the complete new one."""

import os
import signal
import subprocess
import sys

import pytest

from dinov3_mm.checkpoints.io import PARTIAL_SUFFIX, atomic_write


def test_replaces_the_file_and_leaves_nothing_beside_it(tmp_path):
    target = tmp_path / "new_folder" / "weights.bin"
    for content in (b"first", b"second"):
        with atomic_write(target) as partial:
            assert partial.parent == target.parent and not partial.exists()
            partial.write_bytes(content)
        assert target.read_bytes() == content
    assert os.listdir(target.parent) == ["weights.bin"]


def test_an_error_in_the_body_keeps_the_old_file(tmp_path):
    target = tmp_path / "weights.bin"
    target.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="disk full"), atomic_write(target) as partial:
        partial.write_bytes(b"ne")
        raise RuntimeError("disk full")
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["weights.bin"]


def test_a_body_that_writes_nothing_is_an_error(tmp_path):
    target = tmp_path / "weights.bin"
    target.write_bytes(b"old")
    with pytest.raises(FileNotFoundError), atomic_write(target):
        pass
    assert target.read_bytes() == b"old"


def test_a_folder_is_no_target(tmp_path):
    with pytest.raises(IsADirectoryError, match="folder"), atomic_write(tmp_path):
        pass


def test_a_killed_writer_leaves_the_old_file(tmp_path):
    target = tmp_path / "weights.bin"
    target.write_bytes(b"old")
    script = (
        "import os, signal, sys\n"
        "from dinov3_mm.checkpoints.io import atomic_write\n"
        "with atomic_write(sys.argv[1]) as partial:\n"
        "    partial.write_bytes(b'half of the new')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(target)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert target.read_bytes() == b"old"
    others = [name for name in os.listdir(tmp_path) if name != "weights.bin"]
    assert len(others) == 1 and others[0].endswith(PARTIAL_SUFFIX)
