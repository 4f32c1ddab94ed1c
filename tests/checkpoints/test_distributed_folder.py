"""Folders of ``torch.distributed.checkpoint``: real ones are read, tampered ones are refused."""

import os
import pickle
import shutil
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from dinov3_mm.checkpoints import build_backbone, load_backbone_weights, load_weights
from tests.checkpoints.test_opening import RunsCode
from tests.checkpoints.toys import assert_same_tensors, tensors_of, toy_backbone


def heads_state(value):
    return {"mlp.0.weight": torch.full((3, 4), value), "mlp.0.bias": torch.full((3,), -value)}


def prefixed(prefix, state):
    return {f"{prefix}.{name}": tensor for name, tensor in state.items()}


def save(tree, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(tree, checkpoint_id=folder, no_dist=True)
    return folder


@pytest.fixture
def models():
    return {role: toy_backbone(seed) for seed, role in enumerate(("model_ema", "student", "gram"))}


@pytest.fixture
def training_folder(models, tmp_path):
    """A folder with the names of a reference training run, optimizer and iteration included."""
    student = tensors_of(models["student"])
    model = {
        **prefixed("student.backbone", student),
        **prefixed("student.dino_head", heads_state(1.0)),
        **prefixed("model_ema.backbone", models["model_ema"].state_dict()),
        **prefixed("model_ema.dino_head", heads_state(2.0)),
        **prefixed("model_ema.ibot_head", heads_state(3.0)),
        **prefixed("teacher.backbone", models["model_ema"].state_dict()),
        **prefixed("gram_teacher.backbone", models["gram"].state_dict()),
        "dino_loss.center": torch.zeros(1, 3),
    }
    moments = {name: {"exp_avg": torch.ones(2), "step": torch.ones(())} for name in student}
    optimizer = {
        "state": prefixed("student.backbone", moments),
        "param_groups": [{"lr": 1e-3, "params": list(student), "is_last_layer": False}],
    }
    tree = {"iteration": 7, "model": model, "optimizer": optimizer}
    return save(tree, tmp_path / "ckpt" / "7")


def test_the_ema_branch_is_loaded(models, training_folder):
    backbone = build_backbone(training_folder)
    assert_same_tensors(backbone.state_dict(), tensors_of(models["model_ema"]))


def test_heads_come_from_the_same_branch_and_the_rest_is_reported(training_folder):
    checkpoint = load_weights(training_folder, heads=True)
    assert_same_tensors(checkpoint.heads["dino_head"], heads_state(2.0))
    assert_same_tensors(checkpoint.heads["ibot_head"], heads_state(3.0))
    line = str(checkpoint.report)
    assert "official DCP folder" in line and "heads: dino_head, ibot_head" in line
    for part in ("model.student", "model.teacher", "model.gram_teacher", "model.dino_loss"):
        assert part in line
    assert "optimizer" not in line


def test_the_sharded_evaluation_variant_is_read(models, tmp_path):
    model = {
        **prefixed("backbone", models["model_ema"].state_dict()),
        **prefixed("dino_head", heads_state(2.0)),
    }
    folder = save({"iteration": "training_7", "model": model}, tmp_path / "eval")
    checkpoint = load_weights(folder, heads=True)
    assert_same_tensors(checkpoint.state_dict, tensors_of(models["model_ema"]))
    assert set(checkpoint.heads) == {"dino_head"}


def test_a_consolidated_folder_gives_the_same(models, training_folder, tmp_path):
    dcp_to_torch_save(training_folder, tmp_path / "consolidated.pth")
    checkpoint = load_weights(tmp_path / "consolidated.pth", heads=True)
    assert_same_tensors(checkpoint.state_dict, tensors_of(models["model_ema"]))
    assert set(checkpoint.heads) == {"dino_head", "ibot_head"}


class Malicious:
    """A class of some importable module, unknown to checkpoint indices."""


def tamper(folder, change):
    path = folder / ".metadata"
    index = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps(change(index)))


def test_an_index_that_would_run_code_is_refused(training_folder, tmp_path):
    witness = tmp_path / "executed"

    def plant(index):
        index.planner_data["iteration"] = RunsCode(witness)
        return index

    tamper(training_folder, plant)
    backbone = toy_backbone(9)
    before = tensors_of(backbone)
    with pytest.raises(ValueError, match=r"(posix|nt)\.system is no part of a checkpoint index"):
        load_backbone_weights(backbone, training_folder)
    assert not witness.exists()
    assert_same_tensors(backbone.state_dict(), before)
    pickle.loads((training_folder / ".metadata").read_bytes())
    assert witness.exists(), "the bomb is a dud, so this test proves nothing"


@pytest.mark.parametrize("what", [Malicious(), getattr, torch.load, os.path.join])
def test_an_index_with_any_other_class_or_function_is_refused(what, training_folder):
    def plant(index):
        index.planner_data["iteration"] = what
        return index

    tamper(training_folder, plant)
    with pytest.raises(ValueError, match="is no part of a checkpoint index"):
        load_weights(training_folder)


def test_a_shard_that_would_run_code_is_refused(training_folder, tmp_path):
    witness = tmp_path / "executed"
    for shard in training_folder.glob("*.distcp"):
        size = shard.stat().st_size
        bomb = pickle.dumps(RunsCode(witness))
        shard.write_bytes((bomb * (size // len(bomb) + 1))[:size])
    with pytest.raises(ValueError, match="is damaged"):
        load_weights(training_folder)
    assert not witness.exists()


def test_damaged_folders_are_refused(training_folder, tmp_path):
    copy = shutil.copytree(training_folder, tmp_path / "truncated_index")
    content = (copy / ".metadata").read_bytes()
    (copy / ".metadata").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="was refused"):
        load_weights(copy)

    copy = shutil.copytree(training_folder, tmp_path / "truncated_shard")
    for shard in copy.glob("*.distcp"):
        shard.write_bytes(shard.read_bytes()[:5000])
    with pytest.raises(ValueError, match="is damaged"):
        load_weights(copy)

    copy = shutil.copytree(training_folder, tmp_path / "no_shard")
    for shard in copy.glob("*.distcp"):
        shard.unlink()
    with pytest.raises(ValueError, match="is damaged"):
        load_weights(copy)

    copy = shutil.copytree(training_folder, tmp_path / "no_index")
    (copy / ".metadata").write_bytes(pickle.dumps({"state_dict_metadata": {}}))
    with pytest.raises(ValueError, match="expected a checkpoint index"):
        load_weights(copy)
