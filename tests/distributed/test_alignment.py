"""A teacher that is not the student's twin is refused before the first step."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from dinov3_mm.engine.strategies.fsdp2 import check_alignment


class Algorithm(nn.Module):
    def __init__(self):
        super().__init__()
        self.student = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 2)})
        self.teacher = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 2)})


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def without_bias(model):
    model.teacher["b"] = nn.Linear(4, 2, bias=False)


def wide(model):
    model.teacher["b"] = nn.Linear(5, 2)


def half(model):
    model.teacher["a"].bfloat16()


def other_order(model):
    model.teacher = nn.ModuleDict({"b": model.teacher["b"], "a": model.teacher["a"]})


@pytest.mark.parametrize(
    "spoil, message",
    [
        (without_bias, "b.bias is missing in the teacher"),
        (wide, r"b.weight is \(2, 4\) in the student, \(2, 5\) in the teacher"),
        (half, "a.weight is torch.float32 in the student, torch.bfloat16 in the teacher"),
        (other_order, "the student has a.weight where the teacher has b.weight"),
    ],
)
def test_networks_that_differ(spoil, message):
    model = Algorithm()
    assert check_alignment(model) == 4
    spoil(model)
    with pytest.raises(ValueError, match=f"student and EMA teacher are not aligned.*{message}"):
        check_alignment(model)


def test_shards_that_lie_elsewhere(mesh):
    model = Algorithm()
    for network in (model.student, model.teacher):
        for module in network.values():
            fully_shard(module, mesh=mesh)
    assert check_alignment(model) == 4
    whole = torch.zeros(4, 4)
    for placement, words in ((Replicate(), r"R"), (Shard(1), r"S\(1\)")):
        other = distribute_tensor(whole, mesh, [placement])
        model.teacher["a"].weight = nn.Parameter(other, requires_grad=False)
        expected = rf"a.weight is S\(0\) over ranks \[0\] in the student, {words} over ranks \[0\]"
        with pytest.raises(ValueError, match=expected):
            check_alignment(model)
    model.teacher["a"].weight = nn.Parameter(whole)
    with pytest.raises(ValueError, match="in the student, whole in the teacher"):
        check_alignment(model)


def test_every_one_of_several_students(mesh):
    model = nn.Module()
    model.students = nn.ModuleDict({"small": Algorithm(), "large": Algorithm()})
    assert check_alignment(model) == 8
    wide(model.students["large"])
    with pytest.raises(ValueError, match="student 'large' and its EMA teacher are not aligned"):
        check_alignment(model)
