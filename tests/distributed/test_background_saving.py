"""Checkpoints written in the background while two gloo ranks go on communicating."""

import signal
import time
from datetime import timedelta

import psutil
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dinov3_mm.engine.run_files import checkpoint_path, list_checkpoints
from dinov3_mm.engine.training_state import (
    finish,
    load_sharded_state,
    new_background_group,
    save_sharded_state,
)
from tests.acceptance.rank_parity import parity_config
from tests.engine.optim.models import ToyModel
from tests.engine.optim.test_constructor import build
from tests.integration.toy_run import start_training, write_images
from tests.integration.traces import read_shards

WORLD, SAVES, MESSAGES = 2, 5, 200


def toy(seed: int):
    torch.manual_seed(seed)
    model = ToyModel()
    fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
    return model, build(model, optimizer={"type": "AdamW", "lr": 0.1}).optimizer


def rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", WORLD)
    timeout = timedelta(minutes=10)  # messages that mixed would wait for ever
    dist.init_process_group("gloo", rank=rank, world_size=WORLD, store=store, timeout=timeout)
    group = new_background_group()
    results = {
        "own group": group is not dist.group.WORLD,
        "sends CPU tensors": torch.device("cpu") in group._device_types,
    }
    wrong, unequal = 0, []
    for number in range(SAVES):
        model, optimizer = toy(number)
        place = f"{folder}/iter_{number}"
        write = save_sharded_state(
            place, model, optimizer, {"meta": {"n": number}}, background_group=group
        )
        # The weights that are saved are those of this moment.
        saved = [p.to_local().clone() for p in model.parameters()]
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        for message in range(MESSAGES):
            size = 1 + (37 * message) % 500
            value = torch.full((size,), float(message + rank))
            dist.all_reduce(value)
            wrong += int(not (value == 2 * message + 1).all())
        finish(place, write)
        other, optimizer = toy(SAVES)
        state, _ = load_sharded_state(place, other, None)
        equal = [torch.equal(p.to_local(), q) for p, q in zip(other.parameters(), saved)]
        unequal.append(equal.count(False) + int(state["meta"]["n"] != number))
    results |= {"wrong messages": wrong, "unequal tensors": sum(unequal)}
    if rank == 0:
        torch.save(results, f"{folder}/results.pth")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("background")
    mp.spawn(rank_main, (str(folder),), WORLD)
    return torch.load(folder / "results.pth", weights_only=True)


def test_writes_and_training_do_not_mix(results):
    assert results["wrong messages"] == 0
    assert results["unequal tensors"] == 0


def test_the_group_is_one_that_a_thread_may_use_beside_nccl(results):
    assert results["own group"]
    assert results["sends CPU tensors"]


def test_one_process_needs_no_group():
    assert new_background_group() is None


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [None, 2])
def test_a_kill_after_the_write_loses_nothing(tmp_path, ranks):
    """The checkpoint has its name without another save, and holds everything."""
    work_dir = tmp_path / "run"
    cfg = parity_config(write_images(tmp_path / "images"), work_dir, iters=100)
    cfg.strategy = dict(type="FSDP2Strategy", save_in_background=True)
    cfg.default_hooks.checkpoint.update(interval=2, export=False)
    cfg.custom_imports = dict(imports=["tests.integration.fault_hook"])
    cfg.custom_hooks = [*cfg.custom_hooks, dict(type="WaitHook", iteration=2)]
    cfg.dump(tmp_path / "toy.py")
    run = start_training(tmp_path / "toy.py", ranks=ranks)
    while run.poll() is None and len(list(work_dir.glob("waiting_*"))) < (ranks or 1):
        time.sleep(0.05)
    waited_until = time.monotonic() + 60  # all ranks stand still: only the write goes on
    while not list_checkpoints(work_dir) and time.monotonic() < waited_until:
        time.sleep(0.05)
    if run.poll() is None:
        for process in [run, *psutil.Process(run.pid).children(recursive=True)]:
            process.kill()
    output, _ = run.communicate()
    assert run.returncode == -signal.SIGKILL, output
    assert list(list_checkpoints(work_dir)) == [2]
    tensors = read_shards(checkpoint_path(work_dir, 2, sharded=True))
    assert {name.split(".")[0] for name in tensors} == {"model", "optimizer"}
    assert all(tensor.isfinite().all() for tensor in tensors.values())
