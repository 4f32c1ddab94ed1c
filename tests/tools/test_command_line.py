"""How programs end: what a user can mend in a line, a bug with its traceback, Ctrl-C with 130."""

import errno
import os
import resource
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.registry import HOOKS, MODELS
from torch.utils.data import DataLoader, Dataset

from dinov3_mm.command_line import explain, run_tool
from dinov3_mm.datasets import ImageFolder
from dinov3_mm.engine import ConfigError, read_config
from dinov3_mm.features.frozen import OtherRankError

REPOSITORY = Path(__file__).resolve().parents[2]
TOOLS = sorted(path.stem for path in (REPOSITORY / "tools").glob("*.py"))
# These have a command line of their own: torchrun's, and one that needs nothing but Python.
OTHERS = {"dist_launch", "gpu_check"}


def text_of(function, *args) -> str | None:
    """What a user reads of the error of a call."""
    with pytest.raises(Exception) as caught:
        function(*args)
    return explain(caught.value)


def ending(main, monkeypatch, *words: str):
    """Exit status, or last words, of a program."""
    monkeypatch.setattr(sys, "argv", ["tools/program.py", *words])
    with pytest.raises(SystemExit) as ended:
        run_tool(main)
    return ended.value.code


def test_what_this_package_refuses_is_a_line(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    line = ending(lambda: ImageFolder(str(tmp_path / "empty")), monkeypatch)
    assert line.startswith("program: no image below")
    line = ending(lambda: ImageFolder(str(tmp_path / "empty")), monkeypatch, "cfg.py")
    assert line.startswith("cfg.py: no image below")


def test_a_bug_keeps_its_traceback(monkeypatch):
    def broken():
        return int("three")

    text = ending(broken, monkeypatch)
    assert "Traceback" in text and "in broken" in text
    assert text.endswith("program: this is a bug, not a mistake of yours: please report it with "
                         "the lines above")  # fmt: skip
    assert text_of(torch.cat, []) is None


def test_traceback_shows_all(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["program.py", "--traceback"])
    with pytest.raises(FileNotFoundError):
        run_tool(lambda: ImageFolder(str(tmp_path / "nowhere")))


def test_ctrl_c(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    assert ending(interrupted, monkeypatch) == 130
    assert capsys.readouterr().err == "\nprogram: interrupted\n"


def test_a_closed_pipe_is_no_error():
    command = f"{sys.executable} tools/list_backbones.py | head -1"
    done = subprocess.run(
        ["bash", "-c", f"{command}; echo ${{PIPESTATUS[0]}}"],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] in ("0", "141")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(errno.ENOSPC, "x", "run/iter_1.pth"), "run/iter_1.pth: No space left on device;"),
        (PermissionError(errno.EACCES, "x", "/root"), "/root: Permission denied; this user may"),
        (FileExistsError(errno.EEXIST, "x", "runs"), "runs: File exists; something of that name"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "out of memory on the GPU:"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you"), "out of memory"),
        (MemoryError(), "out of memory: a smaller batch"),
        (RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed. "), "a loader"),
        (RuntimeError("DataLoader worker (pid 3) is killed by signal: Bus error. It is possible "
                      "that dataloader's workers are out of shared memory"), "a loader worker ran"),
        (RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"),
         "a checkpoint could not be written"),
        (ModuleNotFoundError("No module named 'faiss'", name="faiss"), "the package faiss is not"),
        (RuntimeError("shape '[3]' is invalid for input of size 4"), None),
        (AssertionError("no"), None),
        (ModuleNotFoundError("No module named 'dinov3_mm.x'", name="dinov3_mm.x"), None),
    ],
)  # fmt: skip
def test_what_the_machine_refuses(error, text):
    found = explain(error)
    assert found == text if text is None else found.startswith(text)
    assert found is None or "\n" not in found


def test_a_file_system_that_takes_no_more(tmp_path):
    def save():
        torch.save(torch.zeros(100000), tmp_path / "weights.pth")

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        text = text_of(save)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert text is not None and ("could not be written" in text or "ulimit -f" in text)


@HOOKS.register_module()
class PickyHook:
    """Refuses everything but a few names, as classes of the hosts do."""

    def __init__(self, interval: int, begin: int = 0) -> None:
        self.interval = interval


def test_what_a_config_gets_wrong():
    assert text_of(MODELS.build, dict(type="DINOv3Vit")) == (
        "type='DINOv3Vit': there is no model of that name; did you mean 'DINOv3ViT'?"
    )
    assert "custom_imports" in text_of(MODELS.build, dict(type="Xyz"))
    assert text_of(HOOKS.build, dict(type="PickyHook", intervall=1)) == (
        "PickyHook has no argument 'intervall'; did you mean 'interval'?"
    )
    text = text_of(HOOKS.build, dict(type="PickyHook"))
    assert text == "PickyHook: missing 1 required positional argument: 'interval'"
    # MMEngine's own refusal
    assert text_of(HOOKS.build, dict(type="LoggerHook", interval=-1)).startswith("LoggerHook: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = dict(b=1\nc = 2\n", "line 1: SyntaxError"),
        ("a = 1\nb = a + undefined\n", "line 2: NameError: name 'undefined' is not defined"),
        ("_base_ = ['base.py']\n", "base.py, line 3: KeyError: lr"),
    ],
)
def test_a_config_that_is_no_python(text, message, tmp_path):
    (tmp_path / "base.py").write_text("a = dict(b=1)\n\nc = a['lr']\n")
    path = tmp_path / "cfg.py"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_config(path)


class Refusing(Dataset):
    """Fails in a loader worker, with a message for people or by mistake."""

    def __init__(self, folder=None):
        self.folder = folder

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return ImageFolder(self.folder) if self.folder else int("three")


def test_a_refusal_in_a_loader_worker_is_a_line_too(tmp_path):
    text = text_of(next, iter(DataLoader(Refusing(str(tmp_path)), num_workers=1)))
    assert text.startswith("no image below") and "Traceback" not in text
    assert text_of(next, iter(DataLoader(Refusing(), num_workers=1))) is None


@pytest.fixture
def ranks(monkeypatch, tmp_path):
    """Play several processes of one launch, one after the other."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "3")

    def play(rank: int, error: Exception):
        def fail():
            raise error

        monkeypatch.setenv("RANK", str(rank))
        return ending(fail, monkeypatch)

    return play


def test_ranks_say_one_thing_once(ranks, monkeypatch):
    full = OSError(errno.ENOSPC, "x", "iter.pth")
    assert ranks(0, full).startswith("program: iter.pth: No space left")
    assert ranks(1, full) == 1
    # what another has to say is its own
    assert ranks(2, OSError(errno.EACCES, "x", "b")).startswith("program (rank 2): b: Permission")
    # and what follows from it is no news
    assert ranks(0, OtherRankError("rank 2 failed: PermissionError")) == 1
    assert ranks(0, RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")) == 1


def test_a_rank_that_fails_alone_says_who_it_is(ranks):
    assert "(rank 1): b.pth" in ranks(1, OSError(errno.EIO, "x", "b.pth"))


@pytest.mark.parametrize("tool", [tool for tool in TOOLS if tool not in OTHERS])
def test_every_tool_has_the_option(tool, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"tools/{tool}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(REPOSITORY / "tools" / f"{tool}.py"), run_name="__main__")
    assert ended.value.code == 0
    assert "--traceback" in capsys.readouterr().out


def test_a_tool_of_a_host(tmp_path, monkeypatch):
    tool = tmp_path / "tool.py"
    tool.write_text("import sys\nfrom dinov3_mm.datasets import ImageFolder\n"
                    "assert sys.argv[1:] == ['a']\nImageFolder('/nowhere')\n")  # fmt: skip
    for words, error in (([], SystemExit), (["--traceback"], FileNotFoundError)):
        monkeypatch.setattr(sys, "argv", ["hosts.py", *words, str(tool), "a"])
        with pytest.raises(error) as ended:
            runpy.run_module("dinov3_mm.hosts", run_name="__main__")
        assert error is not SystemExit or "does not exist" in ended.value.code
