# ViT-L/16, satellite images, frozen. For configs that put a head on it; see docs/hosts.md.
num_layers = 24
embed_dims = 1024
four_layers = [4, 11, 17, 23]
four_dims = [1024] * 4
stride = 16
mean = [109.65, 104.805, 75.48]
std = [54.315, 39.78, 36.465]
backbone = dict(
    type='DINOv3ViT',
    arch='large_sat',
    frozen_stages=num_layers,
    init_cfg=dict(type='DINOv3Pretrained', checkpoint='dinov3_vitl16_sat493m'),
)
