"""What is said when a host is missing, and the guard of mmpretrain, on stand-ins of the hosts."""

import os
import subprocess
import sys

import pytest

from dinov3_mm import hosts

GUARDED = (
    "import dinov3_mm.hosts; from mmpretrain.utils import dependency as d; print(d.WITH_MULTIMODAL)"
)


def pretend(monkeypatch, *missing: str) -> None:
    monkeypatch.setattr(hosts, "find_spec", lambda name: None if name in missing else object())


def test_a_missing_host_names_the_command_and_the_extra(monkeypatch):
    pretend(monkeypatch, "mmseg")
    with pytest.raises(ImportError, match=r"mmseg is not .*setup_env.sh ops'.*dinov3_mm\[seg\]"):
        hosts.require_host("mmseg")
    pretend(monkeypatch, "mmcv")
    with pytest.raises(ImportError, match=r"mmcv is not installed.*dinov3_mm\[det\]"):
        hosts.require_host("mmdet")


@pytest.mark.parametrize("name", ["mmcv.ops", "mmdet"])
def test_an_mmcv_without_operators_is_told_apart(name, monkeypatch):
    pretend(monkeypatch, "mmcv._ext")
    with pytest.raises(ImportError, match=f"{name} needs the compiled operators of mmcv"):
        hosts.require_host(name)


def test_an_unknown_host_gets_the_nearest_name():
    with pytest.raises(ValueError, match=r"'mmdte' is no host package; did you mean 'mmdet'\?"):
        hosts.require_host("mmdte")


@pytest.mark.parametrize(("version", "flag"), [("4.57.6", "True"), ("5.0.0", "False")])
def test_multimodal_models_are_left_out_from_transformers_5_on(version, flag, tmp_path):
    metadata = tmp_path / f"transformers-{version}.dist-info" / "METADATA"
    dependency = tmp_path / "mmpretrain" / "utils" / "dependency.py"
    modules = ("mmcv/__init__.py", "mmpretrain/__init__.py", "mmpretrain/utils/__init__.py")
    for path in (metadata, dependency, *(tmp_path / module for module in modules)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    metadata.write_text(f"Metadata-Version: 2.1\nName: transformers\nVersion: {version}\n")
    dependency.write_text("WITH_MULTIMODAL = True\n")
    done = subprocess.run(
        [sys.executable, "-c", GUARDED],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == flag, done.stderr
