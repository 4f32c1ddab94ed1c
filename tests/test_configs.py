"""Every config of the repository is understood and builds."""

from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.registry import HOOKS, MODELS

import dinov3_mm  # noqa: F401
from dinov3_mm.engine import check_config
from dinov3_mm.engine.config.defaults import fill_defaults

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*/*.py") if path.parent.name != "_base_")


def test_there_are_configs():
    assert len(CONFIGS) >= 5


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_config_is_valid_and_builds(path):
    cfg = Config.fromfile(path)
    fill_defaults(cfg)
    check_config(cfg)
    model = MODELS.build(cfg.model)
    model.init_weights()
    hooks = {type(HOOKS.build(hook)).__name__ for hook in cfg.custom_hooks}
    assert {"OptimScheduleHook", "TeacherEMAHook", "DiagnosisHook"} <= hooks
    assert ("GramAnchorHook" in hooks) == (model.gram is not None)
    sizes = cfg.train_dataloader.transform
    for size in (sizes.global_size, sizes.local_size, sizes.get("gram_size") or 0):
        assert size % model.student.backbone.patch_size == 0
