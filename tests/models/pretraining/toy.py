"""A DINOv3 model of two narrow blocks and batches for it."""

import numpy as np
import torch

from dinov3_mm.datasets.collate import mask_tensors
from dinov3_mm.models.pretraining import DINOv3

BACKBONE = dict(
    type="DINOv3ViT",
    arch=dict(embed_dims=32, num_layers=2, num_heads=2),
    patch_size=8,
    num_registers=1,
    layer_scale_init_value=1.0,
    untie_global_and_local_cls_norm=True,
)
HEAD = dict(type="DINOv3Head", num_prototypes=24, hidden_dims=32, bottleneck_dims=16)


def build_toy(**settings) -> DINOv3:
    backbone = {**BACKBONE, **settings.pop("backbone", {})}
    model = DINOv3(backbone, HEAD, HEAD, **settings)
    model.init_weights()
    return model


def toy_batch(images: int = 3, *, num_local: int = 2, gram: bool = False, masked: int = 3) -> dict:
    """Collated uint8 batch: 32 px global crops (16 patches), 16 px local, 64 px Gram crops."""
    rng = np.random.default_rng(0)

    def crops(count, size):
        return torch.from_numpy(rng.integers(0, 256, (count, 3, size, size), dtype=np.uint8))

    masks = np.zeros((2 * images, 16), bool)
    masks[:masked] = rng.random((masked, 16)) < 0.4
    batch = dict(
        global_crops=crops(2 * images, 32),
        local_crops=crops(num_local * images, 16),
        positions=torch.arange(images),
        iteration=0,
        broken=[],
        **mask_tensors(masks),
    )
    if gram:
        batch["gram_crops"] = crops(2 * images, 64)
    return batch


def prepared(model: DINOv3, batch: dict) -> dict:
    return model.data_preprocessor(batch, True)["inputs"]
