"""What the command line sets in configs of the hosts, and what is refused."""

import copy

import pytest
from mmengine.config import Config

from dinov3_mm.checkpoints import export_backbone
from dinov3_mm.engine import ConfigError
from dinov3_mm.engine.config.host import (
    set_data_root,
    set_head,
    set_host_weights,
    settle_host,
    shorten_warmup,
)
from tests.checkpoints.toys import toy_backbone

PRETRAINED = {"type": "DINOv3Pretrained", "checkpoint": None}
MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]


def host_config(**model) -> Config:
    dataset = {"type": "CustomDataset", "data_root": "data/pets", "data_prefix": "train"}
    return Config(
        {
            "model": {
                "type": "ImageClassifier",
                "data_preprocessor": {"mean": MEAN, "std": STD, "to_rgb": True},
                "backbone": {"type": "DINOv3ViT", "init_cfg": dict(PRETRAINED)},
                "head": {"type": "LinearClsHead", "num_classes": 1000},
                **model,
            },
            "train_dataloader": {"dataset": dataset},
            "val_dataloader": {"dataset": {**dataset, "data_prefix": "val"}},
            "val_evaluator": {"type": "CocoMetric", "ann_file": "data/pets/annotations/val.json"},
        }
    )


def test_weights_reach_a_nested_backbone(tmp_path):
    nested = {"type": "Adapter", "backbone": {"type": "DINOv3ViT", "init_cfg": dict(PRETRAINED)}}
    cfg = host_config(backbone=nested)
    set_host_weights(cfg, "weights.safetensors")
    assert cfg.model.backbone.backbone.init_cfg.checkpoint == "weights.safetensors"


def test_weights_without_a_place_for_them():
    with pytest.raises(ConfigError, match="no backbone of this config loads weights"):
        set_host_weights(host_config(backbone={"type": "DINOv3ViT"}), "w.pth")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (None, "no weights for the backbone"),
        ("nowhere.pth", "nowhere.pth does not exist"),
        ("dinov3_vits16", "gated"),
    ],
)
def test_weights_that_are_not_there(weights, message, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cfg = host_config()
    cfg.model.backbone.init_cfg.checkpoint = weights
    with pytest.raises(ConfigError, match=message):
        settle_host(cfg)


def test_weights_for_other_inputs_are_mentioned(tmp_path):
    statistics = {"statistics": {"mean": (0.4, 0.5, 0.6), "std": (0.1, 0.2, 0.3)}}
    path = export_backbone(toy_backbone(1), tmp_path / "w.safetensors", statistics)
    cfg = host_config()
    set_host_weights(cfg, str(path))
    (line,) = settle_host(cfg)
    assert "[102.0, 127.5, 153.0]" in line and "model.data_preprocessor.mean" in line
    assert cfg.model.data_preprocessor.mean == MEAN
    cfg.model.data_preprocessor.update(mean=[102, 127.5, 153], std=[25.5, 51, 76.5])
    assert settle_host(cfg) == []


def test_batch_norms_are_not_synchronised_without_a_gpu(tmp_path, monkeypatch):
    cfg = host_config(backbone={"type": "DINOv3ViT"})
    for there in (False, True):
        cfg.sync_bn = "torch"
        monkeypatch.setattr("torch.cuda.is_available", lambda there=there: there)
        lines = settle_host(cfg)
        assert (cfg.sync_bn, len(lines)) == (("torch", 0) if there else (None, 1))


def test_data_moves_all_paths_and_counts_folders(tmp_path):
    for name in ("cat", "dog", "owl"):
        (tmp_path / "train" / name).mkdir(parents=True)
    cfg = host_config()
    set_data_root(cfg, str(tmp_path))
    assert cfg.train_dataloader.dataset.data_root == str(tmp_path)
    assert cfg.val_dataloader.dataset.data_root == str(tmp_path)
    assert cfg.val_evaluator.ann_file == str(tmp_path / "annotations/val.json")
    assert cfg.model.head.num_classes == 3


def test_other_names_of_the_validation_folder(tmp_path):
    for name in ("train/cat", "train/dog", "valid/cat"):
        (tmp_path / name).mkdir(parents=True)
    cfg = host_config()
    set_data_root(cfg, str(tmp_path))
    assert cfg.val_dataloader.dataset.data_prefix == "valid"
    assert cfg.train_dataloader.dataset.data_prefix == "train"
    (tmp_path / "validation").mkdir()
    cfg = host_config()
    set_data_root(cfg, str(tmp_path))  # which of the two is not for us to say
    assert cfg.val_dataloader.dataset.data_prefix == "val"


def test_data_refusals(tmp_path):
    with pytest.raises(ConfigError, match="is no folder"):
        set_data_root(host_config(), str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="one folder a class"):
        set_data_root(host_config(), str(tmp_path))
    (tmp_path / "train/pets/cat").mkdir(parents=True)  # an archive unpacked into a folder more
    with pytest.raises(ConfigError, match=r"one folder a class in .*, found 1 \(pets\)"):
        set_data_root(host_config(), str(tmp_path))
    cfg = host_config()
    for loader in ("train_dataloader", "val_dataloader"):
        del cfg[loader].dataset["data_root"]
    with pytest.raises(ConfigError, match="no data set of this config has a data_root"):
        set_data_root(cfg, str(tmp_path))


def test_head(tmp_path):
    head = {"init_cfg": {"type": "DINOv3HeadPretrained", "kind": "linear_classifier"}}
    cfg = host_config(head=head)
    (tmp_path / "head.pth").touch()
    set_head(cfg, str(tmp_path / "head.pth"))
    assert cfg.model.head.init_cfg.checkpoint == str(tmp_path / "head.pth")
    with pytest.raises(ConfigError, match="does not exist"):
        set_head(cfg, "nothing.pth")
    with pytest.raises(ConfigError, match="does not load a released head"):
        set_head(host_config(), "nothing.pth")


def test_a_warmup_longer_than_the_run_is_shortened():
    cfg = host_config(backbone={"type": "DINOv3ViT"})
    schedules = [
        {"type": "LinearLR", "start_factor": 0.01, "by_epoch": False, "end": 50},
        {"type": "CosineAnnealingLR", "by_epoch": False, "begin": 50},
    ]
    for total, expected in ((1000, (50, 50)), (40, (4, 4))):
        cfg.param_scheduler, cfg.train_cfg = copy.deepcopy(schedules), {"max_iters": total}
        lines = shorten_warmup(cfg)
        warmup, cosine = cfg.param_scheduler
        assert (warmup["end"], cosine["begin"]) == expected
        assert bool(lines) == (total < 50)
    cfg.param_scheduler, cfg.train_cfg = copy.deepcopy(schedules), {"max_iters": 2}
    shorten_warmup(cfg)
    (cosine,) = cfg.param_scheduler
    assert cosine["begin"] == 0
