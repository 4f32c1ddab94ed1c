# ViT-L/16, frozen. For configs that put a head on it; see docs/hosts.md.
num_layers = 24
embed_dims = 1024
four_layers = [4, 11, 17, 23]
four_dims = [1024] * 4
stride = 16
mean = [123.675, 116.28, 103.53]
std = [58.395, 57.12, 57.375]
backbone = dict(
    type='DINOv3ViT',
    arch='large',
    frozen_stages=num_layers,
    init_cfg=dict(type='DINOv3Pretrained', checkpoint='dinov3_vitl16_lvd1689m'),
)
