"""Small classification heads."""

from mmengine.config import Config

from tests.shrink import NUM_LAYERS, WIDTH, every

NUM_CLASSES = 5


def shrink_classification(cfg: Config) -> None:
    """Heads of the tiny backbones' widths with five classes; no released head."""
    head = cfg.model.head
    is_linear = head.type == "DINOv3LinearClsHead"
    head.in_channels = 2 * WIDTH if is_linear else WIDTH
    head.num_classes = cfg.model.data_preprocessor.num_classes = NUM_CLASSES
    if not is_linear:
        head.num_heads = 2
        head.num_layers = min(head.get("num_layers", 1), NUM_LAYERS)
    for part in every(cfg.model):
        if (part.get("init_cfg") or {}).get("type") == "DINOv3HeadPretrained":
            part.init_cfg = None
