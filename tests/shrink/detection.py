"""Small detection heads."""

from mmengine.config import Config

from tests.shrink import CONVNEXT, NUM_LAYERS, WIDTH, every

NUM_QUERIES = 20


def shrink_detection(cfg: Config) -> None:
    """Heads of 32 channels, two layers and 20 queries; no released head."""
    model = cfg.model
    for part in every(model):
        if (part.get("init_cfg") or {}).get("type") == "DINOv3HeadPretrained":
            part.init_cfg = None
    if "neck" in model:
        _shrink_neck(model.neck)
    _RULES[model.type](model)


def _shrink_neck(neck: dict) -> None:
    neck["out_channels"] = WIDTH
    if isinstance(neck["in_channels"], int):
        neck["in_channels"] = WIDTH
    else:
        neck["in_channels"] = CONVNEXT["dims"][-len(neck["in_channels"]) :]


def _shrink_plain_detr(model: dict) -> None:
    model["bbox_head"].update(
        in_channels=2 * NUM_LAYERS * WIDTH,
        embed_dims=WIDTH,
        num_heads=4,
        encoder_ffn_dims=WIDTH,
        decoder_ffn_dims=WIDTH,
        rpe_hidden_dims=16,
        num_encoder_layers=2,
        num_decoder_layers=2,
        num_queries=NUM_QUERIES,
        num_one2many_queries=NUM_QUERIES,
    )


def _shrink_dino(model: dict) -> None:
    model["num_queries"] = NUM_QUERIES
    model["bbox_head"]["embed_dims"] = WIDTH
    model["positional_encoding"]["num_feats"] = WIDTH // 2
    for part in ("encoder", "decoder"):
        model[part]["num_layers"] = 2
        for layer in model[part]["layer_cfg"].values():
            layer["embed_dims"] = WIDTH
            if "feedforward_channels" in layer:
                layer["feedforward_channels"] = WIDTH


def _shrink_rcnn(model: dict) -> None:
    roi = model["roi_head"]
    model["rpn_head"].update(in_channels=WIDTH, feat_channels=WIDTH)
    roi["bbox_head"].update(in_channels=WIDTH, fc_out_channels=WIDTH)
    roi["bbox_roi_extractor"]["out_channels"] = WIDTH
    if "mask_head" in roi:
        roi["mask_head"].update(in_channels=WIDTH, conv_out_channels=WIDTH, num_convs=1)
        roi["mask_roi_extractor"]["out_channels"] = WIDTH


_RULES = {
    "DINOv3PlainDETR": _shrink_plain_detr,
    "DINO": _shrink_dino,
    "FasterRCNN": _shrink_rcnn,
    "MaskRCNN": _shrink_rcnn,
}
