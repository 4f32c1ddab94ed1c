"""The Gram stage in whole runs: from a teacher export, from the EMA teacher, refreshed, resumed."""

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, MODELS

from dinov3_mm.checkpoints import load_weights
from dinov3_mm.engine.training_state import read_training_state
from tests.integration.toy_run import toy_config, train, write_images

GRAM_TEACHER = "gram_teacher.backbone."


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), count=12)


@pytest.fixture(scope="module")
def first_stage(images, tmp_path_factory):
    """Work folder of a run of four steps without Gram term."""
    folder = tmp_path_factory.mktemp("first")
    cfg = toy_config(images, folder / "work", train_dataloader__num_workers=0)
    cfg.train_cfg.max_iters = 4
    train(cfg, folder)
    return folder / "work"


def gram_config(images, work_dir, hook, *, teacher="frozen", max_iters=6):
    cfg = toy_config(images, work_dir, train_dataloader__num_workers=0)
    cfg.model.gram = {"weight": 2.0, "teacher": teacher}
    if teacher == "frozen":
        cfg.train_dataloader.transform.gram_size = 48
    cfg.train_cfg.max_iters = max_iters
    cfg.default_hooks.checkpoint.interval = 1
    cfg.default_hooks.checkpoint.max_to_keep = None
    cfg.custom_hooks = [*cfg.custom_hooks, {"type": "GramAnchorHook", **hook}]
    return cfg


def state(work_dir, iteration):
    return read_training_state(work_dir / f"checkpoints/iter_{iteration:08d}.pth")["state_dict"]


def branch(tensors, prefix):
    return {
        key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)
    }


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def differs(actual, expected):
    return any(not torch.equal(actual[name], value) for name, value in expected.items())


def test_teacher_export_of_the_first_stage(images, first_stage, tmp_path):
    export = first_stage / "exports" / "teacher_latest.safetensors"
    train(gram_config(images, tmp_path / "work", {"checkpoint": str(export)}), tmp_path)
    last = state(tmp_path / "work", 6)
    assert_same(branch(last, GRAM_TEACHER), load_weights(export).state_dict)
    assert differs(branch(last, "teacher.backbone."), branch(last, GRAM_TEACHER))


@HOOKS.register_module(force=True)
class LoadGramHook(Hook):
    """Does what the model's own message proposes."""

    def __init__(self, file):
        self.file = file

    def before_run(self, runner):
        runner.model.load_gram_teacher(self.file)


def test_a_teacher_that_was_loaded_into_the_model(images, first_stage, tmp_path):
    export = str(first_stage / "exports" / "teacher_latest.safetensors")
    cfg = gram_config(images, tmp_path / "work", {})
    cfg.custom_hooks.append({"type": "LoadGramHook", "file": export})
    train(cfg, tmp_path)
    assert_same(branch(state(tmp_path / "work", 6), GRAM_TEACHER), load_weights(export).state_dict)


def test_initialisation_keeps_a_teacher_that_was_loaded(images, first_stage, tmp_path):
    export = first_stage / "exports" / "teacher_latest.safetensors"
    model = MODELS.build(gram_config(images, tmp_path / "work", {}).model)
    model.load_gram_teacher(export)
    model.init_weights()
    assert_same(model.gram_teacher.backbone.state_dict(), load_weights(export).state_dict)


def test_second_stage_resumes_the_first(images, first_stage, tmp_path):
    """Iterations are counted through; the checkpoint has no Gram teacher, so the file is read."""
    export = first_stage / "exports" / "teacher_latest.safetensors"
    cfg = gram_config(images, tmp_path / "work", {"checkpoint": str(export)})
    train(cfg, tmp_path, "--resume", str(first_stage / "checkpoints" / "iter_00000004.pth"))
    last = state(tmp_path / "work", 6)
    assert_same(branch(last, GRAM_TEACHER), load_weights(export).state_dict)


def test_copy_of_the_ema_teacher_and_refreshes(images, tmp_path):
    hook = {"load_ema_at": 2, "rep_update": True, "first_update": 4, "update_interval": 1}
    cfg = gram_config(images, tmp_path / "work", {**hook, "max_updates": 1})
    train(cfg, tmp_path)
    teachers = {it: branch(state(tmp_path / "work", it), "teacher.backbone.") for it in (2, 4)}
    grams = {it: branch(state(tmp_path / "work", it), GRAM_TEACHER) for it in (3, 4, 6)}
    assert_same(grams[3], teachers[2])
    assert_same(grams[4], teachers[4])
    assert_same(grams[6], teachers[4])
    assert differs(teachers[2], teachers[4])


def test_interrupted_gram_stage_ends_like_an_uninterrupted_one(images, tmp_path):
    hook = {"load_ema_at": 1, "rep_update": True, "update_interval": 2, "max_updates": 2}
    train(gram_config(images, tmp_path / "whole", hook), tmp_path)
    train(gram_config(images, tmp_path / "part", hook), tmp_path)
    for it in (4, 5, 6):
        (tmp_path / f"part/checkpoints/iter_{it:08d}.pth").unlink()
    train(gram_config(images, tmp_path / "part", hook), tmp_path, "--resume")
    assert_same(state(tmp_path / "part", 6), state(tmp_path / "whole", 6))


def test_live_ema_teacher(images, tmp_path):
    train(gram_config(images, tmp_path / "work", {"weight": 1.5}, teacher="ema"), tmp_path)
    assert branch(state(tmp_path / "work", 6), GRAM_TEACHER) == {}
