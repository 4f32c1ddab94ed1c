"""Students in rank groups on gloo: equal to distillations of their own."""

import json
import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dinov3_mm.models.layers.batch_norm import SyncedBatchNorm2d
from dinov3_mm.models.losses import koleo_loss
from dinov3_mm.models.pretraining.groups import group_as_world, place_students, share
from tests.acceptance.multi_distillation import grouped_against_single
from tests.golden import assert_parity, load_golden
from tests.integration.distill_run import write_teacher

WORLD = 4
RANKS = {"first": (0, 2), "second": (2, 4)}


def grouped_values(rank: int) -> dict:
    placed = place_students(RANKS)
    groups = {name: dist.new_group(place.ranks) for name, place in placed.items()}
    name, place = next((name, place) for name, place in placed.items() if place.is_local)
    crops, samples = torch.arange(2.0)[:, None], torch.arange(2.0)
    piece = 100 * crops + 10 * rank + samples
    values = {"shared": share(piece, 1, 6, index=place.index, size=len(place.ranks))}
    with group_as_world(groups[name]):
        values["world"] = torch.tensor([dist.get_rank(), dist.get_world_size()])
        features = koleo_features()[place.index].requires_grad_()
        loss = koleo_loss(features, distributed=True)
        loss.backward()
        values.update(koleo=loss.detach(), koleo_grad=features.grad)
        values.update(batch_norm_step(place.index))
    values["world_after"] = torch.tensor([dist.get_rank(), dist.get_world_size()])
    return values


def koleo_features() -> list[torch.Tensor]:
    return list(torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).chunk(2))


def batch_norm_input() -> torch.Tensor:
    return 3 * torch.randn(4, 5, 3, 3, generator=torch.Generator().manual_seed(1)) + 2


def batch_norm_step(index: int | None) -> dict:
    """A training step of a batch norm on this rank's half of the images, or on all."""
    norm = SyncedBatchNorm2d(5) if index is not None else torch.nn.BatchNorm2d(5)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 1.5, 5))
        norm.bias.copy_(torch.linspace(-1, 1, 5))
    whole = batch_norm_input()
    x = (whole if index is None else whole.chunk(2)[index]).clone().requires_grad_()
    output = norm(x)
    (output.sin().sum()).backward()
    return {
        "output": output.detach(),
        "x_grad": x.grad,
        "weight_grad": norm.weight.grad,
        "running_mean": norm.running_mean,
        "running_var": norm.running_var,
    }


def messages() -> list[str]:
    found = []
    for given in ({"a": (0, 2), "b": None}, {"a": (0, 2), "b": (1, 4)}, {"a": (0, 3)}):
        with pytest.raises(ValueError) as caught:
            place_students(given)
        found.append(str(caught.value))
    return found


def rank_main(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    torch.save(grouped_values(rank), f"{folder}/{rank}.pt")
    if rank == 0:
        Path(folder, "messages.json").write_text(json.dumps(messages()))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(rank_main, (port, str(folder)), nprocs=WORLD)
    return folder


@pytest.fixture(scope="module")
def ranks(folder) -> list[dict]:
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


def test_share_is_the_reference_operator(ranks):
    expected = load_golden("ssl_distributed")[0]["scalars"]["broadcast_to_subgroups"]["outputs"]
    for rank, values in enumerate(ranks):
        assert_parity(values["shared"], torch.tensor(expected[str(rank)]))


def test_the_group_is_the_world_within(ranks):
    assert [values["world"].tolist() for values in ranks] == [[0, 2], [1, 2], [0, 2], [1, 2]]
    assert [values["world_after"].tolist() for values in ranks] == [[r, 4] for r in range(4)]


def test_koleo_searches_the_group(ranks):
    features = torch.cat(koleo_features()).requires_grad_()
    loss = koleo_loss(features)
    (2 * loss).backward()
    for pair in (ranks[:2], ranks[2:]):
        assert_parity(torch.stack([values["koleo"] for values in pair]).mean(), loss)
        assert_parity(torch.cat([values["koleo_grad"] for values in pair]), features.grad)


def test_synced_batch_norm_is_torchs_on_the_whole_batch(ranks):
    expected = batch_norm_step(None)
    for pair in (ranks[:2], ranks[2:]):
        for name in ("output", "x_grad"):
            assert_parity(torch.cat([values[name] for values in pair]), expected[name])
        assert_parity(sum(values["weight_grad"] for values in pair), expected["weight_grad"])
        for values in pair:
            for name in ("running_mean", "running_var"):
                assert_parity(values[name], expected[name])


def test_impossible_ranks(folder):
    some, twice, few = json.loads((folder / "messages.json").read_text())
    assert "['b'] have no ranks" in some
    for message in (twice, few):
        assert "4 processes" in message and "0 to 3, each once" in message


@pytest.mark.slow
@pytest.mark.parametrize("begin_together", [False, True])
def test_groups_train_as_single_distillations(tmp_path, begin_together):
    images, teacher = write_teacher(tmp_path)
    for difference in grouped_against_single(
        tmp_path, images, teacher, 6, True, begin_together=begin_together
    ):
        assert difference.is_within_bars, str(difference)
