"""Sharded models on two gloo ranks: the values of one process, in and out."""

import copy
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from mmengine.registry import MODELS
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

from dinov3_mm.checkpoints import build_backbone, export_backbone, load_backbone_weights
from dinov3_mm.checkpoints.load import gather_whole, shard_like
from dinov3_mm.engine.strategies.ddp import compile_units
from dinov3_mm.engine.strategies.fsdp2 import (
    ShardingPolicy,
    WholeTensorDraws,
    check_initialised,
    materialise,
    shard_model,
    sharded_modules,
)
from tests.checkpoints.toys import redraw

WORLD = 2
HEAD = dict(type="DINOv3Head", num_prototypes=24, hidden_dims=32, bottleneck_dims=16)
BACKBONES = {
    "vit": dict(
        type="DINOv3ViT",
        arch=dict(embed_dims=32, num_layers=2, num_heads=2, layer_scale_init_value=1.0),
        patch_size=8,
    ),
    "convnext": dict(
        type="DINOv3ConvNeXt",
        arch=dict(depths=[1, 1, 1, 1], dims=[8, 8, 16, 32], layer_scale_init_value=1.0),
    ),
}


def config(kind: str) -> dict:
    return dict(
        type="DINOv3",
        backbone=copy.deepcopy(BACKBONES[kind]),
        dino_head=dict(HEAD),
        ibot_head=dict(HEAD),
        gram=dict(weight=1.0),
        mask_student=kind == "vit",
    )


def build_whole(kind: str):
    model = MODELS.build(config(kind))
    torch.manual_seed(3)
    model.init_weights()
    return model


def build_sharded(kind: str):
    with torch.device("meta"):
        model = MODELS.build(config(kind))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("shard",))
    shard_model(model, mesh, ShardingPolicy())
    materialise(model, torch.device("cpu"))
    torch.manual_seed(3)
    with WholeTensorDraws():
        model.init_weights()
    check_initialised(model)
    return model


def difference(whole: dict[str, Tensor], sharded: dict[str, Tensor]) -> float:
    """Largest difference of two state dicts; all ranks take part."""
    assert list(whole) == list(sharded)
    return max(
        (whole[name].double() - gather_whole(tensor).double()).abs().max().item()
        for name, tensor in sharded.items()
    )


def rank_main(rank: int, store: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD, store=dist.FileStore(store, WORLD))
    folder = Path(folder)
    results = {}
    for kind in BACKBONES:
        whole, sharded = build_whole(kind), build_sharded(kind)
        results[kind, "initial"] = difference(whole.state_dict(), sharded.state_dict())
        results[kind, "units"] = len(sharded_modules(sharded))
        results[kind, "sharded"] = all(
            isinstance(parameter, DTensor) for parameter in sharded.parameters()
        )
        other = redraw(MODELS.build(BACKBONES[kind]), seed=5)
        if rank == 0:
            export_backbone(other, folder / f"{kind}.safetensors")
        dist.barrier()
        backbone = sharded.student.backbone
        load_backbone_weights(backbone, folder / f"{kind}.safetensors")
        results[kind, "loaded"] = difference(other.state_dict(), backbone.state_dict())
        sharded.load_gram_teacher(other.state_dict())
        gram = sharded.gram_teacher.backbone
        results[kind, "gram"] = difference(other.state_dict(), gram.state_dict())
        images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            outputs = [net.eval().forward_tokens(images) for net in (other, backbone)]
        results[kind, "forward"] = (outputs[0].patches - outputs[1].patches).abs().max().item()
        export_backbone(backbone, folder / f"{kind}_again.safetensors")
    if rank == 0:
        torch.save(results, folder / "results.pth")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[dict, Path]:
    folder = tmp_path_factory.mktemp("fsdp2")
    mp.spawn(rank_main, (str(folder / "store"), str(folder)), WORLD)
    return torch.load(folder / "results.pth", weights_only=True), folder


@pytest.mark.parametrize("kind", BACKBONES)
def test_every_parameter_is_sharded_by_block_and_head(run, kind):
    results, _ = run
    assert results[kind, "sharded"]
    blocks = 2 if kind == "vit" else 8
    # Student and teacher: blocks, the rest of the backbone, two heads; Gram teacher: no heads.
    assert results[kind, "units"] == 2 * (blocks + 3) + blocks + 1


@pytest.mark.parametrize("kind", BACKBONES)
@pytest.mark.parametrize("what", ["initial", "loaded", "gram"])
def test_values_are_those_of_one_process_to_the_bit(run, kind, what):
    assert run[0][kind, what] == 0


@pytest.mark.parametrize("kind", BACKBONES)
def test_features(run, kind):
    assert run[0][kind, "forward"] < 1e-5


@pytest.mark.parametrize("kind", BACKBONES)
def test_exports_of_shards_are_whole(run, kind):
    _, folder = run
    first, again = (
        build_backbone(folder / f"{kind}{suffix}.safetensors").state_dict()
        for suffix in ("", "_again")
    )
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_uninitialised_tensors_are_found():
    module = torch.nn.Linear(2, 2, device="meta")
    materialise(module, torch.device("cpu"))
    with pytest.raises(RuntimeError, match=r"2 tensors were not initialised, e\.g\. weight, bias"):
        check_initialised(module)


def test_whole_tensors_stay_what_they_are():
    tensor = torch.arange(4.0)
    assert shard_like(tensor, torch.zeros(4)) is tensor
    assert torch.equal(gather_whole(tensor), tensor)


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,), mesh_dim_names=("shard",))
    dist.destroy_process_group()


def step_of_student(model) -> tuple[list[Tensor], Counter]:
    """Loss and whole gradients of the student's backbone, and how often products ran in a step
    that is not the first.
    """
    backbone = model.student.backbone
    generator = torch.Generator().manual_seed(5)
    images = [torch.randn(n, 3, size, size, generator=generator) for n, size in ((4, 32), (6, 16))]
    for _ in range(2):
        backbone.zero_grad()
        with profile(activities=[ProfilerActivity.CPU], acc_events=True) as recorded:
            outputs = backbone.forward_tokens(images)
            loss = sum(out.cls.square().mean() + out.patches.square().mean() for out in outputs)
            loss.backward()
    products = ("aten::addmm", "aten::mm", "aten::_scaled_dot_product_flash_attention_for_cpu")
    events = recorded.profiler.kineto_results.events()
    grads = [gather_whole(p.grad) for p in backbone.parameters() if p.grad is not None]
    return [loss.detach(), *grads], Counter(e.name() for e in events if e.name() in products)


def test_checkpoint_within_compiler_within_shards(one_rank):
    """The strategy's order: no product runs twice, and the values are those of neither."""
    expected, products = step_of_student(build_whole("vit"))
    model = build_whole("vit")
    for network in (model.student, model.teacher):
        for block in network.backbone.blocks:
            block.with_cp = "selective"
    torch._dynamo.reset()
    compile_units(model)
    shard_model(model, one_rank, ShardingPolicy())
    actual, ran = step_of_student(model)
    assert ran == products
    for value, reference in zip(actual, expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-5, atol=1e-6)
