"""``dinov3-mm``: its commands are the tools, it starts without torch, configs have names."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from dinov3_mm.engine.config.read import SHIPPED, config_names, find_config, read_config
from dinov3_mm.errors import ConfigError
from dinov3_mm_cli import COMMANDS, GROUPS, main

ROOT = Path(__file__).resolve().parent.parent
# Programs of a checkout, and what the launchers start.
NO_COMMANDS = {"dist_launch", "gpu_check", "quickstart"}


@pytest.fixture(autouse=True)
def words_of_this_process(monkeypatch):
    monkeypatch.setattr(sys, "argv", list(sys.argv))


def refusal(*words: str) -> str | int | None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    return ended.value.code


@pytest.mark.parametrize("words", [[], ["--help"], ["export"], ["extarct"]])
def test_help_needs_neither_torch_nor_mmengine(words):
    program = (
        "import atexit, sys\n"
        "atexit.register(lambda: print('HEAVY', {'torch', 'mmengine'} & set(sys.modules)))\n"
        f"from dinov3_mm_cli import main\nmain({words})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines()[-1] == "HEAVY set()", done.stderr
    if words in ([], ["--help"]):
        assert done.returncode == 0
        assert all(f"{title}:" in done.stdout for title in GROUPS)


@pytest.mark.parametrize(
    "name", [name for name, it in COMMANDS.items() if "launch" not in it.target]
)
def test_every_command_explains_itself(name, capsys):
    assert refusal(*name.split(), "--help") == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: dinov3-mm {name} ")
    assert "--traceback" in printed


def test_every_tool_is_a_command():
    targets = {command.target for command in COMMANDS.values()}
    for path in (ROOT / "tools").glob("*.py"):
        if path.stem in NO_COMMANDS:
            continue
        imported = {
            f"{node.module.removeprefix('dinov3_mm.commands.')}:{alias.name}"
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        assert imported & targets, path.name
    launchers = {path.stem for path in (ROOT / "tools").glob("*_t*.sh")}
    assert {f"{kind}_{job}" for kind in ("dist", "slurm") for job in ("train", "test")} <= launchers
    assert {name for name in COMMANDS if name.split("_")[0] in ("dist", "slurm")} == {
        name for name in launchers if name.split("_")[0] in ("dist", "slurm")
    }


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["trian", "c.py"], "'train'"),
        (["demo", "segmnet", "c.py"], "'demo segment'"),
        (["export", "model.onnx"], "'export onnx' or 'export torch'"),
        (["xyz"], "--help"),
    ],
)
def test_an_unknown_command(words, meant, capsys):
    assert refusal(*words) == 2
    assert meant in capsys.readouterr().err


def test_configs_are_listed(capsys):
    main(["configs", "continue_vits"])
    listed = capsys.readouterr().out.split()
    assert "dinov3/continue_vits16" in listed and len(listed) < len(config_names())
    assert all("continue_vits" in name for name in listed)
    assert "no config matches 'nothing'" in refusal("configs", "nothing")


@pytest.mark.parametrize("form", ["{}", "{}.py", "configs/{}.py", "dinov3_mm::{}.py"])
def test_a_config_by_name(form, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = find_config(form.format("dinov3/continue_vits16"))
    assert path == str((SHIPPED / "configs/dinov3/continue_vits16.py").resolve())
    assert read_config(form.format("dinov3/continue_vits16")).filename == path


def test_a_file_goes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dinov3").mkdir()
    (tmp_path / "dinov3/continue_vits16.py").write_text("mine = 1\n")
    assert read_config("dinov3/continue_vits16.py").mine == 1
    assert "mine" not in read_config("dinov3/continue_vits16")


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("dinov3/continue_vit16", "did you mean 'dinov3/continue_vits16'"),
        ("continue_vits16", "did you mean 'dinov3/continue_vits16'"),
        ("configs/dinov3/continue_vits61.py", "did you mean 'dinov3/continue_vits16'"),
        ("_base_/continue", "dinov3-mm configs"),
    ],
)
def test_no_config_of_that_name(given, meant, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=meant):
        find_config(given)


def test_a_missing_file_is_a_missing_file(tmp_path):
    for given in (tmp_path / "mine.py", "mine.py", "own/mine.py"):
        with pytest.raises(FileNotFoundError):
            read_config(given)
