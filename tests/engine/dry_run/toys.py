"""A pretraining config so small that a dry run of it takes a second."""

from mmengine.config import Config

import dinov3_mm.engine  # noqa: F401  (registers what configs name)

PROTOTYPES = 24
LAYERS = 2


def toy_config(*, global_batch_size: int = 8, **changes: object) -> Config:
    """32 px global and 16 px local crops; ``changes`` are paths, ``__`` standing for a dot."""
    head = dict(type="DINOv3Head", num_prototypes=PROTOTYPES, hidden_dims=32, bottleneck_dims=16)
    cfg = Config(
        dict(
            runner_type="FlexibleRunner",
            model=dict(
                type="DINOv3",
                backbone=dict(
                    type="DINOv3ViT",
                    arch=dict(embed_dims=32, num_layers=LAYERS, num_heads=2),
                    patch_size=8,
                ),
                dino_head=dict(head),
                ibot_head=dict(head),
                koleo=dict(weight=0.1, distributed=True),
            ),
            train_cfg=dict(type="PretrainLoop", max_iters=100, global_batch_size=global_batch_size),
            train_dataloader=dict(
                source=dict(type="ImageFolder", root="no/such/folder"),
                transform=dict(type="MultiCrop", global_size=32, local_size=16, num_local=2),
            ),
            optim_wrapper=dict(
                type="PretrainOptimWrapper",
                constructor="PretrainOptimConstructor",
                optimizer=dict(type="AdamW", lr=1e-3),
                clip_grad=3.0,
            ),
            custom_hooks=[
                dict(
                    type="OptimScheduleHook",
                    lr=dict(type="cosine", base=2e-3, final=1e-6, warmup_iters=11),
                    weight_decay=0.04,
                ),
                dict(type="TeacherEMAHook", momentum=0.99, teacher_temp=0.05),
            ],
        )
    )
    cfg.merge_from_dict({path.replace("__", "."): value for path, value in changes.items()})
    return cfg
