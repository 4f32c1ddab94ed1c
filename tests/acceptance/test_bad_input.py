"""Bad input to ``tools/train.py`` ends with one clear error before the first iteration."""

import os
import pickle

import pytest
import torch
from mmengine.config import Config

from dinov3_mm.engine import ConfigError
from tests.integration.toy_run import toy_config, train, write_images
from tests.integration.traces import read_trace
from tools.train import main


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), count=6)


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def refuse(cfg: Config, tmp_path, error: type, message: str, *arguments: str) -> None:
    """Train must raise ``error`` with ``message`` and leave no trace of an iteration."""
    with pytest.raises(error, match=message):
        train(cfg, tmp_path, *arguments)
    assert read_trace(tmp_path / "run") == {}
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_missing_folder(tmp_path):
    cfg = toy_config(tmp_path / "nowhere", tmp_path / "run")
    refuse(cfg, tmp_path, FileNotFoundError, "nowhere")


def test_empty_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    cfg = toy_config(tmp_path / "empty", tmp_path / "run")
    refuse(cfg, tmp_path, ValueError, "no image below")


def test_image_smaller_than_a_crop(tmp_path):
    small = write_images(tmp_path / "small", count=3, size=20)
    cfg = toy_config(small, tmp_path / "run")
    refuse(cfg, tmp_path, ValueError, r"smaller than the crop size of 32 px.*20x20 px")


@pytest.mark.parametrize("name", ["global_size", "local_size"])
def test_crop_size_not_divisible_by_the_patch_size(images, tmp_path, name):
    cfg = toy_config(images, tmp_path / "run")
    cfg.train_dataloader.transform[name] = 28
    refuse(cfg, tmp_path, ValueError, f"{name}=28 is not divisible by the patch size 8")


def test_weight_file_of_another_architecture(images, tmp_path):
    first = toy_config(images, tmp_path / "first", train_cfg__max_iters=1)
    train(first, tmp_path)
    cfg = toy_config(images, tmp_path / "run")
    cfg.model.backbone.arch.num_layers = 3
    weights = tmp_path / "first" / "exports" / "teacher_latest.safetensors"
    cfg.model.backbone.init_cfg = dict(type="DINOv3Pretrained", checkpoint=str(weights))
    refuse(cfg, tmp_path, ValueError, r"num_layers|blocks\.2")


def test_pickle_with_code_as_weights_or_checkpoint(images, tmp_path):
    crater, file = tmp_path / "crater", tmp_path / "bomb.pth"
    torch.save({"format_version": 1, "state_dict": Bomb(crater)}, file)
    cfg = toy_config(images, tmp_path / "run")
    refuse(cfg, tmp_path, ValueError, "only unpickling", "--resume", str(file))
    cfg.load_from = str(file)
    refuse(cfg, tmp_path, ValueError, "only unpickling")
    cfg.load_from = None
    cfg.model.backbone.init_cfg = dict(type="DINOv3Pretrained", checkpoint=str(file))
    refuse(cfg, tmp_path, ValueError, "bomb.pth")
    assert not crater.exists()


def test_distributed_checkpoint_folder_with_code(images, tmp_path):
    crater, folder = tmp_path / "crater", tmp_path / "dcp"
    folder.mkdir()
    (folder / ".metadata").write_bytes(pickle.dumps(Bomb(crater)))
    cfg = toy_config(images, tmp_path / "run")
    cfg.model.backbone.init_cfg = dict(type="DINOv3Pretrained", checkpoint=str(folder))
    refuse(cfg, tmp_path, ValueError, "metadata")
    assert not crater.exists()


@pytest.mark.parametrize(
    "path, message",
    [
        ("model.backbone.drop_pathrate", "did you mean 'drop_path_rate'"),
        ("model.dino_head.num_prototype", "did you mean 'num_prototypes'"),
        ("custom_hooks.1.momentun", "did you mean 'momentum'"),
        ("default_hooks.checkpoint.intervall", "did you mean 'interval'"),
        ("train_dataloader.num_worker", "did you mean 'num_workers'"),
        ("train_dataloader.masking.mask_ratios", "did you mean 'mask_ratio'"),
        ("model.koleo", "did you mean 'weight'"),
        ("model.gram", "did you mean 'img_level'"),
        ("optim_wrapper.paramwise_cfg.layer_decay", "did you mean 'layerwise_decay'"),
        ("randomness.sed", "did you mean 'seed'"),
        ("env_cfg", "did you mean 'cudnn_benchmark'"),
        ("custom_hook", "did you mean 'custom_hooks'"),
    ],
)
def test_unknown_argument(images, tmp_path, path, message):
    values = {
        "model.koleo": dict(wieght=1.0),
        "model.gram": dict(img_levels=True),
        "env_cfg": dict(cudnn_bench=True),
        "custom_hook": [],
    }
    cfg = toy_config(images, tmp_path / "run")
    cfg.merge_from_dict({path: values.get(path, 1)}, allow_list_keys=True)
    refuse(cfg, tmp_path, ValueError, message)


def test_unknown_option_path(images, tmp_path):
    cfg = toy_config(images, tmp_path / "run")
    option = "model.backbone.drop_pathrate=0.1"
    refuse(cfg, tmp_path, ConfigError, "did you mean 'drop_path_rate'", "--cfg-options", option)


def test_batch_that_micro_batches_do_not_divide(images, tmp_path):
    cfg = toy_config(images, tmp_path / "run", train_cfg__accumulate=3)
    refuse(cfg, tmp_path, ConfigError, r"global_batch_size=4 is not divisible .* 1 \* 3")


def test_missing_config_and_checkpoint(images, tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        main([str(tmp_path / "nothing.py")])
    cfg = toy_config(images, tmp_path / "run")
    refuse(cfg, tmp_path, ConfigError, "gone.pth", "--resume", str(tmp_path / "gone.pth"))
