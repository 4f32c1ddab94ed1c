"""A short training run of the quickstart's config: what is frozen stays, what is written loads."""

from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config

from tests.checkpoints.toys import toy_backbone
from tests.hosts.lane import require_hosts

require_hosts()
from dinov3_mm.checkpoints import export_backbone  # noqa: E402
from dinov3_mm.engine import build_runner  # noqa: E402

QUICKSTART = Path(__file__).parents[3] / "configs/quickstart/segmentation.py"
ARCH = dict(embed_dims=32, num_layers=2, num_heads=2, ffn_ratio=2.0, num_registers=2)


def config(folder, **head):
    weights = export_backbone(toy_backbone(), folder / "toy.safetensors")
    cfg = Config.fromfile(QUICKSTART)
    init_cfg = dict(type="DINOv3Pretrained", checkpoint=str(weights))
    cfg.model.backbone = dict(
        type="DINOv3ViT", arch=ARCH, patch_size=8, frozen_stages=2, init_cfg=init_cfg
    )
    cfg.model.decode_head.update({"in_channels": 32, **head})
    for loader, length in (("train_dataloader", 8), ("val_dataloader", 4)):
        cfg[loader].update(batch_size=2)
        cfg[loader].dataset.update(length=length, image_size=32)
    cfg.test_dataloader = cfg.val_dataloader
    cfg.model.data_preprocessor.size = (32, 32)
    cfg.train_cfg.update(max_iters=3, val_interval=3)
    cfg.default_hooks.checkpoint.update(interval=3, save_best=None)
    for step in cfg.test_pipeline:
        step.update(scale=(1000000, 32)) if step["type"] == "Resize" else None
    cfg.val_dataloader.dataset.pipeline = cfg.test_pipeline
    # The toy has no place in the three steps of a warm-up.
    cfg.param_scheduler = []
    cfg.work_dir, cfg.experiment_name, cfg.log_level = str(folder / "run"), folder.name, "WARNING"
    return cfg


def test_the_head_trains_and_the_backbone_does_not(tmp_path):
    cfg = config(tmp_path)
    runner = build_runner(cfg)
    model = runner.model
    expected = {name: tensor.clone() for name, tensor in toy_backbone().state_dict().items()}
    head = {name: tensor.clone() for name, tensor in model.decode_head.state_dict().items()}
    runner.train()
    for name, tensor in model.backbone.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert all(parameter.grad is None for parameter in model.backbone.parameters())
    assert not any(module.training for module in model.backbone.modules())
    trained = {id(parameter) for parameter in model.decode_head.parameters()}
    assert {id(parameter) for parameter in runner.optim_wrapper.optimizer.state} == trained
    for name, tensor in model.decode_head.state_dict().items():
        assert not torch.equal(tensor, head[name]), name

    from mmseg.apis import inference_model, init_model

    (path,) = (tmp_path / "run").glob("iter_3.pth")
    names = torch.load(path, weights_only=False)["state_dict"]
    assert {name for name in names if name.startswith("backbone.")} == {"backbone.weights_record"}
    again = init_model(cfg, str(path), device="cpu")
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    # Any size, as users have them.
    image = np.random.default_rng(0).integers(0, 256, (37, 51, 3), dtype=np.uint8)
    result = inference_model(again, image)
    assert result.pred_sem_seg.data.shape == (1, 37, 51)


def test_too_few_classes_end_the_run_before_it_begins(tmp_path):
    with pytest.raises(ValueError, match=r"set model\.decode_head\.num_classes=13"):
        build_runner(config(tmp_path, num_classes=5)).train()


def test_a_head_for_another_backbone(tmp_path):
    with pytest.raises(ValueError, match="width 64, the backbone and neck give 32"):
        build_runner(config(tmp_path, in_channels=64)).train()


def test_a_released_head_from_the_config(tmp_path):
    """``init_cfg`` of the head: its file is what the official trainer writes."""
    from dinov3_mm.checkpoints import export_head
    from dinov3_mm.models.segmentation import DINOv3LinearSegHead

    head = DINOv3LinearSegHead(32, 13)
    torch.nn.init.normal_(head.conv_seg.weight)
    path = export_head(head, tmp_path / "head.safetensors", kind="linear_segmentation")
    init_cfg = dict(type="DINOv3HeadPretrained", kind="linear_segmentation", checkpoint=str(path))
    runner = build_runner(config(tmp_path, init_cfg=init_cfg))
    runner.model.init_weights()
    assert torch.equal(runner.model.decode_head.conv_seg.weight, head.conv_seg.weight)
