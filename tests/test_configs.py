"""Every config of the repository is understood and builds."""

import copy
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import HOOKS, MODELS, STRATEGIES, TRANSFORMS

import dinov3_mm  # noqa: F401
from dinov3_mm.datasets.loader import check_sizes
from dinov3_mm.engine import check_config
from dinov3_mm.engine.config.auto import DataFacts, resolve_auto
from dinov3_mm.engine.config.check import fill_defaults, token_stride_of
from dinov3_mm.engine.optim import build_schedule

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*/*.py") if path.parent.name != "_base_")
LOADED = {path: Config.fromfile(path) for path in CONFIGS}
PRETRAINING = [
    path for path, cfg in LOADED.items() if cfg.get("train_cfg", {}).get("type") == "PretrainLoop"
]
DOWNSTREAM = [path for path in CONFIGS if path not in PRETRAINING]
# Larger models are built without storage.
LARGEST_WITH_STORAGE = 20e6
SCHEDULES = {"lr", "weight_decay", "momentum", "teacher_temp", "dino_local_weight", "weight"}


def build(cfg: Config):
    """The model: initialised where it is small."""
    model_cfg = copy.deepcopy(cfg.model)
    if "backbone" in model_cfg:
        model_cfg.backbone.init_cfg = None  # the weights are not here
    with torch.device("meta"):
        model = MODELS.build(model_cfg)
    if sum(param.numel() for param in model.parameters()) <= LARGEST_WITH_STORAGE:
        model = MODELS.build(model_cfg)
        model.init_weights()
    return model


def check_schedules(hook: dict, total_iters: int):
    """Every schedule of a hook fits the run."""
    for name in SCHEDULES & hook.keys():
        if hook[name] is not None:
            schedule = build_schedule(hook[name], total_iters)
            assert schedule(total_iters - 1) >= 0


def test_there_are_configs():
    assert len(PRETRAINING) >= 47


@pytest.mark.parametrize("path", PRETRAINING, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_config_is_valid_and_builds(path):
    cfg = Config.fromfile(path)
    fill_defaults(cfg)
    check_config(cfg)
    resolve_auto(cfg, world_size=2, data=DataFacts(num_images=50_000, num_train=48_000, every=25))
    check_config(cfg, world_size=2)
    model = build(cfg)
    hook_cfgs = [hook.get("hook", hook) for hook in cfg.custom_hooks]
    hooks = {HOOKS.build(hook) and plain.type for hook, plain in zip(cfg.custom_hooks, hook_cfgs)}
    assert {"OptimScheduleHook", "TeacherEMAHook", "DiagnosisHook"} <= hooks
    assert ("DistillationHook" in hooks) == hasattr(model, "distillation_teacher")
    models = list(getattr(model, "students", {"": model}).values())
    strides = sorted({each.student.backbone.token_stride for each in models})
    patches = cfg.train_dataloader.masking.patch_size
    assert token_stride_of(cfg) == patches == (strides if len(strides) > 1 else strides[0])
    for each in models:
        assert ("GramAnchorHook" in hooks) == (each.gram is not None)
    for sizes in TRANSFORMS.build(cfg.train_dataloader.transform).variants:
        assert ("GramAnchorHook" in hooks) == (sizes.gram_size is not None)
        for stride in strides:
            check_sizes(sizes, stride)
    for hook in hook_cfgs:
        check_schedules(hook, cfg.train_cfg.max_iters)
    assert STRATEGIES.get(cfg.strategy.type) is not None


@pytest.mark.parametrize("path", DOWNSTREAM, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_files_are_read_the_one_way(path):
    """No loader of a host; a file that cannot be read is replaced in training alone."""
    cfg = LOADED[path]
    pipelines = {"tta": cfg.get("tta_pipeline", [])}
    for phase in ("train", "val", "test"):
        dataset = cfg[f"{phase}_dataloader"].dataset
        while "dataset" in dataset:
            dataset = dataset.dataset
        pipelines[phase] = dataset.pipeline
    for phase, pipeline in pipelines.items():
        loaders = [step for step in _steps(pipeline) if step["type"].startswith("Load")]
        broken = "replace" if phase == "train" else "error"
        for step in loaders:
            if step["type"] == "LoadAnnotations":
                assert step.with_bbox and not step.get("with_seg")  # of the annotation file
            else:
                assert step["type"] in ("LoadMissingImage", "LoadLabelMap", "LoadDepthMap")
                assert step.get("broken", "error") == broken, (phase, step)
        assert phase == "tta" or loaders


def _steps(part):
    """Every step of a pipeline, also of those within steps."""
    if isinstance(part, dict):
        yield part
        yield from _steps(part.get("transforms", []))
    elif isinstance(part, (list, tuple)):
        for step in part:
            yield from _steps(step)
