"""Values 'auto' of a config: which are settled, which stay, what is kept and told."""

import copy

import pytest
from mmengine.config import Config

from dinov3_mm.engine import ConfigError
from dinov3_mm.engine.config import auto as rules
from dinov3_mm.engine.config import fill_defaults
from dinov3_mm.engine.config.auto import RECORD, DataFacts, auto_places, data_facts, resolve_auto
from dinov3_mm.engine.dry_run import dry_run
from tests.engine.dry_run.toys import toy_config
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


CONVNEXT = dict(
    _delete_=True, type="DINOv3ConvNeXt", arch=dict(depths=[2, 2, 2, 2], dims=[16, 32, 64, 128])
)
FITS = {
    "plain": dict(),
    "recomputed": dict(model__backbone__with_cp=True),
    "large heads": dict(model__dino_head__num_prototypes=8192),
    "Gram": dict(
        model__gram=dict(weight=1.0, img_level=False), train_dataloader__transform__gram_size=48
    ),
    "ConvNeXt": dict(
        model__mask_student=False,
        model__backbone=CONVNEXT,
        train_dataloader__transform__global_size=64,
        train_dataloader__transform__local_size=32,
    ),
}


def toy(batch, **changes):
    cfg = toy_config(global_batch_size=batch, model__compute_dtype="bf16", **changes)
    if "gram" in cfg.model:
        cfg.custom_hooks.append(dict(type="GramAnchorHook", load_ema_at=0))
    fill_defaults(cfg)
    return cfg


@pytest.mark.parametrize("name", FITS)
def test_an_automatic_batch_is_what_the_dry_run_finds_to_fit(name):
    """The memory of the GPU lies between the steps of 32 and of 64 images."""
    peaks = {n: dry_run(toy(n, **FITS[name]), 1).steps[0].peak.total for n in (32, 64)}
    cfg = toy("auto", **FITS[name])
    usable = (peaks[32] * peaks[64]) ** 0.5
    resolve_auto(cfg, data=DATA, memory_gib=usable / rules.USABLE_MEMORY / 2**30)
    assert cfg.train_cfg.global_batch_size == 32


def test_an_automatic_batch_of_another_backbone_is_measured_in_a_process_apart():
    pytest.importorskip("timm")
    network = dict(type="TimmBackbone", name="resnet10t", batch_norm="group")
    sizes = dict(channels=[8, 16, 24, 32], stem_width=8, output_stride=8)
    backbone = dict(_delete_=True, model_args=sizes, **network)
    cfg = toy("auto", model__backbone=backbone, model__mask_student=False)
    resolve_auto(cfg, data=DATA, memory_gib=80.0)
    assert cfg.train_cfg.global_batch_size == 128


def test_a_batch_that_fits_nowhere_is_the_least_and_says_so():
    cfg = recipe("continue_vitl16")
    lines = resolve_auto(cfg, world_size=2, data=DATA, memory_gib=8)
    assert cfg.train_cfg.global_batch_size == 16
    (line,) = [line for line in lines if line.startswith("global batch")]
    assert "GiB are predicted, of 8 GiB" in line


def test_without_a_gpu_a_process_has_a_few_images():
    cfg = recipe()
    resolve_auto(cfg, world_size=2, data=DATA)
    assert cfg.train_cfg.global_batch_size == 32
