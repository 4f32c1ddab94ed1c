"""Small Mask2Former segmentors, part of the segmentation configs."""

from mmengine.config import Config

from tests.shrink import CONVNEXT, CROP, WIDTH

NUM_CLASSES = 5


def shrink_mask2former(cfg: Config) -> None:
    """Adapter and head of the tiny backbones' widths, five classes, crops of 64 pixels.

    Two encoder and three decoder layers, five queries, 64 points; no released weights.
    """
    backbone, head = cfg.model.backbone, cfg.model.decode_head
    if backbone.type == "DINOv3ViTAdapter":
        backbone.update(num_heads=2, conv_channels=4, init_cfg=None)
        head.in_channels = [WIDTH] * 4
    else:
        head.in_channels = CONVNEXT["dims"]
    head.update(
        num_classes=NUM_CLASSES,
        feat_channels=WIDTH,
        num_heads=2,
        num_queries=5,
        num_points=64,
        num_encoder_layers=2,
        num_decoder_layers=3,
        encoder_ffn_channels=WIDTH,
        decoder_ffn_channels=WIDTH,
        init_cfg=None,
    )
    cfg.model.data_preprocessor.size = (CROP, CROP)
    if cfg.model.test_cfg.mode == "slide":
        cfg.model.test_cfg.update(crop_size=(CROP, CROP), stride=(CROP // 2, CROP // 2))
