"""Continued pretraining by the one command: refusals, start, freeze, resume, export."""

import json

import pytest
import torch

import tests.integration.stop_hook  # noqa: F401
from dinov3_mm.checkpoints import build_backbone, load_weights
from dinov3_mm.engine import ConfigError
from dinov3_mm.engine.run_files import checkpoint_path
from dinov3_mm.engine.training_state import read_training_state
from dinov3_mm.evaluation.records import read_records
from tests.integration.continue_run import (
    labelled_noise,
    random_convnext,
    random_released_like,
    toy_continue,
)
from tests.integration.toy_run import train, write_images
from tests.integration.traces import different_tensors, read_trace

ITERS = 16
FREEZE = 4  # a quarter of the run


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return labelled_noise(tmp_path_factory.mktemp("images") / "photos")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    return random_released_like(folder / "toy_pretrain_lvd1689m-00000000.pth")


def recipe(work_dir, name="continue_vits16", **changes):
    settings = dict(train_cfg__max_iters=ITERS, train_cfg__global_batch_size=8)
    cfg = toy_continue(name, work_dir, **{**settings, **changes})
    cfg.default_hooks.checkpoint.update(interval=4, max_to_keep=None)
    return cfg


@pytest.fixture(scope="module")
def straight(images, weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    train(recipe(folder / "run"), folder, "--data", str(images), "--weights", str(weights))
    return folder / "run"


def log_of(work_dir):
    return "\n".join(path.read_text() for path in sorted(work_dir.glob("*/*.log")))


def backbone_of(work_dir, iteration, owner="student"):
    state = read_training_state(checkpoint_path(work_dir, iteration))["state_dict"]
    start = f"{owner}.backbone."
    return {n.removeprefix(start): t for n, t in state.items() if n.startswith(start)}


def test_what_is_printed(straight):
    log = log_of(straight)
    for line in (
        "loaded 68/68 backbone tensors from official",
        "bias masks reset to 1/0/1",
        "heads: random; teacher: a copy of the student",
        "evaluation on 1 image in 5",
        "(LVD-1689M)",
        "prototypes 256 = power of two below",
        "learning rate 7.07e-05 = 0.0008 (width 96) x sqrt(8 / 1024)",
        "backbone frozen for 4 iterations = 10% of 16",
        "EMA momentum 0.5",
        "k-NN over 3 class folders (class0, class1, class2)",
        "starting point: k-NN top-1",
        "the backbone stays frozen until iteration 4",
        "iteration 4: the backbone thaws",
        "knn cls_top1_k10: ",
        "the file to use: ",
    ):
        assert line in log, line
    assert log.index("starting point: k-NN") < log.index("iter 1/16")
    records = read_records(straight / "evaluations.jsonl", "knn")
    assert records[0]["step"] == 0 and records[-1]["step"] == ITERS


def test_the_backbone_stays_to_the_bit_and_thaws_with_sane_moments(straight, weights):
    expected = load_weights(weights, reset_bias_mask=True).state_dict
    for owner in ("student", "teacher"):
        frozen = backbone_of(straight, FREEZE, owner)
        assert frozen.keys() == expected.keys()
        assert all(torch.equal(frozen[name], expected[name]) for name in frozen)
    thawed = backbone_of(straight, 2 * FREEZE)
    moved = [name for name in thawed if not torch.equal(thawed[name], expected[name])]
    assert len(moved) > 0.8 * len(thawed)

    before = optimizer_by_name(read_training_state(checkpoint_path(straight, FREEZE)))
    assert before and not any(name.startswith("backbone.") for name in before)
    after = optimizer_by_name(read_training_state(checkpoint_path(straight, 2 * FREEZE)))
    for name, state in after.items():
        steps = FREEZE if name.startswith("backbone.") else 2 * FREEZE
        assert state["step"].item() == steps, name
        assert state["exp_avg"].isfinite().all() and (state["exp_avg_sq"] >= 0).all()
    trace = read_trace(straight)
    rates = [trace[step]["backbone_lr"] / trace[step]["lr"] for step in range(FREEZE + 1, ITERS)]
    assert rates == pytest.approx([min(1, (i + 1) / (FREEZE + 1)) for i in range(len(rates))])
    assert trace[FREEZE]["backbone_lr"] == 0 and trace[FREEZE]["grad_norm/backbone"] > 0


def optimizer_by_name(state):
    names = {}
    for group in state["optimizer"]["param_groups"]:
        names.update(zip(group["params"], group["param_names"], strict=True))
    return {names[key]: value for key, value in state["optimizer"]["state"].items()}


@pytest.mark.parametrize(
    "stop", [2, *(pytest.param(stop, marks=pytest.mark.slow) for stop in (4, 6))]
)
def test_resume_is_exact_in_and_after_the_freeze(straight, images, weights, tmp_path, stop):
    work_dir = tmp_path / "run"
    given = ("--data", str(images), "--weights", str(weights))
    cfg = recipe(work_dir)
    cfg.default_hooks.checkpoint.interval = 2
    cfg.custom_hooks.append(dict(type="StopHook", after=stop))
    train(cfg, tmp_path, *given)
    assert max(read_trace(work_dir)) == stop
    cfg.custom_hooks.pop()
    # The weights are in the checkpoint: the file is not asked for again.
    train(cfg, tmp_path, "--resume", "--data", str(images))
    assert read_trace(work_dir) == read_trace(straight)
    assert different_tensors(work_dir, straight, ITERS) == []


def test_a_grown_folder_keeps_the_hyper_parameters(straight, images, weights, tmp_path):
    folder = labelled_noise(tmp_path / "photos", per_class=40)
    train(
        recipe(tmp_path / "run", train_cfg__max_iters=ITERS + 2),
        tmp_path,
        *("--data", str(folder), "--resume", str(checkpoint_path(straight, ITERS))),
    )
    log = log_of(tmp_path / "run")
    assert "the data set has 120 images, it had 36 when the run began" in log
    assert "backbone frozen for" not in log
    stored = [
        read_training_state(checkpoint_path(run, step))["meta"]["derived"]
        for run, step in ((straight, ITERS), (tmp_path / "run", ITERS + 2))
    ]
    assert stored[0]["values"] == stored[1]["values"]
    assert stored[0]["values"]["custom_hooks.OptimScheduleHook.backbone_freeze_iters"] == FREEZE


def test_the_export_is_the_teacher_with_the_statistics_of_the_weights(straight):
    path = straight / "exports" / "teacher_latest.safetensors"
    backbone = build_backbone(path)
    expected = backbone_of(straight, ITERS, "teacher")
    assert all(torch.equal(t, expected[name]) for name, t in backbone.state_dict().items())
    header = json.loads(path.with_suffix(".json").read_text())
    assert header["statistics"]["mean"] == [0.485, 0.456, 0.406]
    bias = backbone.state_dict()["blocks.0.attn.qkv.bias"].chunk(3)
    assert bias[0].any() and bias[2].any()  # q and v train


@pytest.mark.slow
def test_a_gram_teacher_is_the_released_backbone(images, weights, tmp_path):
    cfg = recipe(tmp_path / "run", "continue_gram_vits16")
    train(cfg, tmp_path, "--data", str(images), "--weights", str(weights))
    expected = load_weights(weights, reset_bias_mask=True).state_dict
    anchor = backbone_of(tmp_path / "run", ITERS, "gram_teacher")
    assert all(torch.equal(anchor[name], expected[name]) for name in expected)
    trace = read_trace(tmp_path / "run")
    assert trace[ITERS]["gram_loss"] > 0 and trace[1]["gram_weight"] == 1


@pytest.mark.slow
def test_a_convnext_continues_without_masks(images, tmp_path):
    weights = random_convnext(tmp_path / "convnext.pth")
    cfg = recipe(tmp_path / "run", "continue_convnext_tiny", train_cfg__max_iters=8)
    train(cfg, tmp_path, "--data", str(images), "--weights", str(weights))
    work_dir = tmp_path / "run"
    start = load_weights(weights).state_dict
    moved = backbone_of(work_dir, 8)
    assert not torch.equal(moved["stages.3.0.dwconv.weight"], start["stages.3.0.dwconv.weight"])
    assert "input statistics: ImageNet's, as the weights do not state any" in log_of(work_dir)
    export = build_backbone(work_dir / "exports" / "teacher_latest.safetensors")
    assert type(export).__name__ == "DINOv3ConvNeXt"
    assert read_trace(work_dir)[8]["ibot_loss"] > 0


def test_folders_without_classes_are_evaluated_by_retrieval(weights, tmp_path):
    folder = write_images(tmp_path / "flat", count=20)
    cfg = recipe(tmp_path / "run", train_cfg__max_iters=4)
    train(cfg, tmp_path, "--data", str(folder), "--weights", str(weights))
    log = log_of(tmp_path / "run")
    assert "evaluation: two-crop retrieval among" in log
    assert "starting point: two-crop retrieval top-1" in log
    assert "retrieval cls_top1: " in log


def test_random_weights_are_refused(images, tmp_path):
    with pytest.raises(ConfigError, match=r"no weights to continue from.*--weights FILE"):
        train(recipe(tmp_path / "run"), tmp_path, "--data", str(images))


def test_missing_images_are_refused(weights, tmp_path):
    with pytest.raises(ConfigError, match=r"no images to train on: .*--data DIR"):
        train(recipe(tmp_path / "run"), tmp_path, "--weights", str(weights))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "/nowhere"), "--data: /nowhere does not exist"),
        (("--weights", "/nowhere.pth"), "--weights: /nowhere.pth does not exist"),
        (("--weights", "dinov3_vits16"), "--weights: .*not at.*gated"),
    ],
)
def test_what_users_mistype(arguments, message, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=message):
        train(recipe(tmp_path / "run"), tmp_path, *arguments)


def test_weights_of_another_architecture_are_refused(images, tmp_path):
    arch = dict(embed_dims=48, num_layers=2, num_heads=3, patch_size=8)
    other = random_released_like(tmp_path / "other.pth", arch)
    with pytest.raises(ValueError, match="do not fit this DINOv3ViT; nothing was loaded"):
        train(recipe(tmp_path / "run"), tmp_path, "--data", str(images), "--weights", str(other))
