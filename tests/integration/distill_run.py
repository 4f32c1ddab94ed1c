"""Distillation runs that take seconds: a toy teacher, one student or several."""

import copy
from pathlib import Path

from mmengine.config import Config

from tests.integration.toy_run import toy_config, train, write_images

PER_STUDENT = ("OptimScheduleHook", "TeacherEMAHook", "DiagnosisHook")
# Parts of the model that all students of a run share.
TEACHER_KEYS = ("backbone", "dino_head", "ibot_head")


def write_teacher(folder: Path) -> tuple[Path, Path]:
    """A folder of images and the checkpoint of a teacher that saw them for three steps."""
    images = write_images(folder / "images", count=16)
    cfg = toy_config(images, folder / "teacher", train_cfg__max_iters=3)
    train(cfg, folder)
    return images, folder / "teacher/checkpoints/iter_00000003.pth"


def without_noise(backbone: dict) -> dict:
    """The toy backbone without stochastic depth and RoPE augmentation, in layers that matter."""
    quiet = dict(drop_path_rate=0.0, rope_jitter_coords=None, rope_rescale_coords=None)
    return {**backbone, **quiet, "layer_scale_init_value": 1.0}


def students_of(cfg: Config) -> dict[str, dict]:
    """Two students of the toy teacher: narrower, and with another depth."""
    head = dict(type="DINOv3Head", hidden_dims=24, bottleneck_dims=12)
    backbone = without_noise(cfg.model.backbone.to_dict())
    return {
        name: dict(
            backbone={**backbone, "arch": dict(embed_dims=width, num_layers=depth, num_heads=2)},
            dino_head=dict(head),
            ibot_head=dict(head),
        )
        for name, width, depth in (("narrow", 16, 2), ("deep", 24, 3))
    }


def distill_config(
    images: Path, teacher: Path, work_dir: Path, student: str, iters: int = 4, batch: int = 8
) -> Config:
    """One student alone."""
    cfg = toy_config(images, work_dir)
    parts = {key: cfg.model.pop(key) for key in TEACHER_KEYS}
    cfg.model.backbone = None
    parts["backbone"] = without_noise(parts["backbone"].to_dict())
    cfg.model.update(copy.deepcopy(students_of(toy_config(images, work_dir))[student]))
    cfg.model.distillation = parts
    return _finish(cfg, teacher, iters, batch)


def multi_config(
    images: Path,
    teacher: Path,
    work_dir: Path,
    iters: int = 4,
    batch: int = 8,
    ranks: dict[str, tuple[int, int]] | None = None,
) -> Config:
    """Both students in one run."""
    cfg = toy_config(images, work_dir)
    parts = {key: cfg.model.pop(key) for key in TEACHER_KEYS}
    parts["backbone"] = without_noise(parts["backbone"].to_dict())
    students = students_of(toy_config(images, work_dir))
    for name, place in (ranks or {}).items():
        students[name]["ranks"] = place
    cfg.model = dict(
        type="MultiDistillation",
        teacher=parts,
        students=students,
        data_preprocessor=cfg.model.data_preprocessor,
    )
    _finish(cfg, teacher, iters, batch)
    cfg.custom_hooks = [
        dict(type="PerStudentHook", hook=hook) if hook["type"] in PER_STUDENT else hook
        for hook in cfg.custom_hooks
    ]
    return cfg


def _finish(cfg: Config, teacher: Path, iters: int, batch: int) -> Config:
    cfg.custom_hooks.append(dict(type="DistillationHook", checkpoint=str(teacher)))
    cfg.train_cfg.update(global_batch_size=batch, max_iters=iters)
    cfg.default_hooks.checkpoint.interval = iters
    return cfg
