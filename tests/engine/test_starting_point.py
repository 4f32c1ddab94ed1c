"""Images and weights of a command line: where they go, and what is refused."""

import pytest
from mmengine.config import Config

from dinov3_mm.engine import ConfigError, build_runner, set_data, set_weights
from dinov3_mm.engine.config.read import settle_data, settle_weights
from tests.integration.continue_run import random_released_like
from tests.integration.toy_run import REPOSITORY

SATELLITE = [0.430, 0.411, 0.296], [0.213, 0.156, 0.143]


def recipe(name):
    return Config.fromfile(REPOSITORY / f"configs/{name}.py")


@pytest.fixture(scope="module")
def satellite(tmp_path_factory):
    return random_released_like(tmp_path_factory.mktemp("w") / "toy_pretrain_sat493m-00000000.pth")


def test_data_reaches_training_and_evaluation(tmp_path):
    cfg = recipe("dinov3/continue_vits16")
    with pytest.raises(ConfigError, match=r"no images to train on: .*--data DIR"):
        settle_data(cfg)
    set_data(cfg, str(tmp_path))
    settle_data(cfg)
    hook = next(hook for hook in cfg.custom_hooks if hook.type == "FolderEvalHook")
    assert cfg.train_dataloader.source.source.root == hook.source.root == str(tmp_path)
    quickstart = recipe("quickstart/folder_pretrain")
    set_data(quickstart, str(tmp_path))
    assert quickstart.train_dataloader.source.root == str(tmp_path)
    assert quickstart.custom_hooks[-1].source.source.root == str(tmp_path)


def test_configs_that_do_not_take_them_say_so(tmp_path):
    cfg = recipe("quickstart/scenes_pretrain")
    with pytest.raises(ConfigError, match=r"trains on 'SyntheticScenes'; --data needs one whose"):
        set_data(cfg, str(tmp_path))
    with pytest.raises(ConfigError, match="starts from random weights; --weights needs one with"):
        set_weights(cfg, "weights.pth")
    file = tmp_path / "photo.png"
    file.touch()
    with pytest.raises(ConfigError, match=r"photo.png is not a folder"):
        set_data(recipe("dinov3/continue_vits16"), str(file))


def test_weights_reach_a_gram_teacher_that_reads_a_file(satellite):
    cfg = recipe("dinov3/continue_gram_vits16")
    cfg.custom_hooks[-1] = dict(type="GramAnchorHook", checkpoint=None)
    set_weights(cfg, str(satellite))
    assert cfg.custom_hooks[-1]["checkpoint"] == str(satellite)
    assert cfg.model.backbone.init_cfg.checkpoint == str(satellite)


def test_inputs_are_normalised_as_the_weights_expect(satellite):
    cfg = recipe("dinov3/continue_vitl16")
    set_weights(cfg, str(satellite))
    (line,) = settle_weights(cfg)
    assert "(SAT-493M)" in line
    assert (cfg.model.data_preprocessor.mean, cfg.model.data_preprocessor.std) == SATELLITE

    resumed = recipe("dinov3/continue_vitl16")
    resumed.resume = "checkpoint.pth"
    settle_weights(resumed, cfg.derived.to_dict())
    assert resumed.model.data_preprocessor.mean == SATELLITE[0]
    assert resumed.model.backbone.init_cfg is None

    own = recipe("dinov3/continue_vitl16")
    own.model.data_preprocessor = dict(type="MultiCropPreprocessor", mean=[0.5] * 3, std=[0.2] * 3)
    set_weights(own, str(satellite))
    assert "(config)" in settle_weights(own)[0]
    assert own.model.data_preprocessor.mean == [0.5] * 3


def test_random_weights_need_a_word():
    cfg = recipe("dinov3/continue_vits16")
    with pytest.raises(ConfigError, match="would start from random ones"):
        settle_weights(cfg)
    cfg.model.backbone.init_cfg = None
    assert settle_weights(cfg) == []


def test_an_impossible_model_is_refused_before_anything_is_built():
    cfg = recipe("quickstart/scenes_pretrain")
    cfg.model.backbone = dict(type="DINOv3ConvNeXt", arch="tiny")
    cfg.train_dataloader.transform.update(global_size=64, local_size=32)
    with pytest.raises(ConfigError, match="model: DINOv3ConvNeXt has no mask token"):
        build_runner(cfg)
