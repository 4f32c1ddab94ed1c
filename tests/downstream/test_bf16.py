"""The precision that a GPU gets by default, forced on the CPU: a step of every kind of head.

What is rounded is near what is not, losses and gradients are fp32, and heads with mmcv's operators
(which take no bf16 on a GPU) hand them fp32.
"""

import copy
import sys

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

from tests.downstream import batches
from tests.downstream.steps import CONFIGS
from tests.hosts.lane import require_hosts
from tests.shrink import shrink

require_hosts()

import mmcv.ops  # noqa: E402, F401

from dinov3_mm.models.adapters import vit_adapter as deformable_attention  # noqa: E402
from dinov3_mm.models.precision import autocast_parts, use_compute_dtype  # noqa: E402

LINEAR, BODY = ["backbone"], ["backbone", "decode_head"]
ROI = ["backbone", "neck", "rpn_head", "roi_head.bbox_head"]
# Config: the parts that compute in bf16.
FAMILIES = {
    "classification/linear_vits16_in1k": ["backbone", "neck"],
    "classification/linear_convnext_tiny_in1k_tuned": ["backbone", "neck"],
    "classification/attention_vits16_in1k": ["backbone", "head"],
    "segmentation/linear_vits16_ade20k": LINEAR,
    "segmentation/dpt_vits16_ade20k": BODY,
    "segmentation/upernet_vits16_ade20k": ["backbone", "neck", "decode_head"],
    "segmentation/upernet_convnext_tiny_ade20k": BODY,
    "segmentation/mask2former_vits16_ade20k": BODY,
    "segmentation/mask2former_convnext_tiny_ade20k": BODY,
    "depth/linear_vits16_nyu": LINEAR,
    "depth/dpt_vits16_nyu": BODY,
    "detection/dino_vits16_coco": ["backbone", "neck", "encoder", "decoder", "bbox_head"],
    "detection/faster-rcnn_vits16_coco": ROI,
    "detection/mask-rcnn_vits16_coco": [*ROI, "roi_head.mask_head"],
    "detection/plain-detr_vits16_coco": ["backbone", "bbox_head"],
}
# Relative distance of the sum of the losses. Measured: 1e-4 at most; 1.3e-3 where matching or
# sampling may choose others after rounding; 4e-2 where positions of a map are the first boxes.
NEAR = {"mask2former": 0.01, "dino": 0.01, "rcnn": 0.01, "plain-detr": 0.15}


OPERATORS = {
    "dino": {"multi_scale_deformable_attn_pytorch"},
    "mask2former": {"multi_scale_deformable_attn_pytorch"},
    "faster-rcnn": {"roi_align"},
    "mask-rcnn": {"roi_align"},
}


@pytest.fixture
def operators(monkeypatch) -> dict[str, set]:
    """Dtypes of the tensors that mmcv's operators get, by operator."""
    seen = {}

    def spy(place, name):
        real = getattr(place, name)

        def recorded(*args, **kwargs):
            tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
            seen.setdefault(name, set()).update(tensor.dtype for tensor in tensors)
            return real(*args, **kwargs)

        monkeypatch.setattr(place, name, recorded)

    spy(sys.modules["mmcv.ops.multi_scale_deform_attn"], "multi_scale_deformable_attn_pytorch")
    spy(deformable_attention, "multi_scale_deformable_attn_pytorch")
    spy(sys.modules["mmcv.ops.roi_align"], "roi_align")
    return seen


def build(name: str):
    """A shrunk model, its config and its batch."""
    job = name.split("/")[0]
    cfg = shrink(Config.fromfile(CONFIGS / f"{name}.py"), job)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    return model.train(), cfg, getattr(batches, job)(cfg)


def step(model, batch) -> tuple[torch.Tensor, dict]:
    """Sum and parts of the losses, after the backward pass."""
    torch.manual_seed(1)
    np.random.seed(1)  # mixing of images
    data = model.data_preprocessor(copy.deepcopy(batch), training=True)
    total, parts = model.parse_losses(model(**data, mode="loss"))
    total.backward()
    return total.detach(), parts


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_in_bf16(name, operators):
    cfg = Config.fromfile(CONFIGS / f"{name}.py")
    with DefaultScope.overwrite_default_scope(cfg.get("default_scope", "mmengine")):
        model, cfg, batch = build(name)
        exact, _ = step(copy.deepcopy(model), batch)
        assert autocast_parts(model, torch.bfloat16) == FAMILIES[name]
        total, parts = step(model, batch)
        spread = [value.dtype for value in parts.values()]
        assert total.dtype == torch.float32 and set(spread) == {torch.float32}, parts
        assert total.isfinite() and total != exact, "nothing was rounded"
        bound = next((value for part, value in NEAR.items() if part in name), 1e-3)
        assert abs(total - exact) <= bound * abs(exact), (total, exact)
        assert operators.keys() == OPERATORS.get(name.split("/")[1].split("_")[0], set())
        assert set().union(*operators.values()) <= {torch.float32, torch.int64}, operators
        trained = [p for p in model.parameters() if p.requires_grad]
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        grads = [p.grad for p in trained if p.grad is not None]
        assert grads and all(g.dtype == torch.float32 and g.isfinite().all() for g in grads)
        model.eval()
        with torch.no_grad():
            assert len(model.test_step(batch)) == len(batch["inputs"])


def test_every_config_names_its_dtype():
    """'auto', but for the released models that are fp32 by their own definition."""
    fp32 = {"dpt_vit7b16_synthmix", "chmv2_vitl16sat"}
    for job in ("classification", "segmentation", "detection", "depth"):
        for path in sorted((CONFIGS / job).glob("*.py")):
            cfg = Config.fromfile(path)
            assert cfg.get("compute_dtype") == ("fp32" if path.stem in fp32 else "auto"), path
    use_compute_dtype(cfg)
    assert cfg.custom_hooks[-1].type == "ComputeDtypeHook"
