"""When CUDA graphs are refused, and what asks for them; no graph is recorded here."""

import copy

import pytest
import torch
from mmengine.registry import MODELS

from dinov3_mm.engine.strategies.ddp import (
    COMPILE_OPTIONS,
    PretrainStrategy,
    check_device,
    check_settings,
    compile_units,
    mark_steps,
)
from dinov3_mm.engine.strategies.fsdp2 import FSDP2Strategy
from tests.integration.toy_run import toy_config, train, write_images


def config(**changes):
    cfg = toy_config("images", "work_dir", **changes)
    cfg.strategy = dict(type="PretrainStrategy", compile_blocks=True, cuda_graphs=True)
    return cfg


def test_a_plain_run_can_be_replayed():
    check_settings(config())


SETS = [
    dict(global_size=32, local_size=16, ratio=0.5),
    dict(global_size=48, local_size=16, ratio=0.5),
]


@pytest.mark.parametrize(
    "path, value, words",
    [
        ("strategy.compile_blocks", False, "compile_blocks=False"),
        ("model.backbone.with_cp", True, "model.backbone.with_cp=True"),
        ("model.backbone.with_cp", "selective", "with_cp='selective'"),
        ("train_cfg.accumulate", 2, "train_cfg.accumulate=2"),
        ("strategy.type", "FSDP2Strategy", "FSDP2Strategy, which gathers"),
        ("strategy.type", FSDP2Strategy, "FSDP2Strategy, which gathers"),
        ("model.students", dict(a=dict(), b=dict()), "several students"),
        (
            "train_dataloader.transform",
            dict(_delete_=True, type="MultiResolutionCrop", size_sets=SETS),
            "2 sets of crop sizes",
        ),
    ],
)
def test_steps_that_cannot_be_replayed(path, value, words):
    cfg = config()
    cfg.merge_from_dict({path: value})
    with pytest.raises(ValueError, match=f"cuda_graphs=True does not go with .*{words}"):
        check_settings(cfg)
    cfg.strategy.cuda_graphs = False
    check_settings(cfg)


def test_all_reasons_are_named_at_once():
    cfg = config(train_cfg__accumulate=2, model__backbone__with_cp=True)
    with pytest.raises(ValueError, match=r"with_cp=True.*; train_cfg.accumulate=2"):
        check_settings(cfg)


@pytest.mark.parametrize("strategy", [PretrainStrategy, FSDP2Strategy])
def test_a_cpu_is_refused_before_anything_is_built(strategy, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match=r"needs a CUDA device.* trains on cpu"):
        strategy(compile_blocks=True, cuda_graphs=True)
    check_device(torch.device("cuda", 0))


def test_blocks_are_compiled_with_the_options(monkeypatch):
    model = MODELS.build(toy_config("images", "work_dir").model)
    seen = []
    block = type(model.student.backbone.blocks[0])
    monkeypatch.setattr(block, "compile", lambda self, **options: seen.append(options))
    assert compile_units(model, **COMPILE_OPTIONS) == 4
    assert seen == [{"mode": "reduce-overhead", "fullgraph": True, "dynamic": False}] * 4


def test_every_forward_pass_begins_a_step(monkeypatch):
    calls = []
    monkeypatch.setattr("torch.compiler.cudagraph_mark_step_begin", lambda: calls.append(1))
    model = torch.nn.Linear(2, 2)
    mark_steps(model)
    for _ in range(3):
        model(torch.zeros(1, 2))
    assert len(calls) == 3


def test_fsdp2_refuses_several_students():
    toy = toy_config("images", "work_dir").model.to_dict()
    parts = {key: toy[key] for key in ("backbone", "dino_head", "ibot_head")}
    students = {name: copy.deepcopy(parts) for name in ("small", "large")}
    model = dict(type="MultiDistillation", teacher=copy.deepcopy(parts), students=students)
    with pytest.raises(ValueError, match=r"FSDP2Strategy trains one student.*has 2.*MultiDistil"):
        FSDP2Strategy().build_model(model)


def test_a_run_on_a_cpu_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    cfg = toy_config(write_images(tmp_path / "images"), tmp_path / "run")
    cfg.strategy = dict(type="PretrainStrategy", cuda_graphs=True)
    with pytest.raises(ValueError, match="needs a CUDA device"):
        train(cfg, tmp_path)


def test_the_loop_refuses_before_the_first_step(tmp_path, monkeypatch):
    # As if this were a GPU: the device is not what is wrong.
    monkeypatch.setattr("dinov3_mm.engine.strategies.ddp.check_device", lambda device: None)
    cfg = toy_config(write_images(tmp_path / "images"), tmp_path / "run")
    cfg.strategy = dict(type="PretrainStrategy", cuda_graphs=True)
    with pytest.raises(ValueError, match="does not go with compile_blocks=False"):
        train(cfg, tmp_path)
