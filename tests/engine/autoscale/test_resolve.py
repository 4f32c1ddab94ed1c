"""Values 'auto' of a config: which are settled, which stay, what is kept and told."""

import copy

import pytest
from mmengine.config import Config

from dinov3_mm.engine import ConfigError
from dinov3_mm.engine.autoscale import RECORD, DataFacts, resolve_auto
from dinov3_mm.engine.autoscale.facts import auto_places, data_facts, tokens_per_image
from dinov3_mm.engine.config import fill_defaults
from tests.integration.toy_run import REPOSITORY, write_images

DATA = DataFacts(num_images=10_000, num_train=9600, every=25)


def recipe(name="continue_vitb16", **changes) -> Config:
    cfg = Config.fromfile(REPOSITORY / f"configs/dinov3/{name}.py")
    fill_defaults(cfg)
    cfg.merge_from_dict({key.replace("__", "."): value for key, value in changes.items()})
    return cfg


def hook(cfg, name):
    return next(each for each in cfg.custom_hooks if each["type"] == name)


def test_every_auto_of_the_recipe_is_settled_and_told():
    cfg = recipe(train_cfg__global_batch_size=64)
    lines = resolve_auto(cfg, world_size=2, data=DATA)
    assert auto_places(cfg) == []
    text = "\n".join(lines)
    for line in (
        "iterations 3000 = 20 epochs x 9600 images / batch 64",
        "learning rate 2.5e-05 = 0.0001 (width 768) x sqrt(64 / 1024)",
        "prototypes 256 = ",
        "backbone frozen for 300 iterations",
        "EMA momentum 0.996667: averages over 300 iterations",
    ):
        assert line in text
    assert "global batch" not in text  # stated in the config
    schedule = hook(cfg, "OptimScheduleHook")
    assert schedule.lr.base == 2.5e-5 and schedule.lr.warmup_iters == 150
    assert (schedule.backbone_freeze_iters, schedule.backbone_warmup_iters) == (300, 300)
    assert hook(cfg, "FolderEvalHook").interval == 300
    assert cfg.train_dataloader.source.every == hook(cfg, "FolderEvalHook").every == 5
    assert cfg.model.dino_head.num_prototypes == cfg.model.ibot_head.num_prototypes == 256


def test_explicit_values_stay_and_others_follow_them():
    cfg = recipe(
        train_cfg__global_batch_size=64,
        train_cfg__max_iters=1000,
        model__dino_head__num_prototypes=2048,
    )
    hook(cfg, "OptimScheduleHook").backbone_freeze_iters = 0
    resolve_auto(cfg, data=DATA)
    assert cfg.train_cfg.max_iters == 1000
    assert cfg.model.dino_head.num_prototypes == 2048
    assert cfg.model.ibot_head.num_prototypes == 256
    schedule = hook(cfg, "OptimScheduleHook")
    assert (schedule.backbone_freeze_iters, schedule.backbone_warmup_iters) == (0, 0)
    assert hook(cfg, "TeacherEMAHook").momentum.base == 0.99


def test_a_learning_rate_may_be_one_word():
    cfg = recipe(train_cfg__global_batch_size=1024)
    hook(cfg, "OptimScheduleHook").lr = "auto"
    hook(cfg, "TeacherEMAHook").momentum = "auto"
    resolve_auto(cfg, data=DATA)
    assert hook(cfg, "OptimScheduleHook").lr == 1e-4
    assert 0.9 < hook(cfg, "TeacherEMAHook").momentum < 1


def test_a_config_without_auto_builds_no_source():
    cfg = recipe()
    cfg.merge_from_dict(dict.fromkeys(auto_places(cfg), 7))
    assert auto_places(cfg) == []
    assert resolve_auto(cfg) == [] and RECORD not in cfg


def test_backends_called_auto_are_none_of_this():
    cfg = recipe(model__backbone__attn_backend="auto", train_cfg__global_batch_size=64)
    resolve_auto(cfg, data=DATA)
    assert cfg.model.backbone.attn_backend == "auto"


def test_an_auto_without_a_rule_is_refused():
    cfg = recipe()
    hook(cfg, "OptimScheduleHook").weight_decay = "auto"
    with pytest.raises(ConfigError, match=r"custom_hooks.0.weight_decay: no rule derives"):
        resolve_auto(cfg, data=DATA)


def test_two_rules_for_one_learning_rate_are_refused():
    cfg = recipe()
    hook(cfg, "OptimScheduleHook").scaling_rule = "sqrt_wrt_1024"
    with pytest.raises(ConfigError, match="follows the batch already; remove scaling_rule"):
        resolve_auto(cfg, data=DATA)


def test_what_a_run_derived_holds_when_it_is_resumed():
    first = recipe(train_cfg__global_batch_size=64)
    resolve_auto(first, data=DATA)
    grown = DataFacts(num_images=20_000, num_train=19_200, every=25)
    resumed = recipe(train_cfg__global_batch_size=64)
    lines = resolve_auto(resumed, stored=first[RECORD].to_dict(), data=grown)
    assert "20000 images, it had 10000 when the run began" in lines[-1]
    assert len(lines) == 2
    fresh, kept = (copy.deepcopy(cfg).to_dict() for cfg in (first, resumed))
    fresh.pop(RECORD), kept.pop(RECORD)
    assert fresh == kept
    # a value that the user states again wins
    longer = recipe(train_cfg__global_batch_size=64, train_cfg__max_iters=5000)
    resolve_auto(longer, stored=first[RECORD].to_dict(), data=grown)
    assert longer.train_cfg.max_iters == 5000
    assert hook(longer, "OptimScheduleHook").lr.warmup_iters == 150


def test_images_are_counted_with_their_split(tmp_path):
    folder = write_images(tmp_path / "images", count=40)
    source = dict(type="ImageFolder", root=str(folder))
    assert data_facts(source) == DataFacts(40, 40, None)
    split = dict(type="HeldOutSplit", source=source, part="train", every="auto")
    facts = data_facts(split)
    assert facts.every == 5 and 25 <= facts.num_train < 40
    assert data_facts({**split, "every": 2}).num_train < facts.num_train


def test_a_missing_folder_is_a_finding(tmp_path):
    source = dict(type="ImageFolder", root=str(tmp_path / "photos"))
    with pytest.raises(
        ConfigError, match=r"train_dataloader.source: image folder .*does not exist"
    ):
        data_facts(source)


def test_tokens_of_an_image_are_those_of_its_largest_set_of_sizes():
    assert tokens_per_image({}, 16) == 2 * 14**2 + 8 * 6**2
    sets = [dict(global_size=512, local_size=112), dict(global_size=768, local_size=168)]
    # 168 px are ten patches and a half
    assert tokens_per_image(dict(size_sets=sets, num_local=6), 16) == 2 * 48**2 + 6 * 10**2
