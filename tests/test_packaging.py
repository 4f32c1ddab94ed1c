"""Configs travel with the package, and MMEngine and mim find them by its index."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.fileio import load
from mmengine.hub import get_config

import dinov3_mm
from dinov3_mm.engine import read_config
from dinov3_mm.models.backbones.zoo import ZOO
from tests.hosts.lane import require_hosts

ROOT = Path(__file__).resolve().parent.parent
INDEX = load(ROOT / "model-index.yml")["Import"]
METAFILES = [pytest.param(ROOT / path, id=path) for path in INDEX]


def test_a_base_config_of_the_package(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "_base_ = 'dinov3_mm::dinov3/distill_vits16.py'\ntrain_cfg = dict(max_iters=7)\n"
    )
    cfg = read_config(path)
    original = Config.fromfile(ROOT / "configs/dinov3/distill_vits16.py")
    assert cfg.model == original.model and cfg.train_cfg.max_iters == 7


def test_a_config_through_the_index():
    cfg = get_config("dinov3_mm::dinov3/vit7b_high_res.py")
    assert cfg.model == Config.fromfile(ROOT / "configs/dinov3/vit7b_high_res.py").model


@pytest.mark.parametrize("path", METAFILES)
def test_metafile(path):
    content = load(path)
    collections = {item["Name"] for item in content["Collections"]}
    names = [model["Name"] for model in content["Models"]]
    assert len(names) == len(set(names))
    for item in content["Collections"]:
        assert (ROOT / item["README"]).is_file()
    for model in content["Models"]:
        assert model["In Collection"] in collections
        assert (ROOT / model["Config"]).is_file(), model["Config"]
        for result in model.get("Results", []):
            assert result["Task"] and result["Dataset"] and result["Metrics"]


def test_metafile_of_the_released_backbones():
    for model in load(ROOT / "configs/dinov3/metafile.yml")["Models"]:
        row = ZOO[model["Name"]]
        assert model["Metadata"]["Parameters"] == row.num_params
        assert model["Metadata"]["FLOPs"] == pytest.approx(row.gmacs * 1e9)
        assert model["Converted From"]["Weights"].endswith(row.hf_id)


@pytest.mark.slow
def test_wheel_holds_configs_and_tools_and_its_command_works(tmp_path):
    require_hosts()  # its environment has setuptools
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    source = tmp_path / "source"
    # A copy: building writes into the tree.
    tracked = subprocess.run(
        [
            "git",
            "ls-files",
            "dinov3_mm",
            "dinov3_mm_cli",
            "configs",
            "tools",
            "model-index.yml",
            "pyproject.toml",
        ]
        + ["README.md", "LICENSE"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\n")
    for name in filter(None, tracked):
        if not (ROOT / name).exists():
            continue
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            target.symlink_to((ROOT / name).readlink())
        else:
            target.write_bytes((ROOT / name).read_bytes())
    subprocess.run([*command, "--wheel-dir", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert dinov3_mm.__version__ in wheel.name
    held = set(zipfile.ZipFile(wheel).namelist())
    configs = {name for name in tracked if name.startswith("configs/") and name.endswith(".py")}
    assert configs and {f"dinov3_mm/.mim/{name}" for name in configs} <= held
    assert {"dinov3_mm/.mim/model-index.yml", "dinov3_mm/.mim/tools/train.py"} <= held
    use_the_command(wheel, tmp_path)


def use_the_command(wheel: Path, tmp_path: Path) -> None:
    """Install a wheel aside, and give its command outside of any checkout."""
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    install = ["install", "--quiet", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True)
    environment = {**os.environ, "PYTHONPATH": str(site), "CUDA_VISIBLE_DEVICES": ""}

    def give(*words: str, **variables: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [str(site / "bin/dinov3-mm"), *words],
            cwd=elsewhere,
            env={**environment, **variables},
            capture_output=True,
            text=True,
        )

    assert "dist_train" in give("--help").stdout
    assert "dinov3/continue_vits16" in give("configs").stdout.splitlines()
    tried = give("train", "quickstart/scenes_pretrain", "--dry-run")
    assert tried.returncode == 0, tried.stderr
    assert "schedules" in tried.stdout
    refused = give("train", "quickstart/scenes_pretrian", "--dry-run")
    assert refused.returncode == 1
    assert "did you mean 'quickstart/scenes_pretrain'" in refused.stderr
    job = ("slurm_train", "gpu", "job", "dinov3/continue_vits16", "work")
    script = give(*job, DRY_RUN="1").stdout
    assert f"{site.resolve()}/dinov3_mm/.mim/tools/train.py" in script
    assert f"{site.resolve()}/dinov3_mm/.mim/configs/dinov3/continue_vits16.py" in script
