# ViT-7B/16, stage 1 of 3. 32 nodes of eight GPUs, 16 images each:
#   GPUS=256 bash tools/slurm_train.sh PARTITION vit7b configs/dinov3/vit7b_pretrain.py WORK_DIR
# Weights, moments and teacher fit eight GPUs of 80 GB, a batch of 4096 does not: with model.backbone.with_cp=True one of 1024 does,
# or 4096 with train_cfg.accumulate=8. The learning rate follows by its scaling rule. See docs/scaling.md.
_base_ = ['../_base_/vit7b.py']

max_iters = 1_000_000
train_cfg = dict(type='PretrainLoop', max_iters=max_iters, global_batch_size=4096)

train_dataloader = dict(
    # Blur with probability 0, 0.9 and 0.5 (MultiCrop's default): the released configuration means 1, 0.1 and 0.5, which its
    # code inverts.
    transform=dict(
        type='MultiCrop',
        global_size=256,
        local_size=112,
        num_local=8,
        global_scale=(0.32, 1.0),
        local_scale=(0.05, 0.32),
        horizontal_flip=False,
    ),
)

custom_hooks = [
    dict(
        type='OptimScheduleHook',
        # x 8 = 4e-4 at a batch of 4096, constant after the warm-up: the run has no planned end.
        lr=dict(type='warmup_cosine', start=0.0, peak=5e-5, end=5e-5, warmup_iters=100_000),
        scaling_rule='sqrt_wrt_1024',
        weight_decay=0.04,
        freeze_last_layer_iters=5000,
    ),
    dict(
        type='TeacherEMAHook',
        momentum=0.994,     # paper (appendix C): 0.999, which the released configurations have from stage 2 on
        teacher_temp=dict(type='warmup_cosine', start=0.04, peak=0.07, end=0.07, warmup_iters=100_000),
    ),
    dict(type='DiagnosisHook', interval=1000),
    dict(type='NonFiniteGuardHook'),
    dict(type='CollapseGuardHook'),
]
