# ViT-7B/16, frozen. For configs that put a head on it; see docs/hosts.md.
num_layers = 40
embed_dims = 4096
four_layers = [9, 19, 29, 39]
four_dims = [4096] * 4
stride = 16
mean = [123.675, 116.28, 103.53]
std = [58.395, 57.12, 57.375]
backbone = dict(
    type='DINOv3ViT',
    arch='7b',
    frozen_stages=num_layers,
    init_cfg=dict(type='DINOv3Pretrained', checkpoint='dinov3_vit7b16_lvd1689m'),
)
