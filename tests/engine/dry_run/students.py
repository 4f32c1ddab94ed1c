"""A distillation into two students, so small that a dry run of it takes seconds."""

from mmengine.config import Config

from tests.engine.dry_run.toys import toy_config

TEACHER_BOTTLENECK = 16


def two_students(*, ranks: dict[str, tuple[int, int]] | None = None, **changes: object) -> Config:
    """A narrow and a wide ViT; ``ranks`` are their groups."""
    cfg = toy_config(**changes)
    backbone, head = cfg.model.backbone, cfg.model.dino_head
    own_head = {key: value for key, value in head.items() if key != "num_prototypes"}
    students = {
        name: dict(backbone=dict(arch=dict(embed_dims=dims, num_layers=2, num_heads=2)))
        for name, dims in (("narrow", 32), ("wide", 64))
    }
    for name, given in (ranks or {}).items():
        students[name]["ranks"] = given
    cfg.model = dict(
        type="MultiDistillation",
        teacher=dict(backbone=backbone, dino_head=head, ibot_head=head),
        student=dict(
            backbone=backbone, dino_head=own_head, ibot_head=own_head, koleo=dict(weight=0.1)
        ),
        students=students,
    )
    hooks = [dict(type="PerStudentHook", hook=hook) for hook in cfg.custom_hooks]
    cfg.custom_hooks = [dict(type="DistillationHook", checkpoint=None), *hooks]
    return cfg
