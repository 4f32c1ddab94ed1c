"""The distillation configs against the reference schedules and the released values."""

import copy

import pytest

from dinov3_mm.engine.optim import build_schedule
from dinov3_mm.models.pretraining.multi_distillation import merged_student

from ..golden import load_golden
from .test_official_recipes import hook, lookup, recipe, schedules

DESCRIPTION, TENSORS = load_golden("ssl_schedules")
GOLDEN = {
    "distill_vitl16": "vitl_distilled_hrft",
    **{f"distill_convnext_{s}": f"convnext_{s}_test" for s in ("tiny", "small", "base", "large")},
}
QUANTITIES = ("lr", "last_layer_lr", "weight_decay", "momentum", "teacher_temp")


@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("name", GOLDEN)
def test_schedule_is_the_released_one(name, quantity):
    """At the batch that the reference counts for its learning-rate rule."""
    cfg = recipe(name)
    setting = DESCRIPTION["recipes"][GOLDEN[name]]
    cfg.train_cfg.global_batch_size = setting["world_size"] * setting["batch_size_per_gpu"]
    schedule = build_schedule(schedules(cfg)[quantity], cfg.train_cfg.max_iters)
    freeze = hook(cfg, "OptimScheduleHook").get("freeze_last_layer_iters", 0)
    frozen = freeze if quantity == "last_layer_lr" else 0
    key = f"{GOLDEN[name]}.{quantity}"
    iterations, values = TENSORS[f"{key}.idx"].tolist(), TENSORS[f"{key}.val"].tolist()
    for it, value in zip(iterations, values, strict=True):
        assert abs((0.0 if it < frozen else schedule(it)) - value) <= 1e-12


VALUES = {  # released: ViT-L, ConvNeXts
    "train_cfg.max_iters": (25_000, 625_000),
    "train_cfg.global_batch_size": (1920, 4096),
    "model.distillation.dino_head.num_prototypes": (262_144, 262_144),
    "model.distillation.ibot_head.num_prototypes": (98_304, 98_304),
    "model.distillation.resolution_scale": (None, 2.0),
    "model.dino_head.hidden_dims": (8192, 2048),
    "model.dino_head.bottleneck_dims": (512, 256),
    "model.ibot_head.hidden_dims": (4096, 2048),
    "model.ibot_head.bottleneck_dims": (384, 256),
    "model.koleo.weight": (0.1, 0.1),
    "model.backbone.rope_rescale_coords": (2.0, None),
    "model.backbone.drop_path_rate": (None, None),  # 0, the default
    "optim_wrapper.optimizer.betas": ((0.9, 0.999), (0.9, 0.999)),
    "optim_wrapper.paramwise_cfg.layerwise_decay": (0.99, 1.0),
    "optim_wrapper.clip_grad": (3.0, 3.0),
    "train_dataloader.masking.patch_size": (16, 32),
    "train_dataloader.masking.mask_ratio": ((0.1, 0.5), (0.1, 0.5)),
    "train_dataloader.transform.global_size": (256, 512),
    "train_dataloader.transform.local_size": (112, 224),
    "train_dataloader.transform.horizontal_flip": (False, True),
    "default_hooks.checkpoint.interval": (3750, 3750),
}


@pytest.mark.parametrize("path", VALUES)
def test_value_is_the_released_one(path):
    found = [lookup(recipe(name), path) for name in GOLDEN]
    assert tuple(found) == VALUES[path][:1] + VALUES[path][1:] * 4


def test_students_of_the_released_layout():
    cfg = recipe("distill_multi")
    students = cfg.model.students
    ranks = {name: tuple(student.ranks) for name, student in students.items()}
    assert ranks == {"vits": (0, 48), "vitsp": (48, 96), "vitb": (96, 176), "vitl": (176, 296)}
    merged = merged_student(cfg.model.student, students.vitl)
    alone = copy.deepcopy(recipe("distill_vitl16").model.to_dict())
    for key in ("backbone", "dino_head", "ibot_head", "koleo"):
        assert merged[key] == alone[key]
    assert cfg.model.teacher == alone["distillation"]
