"""Losses over gloo ranks: against the reference vectors, and against one process."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dinov3_mm.models.losses import koleo_loss, sinkhorn_knopp
from dinov3_mm.models.pretraining.diagnostics import gather_rows
from tests.golden import assert_parity, load_golden

WORLD = 2
KOLEO_CASES = [(topk, size) for topk in (1, 2) for size in (None, 4)]


def reference_values(rank: int) -> dict:
    """All golden quantities of one rank."""
    _, tensors = load_golden("ssl_distributed")
    cls = tensors["cls_logits_all"].chunk(WORLD)[rank]
    patches = tensors["patch_logits_all"].split([4, 7])[rank]
    values = {
        "sinkhorn_cls": sinkhorn_knopp(cls, 0.07),
        "sinkhorn_patch": sinkhorn_knopp(patches, 0.07),
    }
    for topk, size in KOLEO_CASES:
        features = tensors["koleo_x_all"].chunk(WORLD)[rank].clone().requires_grad_()
        loss = koleo_loss(features, topk=topk, distributed=True, loss_group_size=size)
        loss.backward()
        values[f"koleo_topk{topk}_group{size}.loss"] = loss.detach()
        values[f"koleo_topk{topk}_group{size}.grad"] = features.grad
    return values


def uneven_problem() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits whose exponentials overflow float32, and two crops of six images."""
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(9, 20, generator=generator) + 50
    return logits, torch.randn(2, 6, 8, generator=generator)


def uneven_values(rank: int) -> dict:
    """Sinkhorn when rank 0 has no sample; KoLeo of several crops at once; gathered rows."""
    logits, crops = uneven_problem()
    own = crops.chunk(WORLD, dim=1)[rank].clone().requires_grad_()
    loss = koleo_loss(own, distributed=True)
    loss.backward()
    return {
        "assignments": sinkhorn_knopp(logits.split([0, 9])[rank], 0.1),
        "unnormalised": sinkhorn_knopp(logits.split([3, 6])[rank], 4.0, num_iters=0),
        "koleo": loss.detach(),
        "koleo_grad": own.grad,
        "gathered": gather_rows(torch.full((2, 1), float(rank))),
    }


def messages_of_impossible_groups() -> list[str]:
    messages = []
    for settings in (dict(loss_group_size=3), dict(loss_group_size=6), dict(topk=8)):
        with pytest.raises(ValueError) as caught:
            koleo_loss(torch.ones(4, 8), distributed=True, **settings)
        messages.append(str(caught.value))
    return messages


def rank_main(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    values = {
        "reference": reference_values(rank),
        "uneven": uneven_values(rank),
        "messages": messages_of_impossible_groups(),
    }
    torch.save(values, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What each rank computed."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(rank_main, (port, str(folder)), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


def test_reference_vectors(ranks):
    description, tensors = load_golden("ssl_distributed")
    expected = {
        **{key: torch.tensor(v) for key, v in description["scalars"].items() if "koleo" in key},
        **{key: tensor for key, tensor in tensors.items() if key.startswith("rank")},
    }
    actual = {
        f"rank{rank}.{key}": value
        for rank in range(WORLD)
        for key, value in ranks[rank]["reference"].items()
    }
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert_parity(actual[name], value)


def test_a_rank_without_samples(ranks):
    logits, _ = uneven_problem()
    none, assignments = (values["uneven"]["assignments"] for values in ranks)
    assert none.shape == (0, 20)
    assert_parity(assignments, sinkhorn_knopp(logits, 0.1))
    assert_parity(assignments.sum(1), torch.ones(9))


def test_zero_iterations_share_one_sum(ranks):
    logits, _ = uneven_problem()
    actual = torch.cat([values["uneven"]["unnormalised"] for values in ranks])
    weights = (logits.double() / 4).softmax(-1) * (logits.double() / 4).logsumexp(-1).softmax(0)[
        :, None
    ]
    assert_parity(actual, (9 * weights).float())


def test_koleo_of_several_crops_is_that_of_one_process(ranks):
    _, crops = uneven_problem()
    crops.requires_grad_()
    loss = koleo_loss(crops)
    (WORLD * loss).backward()  # a rank's gradient is that of the sum of all ranks' losses
    assert_parity(torch.stack([values["uneven"]["koleo"] for values in ranks]).mean(), loss)
    grads = torch.cat([values["uneven"]["koleo_grad"] for values in ranks], dim=1)
    assert_parity(grads, crops.grad)


def test_gathered_rows_are_in_rank_order(ranks):
    for values in ranks:
        assert values["uneven"]["gathered"].flatten().tolist() == [0, 0, 1, 1]


def test_impossible_groups_are_refused(ranks):
    not_whole_ranks, not_a_divisor, too_few = ranks[0]["messages"]
    expected = "must be a multiple of the batch per rank (4) and divide the global batch (8)"
    assert f"loss_group_size=3 {expected}" in not_whole_ranks
    assert f"loss_group_size=6 {expected}" in not_a_divisor
    assert "more than topk=8 images" in too_few
