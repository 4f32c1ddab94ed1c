"""The guards in whole runs of the DINOv3 algorithm: injected faults, and a healthy run."""

from math import isfinite

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from dinov3_mm.engine.capture import replay_capture
from dinov3_mm.engine.hooks.guards import TrainingStoppedError
from dinov3_mm.engine.training_state import read_training_state
from tests.integration import fault_hook  # noqa: F401  (registers PoisonHook)
from tests.integration.toy_run import toy_config, train, write_images
from tools import replay_capture as replay_tool

GUARDS = ({"type": "NonFiniteGuardHook"}, {"type": "CollapseGuardHook", "patience": 2})


@HOOKS.register_module(force=True)
class FaultHook(Hook):
    """Breaks the model from iteration 3 on, and keeps the losses it sees."""

    losses: list

    def __init__(self, kind: str | None = None):
        self.kind = kind
        FaultHook.losses = []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter < 3 or self.kind is None:
            return
        model = runner.model
        block = model.student.backbone.blocks[1]
        with torch.no_grad():
            if self.kind == "weight":
                block.mlp.fc1.weight[0, 0] = float("inf")
            elif self.kind == "collapse":
                for norm in (model.student.backbone.norm, model.teacher.backbone.norm):
                    norm.weight.zero_()
                    norm.bias.fill_(1.0)
        if self.kind == "gradient" and runner.iter == 3:
            block.mlp.fc1.weight.register_hook(lambda grad: grad * float("nan"))

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        FaultHook.losses.append(outputs["loss"].item())


@pytest.fixture
def config(tmp_path):
    images = write_images(tmp_path / "images", count=12)

    def make(kind, **changes):
        cfg = toy_config(
            images, tmp_path / "work", **{"train_dataloader__num_workers": 0, **changes}
        )
        hooks = [hook for hook in cfg.custom_hooks if hook["type"] != "DiagnosisHook"]
        diagnosis = {"type": "DiagnosisHook", "interval": 1}
        cfg.custom_hooks = [*hooks, diagnosis, *GUARDS, {"type": "FaultHook", "kind": kind}]
        return cfg

    return make


def captures(tmp_path):
    return sorted((tmp_path / "work" / "captures").glob("*"))


@pytest.mark.parametrize("layer_scale", [1e-5, 1.0])
def test_healthy_run_triggers_nothing(config, tmp_path, layer_scale):
    train(config(None, model__backbone__layer_scale_init_value=layer_scale), tmp_path)
    assert len(FaultHook.losses) == 12
    assert captures(tmp_path) == []


def test_collapsed_run_is_stopped(config, tmp_path):
    cfg = config("collapse", model__backbone__layer_scale_init_value=1.0)
    with pytest.raises(TrainingStoppedError, match="representation has collapsed"):
        train(cfg, tmp_path)
    assert len(FaultHook.losses) == 4


def test_broken_weight_stops_the_run_and_replay_finds_it(config, tmp_path, capsys):
    cfg = config("weight")
    with pytest.raises(TrainingStoppedError, match="3 steps in a row up to iteration 5"):
        train(cfg, tmp_path)
    files = captures(tmp_path)
    assert [file.name for file in files] == [f"iter_0000000{it}.pt" for it in (3, 4, 5)]
    replay_tool.main([str(tmp_path / "toy.py"), str(files[0])])
    text = capsys.readouterr().out
    assert "iteration 3" in text
    assert "not finite: backbone.blocks.1.mlp.fc1.weight" in text
    assert "output that is not finite: student.backbone.blocks.1.mlp.fc1" in text


def test_replay_repeats_the_loss_with_stochastic_depth_and_rope_augmentation(config, tmp_path):
    cfg = config("gradient")
    with pytest.raises(TrainingStoppedError, match="non-finite gradient, with finite losses"):
        train(cfg, tmp_path)
    for file, loss in zip(captures(tmp_path), FaultHook.losses[3:]):
        report = replay_capture(file, cfg)
        assert report.is_finite
        assert report.losses[0]["loss"] == loss
        assert report.first_bad_module is None


def test_a_step_of_shards_is_captured_and_repeats_its_losses(config, tmp_path, capsys):
    cfg = config(None, strategy__type="FSDP2Strategy")
    cfg.custom_hooks.append({"type": "PoisonHook", "iteration": 3})
    train(cfg, tmp_path)
    (folder,) = captures(tmp_path)
    assert folder.name == "iter_00000003"
    report = replay_capture(folder, cfg)
    assert not report.is_finite
    assert report.first_bad_module == "data_preprocessor"
    seen = read_training_state(folder / "step_rank0.pth")["step"]["outputs"]
    (losses,) = report.losses
    finite = {name for name, value in losses.items() if isfinite(value) and name in seen}
    assert {"dino_global_loss", "ibot_loss", "koleo_loss"} <= finite
    for name in finite:
        assert losses[name] == pytest.approx(seen[name], rel=1e-5)
    with pytest.raises(ValueError, match="holds the ranks 0 to 0, not rank 5"):
        replay_capture(folder, cfg, rank=5)
