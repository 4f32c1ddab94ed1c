"""What the classification configs say about backbones and images is what these are."""

import numpy as np
import pytest
import torch
import yaml
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import MODELS, DefaultScope
from PIL import Image
from torchvision.transforms import v2

import dinov3_mm  # noqa: F401
from dinov3_mm.models.backbones.zoo import zoo_row
from tests.downstream.steps import CONFIGS, configs_of
from tests.hosts.lane import require_hosts

require_hosts()


@pytest.mark.parametrize("path", configs_of("classification"))
def test_head_fits_the_backbone(path):
    cfg = Config.fromfile(path)
    with torch.device("meta"):
        backbone = MODELS.build({**cfg.model.backbone, "init_cfg": None})
    per_token = {"DINOv3LinearClsHead": 2, "DINOv3AttentionHead": 1}[cfg.model.head.type]
    assert cfg.model.head.in_channels == per_token * backbone.embed_dims
    tuned = path.stem.endswith("_tuned")
    assert backbone.frozen_stages == (-1 if tuned else backbone.num_layers)
    assert any(p.requires_grad for p in backbone.parameters()) == tuned


def test_the_released_classifier_has_its_sizes():
    cfg = Config.fromfile(CONFIGS / "classification/linear_vit7b16_in1k.py")
    assert (cfg.model.head.num_classes, cfg.model.head.in_channels) == (1000, 8192)
    assert cfg.model.head.init_cfg.kind == "linear_classifier"


@pytest.mark.parametrize("size", [(300, 401), (333, 256), (100, 90)])
@pytest.mark.parametrize("name", ["linear_vits16_in1k", "linear_vits16_folder"])
def test_evaluation_transform_is_that_of_the_protocol(name, size, tmp_path):
    cfg = Config.fromfile(CONFIGS / f"classification/{name}.py")
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "image.png")
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        pipeline = Compose(cfg.val_dataloader.dataset.pipeline)
        model = MODELS.build(cfg.model.data_preprocessor)
        packed = pipeline({"img_path": str(tmp_path / "image.png"), "gt_label": 1})
    given = model({"inputs": [packed["inputs"]]})["inputs"][0]
    protocol = v2.Compose(
        [
            v2.Resize(256, interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
            v2.CenterCrop(224),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    expected = protocol(Image.open(tmp_path / "image.png").convert("RGB"))
    assert given.shape == expected.shape
    assert (given - expected).abs().max() < 1e-5


def test_metafile_describes_the_linear_configs():
    models = yaml.safe_load((CONFIGS / "classification/metafile.yml").read_text())["Models"]
    assert len(models) == 10
    for model in models:
        cfg = Config.fromfile(CONFIGS.parent / model["Config"])
        row, head = zoo_row(model["Metadata"]["Backbone"]), cfg.model.head
        assert cfg.model.backbone.init_cfg.checkpoint == model["Metadata"]["Backbone"]
        classifier = (head.in_channels + 1) * head.num_classes
        assert model["Metadata"]["Parameters"] == row.num_params + classifier
