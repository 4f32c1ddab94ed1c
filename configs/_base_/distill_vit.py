# Distillation of a ViT. From the released file of ViT-L, the only one with values for a ViT: it ramps the learning rate up and keeps
# it, for 25,000 iterations, and names a "HRFT teacher" as the student's start. For the two phases before that no file is released;
# the paper has 1,000,000 iterations at constant schedules and 250,000 with a cosine to 0:
#   max_iters 1_250_000, lr dict(type='warmup_cosine', start=5e-5, peak=5e-5, end=0.0, warmup_iters=1_000_000), momentum 0.994
_base_ = ['./distill.py']

model = dict(
    backbone=dict(
        type='DINOv3ViT',
        # What the released trainer computes with; its configuration says bf16 here and fp32 for the 7B, and it reads neither.
        rope_dtype='bf16',
        rope_rescale_coords=2.0,
        with_cp='selective',      # matrix products and attention are kept, the rest is recomputed
    ),
    # Prototypes are the teacher's.
    dino_head=dict(type='DINOv3Head', hidden_dims=8192, bottleneck_dims=512, num_layers=3),
    ibot_head=dict(type='DINOv3Head', hidden_dims=4096, bottleneck_dims=384, num_layers=3),
)

max_iters = 25_000
train_cfg = dict(type='PretrainLoop', max_iters=max_iters, global_batch_size=1920)

train_dataloader = dict(
    transform=dict(
        type='MultiCrop',
        global_size=256,
        local_size=112,
        num_local=8,
        global_scale=(0.32, 1.0),
        local_scale=(0.05, 0.32),
        horizontal_flip=False,
    ),
    num_workers=2,
)

optim_wrapper = dict(paramwise_cfg=dict(layerwise_decay=0.99, patch_embed_lr_mult=0.2))

custom_hooks = [
    dict(
        type='OptimScheduleHook',
        # Half a cosine up, then constant: 5e-5 x 5.477 at a batch of 1920. The release counts 1776 images for its rule (6 for
        # each of 296 GPUs), so its factor is 5.268.
        lr=dict(type='warmup_cosine', start=0.0, peak=0.0, end=5e-5, cosine_iters=12_500),
        scaling_rule='sqrt_wrt_1024',
        weight_decay=0.04,
    ),
    dict(
        type='TeacherEMAHook',
        momentum=dict(type='warmup_cosine', start=0.994, peak=0.994, end=1.0),
        teacher_temp=0.07,
    ),
    dict(type='DistillationHook', checkpoint=None),  # --teacher sets the file
    dict(type='DiagnosisHook', interval=1000),
    dict(type='NonFiniteGuardHook'),
    dict(type='CollapseGuardHook'),
]
