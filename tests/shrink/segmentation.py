"""Small segmentation heads."""

import importlib

from mmengine.config import Config

from tests.shrink import CONVNEXT, CROP, NUM_LAYERS, WIDTH, every

NUM_CLASSES = 5
CHANNELS = 16


def shrink_segmentation(cfg: Config) -> None:
    """Heads of 16 channels with five classes, crops and windows of 64; no released head."""
    model = cfg.model
    for part in every(model):
        if (part.get("init_cfg") or {}).get("type") == "DINOv3HeadPretrained":
            part.init_cfg = None
    if "Mask2Former" in model.decode_head.type:
        importlib.import_module("tests.shrink.mask2former").shrink_mask2former(cfg)
        return
    model.data_preprocessor.size = (CROP, CROP)
    model.test_cfg.crop_size, model.test_cfg.stride = (CROP, CROP), (43, 43)
    model.decode_head.num_classes = NUM_CLASSES
    _RULES[model.decode_head.type](model)


def _shrink_linear(model: dict) -> None:
    several = not isinstance(model["decode_head"]["in_channels"], int)
    model["decode_head"]["in_channels"] = [WIDTH] * NUM_LAYERS if several else WIDTH


def _shrink_upernet(model: dict) -> None:
    head = model["decode_head"]
    head["channels"] = CHANNELS
    if model.get("neck"):
        model["neck"].update(in_channels=[WIDTH] * NUM_LAYERS, out_channels=CHANNELS)
        head["in_channels"] = [CHANNELS] * NUM_LAYERS
    else:
        head["in_channels"] = CONVNEXT["dims"]


def _shrink_dpt(model: dict) -> None:
    model["decode_head"].update(
        embed_dims=WIDTH,
        in_channels=[WIDTH] * NUM_LAYERS,
        channels=CHANNELS,
        post_process_channels=[8] * NUM_LAYERS,
    )


_RULES = {
    "DINOv3LinearSegHead": _shrink_linear,
    "UPerHead": _shrink_upernet,
    "DPTHead": _shrink_dpt,
}
