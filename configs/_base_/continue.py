# Continue pretraining from released weights: what all sizes have in common. Values 'auto' are derived from the number of
# images, the number of processes and the backbone when a run starts, and every derivation is logged; the rules are in
# dinov3_mm/engine/config/auto.py. A number in place of 'auto' stays.
_base_ = ['./pretrain_runtime.py']

images = dict(type='ImageFolder', root=None, decode_min_side=448)  # --data sets the root; twice the crop loses no detail

model = dict(
    type='DINOv3',
    backbone=dict(
        type='DINOv3ViT',
        rope_rescale_coords=2.0,  # as in the training of the released files
        # --weights sets the checkpoint. Released files hold a zero mask for the biases of q, k and v; with 1/0/1 those of
        # q and v train. What the model computes at the start is the same.
        init_cfg=dict(type='DINOv3Pretrained', checkpoint=None, reset_bias_mask=True),
    ),
    # The heads of the released models are not public: they start from random weights.
    dino_head=dict(type='DINOv3Head', num_prototypes='auto', hidden_dims=2048, bottleneck_dims=256),
    ibot_head=dict(type='DINOv3Head', num_prototypes='auto', hidden_dims=2048, bottleneck_dims=256),
    # Neighbours over all processes: a small batch of one GPU has few. Released: 0.1, within the GPU.
    koleo=dict(weight=0.1, distributed=True),
    compute_dtype='bf16',
)

# 'auto': torch.compile for blocks and losses on a GPU; False switches it off, e.g. to look at something quickly.
strategy = dict(type='PretrainStrategy', compile_blocks='auto')

train_cfg = dict(type='PretrainLoop', max_iters='auto', global_batch_size='auto')

train_dataloader = dict(
    # Held-out images make the scores of the run honest.
    source=dict(type='HeldOutSplit', source=images, part='train', every='auto'),
    # Crops of the ImageNet recipe. The released ViTs were distilled at 256 and 112: 30 % more compute.
    # horizontal_flip=False where left and right mean something.
    transform=dict(type='MultiCrop', global_size=224, local_size=96, num_local=8),
    masking=dict(mask_probability=0.5, mask_ratio=(0.1, 0.5)),
)

optim_wrapper = dict(
    type='PretrainOptimWrapper',
    constructor='PretrainOptimConstructor',
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999)),  # the schedule sets the rate
    paramwise_cfg=dict(
        layerwise_decay=0.9,      # lower layers are more general and change less; ImageNet recipe
        patch_embed_lr_mult=0.2,  # all recipes
        head_lr_mult=10.0,        # the heads are new: they need the rates of a training from scratch
    ),
    clip_grad=3.0,                # ImageNet and distillation recipes
)

custom_hooks = [
    dict(
        type='OptimScheduleHook',
        lr=dict(type='cosine', base='auto', final=1e-6, warmup_iters='auto'),
        weight_decay=0.04,        # constant as in the 7B stages; a short run has no time for 0.4
        backbone_freeze_iters='auto',
        backbone_warmup_iters='auto',
    ),
    dict(
        type='TeacherEMAHook',
        momentum=dict(type='cosine', base='auto', final=1.0),
        # The ramp of the ImageNet recipe in iterations, not in its share of the run: a faster one blurs the targets
        # sooner than new heads can sharpen them, and the loss stays at ln(prototypes). A short run stays near 0.04.
        teacher_temp=dict(type='linear', start=0.04, end=0.07, total_iters=37500),
    ),
    dict(type='DiagnosisHook', interval='auto'),
    dict(type='NonFiniteGuardHook'),
    dict(type='CollapseGuardHook'),
    dict(
        type='FolderEvalHook',    # before the first step, ten times, at the end
        interval='auto',
        source=images,
        every='auto',
        image_size=224,
    ),
    dict(type='SummaryHook'),
]

default_hooks = dict(checkpoint=dict(interval='auto'))
