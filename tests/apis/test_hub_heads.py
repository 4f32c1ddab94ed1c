"""The official names of models with heads: plain calls, the host's numbers, clear refusals."""

import pytest
import torch
from mmengine.config import Config

import hubconf
from dinov3_mm.apis.hub_heads import CONFIGS, ENTRIES, build_head_model, official_head_model
from tests.hosts.lane import require_hosts
from tests.shrink import shrink

require_hosts()


def toy(name):
    entry = ENTRIES[name]
    torch.manual_seed(0)
    cfg = shrink(Config.fromfile(CONFIGS / entry.config), entry.config.partition("/")[0])
    return build_head_model(cfg, entry.model, pretrained=False)


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_classifier(images):
    model = toy("dinov3_vit7b16_lc")
    logits = model(images)
    parts = model.model
    (tokens,) = parts.neck(parts.backbone(images))
    assert torch.equal(logits, parts.head.fc(tokens)) and logits.shape[0] == 2


@pytest.mark.parametrize("name", ["dinov3_vit7b16_dd", "dinov3_vitl16_chmv2"])
@torch.no_grad()
def test_depther(images, name):
    depth = toy(name)(images)
    assert depth.shape == (2, 1, 64, 96) and (depth > 0).all()


@torch.no_grad()
def test_segmentor(images):
    model = toy("dinov3_vit7b16_ms")
    output = model(images)
    queries, classes = output["pred_logits"].shape[1:]
    assert output["pred_masks"].shape == (2, queries, 16, 24)
    maps = model.predict(images, rescale_to=(32, 48))
    assert maps.shape == (2, classes - 1, 32, 48)
    metas = [{"img_shape": (64, 96)}] * 2
    host = model.model.encode_decode(images, metas)
    torch.testing.assert_close(model.predict(images), host, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_detector():
    model = toy("dinov3_vit7b16_de")
    generator = torch.Generator().manual_seed(2)
    images = [torch.randn(3, *size, generator=generator) for size in ((96, 112), (112, 96))]
    together = model(images)
    for image, found in zip(images, together):
        assert (found["scores"].diff() <= 0).all() and found["labels"].max() <= 90
        assert (found["boxes"][:, 0::2] <= image.shape[2]).all()
        assert (found["boxes"][:, 1::2] <= image.shape[1]).all()
    alone = model([torch.randn(3, 96, 96, generator=generator)])
    assert len(alone) == 1


def test_refusals(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ValueError, match="did you mean 'dinov3_vit7b16_lc'"):
        official_head_model("dinov3_vit7b16_lcc")
    with pytest.raises(ValueError, match="pretrained=False takes no weights"):
        hubconf.dinov3_vit7b16_dd(pretrained=False, weights="a.pth")
