"""Two gloo ranks: a bad loss on one of them makes both skip, and they stay equal."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from mmengine.model import MMDistributedDataParallel

from tests.engine.optim.models import ToyModel
from tests.engine.optim.test_constructor import build


def train(rank: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    torch.manual_seed(0)
    model = MMDistributedDataParallel(ToyModel())
    wrapper = build(model, clip_grad=1.0)
    trace = []
    for step in range(4):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(10 * step + rank))
        loss = model(x)
        if step == 1 and rank == 1:
            # Infinite, but with a zero gradient of its own: the norms alone would not tell.
            loss = loss + torch.tensor(float("inf"))
        if step == 2 and rank == 0:
            loss = loss * float("nan")
        wrapper.update_params(loss)
        weights = torch.cat([p.detach().flatten() for p in model.module.student.parameters()])
        trace.append({"skipped": wrapper.step_skipped, "weights": weights})
    torch.save(trace, f"{out}/rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_ranks_skip_together(tmp_path):
    mp.spawn(train, args=(str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert [bool(step["skipped"]) for step in first] == [False, True, True, False]
    assert [bool(step["skipped"]) for step in second] == [False, True, True, False]
    for a, b in zip(first, second):
        assert torch.equal(a["weights"], b["weights"])
    assert torch.equal(first[0]["weights"], first[2]["weights"])
    assert not torch.equal(first[2]["weights"], first[3]["weights"])
