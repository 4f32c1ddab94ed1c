"""Small depth heads."""

from mmengine.config import Config

from tests.shrink import CONVNEXT, NUM_LAYERS, WIDTH, every

NUM_BINS = 8


def shrink_depth(cfg: Config) -> None:
    """Heads of the tiny backbones' widths with eight bins; no released head."""
    head = cfg.model.decode_head
    is_pyramid = cfg.model.backbone.type == "DINOv3ConvNeXt"
    widths = CONVNEXT["dims"] if is_pyramid else [WIDTH] * NUM_LAYERS
    head.num_bins = NUM_BINS
    if head.type == "DINOv3LinearDepthHead":
        head.in_channels = widths[-1]
    else:
        head.in_channels = widths
        head.channels = 16
        head.hidden_channels = 8
        head.post_process_channels = [8, 12, 16, 20]
    for part in every(cfg.model):
        if (part.get("init_cfg") or {}).get("type") == "DINOv3HeadPretrained":
            part.init_cfg = None
