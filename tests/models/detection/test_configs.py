"""What the detection configs say about backbones is what these are."""

import pytest
import torch
import yaml
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

import dinov3_mm.hosts  # noqa: F401
from tests.checkpoints.toys import redraw
from tests.downstream.steps import CONFIGS, configs_of
from tests.hosts.lane import require_hosts
from tests.models.detection import toys

require_hosts()

FOLDER = CONFIGS / "detection"


@pytest.mark.parametrize("path", configs_of("detection"))
def test_detector_fits_the_backbone(path):
    cfg = Config.fromfile(path)
    is_plain = cfg.model.type == "DINOv3PlainDETR"
    arguments = cfg.model.backbone.backbone if is_plain else cfg.model.backbone
    with torch.device("meta"):
        backbone = MODELS.build({**arguments, "init_cfg": None})
    if is_plain:
        quarter = backbone.num_layers // 4
        assert list(backbone.out_indices) == [quarter * i - 1 for i in (1, 2, 3, 4)]
        assert cfg.model.bbox_head.in_channels == 8 * backbone.embed_dims
    elif arguments.type == "DINOv3ViT":
        assert cfg.model.neck.in_channels == backbone.embed_dims
        assert cfg.model.neck.in_stride == backbone.patch_size
    else:
        dims = [backbone.feature_dims[i] for i in backbone.out_indices]
        assert cfg.model.neck.in_channels == dims
    tuned = path.stem.endswith("_tuned")
    assert any(p.requires_grad for p in backbone.parameters()) == tuned


def test_the_released_detector():
    cfg = Config.fromfile(FOLDER / "plain-detr_vit7b16_coco.py")
    assert cfg.model.backbone.num_windows == 3
    assert list(cfg.model.backbone.backbone.out_indices) == [9, 19, 29, 39]
    assert cfg.model.bbox_head.init_cfg.kind == "detector"
    assert cfg.model.test_cfg.max_per_img == 1500


def test_metafile_names_configs():
    content = yaml.safe_load((FOLDER / "metafile.yml").read_text())
    for model in content["Models"]:
        assert (CONFIGS.parent / model["Config"]).is_file()
        assert model["Name"] == (CONFIGS.parent / model["Config"]).stem


def test_predictions_of_flips_and_scales_are_merged():
    model = redraw(toys.detector())
    cfg = Config.fromfile(FOLDER / "plain-detr_vitb16_coco.py")
    with DefaultScope.overwrite_default_scope("mmdet"):
        merger = MODELS.build({**cfg.tta_model, "module": model})
    inputs, samples = [], []
    for size, scale, flip in [((96, 112), 1.0, False), ((144, 160), 1.5, True)]:
        sample = toys.sample(size, scale_factor=(scale, scale))
        sample.set_metainfo({"flip": flip, "flip_direction": "horizontal", "ori_shape": (96, 112)})
        inputs.append(toys.batch(*toys.images(size)))
        samples.append([sample])
    with torch.no_grad():
        predictions = [model.predict(x, s) for x, s in zip(inputs, samples)]
        (merged,) = merger.merge_preds([list(pair) for pair in zip(*predictions)])
    found = merged.pred_instances
    assert 0 < len(found) <= 60 and found.bboxes.isfinite().all()
