"""Which checkpoint ``--resume`` means, what is compared, and what is refused."""

import os
import shutil

import pytest
import torch
from mmengine.config import Config

from dinov3_mm.checkpoints import export_backbone
from dinov3_mm.datasets import ImageFolder
from dinov3_mm.engine import ConfigError
from dinov3_mm.engine.resume import (
    choose_checkpoint,
    compare_configs,
    compare_schedules,
    identify_samples,
    record_run,
    refuse_resumed,
    saved_checkpoints,
    set_resume,
)
from dinov3_mm.engine.run_files import checkpoint_path
from dinov3_mm.engine.training_state import save_sharded_state, write_training_state
from tests.checkpoints.toys import toy_backbone
from tests.integration.toy_run import write_images

SAMPLES = {"num_samples": 24, "samples": "abc"}


def pretraining(work_dir="", **changes) -> Config:
    """A config as far as it is compared."""
    schedule = dict(type="cosine", base=1e-3, final=1e-6, warmup_iters=2)
    cfg = Config(
        dict(
            runner_type="FlexibleRunner",
            work_dir=str(work_dir),
            randomness=dict(seed=0),
            train_cfg=dict(type="PretrainLoop", max_iters=12, global_batch_size=4),
            train_dataloader=dict(source=dict(type="ImageFolder", root="/data/a"), num_workers=2),
            model=dict(type="DINOv3", backbone=dict(type="DINOv3ViT")),
            optim_wrapper=dict(optimizer=dict(type="AdamW", betas=(0.9, 0.999))),
            custom_hooks=[
                dict(type="OptimScheduleHook", lr=schedule, scaling_rule="sqrt_wrt_1024"),
                dict(type="KNNEvalHook", interval=10),
            ],
        )
    )
    cfg.merge_from_dict({key.replace("__", "."): value for key, value in changes.items()})
    return cfg


def stored(cfg=None, **meta) -> dict:
    run = record_run(cfg or pretraining(), SAMPLES)
    return {"iter": 6, "epoch": 0, "seed": 0, "run": run, **meta}


def found(cfg) -> dict[str, str]:
    return {each.path: each.effect for each in compare_configs(cfg, stored())}


def test_the_same_config_has_no_differences():
    assert found(pretraining()) == {}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"train_cfg__global_batch_size": 8}, {"train_cfg.global_batch_size": "exactness"}),
        ({"model__koleo": {"weight": 0.3}}, {"model.koleo": "exactness"}),
        ({"optim_wrapper__optimizer__type": "Adam"}, {"optim_wrapper.optimizer": "exactness"}),
        ({"train_dataloader__num_workers": 0}, {"train_dataloader.num_workers": "none"}),
        ({"train_dataloader__source__root": "/b"}, {"train_dataloader.source.root": "place"}),
        ({"strategy": {"type": "FSDP2Strategy"}}, {"strategy": "rounding"}),
        ({"model__backbone__init_cfg": {"type": "A"}}, {}),
        ({"work_dir": "elsewhere", "helper": 3}, {}),
    ],
)
def test_differences_and_their_effects(changes, expected):
    assert found(pretraining(**changes)) == expected


def test_hooks_are_compared_by_their_type():
    cfg = pretraining()
    cfg.custom_hooks.insert(0, dict(type="DiagnosisHook", interval=5))
    cfg.custom_hooks[1].lr.base = 2e-3
    cfg.custom_hooks.append(dict(type="GramAnchorHook"))
    assert found(cfg) == {
        "custom_hooks.DiagnosisHook": "none",
        "custom_hooks.OptimScheduleHook.lr.base": "exactness",
        "custom_hooks.GramAnchorHook": "exactness",
    }


def test_the_order_of_transforms_is_a_difference():
    pipeline = [dict(type="RandomFlip"), dict(type="PackInputs")]
    old, new = (Config(dict(model=dict(pipeline=p))) for p in (pipeline, pipeline[::-1]))
    (difference,) = compare_configs(new, stored(old))
    assert difference.path == "model.pipeline (order)"


def test_checkpoints_without_a_record_are_not_compared():
    assert compare_configs(pretraining(), {"iter": 6}) is None


def test_schedules_of_another_length_or_batch():
    longer, larger = pretraining(train_cfg__max_iters=20), pretraining()
    jumps, differ = compare_schedules(longer, stored(), 6)
    (old, new), *none = jumps.values()
    assert differ and new > old and not none
    larger.train_cfg.global_batch_size = 16
    ((old, new),) = compare_schedules(larger, stored(), 6)[0].values()
    assert new - 1e-6 == pytest.approx(2 * (old - 1e-6), rel=0.01)
    # A schedule that says its own length does not follow that of the run.
    fixed = [pretraining(train_cfg__max_iters=length) for length in (12, 20)]
    for cfg in fixed:
        cfg.custom_hooks[0].lr.total_iters = 12
    assert compare_schedules(fixed[1], stored(fixed[0]), 6) == ({}, False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_cfg__max_iters": 5}, "has done 6 iterations, and train_cfg.max_iters is 5"),
        ({"randomness__seed": 3}, "resume with --seed 0"),
        ({"optim_wrapper__optimizer__type": "SGD"}, "moments of AdamW.*load_from"),
    ],
)
def test_what_cannot_go_on_is_refused(changes, message):
    cfg = pretraining(**changes)
    cfg.resume = "run/checkpoints/iter_00000006.pth"
    with pytest.raises(ConfigError, match=message):
        refuse_resumed(cfg, stored())


def test_what_can_go_on_is_not_refused():
    for changes in ({}, {"train_cfg__max_iters": 6}, {"randomness": {}}):
        refuse_resumed(pretraining(**changes), stored())


def write(work_dir, *iterations):
    for iteration in iterations:
        state = {"meta": {"iter": iteration}, "weight": torch.zeros(1000)}
        write_training_state(checkpoint_path(work_dir, iteration), state)


def test_the_newest_checkpoint_of_the_folder(tmp_path):
    cfg = pretraining(tmp_path)
    assert choose_checkpoint(cfg) is None
    write(tmp_path, 3, 6)
    assert choose_checkpoint(cfg) == checkpoint_path(tmp_path, 6)
    set_resume(cfg, checkpoint_path(tmp_path, 3))
    assert cfg.resume == str(checkpoint_path(tmp_path, 3))


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_offered(tmp_path):
    write(tmp_path, 3, 6)
    newest = checkpoint_path(tmp_path, 6)
    newest.write_bytes(newest.read_bytes()[:2000])
    with pytest.raises(ConfigError, match=f"--resume {checkpoint_path(tmp_path, 3)}") as caught:
        choose_checkpoint(pretraining(tmp_path))
    assert str(newest) in str(caught.value)
    os.truncate(checkpoint_path(tmp_path, 3), 2000)
    with pytest.raises(ConfigError, match="no earlier one"):
        choose_checkpoint(pretraining(tmp_path))


def test_a_shard_that_is_cut_off_is_found(tmp_path):
    layer = torch.nn.Linear(50, 50)
    optimizer = torch.optim.AdamW(layer.parameters())
    optimizer.param_groups[0]["param_names"] = ["weight", "bias"]
    for iteration in (3, 6):
        folder = checkpoint_path(tmp_path, iteration, sharded=True)
        save_sharded_state(folder, layer, optimizer, {"meta": {"iter": iteration}})
    assert choose_checkpoint(pretraining(tmp_path)) == folder
    shard = next(folder.glob("*.distcp"))
    os.truncate(shard, shard.stat().st_size // 2)
    with pytest.raises(ConfigError, match="iter_00000003") as caught:
        choose_checkpoint(pretraining(tmp_path))
    assert f"{shard} is missing or cut off" in str(caught.value)


def test_a_folder_of_several_students(tmp_path):
    folder = checkpoint_path(tmp_path, 3, sharded=True)
    for name in ("state", "students/a", "students/b"):
        write_training_state(folder / f"{name}.pth", {"meta": {"iter": 3}, "x": torch.zeros(1000)})
    assert choose_checkpoint(pretraining(tmp_path)) == folder
    os.truncate(folder / "students/b.pth", 2000)
    with pytest.raises(ConfigError, match=r"b\.pth"):
        choose_checkpoint(pretraining(tmp_path))


@pytest.mark.parametrize("given", ["teacher.safetensors", "."])
def test_an_export_is_no_checkpoint(tmp_path, given):
    export_backbone(toy_backbone(1), tmp_path / "teacher.safetensors")
    with pytest.raises(ConfigError, match=r"is an export.*--weights"):
        choose_checkpoint(pretraining(tmp_path), tmp_path / given)


def test_other_paths_that_are_no_checkpoint(tmp_path):
    write(tmp_path, 3)
    torch.save({"a": torch.zeros(3)}, tmp_path / "weights.pth")
    for given, message in (
        (tmp_path / "nothing.pth", "does not exist"),
        (tmp_path, "is a work folder"),
        (tmp_path / "weights.pth", "DINOv3Pretrained"),
    ):
        with pytest.raises(ConfigError, match=message):
            choose_checkpoint(pretraining(tmp_path), given)


def test_checkpoints_of_mmengine_are_found_by_name(tmp_path):
    cfg = Config(dict(work_dir=str(tmp_path), train_cfg=dict(max_iters=12)))
    for name in ("iter_2.pth", "iter_4.pth", "iter_10.pth", "best_mIoU_iter_4.pth", "x.pth"):
        (tmp_path / name).touch()
    names = [[path.name for path in paths] for paths in saved_checkpoints(cfg)]
    assert names == [["iter_2.pth", "iter_4.pth", "iter_10.pth"], []]
    (tmp_path / "last_checkpoint").write_text("/elsewhere/run/iter_4.pth")
    names = [[path.name for path in paths] for paths in saved_checkpoints(cfg)]
    assert names == [["iter_2.pth", "iter_4.pth"], ["iter_10.pth"]]


def test_samples_are_known_by_their_names(tmp_path):
    folder = write_images(tmp_path / "a", count=4)
    before = identify_samples(ImageFolder(root=str(folder)))
    assert before["num_samples"] == 4
    shutil.copytree(folder, tmp_path / "b")
    assert identify_samples(ImageFolder(root=str(tmp_path / "b"))) == before
    (tmp_path / "b/000.png").rename(tmp_path / "b/9.png")
    renamed = identify_samples(ImageFolder(root=str(tmp_path / "b")))
    assert renamed["num_samples"] == 4 and renamed["samples"] != before["samples"]
