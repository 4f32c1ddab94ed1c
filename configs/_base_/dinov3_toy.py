# A DINOv3 small enough to learn on two CPU cores in minutes: patch 8, 48 px crops, 4 blocks of width 96.
# Where a value differs from the released recipes, the comment says why a short run needs it.
backbone = dict(
    type='DINOv3ViT',
    arch=dict(embed_dims=96, num_layers=4, num_heads=3),
    patch_size=8,
    num_registers=1,              # released: 4; a local crop has 9 patches here
    layer_scale_init_value=1.0,   # released: 1e-5, which takes thousands of steps to open the blocks
    rope_rescale_coords=2.0,
)
# Few prototypes make coarse clusters, which a short run can fill; released: 65,536 and more.
head = dict(type='DINOv3Head', num_prototypes=128, hidden_dims=384, bottleneck_dims=96)

model = dict(
    type='DINOv3',
    backbone=backbone,
    dino_head=head,
    ibot_head=head,
    koleo=dict(weight=1.0, distributed=True),  # released: 0.1; spreads the features while DINO's targets are vague
    compute_dtype='bf16',
)

optim_wrapper = dict(
    type='PretrainOptimWrapper',
    constructor='PretrainOptimConstructor',
    optimizer=dict(type='AdamW', lr=2e-3, betas=(0.9, 0.99)),
    paramwise_cfg=dict(layerwise_decay=1.0, patch_embed_lr_mult=1.0),  # released: 0.9 and 0.2
    clip_grad=3.0,
)

train_dataloader = dict(
    transform=dict(
        type='MultiCrop',
        global_size=48,
        local_size=24,
        num_local=4,              # released: 8; fewer, so that more images are seen in a minute
        global_scale=(0.4, 1.0),  # released: 0.32 to 1
        local_scale=(0.15, 0.5),  # released: 0.05 to 0.32, two pixels of an object at this size
        blur_kernel=3,            # released: 9 on 224 px
        blur_sigma=(0.1, 0.6),
    ),
    masking=dict(mask_probability=0.5, mask_ratio=(0.1, 0.5)),
    num_workers=0,                # the two cores are busy with training
)
