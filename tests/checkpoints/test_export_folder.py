"""Exports of several files: written whole or from shards, read like one file."""

import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from mmengine.registry import MODELS
from safetensors import safe_open
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from dinov3_mm.checkpoints import (
    build_backbone,
    export_backbone,
    load_backbone_weights,
    load_weights,
    read_metadata,
    read_statistics,
)
from dinov3_mm.checkpoints.containers import open_checkpoint
from dinov3_mm.checkpoints.export import split_by_size, write_folder
from tests.checkpoints.toys import assert_same_tensors, redraw, tensors_of, toy_backbone

WORLD = 2
LIMIT = 8000  # bytes; the toys have ten times as many
WEB = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
CONVNEXT = dict(
    type="DINOv3ConvNeXt",
    arch=dict(depths=[1, 1, 1, 1], dims=[8, 8, 16, 32], layer_scale_init_value=1.0),
)


def head() -> torch.nn.Module:
    return redraw(torch.nn.Linear(32, 40), seed=3)


def build(kind: str) -> torch.nn.Module:
    if kind == "vit":
        return toy_backbone(1, rope_dtype="bf16")
    return redraw(MODELS.build(CONVNEXT), seed=1)


def export(kind: str, folder, backbone=None, part=None) -> str:
    path = export_backbone(
        backbone or build(kind),
        folder / f"{kind}.safetensors",
        {"statistics": WEB, "provenance": {"iteration": 7}},
        heads={"dino_head": part or head()},
        max_file_size=LIMIT,
    )
    assert path == folder / kind
    return path


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """Folder of what two ranks wrote from shards."""
    folder = tmp_path_factory.mktemp("sharded")
    mp.spawn(rank_main, (str(folder),), WORLD)
    return folder


def rank_main(rank: int, name: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{name}/store", WORLD)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD, store=store)
    mesh = init_device_mesh("cpu", (WORLD,))

    def refuse(*_, **__):
        raise AssertionError("a tensor was gathered")

    DTensor.full_tensor = refuse
    for kind in ("vit", "convnext"):
        backbone, part = fully_shard(build(kind), mesh=mesh), fully_shard(head(), mesh=mesh)
        for _ in range(2):  # the second export replaces the first
            export(kind, Path(name), backbone, part)
    state = {
        "weight": distribute_tensor(torch.arange(15.0).view(5, 3), mesh, [Shard(0)]),
        "column": distribute_tensor(torch.arange(12.0).view(3, 4), mesh, [Shard(1)]),
        "running_mean": torch.arange(3.0),
        "num_batches_tracked": torch.tensor(17),
        "scale": torch.tensor(2.5),
    }
    write_folder(Path(name) / "mixed", state, {"note": "x"}, 10)
    dist.destroy_process_group()


def test_tensors_are_cut_in_order_and_a_large_one_stands_alone():
    state = {name: torch.zeros(size) for name, size in zip("abcde", (2, 2, 9, 1, 4))}
    assert split_by_size(state, 16) == {"a": 1, "b": 1, "c": 2, "d": 3, "e": 4}
    assert split_by_size(state, 1000) == dict.fromkeys("abcde", 1)


@pytest.mark.parametrize("kind", ["vit", "convnext"])
@pytest.mark.parametrize("origin", ["whole", "shards"])
def test_a_folder_is_read_like_a_file(kind, origin, tmp_path, sharded):
    path = export(kind, tmp_path) if origin == "whole" else sharded / kind
    expected = build(kind)
    rebuilt = build_backbone(path)
    assert rebuilt.arch_settings == expected.arch_settings
    assert_same_tensors(rebuilt.state_dict(), tensors_of(expected))
    checkpoint = load_weights(path, heads=True)
    assert_same_tensors(checkpoint.heads["dino_head"], tensors_of(head()))
    assert "exported" in str(checkpoint.report)
    assert read_statistics(path).name == "LVD-1689M"
    other = build(kind)
    torch.nn.init.zeros_(next(other.parameters()))
    load_backbone_weights(other, path)
    assert_same_tensors(other.state_dict(), tensors_of(expected))


@pytest.mark.parametrize("origin", ["whole", "shards"])
def test_the_folder_is_in_order(origin, tmp_path, sharded):
    path = export("vit", tmp_path) if origin == "whole" else sharded / "vit"
    one_file = export_backbone(
        build("vit"),
        tmp_path / "one.safetensors",
        {"statistics": WEB, "provenance": {"iteration": 7}},
    )
    assert read_metadata(path) == read_metadata(one_file)
    assert json.loads(path.with_suffix(".json").read_text()) == read_metadata(path)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3
    assert sorted(os.listdir(path)) == [*files, "model.safetensors.index.json"]
    for file in files:
        with safe_open(path / file, framework="pt") as opened:
            names = list(opened.keys())
            sizes = [opened.get_tensor(name).nbytes for name in names]
        assert sum(sizes) <= LIMIT or len(sizes) == 1
    assert not [name for name in os.listdir(path.parent) if "partial" in name]


def test_scalars_and_integers_survive_the_merge(sharded):
    opened = open_checkpoint(sharded / "mixed")
    tensors = opened.read(opened.names)
    assert opened.export == {"note": "x"}
    assert torch.equal(tensors["weight"], torch.arange(15.0).view(5, 3))
    assert torch.equal(tensors["column"], torch.arange(12.0).view(3, 4))
    assert torch.equal(tensors["running_mean"], torch.arange(3.0))
    assert tensors["num_batches_tracked"].item() == 17
    assert tensors["scale"].item() == 2.5


def test_a_failed_export_keeps_the_old_folder(tmp_path, monkeypatch):
    path = export("vit", tmp_path)
    before = {file.name: file.read_bytes() for file in path.iterdir()}

    def full_disk(tensors, partial, metadata):
        partial.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("dinov3_mm.checkpoints.export.save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        export("vit", tmp_path)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before


def test_bad_sizes_and_indices_are_named(tmp_path):
    with pytest.raises(ValueError, match="max_file_size is a number of bytes >= 1, got '5GB'"):
        export_backbone(build("vit"), tmp_path / "x.safetensors", max_file_size="5GB")
    path = export("vit", tmp_path)
    index = path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["metadata"]["dinov3_mm"] = "{half"
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="'dinov3_mm' is no JSON"):
        build_backbone(path)
    (path / "model-00002-of-00003.safetensors").unlink(missing_ok=True)
    content["metadata"].pop("dinov3_mm")
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="no export of dinov3_mm"):
        read_metadata(path)
