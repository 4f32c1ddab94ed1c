# ViT-7B/16, stage 3 of 3: features that stay good at high resolution. 32 nodes of eight GPUs, 8 images each:
#   GPUS=256 bash tools/slurm_train.sh PARTITION hires configs/dinov3/vit7b_high_res.py WORK_DIR --from-stage STAGE_2_DIR
# A run of its own: iterations count from 0 with a fresh optimizer; student, EMA teacher and heads start from the EMA teacher of
# stage 2, which is also the Gram teacher throughout.
_base_ = ['../_base_/vit7b.py']

stage = dict(kind='high_res')

# Paper: 10,000, where the learning rate below ends its rise; released configuration: 30,000.
max_iters = 10_000
train_cfg = dict(type='PretrainLoop', max_iters=max_iters, global_batch_size=2048)

model = dict(
    backbone=dict(with_cp=True),              # everything is recomputed
    gram=dict(img_level=True),
    # Groups of 16 images over the GPUs, which must hold 16 or a divisor of it each.
    koleo=dict(distributed=True, group_size=16),
    # At 768 px 6,000 masked patches a GPU: logits and targets of 98,304 prototypes take 5 GiB whole, half of it in chunks.
    prototype_chunk_size=16_384,
)

train_dataloader = dict(
    # One set of sizes for the whole batch, drawn anew in every iteration.
    transform=dict(
        type='MultiResolutionCrop',
        size_sets=[
            dict(global_size=512, local_size=112, gram_size=768, ratio=0.3),
            dict(global_size=768, local_size=112, gram_size=1152, ratio=0.3),
            dict(global_size=768, local_size=168, gram_size=1152, ratio=0.3),
            dict(global_size=768, local_size=224, gram_size=1152, ratio=0.05),
            dict(global_size=768, local_size=336, gram_size=1152, ratio=0.05),
        ],
        num_local=8,
        global_scale=(0.32, 1.0),
        local_scale=(0.05, 0.32),
        horizontal_flip=False,
        gram_no_distortions=True,
        partial_patches=True,     # 168 = 10.5 patches, of which the backbone sees ten, as in the release
    ),
    # 10 for the one loader; released: 2 for each of five.
    num_workers=10,
)

custom_hooks = [
    dict(
        type='OptimScheduleHook',
        # Half a cosine up to 1.25e-5 x 5.657 = 7.07e-5 at a batch of 2048.
        lr=dict(type='warmup_cosine', start=0.0, peak=0.0, end=1.25e-5, cosine_iters=10_000),
        scaling_rule='sqrt_wrt_1024',
        weight_decay=0.04,
    ),
    dict(type='TeacherEMAHook', momentum=0.999, teacher_temp=0.07, dino_local_weight=0.5),
    # checkpoint: --from-stage sets it. Weight: 2 in the paper.
    dict(type='GramAnchorHook', checkpoint=None, weight=1.5),
    dict(type='DiagnosisHook', interval=250),
    dict(type='NonFiniteGuardHook'),
    dict(type='CollapseGuardHook'),
]

default_hooks = dict(checkpoint=dict(interval=250))
