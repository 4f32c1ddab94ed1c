# The toy that tools/quickstart.sh trains, frozen.
num_layers = 4
embed_dims = 96
four_layers = [0, 1, 2, 3]
four_dims = [96] * 4
stride = 8
mean = [123.675, 116.28, 103.53]
std = [58.395, 57.12, 57.375]
backbone = dict(
    type='DINOv3ViT',
    arch=dict(embed_dims=96, num_layers=4, num_heads=3),
    patch_size=8,
    num_registers=1,
    layer_scale_init_value=1.0,
    frozen_stages=num_layers,
    init_cfg=dict(
        type='DINOv3Pretrained',
        checkpoint='work_dirs/quickstart/dinov3_backbone.safetensors',
    ),
)
