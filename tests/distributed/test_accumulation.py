"""Two gloo ranks with three micro batches a step: one reduction, the gradients of the mean."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from mmengine.model import MMDistributedDataParallel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from dinov3_mm.engine.strategies.fsdp2 import GradientReduction
from tests.engine.optim.models import ToyModel
from tests.engine.optim.test_constructor import build

WORLD, MICRO = 2, 3
# The large eps makes the step follow the size of the gradient.
ADAM = {"type": "AdamW", "lr": 0.1, "eps": 1.0, "weight_decay": 0.0}
MODES = ("ddp", "once", "every", "replicas")


def images(rank: int, micro: int) -> torch.Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(10 * micro + rank))


def toy() -> ToyModel:
    torch.manual_seed(0)
    return ToyModel()


def prepare(mode: str):
    """A wrapped toy, its optimizer wrapper and the communication hook's count."""
    reductions = []
    if mode == "ddp":
        model = MMDistributedDataParallel(toy())

        def count(_, bucket):
            reductions.append(1)
            dist.all_reduce(bucket.buffer())
            future = torch.futures.Future()
            future.set_result(bucket.buffer() / WORLD)
            return future

        model.register_comm_hook(None, count)
        return model, build(model, optimizer=ADAM, accumulative_counts=MICRO), reductions
    shape = (WORLD, 1) if mode == "replicas" else (1, WORLD)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
    model = toy()
    fully_shard(model, mesh=mesh)
    wrapper = build(model, optimizer=ADAM, accumulative_counts=MICRO)
    every = mode in ("every", "replicas")
    wrapper.reduce_gradients = GradientReduction(model, every_micro_batch=every)
    return model, wrapper, reductions


def train(mode: str, rank: int) -> dict:
    model, wrapper, reductions = prepare(mode)
    scatters, reduces = [], []
    for micro in range(MICRO):
        with CommDebugMode() as calls:
            with wrapper.optim_context(model):
                loss = model(images(rank, micro))
            wrapper.update_params(loss)
        counts = {str(op): n for op, n in calls.get_comm_counts().items()}
        scatters.append(sum(n for op, n in counts.items() if "reduce_scatter" in op))
        reduces.append(len(reductions))
    weights = {
        name.removeprefix("module."): (p.full_tensor() if isinstance(p, DTensor) else p).detach()
        for name, p in model.named_parameters()
    }
    return {"scatters": scatters, "reduces": reduces, "weights": weights}


def rank_main(rank: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, WORLD), rank=rank, world_size=WORLD)
    results = {mode: train(mode, rank) for mode in MODES}
    if rank == 0:
        torch.save(results, out)
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("accumulation")
    mp.spawn(rank_main, (str(folder / "store"), str(folder / "out.pth")), WORLD)
    return torch.load(folder / "out.pth", weights_only=True)


@pytest.fixture(scope="module")
def expected() -> dict:
    """Plain torch: a step along the mean of the losses of all micro batches of all ranks."""
    model = toy()
    losses = [model(images(rank, micro)) for rank in range(WORLD) for micro in range(MICRO)]
    torch.stack(losses).mean().backward()
    torch.optim.AdamW(model.student.parameters(), lr=0.1, eps=1.0, weight_decay=0.0).step()
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("mode", MODES)
def test_the_step_is_that_of_the_mean_of_all_micro_batches(results, expected, mode):
    weights = results[mode]["weights"]
    assert weights.keys() == expected.keys()
    worst = max((weights[name] - expected[name]).abs().max().item() for name in expected)
    assert worst < 1e-6


def test_gradients_are_reduced_when_they_must_be(results):
    assert results["ddp"]["reduces"][:2] == [0, 0]
    assert results["ddp"]["reduces"][2] > 0
    assert results["once"]["scatters"][:2] == [0, 0]
    assert results["once"]["scatters"][2] > 0
    assert all(results["every"]["scatters"])
