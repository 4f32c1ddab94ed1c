# ViT-S+/16, frozen. For configs that put a head on it; see docs/hosts.md.
num_layers = 12
embed_dims = 384
four_layers = [2, 5, 8, 11]
four_dims = [384] * 4
stride = 16
mean = [123.675, 116.28, 103.53]
std = [58.395, 57.12, 57.375]
backbone = dict(
    type='DINOv3ViT',
    arch='small_plus',
    frozen_stages=num_layers,
    init_cfg=dict(type='DINOv3Pretrained', checkpoint='dinov3_vits16plus_lvd1689m'),
)
