"""A config that nobody could have meant is refused with the place and the nearest name."""

import copy

import pytest
from mmengine.config import Config
from mmengine.registry import HOOKS, MODELS
from torch import nn

import dinov3_mm  # noqa: F401
from dinov3_mm.engine.config import ConfigError, check_config, fill_defaults
from dinov3_mm.errors import accepted_keywords, hint, nearest


class Base(nn.Module):
    def __init__(self, width: int, *, depth: int = 1):
        super().__init__()


class Child(Base):
    def __init__(self, extra: int = 0, **kwargs):
        super().__init__(**kwargs)


class Swallows(nn.Module):
    def __init__(self, known: int = 0, **kwargs):
        super().__init__()


class SwallowsAll(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()


class NoArguments(nn.Module):
    pass


class Algorithm(nn.Module):
    def __init__(self, backbone: dict, momentum: float = 0.9):
        super().__init__()


TOYS = {"ToyChild": Child, "ToyCheckedModel": Algorithm}


@pytest.fixture(autouse=True)
def toy_types():
    for name, module in TOYS.items():
        MODELS.register_module(name=name, module=module)
    yield
    for name in TOYS:
        MODELS.module_dict.pop(name)


def config() -> Config:
    return Config(
        dict(
            runner_type="FlexibleRunner",
            model=dict(type="ToyCheckedModel", backbone=dict(type="ToyChild", width=3)),
            train_dataloader=dict(
                source=dict(type="ImageFolder", root="images"),
                transform=dict(type="MultiCrop", global_size=32),
            ),
            train_cfg=dict(type="PretrainLoop", max_iters=10, global_batch_size=8),
            optim_wrapper=dict(
                type="PretrainOptimWrapper",
                constructor="PretrainOptimConstructor",
                optimizer=dict(type="AdamW", lr=1e-3, betas=(0.9, 0.99)),
            ),
            custom_hooks=[
                dict(
                    type="OptimScheduleHook",
                    lr=dict(type="cosine", base=1e-3, final=1e-6),
                    weight_decay=0.04,
                    priority="HIGH",
                )
            ],
            my_helper=[1, 2],
        )
    )


def test_signature_follows_keywords_to_the_parents():
    assert accepted_keywords(Child) == {"extra", "width", "depth"}
    assert accepted_keywords(Base) == {"width", "depth"}
    assert accepted_keywords(NoArguments) == frozenset()
    assert accepted_keywords(Swallows) is None
    assert accepted_keywords(SwallowsAll) is None
    assert accepted_keywords(lambda a, *, b=1: None) == {"a", "b"}
    assert accepted_keywords(lambda **kwargs: None) is None


def test_nearest_name_ignores_case_and_underscores():
    assert nearest("DINOV3VIT", {"DINOv3ViT", "DINOv3"}) == "DINOv3ViT"
    assert nearest("drop_pathrate", {"drop_path_rate", "depth"}) == "drop_path_rate"
    assert nearest("zzz", {"depth"}) is None
    assert hint("zzz", {"b", "a"}) == "known: a, b"


def test_a_good_config_passes():
    cfg = config()
    fill_defaults(cfg)
    # the engine's own hooks are among the defaults
    assert cfg.default_hooks.checkpoint.type in HOOKS.module_dict
    check_config(cfg, world_size=2)


@pytest.mark.parametrize(
    "path, value, message",
    [
        ("train_cgf", {}, "train_cgf: not a Runner key, did you mean 'train_cfg'"),
        (
            "model.type",
            "ToyChekedModel",
            "model: no model is called 'ToyChekedModel'; did you mean 'ToyC",
        ),
        ("model.momentun", 1, "model: Algorithm takes no argument 'momentun'; did you mean 'mom"),
        (
            "model.backbone.zzz",
            1,
            "Child takes no argument 'zzz'; known: depth, extra, type, width",
        ),
        (
            "train_dataloader.transform.global_crop",
            1,
            "train_dataloader.transform: MultiCrop takes no argument 'global_crop'; "
            "did you mean 'global_scale'",
        ),
        ("train_dataloader.source.type", "ImagFolder", "did you mean 'ImageFolder'"),
        ("default_hooks", dict(loger={}), "default_hooks.loger: not a slot, did you mean 'logger'"),
        ("randomness", dict(sed=1), "randomness: nobody reads 'sed'; did you mean 'seed'"),
        ("train_cfg.max_iter", 1, "train_cfg: PretrainLoop takes no argument 'max_iter'"),
        ("optim_wrapper.optimizer.beta", 1, "optim_wrapper.optimizer: AdamW takes no argument"),
        ("optim_wrapper.constructor", "PretrainConstructor", "did you mean 'PretrainOptimCons"),
        ("custom_hooks.0.lrs", 1, "custom_hooks.0: OptimScheduleHook takes no argument 'lrs'"),
        ("custom_hooks.0.lr.bas", 1, "custom_hooks.0.lr: CosineSchedule takes no argument 'bas'"),
        (
            "custom_hooks.0.lr.type",
            "cosin",
            "custom_hooks.0.lr: no part is called 'cosin'; did you",
        ),
        ("runner_type", "FlexibelRunner", "did you mean 'FlexibleRunner'"),
        ("train_cfg.global_batch_size", 9, "is not divisible by world_size * accumulate = 2 * 1"),
        ("train_dataloader.masking", dict(patch_size=14), "masking.patch_size=14, but the backbo"),
        ("optim_wrapper.accumulative_counts", 2, "but train_cfg.accumulate=1; set the latter"),
    ],
)
def test_each_mistake_is_found(path, value, message):
    cfg = config()
    cfg.merge_from_dict({path: value}, allow_list_keys=True)
    with pytest.raises(ConfigError) as caught:
        check_config(cfg, world_size=2)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_every_mistake_is_listed():
    cfg = config()
    cfg.model.momentun = 1
    cfg.train_cfg.max_iter = 1
    with pytest.raises(ConfigError) as caught:
        check_config(cfg)
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize("name", ["train_data", "model_dim", "optimizer", "base_lr", "iters"])
def test_a_helper_is_no_mistake(name):
    cfg = config()
    cfg[name] = 1
    check_config(cfg)


def test_defaults_are_only_filled_where_nothing_was_said():
    cfg = config()
    cfg.default_hooks = dict(checkpoint=dict(type="PretrainCheckpointHook", interval=7))
    before = copy.deepcopy(cfg.optim_wrapper.to_dict())
    cfg.train_cfg.accumulate = 4
    fill_defaults(cfg)
    assert cfg.default_hooks.checkpoint.interval == 7
    assert cfg.default_hooks.logger.type == "ProgressHook"
    assert cfg.default_hooks.runtime_info is None
    assert cfg.randomness == dict(seed=0)
    assert cfg.strategy.type == "PretrainStrategy"
    assert cfg.optim_wrapper.to_dict() == {**before, "accumulative_counts": 4}
    assert cfg.train_dataloader.masking.patch_size == 16
