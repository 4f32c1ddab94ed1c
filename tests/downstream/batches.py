"""Random images with labels, as the hosts' pipelines pack them."""

import torch
from mmengine.config import Config
from mmengine.structures import InstanceData, PixelData
from torch import Tensor

BATCH = 2


def images(size: tuple[int, int]) -> list[Tensor]:
    """``BATCH`` images (3, H, W) of uint8."""
    generator = torch.Generator().manual_seed(3)
    return list(torch.randint(0, 256, (BATCH, 3, *size), generator=generator, dtype=torch.uint8))


def classification(cfg: Config, size: tuple[int, int] = (64, 64)) -> dict:
    """Labels 0 and 1."""
    from mmpretrain.structures import DataSample

    samples = [DataSample().set_gt_label(i) for i in range(BATCH)]
    return {"inputs": images(size), "data_samples": samples}


def segmentation(cfg: Config, size: tuple[int, int] = (64, 64)) -> dict:
    """Halves of classes 0 and 1 with a strip to ignore."""
    return {"inputs": images(size), "data_samples": [_pixels(size, i) for i in range(BATCH)]}


def depth(cfg: Config, size: tuple[int, int] = (64, 64)) -> dict:
    """A slope from 1 to 6 with a strip without measurement."""
    samples = [_pixels(size, i) for i in range(BATCH)]
    slope = torch.linspace(1, 6, size[1]).expand(1, *size).clone()
    slope[..., :4] = 0
    for sample in samples:
        del sample.gt_sem_seg
        sample.gt_depth_map = PixelData(data=slope.clone())
    return {"inputs": images(size), "data_samples": samples}


def detection(cfg: Config, size: tuple[int, int] = (96, 96)) -> dict:
    """Two objects, with masks."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks

    boxes = torch.tensor([[4.0, 6.0, 40.0, 44.0], [20.0, 18.0, 60.0, 62.0]])
    masks = torch.zeros(2, *size, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist()):
        mask[y1:y2, x1:x2] = 1
    samples = []
    for index in range(BATCH):
        sample = DetDataSample(metainfo={**_sizes(size), "img_id": index})
        sample.gt_instances = InstanceData(
            bboxes=boxes.clone(),
            labels=torch.tensor([0, 1]),
            masks=BitmapMasks(masks.numpy(), *size),
        )
        samples.append(sample)
    return {"inputs": images(size), "data_samples": samples}


def _sizes(size: tuple[int, int]) -> dict:
    return {
        "img_shape": size,
        "ori_shape": size,
        "batch_input_shape": size,
        "scale_factor": (1.0, 1.0),
        "flip": False,
        "flip_direction": None,
    }


def _pixels(size: tuple[int, int], index: int):
    from mmseg.structures import SegDataSample

    labels = torch.zeros(1, *size, dtype=torch.long)
    labels[..., size[1] // 2 :] = 1
    labels[..., :4] = 255
    sample = SegDataSample(metainfo={**_sizes(size), "img_path": f"image-{index}.png"})
    sample.gt_sem_seg = PixelData(data=labels)
    return sample
