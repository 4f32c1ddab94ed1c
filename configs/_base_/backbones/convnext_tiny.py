# ConvNeXt-Tiny, frozen. For configs that put a head on it; see docs/hosts.md. Its layers are the four stages.
num_layers = 4
embed_dims = 768
four_layers = [0, 1, 2, 3]
four_dims = [96, 192, 384, 768]
stride = 32
mean = [123.675, 116.28, 103.53]
std = [58.395, 57.12, 57.375]
backbone = dict(
    type='DINOv3ConvNeXt',
    arch='tiny',
    frozen_stages=num_layers,
    init_cfg=dict(type='DINOv3Pretrained', checkpoint='dinov3_convnext_tiny_lvd1689m'),
)
