"""``--from-stage``: what a later stage takes from the work folder of the one before it."""

import copy
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from safetensors.torch import load_file

from dinov3_mm.engine import ConfigError, build_runner, resume_stage, start_from_stage
from dinov3_mm.engine.config.from_stage import stored_shapes
from dinov3_mm.engine.run_files import checkpoint_path, export_path, list_checkpoints
from dinov3_mm.engine.training_state import read_training_state
from tests.integration.toy_run import toy_config, train, write_images
from tests.integration.traces import read_trace
from tools.train import main


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def pretrained(images, tmp_path_factory):
    """Work folder of a first stage: checkpoints 3 and 6, exports 3 and 6."""
    folder = tmp_path_factory.mktemp("pretrained")
    train(toy_config(images, folder / "run", train_cfg__max_iters=6), folder)
    return folder / "run"


def gram_stage(images: Path, work_dir: Path, **stage) -> Config:
    cfg = toy_config(images, work_dir, train_cfg__max_iters=2)
    cfg.stage = dict(kind="gram_anchor", **stage)
    cfg.model.gram = dict(weight=1.0)
    for head in ("dino_head", "ibot_head"):
        cfg.model[head].num_prototypes = "auto"
    cfg.train_dataloader.transform.gram_size = 48
    cfg.custom_hooks.append(dict(type="GramAnchorHook", checkpoint=None))
    return cfg


def high_res_stage(images: Path, work_dir: Path) -> Config:
    cfg = gram_stage(images, work_dir)
    cfg.stage = dict(kind="high_res")
    sizes = [
        dict(global_size=40, local_size=16, gram_size=64, ratio=0.5),
        dict(global_size=48, local_size=20, gram_size=64, ratio=0.5),
    ]
    cfg.train_dataloader.transform = dict(
        type="MultiResolutionCrop", size_sets=sizes, num_local=2, partial_patches=True
    )
    return cfg


def tensors(work_dir: Path, iteration: int) -> dict:
    return read_training_state(checkpoint_path(work_dir, iteration))


def test_a_gram_stage_goes_on_and_counts_from_zero(images, pretrained, tmp_path):
    cfg = gram_stage(images, tmp_path / "run")
    train(cfg, tmp_path, "--from-stage", str(pretrained))
    state = tensors(tmp_path / "run", 2)
    assert list(read_trace(tmp_path / "run")) == [1, 2]
    # the moments of stage 1 are six steps old, the heads are its own
    assert {int(each["step"]) for each in state["optimizer"]["state"].values()} == {8}
    assert state["state_dict"]["student.dino_head.last_layer.weight"].shape[0] == 24
    anchor = load_file(export_path(pretrained, 6))
    for name, tensor in anchor.items():
        assert torch.equal(state["state_dict"][f"gram_teacher.backbone.{name}"], tensor), name
    log = next((tmp_path / "run").glob("*/*.log")).read_text()
    assert "weights, heads and optimizer moments of" in log
    assert "iter_00000006_teacher.safetensors (iteration 6, the newest)" in log


def test_an_early_teacher_anchors(images, pretrained, tmp_path):
    cfg = gram_stage(images, tmp_path / "run")
    train(cfg, tmp_path, "--from-stage", str(pretrained), "--gram-iter", "3")
    state = tensors(tmp_path / "run", 2)["state_dict"]
    for name, tensor in load_file(export_path(pretrained, 3)).items():
        assert torch.equal(state[f"gram_teacher.backbone.{name}"], tensor), name


def test_absolute_iterations_repeat_a_run_that_was_never_interrupted(images, pretrained, tmp_path):
    """Until the Gram term comes in, stage 2 is stage 1."""
    cfg = gram_stage(images, tmp_path / "run", iterations="absolute")
    cfg.train_cfg.max_iters = 9
    cfg.train_dataloader.transform.gram_size = 32  # larger ones change the resampling of all crops
    cfg.custom_hooks[-1]["weight"] = dict(
        type="warmup_cosine", start=0.0, peak=0.0, end=2.0, warmup_iters=8, cosine_iters=1
    )
    train(cfg, tmp_path, "--from-stage", str(pretrained))
    trace = read_trace(tmp_path / "run")
    assert list(trace) == [7, 8, 9]
    whole = tmp_path / "whole"
    whole.mkdir()
    train(toy_config(images, whole / "run", train_cfg__max_iters=9), whole)
    expected = read_trace(whole / "run")
    for step in (7, 8):
        assert trace[step]["ibot_loss"] == expected[step]["ibot_loss"]
        assert trace[step]["gram_weight"] == 0


def test_a_high_res_stage_starts_from_the_teacher(images, pretrained, tmp_path):
    cfg = high_res_stage(images, tmp_path / "run")
    assert start_from_stage(cfg, pretrained)[0].startswith("stage high_res")
    runner = build_runner(cfg)
    runner.strategy.prepare(
        runner.model, optim_wrapper=runner.optim_wrapper, dispatch_kwargs=dict(max_epochs=1)
    )
    start = tensors(pretrained, 6)["state_dict"]
    for name, tensor in runner.strategy.model.state_dict().items():
        for branch in ("student.", "teacher."):
            if name.startswith(branch):
                assert torch.equal(tensor, start[name.replace(branch, "teacher.", 1)]), name

    train(high_res_stage(images, tmp_path / "next"), tmp_path, "--from-stage", str(pretrained))
    state = tensors(tmp_path / "next", 2)
    assert {int(each["step"]) for each in state["optimizer"]["state"].values()} == {2}


def test_three_stages_and_an_interruption(images, pretrained, tmp_path):
    second = gram_stage(images, tmp_path / "second")
    train(second, tmp_path, "--from-stage", str(pretrained))
    third = high_res_stage(images, tmp_path / "third")
    third.train_cfg.max_iters = 4
    third.default_hooks.checkpoint.interval = 2
    third.custom_imports = dict(imports=["tests.integration.stop_hook"])
    hooks = third.custom_hooks
    third.custom_hooks = [*hooks, dict(type="StopHook", after=2)]
    arguments = ("--from-stage", str(tmp_path / "second"), "--resume")
    train(third, tmp_path, *arguments)
    assert list(list_checkpoints(tmp_path / "third")) == [2]
    # the same command; the earlier stage may be gone
    (tmp_path / "second").rename(tmp_path / "moved")
    third.custom_hooks = hooks
    train(third, tmp_path, *arguments)
    assert list(list_checkpoints(tmp_path / "third")) == [2, 4]


def test_stages_in_shards(images, pretrained, tmp_path):
    """Checkpoints of FSDP2 are folders; a stage starts from them, and from those of others."""
    for number, (make, earlier) in enumerate(
        ((gram_stage, pretrained), (high_res_stage, tmp_path / "0"), (high_res_stage, pretrained))
    ):
        cfg = make(images, tmp_path / str(number))
        cfg.strategy = dict(type="FSDP2Strategy")
        train(cfg, tmp_path, "--from-stage", str(earlier))
    (folder,) = list_checkpoints(tmp_path / "0").values()
    assert folder.is_dir()
    shapes = stored_shapes(folder)
    assert shapes["teacher.dino_head.last_layer.weight"] == (24, 16)
    assert "gram_teacher.ready" in shapes
    train(gram_stage(images, tmp_path / "own"), tmp_path, "--from-stage", str(pretrained))
    losses = [read_trace(tmp_path / name) for name in ("0", "own")]
    for step in (1, 2):
        assert losses[0][step]["loss"] == pytest.approx(losses[1][step]["loss"], rel=1e-5)


def test_resuming_keeps_the_heads(images, pretrained, tmp_path):
    cfg = gram_stage(images, tmp_path / "run")
    cfg.resume = str(checkpoint_path(pretrained, 3))
    resume_stage(cfg)
    assert cfg.model.dino_head.num_prototypes == 24


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (None, ["no_such_dir"], "no_such_dir does not exist; give the work folder"),
        (None, ["."], "no complete checkpoint in"),
        (None, ["{run}", "--gram-iter", "4"], "keeps no teacher of iteration 4; it has 3, 6"),
        (lambda c: c.pop("stage"), ["{run}"], "this config is no later stage"),
        (
            lambda c: c.stage.update(kind="gram"),
            ["{run}"],
            r"stage.kind='gram'; known: gram_anchor",
        ),
        (lambda c: c.stage.update(iters=1), ["{run}"], "stage: nobody reads 'iters'"),
        (lambda c: c.stage.update(kind="high_res", iterations="absolute"), ["{run}"], "its own"),
        (lambda c: c.update(load_from="a.pth"), ["{run}"], "so does load_from='a.pth'"),
        (
            lambda c: c.model.backbone.update(num_registers=2),
            ["{run}"],
            r"another architecture .*storage_tokens \(there \(1, 4, 32\), here \(1, 2, 32\)\)",
        ),
        (lambda c: c.model.backbone.arch.update(num_layers=3), ["{run}"], "missing in the check"),
        (lambda c: c.model.dino_head.update(num_prototypes=48), ["{run}"], "there .24, 16., here"),
        (lambda c: c.stage.update(iterations="absolute"), ["{run}"], "this stage ends at 2"),
        (lambda c: c.update(work_dir="{run}"), ["{run}"], "is the work folder of this run too"),
    ],
)
def test_mistakes(images, pretrained, tmp_path, monkeypatch, change, arguments, message):
    monkeypatch.chdir(tmp_path)
    cfg = gram_stage(images, tmp_path / "run")
    if change is not None:
        change(cfg)
    cfg.work_dir = cfg.work_dir.replace("{run}", str(pretrained))
    words = [word.replace("{run}", str(pretrained)) for word in arguments]
    with pytest.raises(ConfigError, match=message):
        train(cfg, tmp_path, "--from-stage", *words)


def test_a_later_stage_does_not_start_from_nothing(images, tmp_path):
    with pytest.raises(ConfigError, match=r"the gram_anchor stage, .* with --from-stage WORK_DIR"):
        build_runner(gram_stage(images, tmp_path / "run"))
    cfg = copy.deepcopy(gram_stage(images, tmp_path / "run"))
    cfg.dump(tmp_path / "toy.py")
    with pytest.raises(ConfigError, match="--gram-iter chooses a teacher of the stage"):
        main([str(tmp_path / "toy.py"), "--gram-iter", "3"])
