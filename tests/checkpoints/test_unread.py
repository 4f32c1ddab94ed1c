"""Weights for two gloo ranks: each reads its shards or is sent them, to the bit."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dinov3_mm.checkpoints import (
    export_backbone,
    load_backbone_weights,
    load_weights,
    to_hf,
)
from dinov3_mm.checkpoints import (
    load as loading,
)
from dinov3_mm.checkpoints.containers import StoredTensor
from dinov3_mm.checkpoints.load import UnreadTensor, gather_whole, reading_for_shards, shard_state
from tests.checkpoints.toys import redraw, toy_backbone

WORLD = 2
# Whether a rank can read its own slices, or the first reads for all.
SOURCES = {
    "export.safetensors": True,
    "folder": True,
    "official.pth": True,
    "old.pth": False,
    "hf.safetensors": False,
    "dcp": False,
}
ERRORS = ("absent.safetensors", "nan.safetensors", "nan_hf.safetensors", "wide.safetensors")


def head() -> torch.nn.Module:
    return redraw(torch.nn.Linear(32, 40), seed=3)


def write_sources(folder: Path) -> None:
    backbone = toy_backbone(1)
    state = backbone.state_dict()
    heads = {"dino_head": head()}
    export_backbone(backbone, folder / "export.safetensors", heads=heads)
    export_backbone(backbone, folder / "folder.safetensors", max_file_size=9000)
    torch.save({"teacher": state}, folder / "official.pth")
    torch.save(state, folder / "old.pth", _use_new_zipfile_serialization=False)
    save_file(to_hf(state), folder / "hf.safetensors")
    dcp.save({"model": {"backbone": state}}, checkpoint_id=folder / "dcp", no_dist=True)
    state["norm.weight"][-1] = torch.nan  # in the shard of the last rank
    export_backbone(backbone, folder / "nan.safetensors")
    save_file(to_hf(state), folder / "nan_hf.safetensors")
    wide = toy_backbone(2, in_channels=4)
    export_backbone(wide, folder / "wide.safetensors")


def sharded_toy() -> torch.nn.Module:
    backbone = toy_backbone(9)
    mesh = init_device_mesh("cpu", (WORLD,))
    for block in backbone.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(backbone, mesh=mesh)


class Counter:
    """Counts the bytes of tensors that checkpoints give out, in part and whole."""

    def __init__(self) -> None:
        self.sliced = self.whole = 0
        self._open = loading.open_checkpoint
        loading.open_checkpoint = self.open

    def close(self) -> None:
        loading.open_checkpoint = self._open

    def open(self, path):
        opened = self._open(path)

        def read(names):
            tensors = opened.read(names)
            self.whole += sum(tensor.nbytes for tensor in tensors.values())
            return tensors

        stored = None if opened.stored is None else Counted(opened.stored, self)
        return replace(opened, read=read, stored=stored)


class Counted(Mapping):
    def __init__(self, stored, counter) -> None:
        self.stored, self.counter = stored, counter

    def __len__(self):
        return len(self.stored)

    def __iter__(self):
        return iter(self.stored)

    def __getitem__(self, name):
        found = self.stored[name]

        def read(part):
            tensor = found.read(part)
            self.counter.sliced += tensor.nbytes
            return tensor

        return StoredTensor(found.shape, found.dtype, read)


def rank_main(rank: int, name: str) -> None:
    torch.set_num_threads(1)
    folder = Path(name)
    store = dist.FileStore(f"{name}/store", WORLD)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD, store=store)
    results = {"total": sum(t.nbytes for t in toy_backbone(1).state_dict().values())}
    for source in SOURCES:
        whole = toy_backbone(9)
        load_backbone_weights(whole, folder / source)
        counter, backbone = Counter(), sharded_toy()
        load_backbone_weights(backbone, folder / source)
        counter.close()
        expected, state = whole.state_dict(), backbone.state_dict()
        unequal = [
            key for key in expected if not torch.equal(gather_whole(state[key]), expected[key])
        ]
        results[source] = (counter.sliced, counter.whole, unequal)
    for source in ERRORS:
        backbone = sharded_toy()
        before = [p.to_local().clone() for p in backbone.parameters()]
        try:
            load_backbone_weights(backbone, folder / source)
            message = "loaded"
        except (ValueError, FileNotFoundError) as error:
            message = str(error)
        same = all(torch.equal(p.to_local(), b) for p, b in zip(backbone.parameters(), before))
        results[source] = (message, same)
    with reading_for_shards():
        part = load_weights(folder / "export.safetensors", heads=True).heads["dino_head"]
    target = redraw(torch.nn.Linear(32, 40), seed=4)
    fully_shard(target, mesh=init_device_mesh("cpu", (WORLD,)))
    results["unread"] = all(isinstance(tensor, UnreadTensor) for tensor in part.values())
    target.load_state_dict(shard_state(part, target.state_dict()))
    own = head().state_dict()
    results["head"] = all(
        torch.equal(gather_whole(tensor), own[key]) for key, tensor in target.state_dict().items()
    )
    torch.save(results, folder / f"results{rank}.pth")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("unread")
    write_sources(folder)
    mp.spawn(rank_main, (str(folder),), WORLD)
    return [torch.load(folder / f"results{rank}.pth", weights_only=True) for rank in range(WORLD)]


@pytest.mark.parametrize("source", SOURCES)
def test_weights_are_those_of_the_file(results, source):
    for rank in range(WORLD):
        assert results[rank][source][2] == []


@pytest.mark.parametrize("source", [name for name, sliced in SOURCES.items() if sliced])
def test_a_rank_reads_no_more_than_its_shards(results, source):
    total = results[0]["total"]
    sliced, whole, _ = zip(*(results[rank][source] for rank in range(WORLD)))
    assert whole == (0, 0)
    # Buffers and the larger halves of odd sizes are on top.
    assert all(0.4 * total < count < 0.6 * total for count in sliced)


@pytest.mark.parametrize("source", [name for name, sliced in SOURCES.items() if not sliced])
def test_else_the_first_rank_reads_for_all(results, source):
    sliced, whole, _ = zip(*(results[rank][source] for rank in range(WORLD)))
    assert sliced == (0, 0)
    assert whole[0] > 0.9 * results[0]["total"]
    assert whole[1] == 0


def test_heads_are_unread_too(results):
    assert all(result["unread"] and result["head"] for result in results)


@pytest.mark.parametrize(
    "source, words",
    [
        ("absent.safetensors", "no weights at"),
        ("nan.safetensors", "NaN or infinite values in 1 of"),
        ("nan_hf.safetensors", "NaN or infinite values in 1 of"),
        ("wide.safetensors", "the file is for 4 image channels, the backbone for 3"),
    ],
)
def test_all_ranks_refuse_alike_and_load_nothing(results, source, words):
    for result in results:
        message, same = result[source]
        assert words in message
        assert same


def test_one_process_reads_whole_tensors(tmp_path):
    path = export_backbone(toy_backbone(1), tmp_path / "export.safetensors")
    with reading_for_shards():
        state = load_weights(path).state_dict
    assert not any(tensor.is_meta for tensor in state.values())
