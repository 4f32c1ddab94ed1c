"""The checkpoint file: complete or absent, read without running anything, loaded strictly."""

import os
import pickle

import pytest
import torch
from torch import nn

from dinov3_mm.checkpoints.run_checkpoint import read_run_checkpoint
from dinov3_mm.engine.training_state import (
    load_model_state,
    read_training_state,
    write_training_state,
)


class Stage(nn.Module):
    """An algorithm with the two children that matter here."""

    def __init__(self, with_gram: bool, width: int = 3):
        super().__init__()
        self.student = nn.Linear(width, 2)
        if with_gram:
            self.gram_teacher = nn.Linear(width, 2)


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_round_trip(tmp_path):
    path = tmp_path / "a" / "x.pth"
    state = {"meta": {"iter": 3, "list": [1, 2.5, None, "s"]}, "state_dict": {"w": torch.ones(2)}}
    write_training_state(path, state)
    read = read_training_state(path)
    assert read["meta"] == state["meta"]
    assert torch.equal(read["state_dict"]["w"], torch.ones(2))
    assert [file.name for file in path.parent.iterdir()] == ["x.pth"]


def test_objects_are_refused_when_writing(tmp_path):
    with pytest.raises(TypeError, match=r"checkpoint\['meta'\]\['cfg'\]\[1\] is a object"):
        write_training_state(tmp_path / "x.pth", {"meta": {"cfg": [1, object()]}})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused(tmp_path, zipped):
    path, crater = tmp_path / "x.pth", tmp_path / "crater"
    content = {"format_version": 1, "state_dict": Bomb(crater)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="not a readable training checkpoint"):
        read_training_state(path)
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match="not a readable training checkpoint"):
        read_training_state(path)
    assert not crater.exists()


def test_damage_and_other_files_are_refused(tmp_path):
    path = tmp_path / "x.pth"
    with pytest.raises(FileNotFoundError, match="no training checkpoint at"):
        read_training_state(path)
    write_training_state(path, {"state_dict": {"w": torch.ones(1000)}})
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged"):
        read_training_state(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="damaged"):
        read_training_state(path)
    torch.save({"cls_token": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="DINOv3Pretrained"):
        read_training_state(path)


@pytest.mark.parametrize("content", [b"these are no weights", b")Xasc", b"<html></html>", b""])
def test_what_is_no_checkpoint_is_named(tmp_path, content):
    path = tmp_path / "x.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.pth is not a readable training checkpoint"):
        read_training_state(path)
    with pytest.raises(ValueError, match=r"x\.pth was not loaded"):
        read_run_checkpoint(path)


def test_a_stage_may_add_the_gram_teacher_and_nothing_else():
    first, second = Stage(with_gram=False), Stage(with_gram=True)
    anchor = second.gram_teacher.weight.clone()
    assert load_model_state(second, first.state_dict()) == ("gram_teacher",)
    assert torch.equal(second.student.weight, first.student.weight)
    assert torch.equal(second.gram_teacher.weight, anchor)
    assert load_model_state(Stage(with_gram=True), second.state_dict()) == ()
    with pytest.raises(ValueError, match=r"2 unknown to this config: gram_teacher.bias, gram"):
        load_model_state(first, second.state_dict())


def test_mismatches_are_listed():
    state = Stage(with_gram=True).state_dict()
    del state["gram_teacher.bias"]
    with pytest.raises(ValueError, match=r"1 missing in the checkpoint: gram_teacher.bias"):
        load_model_state(Stage(with_gram=True), state)
    wide = Stage(with_gram=False, width=4)
    before = wide.student.bias.clone()
    with pytest.raises(ValueError) as caught:
        load_model_state(wide, Stage(with_gram=False).state_dict())
    shapes = "student.weight (checkpoint (2, 3), model (2, 4))"
    assert f"1 of another shape: {shapes}" in str(caught.value)
    assert torch.equal(wide.student.bias, before)
