# ViT-B/16, frozen. For configs that put a head on it; see docs/hosts.md.
num_layers = 12
embed_dims = 768
four_layers = [2, 5, 8, 11]
four_dims = [768] * 4
stride = 16
mean = [123.675, 116.28, 103.53]
std = [58.395, 57.12, 57.375]
backbone = dict(
    type='DINOv3ViT',
    arch='base',
    frozen_stages=num_layers,
    init_cfg=dict(type='DINOv3Pretrained', checkpoint='dinov3_vitb16_lvd1689m'),
)
