"""Several teachers in shards on two gloo ranks: what is read, and the training of one process."""

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from mmengine.config import Config
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from dinov3_mm.checkpoints.load import gather_whole
from dinov3_mm.engine.hooks import DistillationHook
from dinov3_mm.engine.launch import end_processes
from dinov3_mm.engine.strategies.ddp import compile_units, networks_of
from dinov3_mm.engine.strategies.fsdp2 import (
    ShardingPolicy,
    materialise,
    shard_model,
    sharded_modules,
)
from dinov3_mm.models.pretraining import DINOv3
from tests.acceptance.rank_parity import compare
from tests.checkpoints.test_unread import Counter
from tests.checkpoints.toys import redraw
from tests.integration.distill_run import distill_config, write_teacher
from tests.integration.toy_run import start_training, toy_config, train

WORLD, ITERS = 2, 8
NAMES = ("web", "sat")
HEAD = dict(type="DINOv3Head", num_prototypes=24, hidden_dims=32, bottleneck_dims=16)
BACKBONE = dict(type="DINOv3ViT", arch=dict(embed_dims=32, num_layers=2, num_heads=2), patch_size=8)
TEACHER = dict(backbone=BACKBONE, dino_head=HEAD, ibot_head=HEAD)


def build(several: bool) -> DINOv3:
    distillation = dict(teachers=dict.fromkeys(NAMES, TEACHER)) if several else TEACHER
    return DINOv3(dict(BACKBONE), dict(HEAD), dict(HEAD), distillation=distillation)


def files_of(folder: Path, several: bool) -> dict[str, str] | str:
    return {n: str(folder / f"{n}.pth") for n in NAMES} if several else str(folder / "web.pth")


def write_files(folder: Path) -> None:
    """A training state for each teacher."""
    for seed, name in enumerate(NAMES):
        teacher = redraw(build(False), seed=seed).teacher
        state = {f"teacher.{key}": value for key, value in teacher.state_dict().items()}
        torch.save({"state_dict": state}, folder / f"{name}.pth")


def load(model: DINOv3, files: dict[str, str] | str) -> int:
    """Let the hook load the teachers; bytes that this process read of the files."""
    counter = Counter()
    runner = SimpleNamespace(model=model, logger=logging.getLogger("test"))
    DistillationHook(files).before_train(runner)
    counter.close()
    return counter.sliced + counter.whole


def rank_main(rank: int, name: str) -> None:
    torch.set_num_threads(1)
    folder = Path(name)
    store = dist.FileStore(f"{name}/store", WORLD)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD, store=store)
    results = {}
    for several in (False, True):
        files = files_of(folder, several)
        whole = build(several)
        results[several, "bytes of whole teachers"] = load(whole, files)
        with torch.device("meta"):
            model = build(several)
        mesh = init_device_mesh("cpu", (WORLD,), mesh_dim_names=("shard",))
        shard_model(model, mesh, ShardingPolicy())
        materialise(model, torch.device("cpu"))
        results[several, "bytes"] = load(model, files)
        results[several, "units"] = len(sharded_modules(model.distillation_teacher))
        parameters = dict(model.distillation_teacher.named_parameters())
        results[several, "sharded"] = all(isinstance(p, DTensor) for p in parameters.values())
        results[several, "unequal"] = [
            key
            for key, value in whole.distillation_teacher.named_parameters()
            if not torch.equal(gather_whole(parameters[key]), value)
        ]
    torch.save(results, folder / f"results{rank}.pth")
    end_processes()


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("teachers")
    write_files(folder)
    mp.spawn(rank_main, (str(folder),), WORLD)
    return [torch.load(folder / f"results{rank}.pth", weights_only=True) for rank in range(WORLD)]


@pytest.mark.parametrize("several", [False, True])
def test_each_rank_reads_its_shards_of_the_teachers(results, several):
    for found in results:
        assert found[several, "sharded"]
        assert found[several, "unequal"] == []
        # Two blocks, the rest of the backbone and two heads of a teacher.
        assert found[several, "units"] == (10 if several else 5)
        # Buffers and the larger halves of odd sizes are on top.
        assert found[several, "bytes"] < 0.56 * found[several, "bytes of whole teachers"]


def test_networks_and_their_blocks_are_found():
    model = build(True)
    names = [name for name, _ in networks_of(model)]
    assert names == ["student", "teacher", "distillation_teacher.web", "distillation_teacher.sat"]
    assert compile_units(model) == 4 * 2


def config(images: Path, files: dict[str, str], work_dir: Path) -> Config:
    cfg = distill_config(images, files["web"], work_dir, "deep", ITERS, batch=8)
    parts = cfg.model.pop("distillation")
    cfg.model.distillation = dict(teachers=dict(web=parts, sat=dict(**parts, weight=0.25)))
    cfg.model.koleo = dict(weight=0.1, distributed=True)
    cfg.custom_hooks[-1] = dict(type="DistillationHook", checkpoint=files)
    return cfg


@pytest.mark.slow
@pytest.mark.parametrize("compile_blocks", [False, True])
def test_two_ranks_equal_one_process(tmp_path, compile_blocks):
    images, web = write_teacher(tmp_path)
    other = toy_config(images, tmp_path / "other", train_cfg__max_iters=3)
    other.randomness = dict(seed=7)
    train(other, tmp_path)
    files = dict(web=str(web), sat=str(tmp_path / "other/checkpoints/iter_00000003.pth"))
    train(config(images, files, tmp_path / "alone"), tmp_path)
    cfg = config(images, files, tmp_path / "ranks")
    cfg.strategy = dict(type="FSDP2Strategy", compile_blocks=compile_blocks)
    cfg.dump(tmp_path / "ranks.py")
    run = start_training(tmp_path / "ranks.py", ranks=WORLD)
    output, _ = run.communicate()
    assert run.returncode == 0, output
    difference = compare(tmp_path / "alone", tmp_path / "ranks", ITERS)
    print(difference)
    assert difference.is_within_bars, str(difference)
