# ViT-L/16 on ImageNet-1k: the released fast recipe, without Gram anchoring. Four nodes of eight GPUs, 64 images each:
#   GPUS=32 bash tools/slurm_train.sh PARTITION vitl configs/dinov3/vitl_im1k.py WORK_DIR
# The released configuration and README name 82.0 to 82.2 % k-NN and 83.3 to 83.5 % linear top-1 on ImageNet-1k.
# Epochs of the release are 1250 iterations; here everything is in iterations.
_base_ = ['../_base_/pretrain_runtime.py']

# 65,536 prototypes for 1.28 M images.
head = dict(type='DINOv3Head', num_prototypes=65536, hidden_dims=2048, bottleneck_dims=256, num_layers=3)

model = dict(
    type='DINOv3',
    backbone=dict(
        type='DINOv3ViT',
        arch='vit_large',
        num_registers=0,
        mask_k_bias=False,
        norm_layer='layernorm',   # eps 1e-6; the 7B has 1e-5
        layer_scale_init_value=1e-5,
        rope_dtype='bf16',        # what the released trainer computes with, whatever its configuration says
        drop_path_rate=0.3,
    ),
    dino_head=head,
    ibot_head=head,
    koleo=dict(weight=0.1),       # among the images of one GPU
    compute_dtype='bf16',
)

# Parameters are gathered in bf16 and gradients reduced in fp32; the masters are fp32.
strategy = dict(type='FSDP2Strategy', param_dtype='bf16', reduce_dtype='fp32', compile_blocks=True)

max_iters = 125_000
train_cfg = dict(type='PretrainLoop', max_iters=max_iters, global_batch_size=2048)

train_dataloader = dict(
    source=dict(type='ImageFolder', root='data/imagenet/train'),
    # Blur with probability 0, 0.9 and 0.5 (MultiCrop's default): the released configuration means 1, 0.1 and 0.5, which its
    # code inverts.
    transform=dict(
        type='MultiCrop',
        global_size=224,
        local_size=96,
        num_local=8,
        global_scale=(0.32, 1.0),
        local_scale=(0.05, 0.32),
        horizontal_flip=True,
    ),
    # mask_scope='rank': as many masked patches on every GPU as on any other, as in the release.
    masking=dict(mask_probability=0.5, mask_ratio=(0.1, 0.5), mask_scope='rank'),
    num_workers=10,
)

optim_wrapper = dict(
    type='PretrainOptimWrapper',
    constructor='PretrainOptimConstructor',
    optimizer=dict(type='AdamW', lr=1e-3, betas=(0.9, 0.999)),  # the schedule sets the rate
    paramwise_cfg=dict(layerwise_decay=0.9, patch_embed_lr_mult=0.2),
    clip_grad=3.0,
)

custom_hooks = [
    dict(
        type='OptimScheduleHook',
        lr=dict(type='cosine', base=1e-3, final=1e-6, warmup_iters=12_500),  # base x 5.657 = 5.657e-3 at a batch of 2048
        scaling_rule='sqrt_wrt_1024',
        weight_decay=dict(type='cosine', base=0.04, final=0.4),
        freeze_last_layer_iters=1250,
    ),
    dict(
        type='TeacherEMAHook',
        momentum=dict(type='cosine', base=0.992, final=1.0),
        # A straight line that reaches 0.07 in its last iteration.
        teacher_temp=dict(
            type='cosine', base=0.07, final=0.07, start=0.04, warmup_iters=37_500, total_iters=37_500
        ),
    ),
    dict(type='DiagnosisHook', interval=1000),
    dict(type='NonFiniteGuardHook'),
    dict(type='CollapseGuardHook'),
    dict(
        type='KNNEvalHook',
        interval=12_500,
        train_source=dict(type='ImageFolder', root='data/imagenet/train', decode_min_side=448),
        test_source=dict(type='ImageFolder', root='data/imagenet/val', decode_min_side=448),
        image_size=224,
        resize_size=256,
        at_start=False,
        cache=False,
        num_workers=10,
    ),
]

default_hooks = dict(checkpoint=dict(interval=3750, max_to_keep=3))
