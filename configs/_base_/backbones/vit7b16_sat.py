# ViT-7B/16, satellite images, frozen. For configs that put a head on it; see docs/hosts.md.
num_layers = 40
embed_dims = 4096
four_layers = [9, 19, 29, 39]
four_dims = [4096] * 4
stride = 16
mean = [109.65, 104.805, 75.48]
std = [54.315, 39.78, 36.465]
backbone = dict(
    type='DINOv3ViT',
    arch='7b',
    frozen_stages=num_layers,
    init_cfg=dict(type='DINOv3Pretrained', checkpoint='dinov3_vit7b16_sat493m'),
)
