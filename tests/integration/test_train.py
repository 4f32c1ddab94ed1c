"""``tools/train.py`` trains, stops, resumes, exports and starts further stages."""

import json
import os
import re
import signal

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from safetensors.torch import load_file

from dinov3_mm.checkpoints import build_backbone, read_metadata
from dinov3_mm.engine.run_files import checkpoint_path, export_path, list_checkpoints, list_exports
from dinov3_mm.engine.training_state import read_training_state
from tests.integration.toy_run import toy_config, train, write_images
from tests.integration.traces import different_tensors, read_trace


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def straight(images, tmp_path_factory):
    """Work folder of twelve uninterrupted iterations, loaded in the main process."""
    folder = tmp_path_factory.mktemp("straight")
    train(toy_config(images, folder / "run"), folder)
    return folder / "run"


def test_resume_repeats_the_uninterrupted_run_bit_by_bit(images, straight, tmp_path):
    work_dir = tmp_path / "run"
    cfg = toy_config(images, work_dir, train_dataloader__num_workers=2)
    train(cfg, tmp_path, "--cfg-options", "train_cfg.max_iters=6")
    train(cfg, tmp_path, "--resume")
    trace = read_trace(work_dir)
    assert trace == read_trace(straight)
    assert sorted(trace) == list(range(1, 13))
    assert {"loss", "dino_local_loss", "grad_norm/backbone", "lr", "momentum"} <= trace[12].keys()
    # the loss moves: equality says something
    assert len({record["loss"] for record in trace.values()}) == 12
    assert different_tensors(work_dir, straight, 12) == []


def test_noise_of_the_model_is_part_of_the_comparison(images, straight, tmp_path):
    train(toy_config(images, tmp_path / "run", model__backbone__drop_path_rate=0.0), tmp_path)
    assert read_trace(tmp_path / "run")[1]["loss"] != read_trace(straight)[1]["loss"]


def test_accumulation_counts_steps(images, tmp_path):
    cfg = toy_config(images, tmp_path / "run", train_cfg__accumulate=2, train_cfg__max_iters=5)
    train(cfg, tmp_path, "--cfg-options", "train_cfg.max_iters=3")
    train(cfg, tmp_path, "--resume")
    state = read_training_state(checkpoint_path(tmp_path / "run", 5))
    steps = {int(values["step"]) for values in state["optimizer"]["state"].values()}
    assert max(steps) == 5
    assert state["meta"]["iter"] == 5
    whole = tmp_path / "whole"
    whole.mkdir()
    cfg.work_dir = str(whole / "run")
    train(cfg, whole)
    assert read_trace(whole / "run") == read_trace(tmp_path / "run")


def test_files_of_a_run(straight):
    assert list(list_checkpoints(straight)) == [6, 9, 12]
    state = torch.load(checkpoint_path(straight, 12), weights_only=True)
    assert state["meta"]["seed"] == 0
    assert (straight / "last_checkpoint").read_text() == str(checkpoint_path(straight, 12))
    latest = straight / "exports" / "teacher_latest.safetensors"
    assert latest.read_bytes() == export_path(straight, 12).read_bytes()
    header = read_metadata(latest)
    assert json.loads(latest.with_suffix(".json").read_text()) == header
    assert header["provenance"]["iteration"] == 12
    assert header["provenance"]["config"] == "toy.py"
    assert header["statistics"]["mean"] == [0.485, 0.456, 0.406]
    backbone = build_backbone(latest)
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, state["state_dict"][f"teacher.backbone.{name}"]), name


def test_exports_at_their_own_interval(images, straight, tmp_path):
    cfg = toy_config(images, tmp_path / "run", train_cfg__max_iters=7)
    cfg.default_hooks.checkpoint.update(interval=7, export=False)
    cfg.custom_hooks.append(dict(type="ExportTeacherHook", interval=2, max_to_keep=3))
    train(cfg, tmp_path)
    assert list(list_exports(tmp_path / "run")) == [4, 6, 7]
    latest = tmp_path / "run" / "exports" / "teacher_latest.safetensors"
    assert load_file(latest).keys() == build_backbone(latest).state_dict().keys()
    same = load_file(export_path(straight, 6)), load_file(export_path(tmp_path / "run", 6))
    assert all(torch.equal(same[0][name], same[1][name]) for name in same[0])


def test_resume_without_a_checkpoint_starts(images, tmp_path):
    cfg = toy_config(images, tmp_path / "run", train_cfg__max_iters=1)
    train(cfg, tmp_path, "--resume")
    assert list(read_trace(tmp_path / "run")) == [1]


def test_resume_refuses_another_seed(images, straight, tmp_path):
    cfg = toy_config(images, tmp_path / "run", train_cfg__max_iters=20)
    checkpoint = str(checkpoint_path(straight, 12))
    with pytest.raises(ValueError, match="trained with seed 0, this run has seed 3"):
        train(cfg, tmp_path, "--resume", checkpoint, "--seed", "3")


def gram_stage(images, work_dir, checkpoint=None):
    """The toy run as a Gram anchoring stage."""
    cfg = toy_config(images, work_dir)
    cfg.model.gram = dict(weight=1.0)
    cfg.train_dataloader.transform.gram_size = 48
    cfg.custom_hooks.append(dict(type="GramAnchorHook", checkpoint=checkpoint, load_ema_at=-1))
    return cfg


def test_a_gram_stage_starts_from_a_checkpoint_without_gram_teacher(images, straight, tmp_path):
    teacher = straight / "exports" / "iter_00000006_teacher.safetensors"
    cfg = gram_stage(images, tmp_path / "run", str(teacher))
    cfg.load_from = str(checkpoint_path(straight, 12))
    train(cfg, tmp_path, "--cfg-options", "train_cfg.max_iters=6")
    log = next((tmp_path / "run").glob("*/*.log")).read_text()
    assert "has no gram_teacher: it keeps its initial values" in log
    anchor = torch.load(checkpoint_path(straight, 6), weights_only=True)["state_dict"]
    checkpoint = read_training_state(checkpoint_path(tmp_path / "run", 6))
    state = checkpoint["state_dict"]
    for name, tensor in state.items():
        if name.startswith("gram_teacher.backbone."):
            expected = anchor[name.replace("gram_teacher", "teacher")]
            assert torch.equal(tensor, expected), name
    assert read_trace(tmp_path / "run")[1]["gram_loss"] > 0
    # a new stage counts from one, with a fresh optimizer, from the first stage's weights
    assert {int(each["step"]) for each in checkpoint["optimizer"]["state"].values()} == {6}
    start = torch.load(checkpoint_path(straight, 12), weights_only=True)["state_dict"]
    name = "student.backbone.blocks.0.attn.qkv.weight"
    first, last = (torch.dist(state[name], tensor[name]) for tensor in (start, anchor))
    assert 0 < first < last

    # resuming takes the anchor from the checkpoint: the file may be gone
    cfg.custom_hooks[-1]["checkpoint"] = str(tmp_path / "gone.safetensors")
    cfg.load_from = None
    train(cfg, tmp_path, "--resume")
    whole = tmp_path / "whole"
    whole.mkdir()
    cfg = gram_stage(images, whole / "run", str(teacher))
    cfg.load_from = str(checkpoint_path(straight, 12))
    train(cfg, whole)
    assert different_tensors(tmp_path / "run", whole / "run", 12) == []


def test_a_stage_without_the_gram_teacher_refuses_its_checkpoint(images, straight, tmp_path):
    teacher = straight / "exports" / "teacher_latest.safetensors"
    cfg = gram_stage(images, tmp_path / "run", str(teacher))
    cfg.train_cfg.max_iters = 1
    train(cfg, tmp_path)
    cfg = toy_config(images, tmp_path / "next")
    cfg.load_from = str(checkpoint_path(tmp_path / "run", 1))
    with pytest.raises(ValueError, match=r"unknown to this config: gram_teacher\.backbone"):
        train(cfg, tmp_path)


@HOOKS.register_module()
class SignalHook(Hook):
    """Sends this process a signal during an iteration."""

    def __init__(self, iteration: int, number: int):
        self.iteration, self.number = iteration, number

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter + 1 == self.iteration:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_scheduler_signal_saves_and_ends_the_run(images, straight, tmp_path, number):
    cfg = toy_config(images, tmp_path / "run", train_dataloader__num_workers=1)
    hook = dict(type="SignalHook", iteration=4, number=int(number))
    hooks = cfg.custom_hooks
    cfg.custom_hooks = [*hooks, hook]
    before = signal.getsignal(number)
    assert train(cfg, tmp_path) == (130 if number == signal.SIGINT else 0)
    assert list(list_checkpoints(tmp_path / "run")) == [3, 4]
    assert signal.getsignal(number) is before
    cfg.custom_hooks = hooks
    train(cfg, tmp_path, "--resume")
    assert different_tensors(tmp_path / "run", straight, 12) == []


def test_an_unreadable_image_is_replaced_counted_and_logged_once(images, tmp_path):
    folder = write_images(tmp_path / "images", count=8)
    (folder / "003.png").write_bytes((folder / "003.png").read_bytes()[:60])
    train(toy_config(folder, tmp_path / "run"), tmp_path)
    trace = read_trace(tmp_path / "run")
    assert trace[12]["broken_images"] >= 5  # 48 samples of 8 images
    log = next((tmp_path / "run").glob("*/*.log")).read_text()
    assert len(re.findall(r"unreadable image replaced.*003\.png", log)) == 1


def test_a_live_bar_replaces_the_lines(images, tmp_path, capsys):
    cfg = toy_config(images, tmp_path / "run", train_cfg__max_iters=3)
    cfg.default_hooks.logger.bar = True
    train(cfg, tmp_path)
    shown = capsys.readouterr().out
    assert "3/3" in shown
    assert "iter 3/3" not in shown
    assert "iter 3/3" in next((tmp_path / "run").glob("*/*.log")).read_text()


def test_tensorboard_is_a_line_of_config(images, tmp_path):
    cfg = toy_config(images, tmp_path / "run", train_cfg__max_iters=2)
    cfg.visualizer.vis_backends = [dict(type="TensorboardVisBackend")]
    train(cfg, tmp_path)
    assert list((tmp_path / "run").glob("*/vis_data/events.out.tfevents.*"))
