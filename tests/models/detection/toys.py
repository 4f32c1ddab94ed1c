"""The toy detector of the golden files, and batches for it."""

import torch
from mmengine.structures import InstanceData
from torch import Tensor

HEAD = {
    "type": "DINOv3PlainDETRHead",
    "num_classes": 5,
    "in_channels": 256,
    "embed_dims": 32,
    "num_heads": 4,
    "encoder_ffn_dims": 64,
    "decoder_ffn_dims": 40,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "rpe_hidden_dims": 24,
    "num_queries": 20,
    "num_one2many_queries": 10,
    "num_repeats": 2,
}


def vit(**arguments) -> dict:
    """A frozen ViT of width 32 with four layers."""
    return {
        "type": "DINOv3ViT",
        "arch": {"embed_dims": 32, "num_layers": 4, "num_heads": 2, "ffn_ratio": 2.0},
        "patch_size": 16,
        "out_indices": (0, 1, 2, 3),
        "frozen_stages": 4,
        **arguments,
    }


def detector(
    head: dict | None = None, num_windows: int | None = 2, max_per_img: int = 30, **kwargs
):
    """The detector with drawn weights, in eval mode."""
    from mmengine.registry import MODELS, DefaultScope

    import dinov3_mm.models.detection  # noqa: F401

    with DefaultScope.overwrite_default_scope("mmdet"):
        model = MODELS.build(
            {
                "type": "DINOv3PlainDETR",
                "backbone": {
                    "type": "DINOv3WindowedBackbone",
                    "backbone": vit(),
                    "num_windows": num_windows,
                },
                "bbox_head": {**HEAD, **(head or {})},
                "test_cfg": {"max_per_img": max_per_img},
                **kwargs,
            }
        )
    model.init_weights()
    return model.eval()


def sample(
    size: tuple[int, int],
    boxes: list | Tensor = (),
    labels: list | Tensor = (),
    scale_factor: tuple[float, float] = (1.0, 1.0),
):
    """A data sample of an image of ``size`` (height, width)."""
    from mmdet.structures import DetDataSample

    result = DetDataSample(
        metainfo={"img_shape": size, "ori_shape": size, "scale_factor": scale_factor}
    )
    result.gt_instances = InstanceData(
        bboxes=torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        labels=torch.as_tensor(labels, dtype=torch.long),
    )
    return result


def batch(*images: Tensor) -> Tensor:
    """Images padded with zeros to the size of the largest."""
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    result = torch.zeros(len(images), 3, height, width)
    for row, image in zip(result, images):
        row[:, : image.shape[1], : image.shape[2]] = image
    return result


def images(*sizes: tuple[int, int]) -> list[Tensor]:
    """Normalised images of the sizes (height, width)."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(3, *size, generator=generator) for size in sizes]
