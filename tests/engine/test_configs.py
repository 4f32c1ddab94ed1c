"""Every pretraining config of the project passes the check that ``tools/train.py`` makes."""

from pathlib import Path

import pytest
from mmengine.config import Config

import dinov3_mm  # noqa: F401
from dinov3_mm.engine.config import check_config, fill_defaults

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = [
    path
    for path in sorted(CONFIGS.glob("**/*.py"))
    if "_base_" not in path.parts and Config.fromfile(path).get("runner_type") == "FlexibleRunner"
]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_config(path):
    cfg = Config.fromfile(path)
    fill_defaults(cfg)
    check_config(cfg)
