"""Formats are told by content; what is damaged or would run code is refused."""

import json
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from dinov3_mm.checkpoints.containers import open_checkpoint
from tests.checkpoints.toys import assert_same_tensors, tensors_of, toy_backbone


@pytest.fixture
def state():
    return tensors_of(toy_backbone())


def read_all(path):
    opened = open_checkpoint(path)
    return opened, opened.read(opened.names)


class RunsCode:
    """Unpickling an instance makes a folder: proof that the file was executed."""

    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return os.system, (f"mkdir '{self.witness}'",)


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors", "weights"])
@pytest.mark.parametrize("legacy", [False, True])
def test_torch_files_are_told_by_content(name, legacy, state, tmp_path):
    torch.save(state, tmp_path / name, _use_new_zipfile_serialization=not legacy)
    opened, tensors = read_all(tmp_path / name)
    assert opened.container == ".pth"
    assert_same_tensors(tensors, state)


def test_a_header_length_that_looks_like_a_pickle_is_none(state, tmp_path):
    """The first byte is the low byte of the header's length: 0x80 in one file of 32."""
    path = tmp_path / "weights.safetensors"
    for padding in range(256):
        save_file(state, path, metadata={"note": "x" * padding})
        if path.read_bytes()[:1] == b"\x80":
            break
    assert path.read_bytes()[:1] == b"\x80"
    opened, tensors = read_all(path)
    assert opened.container == ".safetensors"
    assert_same_tensors(tensors, state)


@pytest.mark.parametrize("name", ["weights.pth", "weights.bin"])
def test_safetensors_are_told_by_content(name, state, tmp_path):
    save_file(state, tmp_path / name)
    opened, tensors = read_all(tmp_path / name)
    assert opened.container == ".safetensors"
    assert_same_tensors(tensors, state)


@pytest.mark.parametrize("entry", ["teacher", "model_ema", "model", "state_dict"])
def test_a_known_entry_is_unwrapped(entry, state, tmp_path):
    tree = {entry: state, "epoch": 3, "optimizer": {"state": {0: {"step": torch.ones(())}}}}
    torch.save(tree, tmp_path / "run.pth")
    assert_same_tensors(read_all(tmp_path / "run.pth")[1], state)


def test_the_ema_entry_is_preferred_and_the_other_one_reported(state, tmp_path):
    trained = {name: tensor + 1 for name, tensor in state.items()}
    torch.save({"model": trained, "model_ema": state}, tmp_path / "run.pth")
    opened, tensors = read_all(tmp_path / "run.pth")
    assert_same_tensors(tensors, state)
    assert opened.notes == ("entry 'model' ignored",)


def test_nested_state_dicts_get_dotted_names(state, tmp_path):
    torch.save({"teacher": {"backbone": state}}, tmp_path / "run.pth")
    assert set(open_checkpoint(tmp_path / "run.pth").names) == {f"backbone.{n}" for n in state}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("bare", [False, True])
def test_a_torch_file_that_would_run_code_is_refused(bare, legacy, state, tmp_path):
    witness, path = tmp_path / "executed", tmp_path / "weights.pth"
    bomb = RunsCode(witness)
    content = bomb if bare else {**state, "extra": bomb}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match="could run code"):
        open_checkpoint(path)
    assert not witness.exists()
    torch.load(path, weights_only=False)
    assert witness.exists(), "the bomb is a dud, so this test proves nothing"


def test_a_bare_pickle_is_refused(tmp_path):
    witness, path = tmp_path / "executed", tmp_path / "weights.pth"
    path.write_bytes(pickle.dumps(RunsCode(witness)))
    with pytest.raises(ValueError, match="was not loaded"):
        open_checkpoint(path)
    assert not witness.exists()


@pytest.mark.parametrize("kept", [0.02, 0.5, 0.999])
@pytest.mark.parametrize("writer", [torch.save, save_file])
def test_truncated_files_are_refused(kept, writer, state, tmp_path):
    path = tmp_path / "weights"
    writer(state, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match="damaged"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>Access denied</html>", "web page"),
        (b"\x89PNG\r\n\x1a\n and more bytes", "begins with"),
        (b'{"hidden_size": 384}', "weight_map"),
        (b"[1, 2, 3] is a list and no object", "begins with"),
    ],
)
def test_other_files_are_named(content, hint, tmp_path):
    (tmp_path / "weights.pth").write_bytes(content)
    with pytest.raises(ValueError, match=hint):
        open_checkpoint(tmp_path / "weights.pth")


def test_a_torch_file_without_a_dict_is_refused(tmp_path):
    torch.save(torch.ones(3), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="expected a dict of tensors"):
        open_checkpoint(tmp_path / "weights.pth")


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no weights at .*absent\.pth.*http"):
        open_checkpoint(tmp_path / "absent.pth")
    (tmp_path / "notes.txt").write_text("nothing here")
    with pytest.raises(FileNotFoundError, match=r"no weights in the folder .*notes\.txt"):
        open_checkpoint(tmp_path)


def write_index(folder, weight_map):
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": weight_map}))
    return path


def test_a_shard_outside_the_folder_is_refused(state, tmp_path):
    (tmp_path / "model").mkdir()
    save_file(state, tmp_path / "secret.safetensors")
    write_index(tmp_path / "model", dict.fromkeys(state, "../secret.safetensors"))
    with pytest.raises(ValueError, match="same folder"):
        open_checkpoint(tmp_path / "model")


def test_an_index_that_promises_too_much_is_refused(state, tmp_path):
    save_file(state, tmp_path / "a.safetensors")
    write_index(tmp_path, {**dict.fromkeys(state, "a.safetensors"), "more": "a.safetensors"})
    with pytest.raises(ValueError, match=r"lacks tensors .*'more'"):
        open_checkpoint(tmp_path)
    write_index(tmp_path, {**dict.fromkeys(state, "a.safetensors"), "more": "b.safetensors"})
    with pytest.raises(FileNotFoundError, match=r"b\.safetensors, which is missing"):
        open_checkpoint(tmp_path)
