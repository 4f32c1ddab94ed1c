# ViT-S, -B and -L from scratch on your images, stage 1 of 3: the recipe of the 7B at a size for 1 to 8 GPUs. The released models of
# these sizes were distilled from the 7B; nobody has published this recipe for them, so each value says where it is from.
#   bash tools/dist_train.sh configs/dinov3/vits_pretrain.py GPUS --data DIR
# 'auto': derived from the images, the processes and the backbone, see dinov3_mm/engine/config/auto.py.
_base_ = ['./pretrain_runtime.py']

images = dict(type='ImageFolder', root=None)  # --data sets the root

model = dict(
    type='DINOv3',
    backbone=dict(
        type='DINOv3ViT',
        untie_global_and_local_cls_norm=True,  # 7B: steadier late in training; used in training only
        rope_rescale_coords=2.0,               # 7B
    ),
    # Prototypes follow images and batch; width of the heads as in the ImageNet recipe, the 7B has 8192 and 4096.
    dino_head=dict(type='DINOv3Head', num_prototypes='auto', hidden_dims=2048, bottleneck_dims=256),
    ibot_head=dict(type='DINOv3Head', num_prototypes='auto', hidden_dims=2048, bottleneck_dims=256),
    koleo=dict(weight=0.1, distributed=True),  # neighbours over all GPUs: a small batch of one has few
    compute_dtype='bf16',
)

# 'auto': torch.compile for blocks and losses on a GPU; False switches it off, e.g. to look at something quickly.
strategy = dict(type='PretrainStrategy', compile_blocks='auto')

# A tenth of the 7B's iterations: at a batch of 1024 80 epochs of ImageNet-1k. The schedules have no end, so a run may be longer.
max_iters = 100_000
train_cfg = dict(type='PretrainLoop', max_iters=max_iters, global_batch_size='auto')

train_dataloader = dict(
    source=dict(type='HeldOutSplit', source=images, part='train', every='auto'),
    # 7B; the ImageNet recipe has 224 and 96. Flips as in the latter: horizontal_flip=False where left and right mean something.
    transform=dict(type='MultiCrop', global_size=256, local_size=112, num_local=8),
    masking=dict(mask_probability=0.5, mask_ratio=(0.1, 0.5)),
)

optim_wrapper = dict(
    type='PretrainOptimWrapper',
    constructor='PretrainOptimConstructor',
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.99)),             # beta2 of the 7B: it outlasts constant rates
    paramwise_cfg=dict(layerwise_decay=0.9, patch_embed_lr_mult=0.2),     # ImageNet recipe; 0.98 is for 40 layers
    clip_grad=3.0,                                                        # ImageNet recipe; 30 is for 6.7 B gradients
)

custom_hooks = [
    dict(
        type='OptimScheduleHook',
        # Constant, so that the stages join and a run can be prolonged. The warm-up is a tenth of the run, as for the 7B.
        lr=dict(type='warmup_cosine', start=0.0, peak=None, end=None, warmup_iters=10_000),
        scaling_rule='sqrt_wrt_1024',
        weight_decay=0.04,
        freeze_last_layer_iters=1250,          # ImageNet recipe
    ),
    dict(
        type='TeacherEMAHook',
        momentum='auto',
        teacher_temp=dict(type='warmup_cosine', start=0.04, peak=0.07, end=0.07, warmup_iters=10_000),
    ),
    dict(type='DiagnosisHook', interval='auto'),
    dict(type='NonFiniteGuardHook'),
    dict(type='CollapseGuardHook'),
    dict(type='FolderEvalHook', interval='auto', source=images, every='auto', image_size=256),
    # Do I need Gram anchoring? Linear segmentation of synthetic scenes needs no labels of yours. If its mIoU falls while the
    # evaluation above still rises, stage 2 is for you.
    dict(
        type='DenseProbeHook',
        interval='auto',
        train_source=dict(type='SyntheticScenes', length=400, image_size=256),
        test_source=dict(type='SyntheticScenes', length=200, start=1_000_000, image_size=256),
        image_size=256,
    ),
    dict(type='SummaryHook'),
]

# One export in ten stays: a Gram teacher can be chosen among them.
default_hooks = dict(checkpoint=dict(interval=1000, keep_every=10_000))
