"""Continued pretraining in miniature: a released-like file, a folder with classes, a toy recipe."""

from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from PIL import Image

from dinov3_mm.datasets import SyntheticScenes
from dinov3_mm.models.backbones import DINOv3ConvNeXt, DINOv3ViT
from tests.integration.toy_run import REPOSITORY

# The backbone of the quickstart.
TOY_ARCH = dict(
    embed_dims=96,
    num_layers=4,
    num_heads=3,
    patch_size=8,
    num_registers=1,
    layer_scale_init_value=1.0,
)
TOY_CONVNEXT = dict(depths=[1, 1, 1, 1], dims=[16, 32, 48, 64])


def write_scenes(folder: Path, count: int, *, start: int = 0, size: int = 64) -> Path:
    """Write scenes as PNG files, one folder a category; return the folder."""
    scenes = SyntheticScenes(length=count, start=start, image_size=size)
    for name in scenes.classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
    for index in range(count):
        name = scenes.classes[scenes.label(index)]
        Image.fromarray(scenes.load_image(index)).save(folder / name / f"{start + index:06d}.png")
    return folder


@torch.no_grad()
def write_released_like(backbone: DINOv3ViT, path: Path) -> Path:
    """Save a backbone as official files are: bare keys, qkv bias and mask 0, bf16 periods."""
    state = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    for name, tensor in state.items():
        if name.endswith(("qkv.bias", "qkv.bias_mask")):
            tensor.zero_()
        elif name.endswith("periods"):
            state[name] = tensor.bfloat16().to(tensor.dtype)
    torch.save(state, path)
    return path


def random_released_like(path: Path, arch: dict = TOY_ARCH, seed: int = 0) -> Path:
    """A released-like file of random weights."""
    torch.manual_seed(seed)
    backbone = DINOv3ViT(arch=dict(arch))
    backbone.init_weights()
    return write_released_like(backbone, path)


def random_convnext(path: Path, seed: int = 0) -> Path:
    """A ConvNeXt file under official names, of random weights."""
    torch.manual_seed(seed)
    backbone = DINOv3ConvNeXt(arch=dict(TOY_CONVNEXT))
    backbone.init_weights()
    torch.save(backbone.state_dict(), path)
    return path


def toy_continue(recipe: str, work_dir: Path, **changes: object) -> Config:
    """A recipe of configs/dinov3 at toy size; ``changes`` are dotted paths with ``__`` for the dot.

    What is not named here is the recipe's, its hooks and its values 'auto' included. RoPE
    augmentation is off: its noise belongs to a process, and runs of one and two are compared.
    """
    cfg = Config.fromfile(REPOSITORY / f"configs/dinov3/{recipe}.py")
    cfg.work_dir = str(work_dir)
    is_vit = cfg.model.backbone.type == "DINOv3ViT"
    if is_vit:
        cfg.model.backbone.update(arch=dict(TOY_ARCH), patch_size=8, rope_rescale_coords=None)
    else:
        cfg.model.backbone.arch = dict(TOY_CONVNEXT)
    for head in (cfg.model.dino_head, cfg.model.ibot_head):
        head.update(hidden_dims=192, bottleneck_dims=64)
    crops = (48, 24) if is_vit else (128, 64)
    cfg.train_dataloader.transform.update(
        global_size=crops[0], local_size=crops[1], num_local=4, blur_kernel=3, blur_sigma=(0.1, 0.6)
    )
    if "gram_size" in cfg.train_dataloader.transform:
        cfg.train_dataloader.transform.gram_size = 3 * crops[0] // 2
    cfg.train_dataloader.update(num_workers=0, small_images="upscale")
    cfg.default_hooks.logger = dict(type="ProgressHook", interval=1, bar=False)
    next(hook for hook in cfg.custom_hooks if hook.type == "FolderEvalHook").image_size = 64
    cfg.merge_from_dict({key.replace("__", "."): value for key, value in changes.items()})
    return cfg


def labelled_noise(folder: Path, per_class: int = 12, size: int = 48) -> Path:
    """Three class folders of smooth noise in the class's colour."""
    rng = np.random.default_rng(0)
    for channel in range(3):
        (folder / f"class{channel}").mkdir(parents=True, exist_ok=True)
        for index in range(per_class):
            coarse = rng.integers(0, 160, (4, 4, 3), dtype=np.uint8)
            coarse[..., channel] += 90
            image = Image.fromarray(coarse).resize((size, size), Image.BICUBIC)
            image.save(folder / f"class{channel}" / f"{index:03d}.png")
    return folder
