"""The plan against counts of real models, fake steps, and torch's counter of operations."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import dinov3_mm.engine.dry_run.run as dry_run_module
from dinov3_mm.engine import ConfigError
from dinov3_mm.engine.dry_run import dry_run
from dinov3_mm.engine.plan import make_plan
from dinov3_mm.engine.plan.backbones import read_backbone
from dinov3_mm.models.backbones import DINOv3ConvNeXt
from tests.engine.dry_run.toys import toy_config

FSDP2 = dict(type="FSDP2Strategy")
EVERY = dict(reduce_every_micro_batch=True, **FSDP2)
GRAM = dict(
    model__gram=dict(weight=1.0),
    train_dataloader__transform__gram_size=48,
)

CONVNEXT = dict(
    model__mask_student=False,
    model__backbone=dict(
        _delete_=True,
        type="DINOv3ConvNeXt",
        arch=dict(depths=[2, 2, 6, 2], dims=[32, 64, 128, 256]),
    ),
    train_dataloader__transform__global_size=128,
    train_dataloader__transform__local_size=64,
)


def config(*, convnext_with_cp=False, **changes):
    if "_delete_" in changes.get("model__backbone", {}):
        changes = {k: v for k, v in changes.items() if k != "model__backbone__arch"}
    cfg = toy_config(**changes)
    if convnext_with_cp:
        cfg.model.backbone.with_cp = convnext_with_cp
    if cfg.model.get("gram"):
        cfg.custom_hooks.append(dict(type="GramAnchorHook", load_ema_at=0))
    return cfg


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (1, dict()),
        (2, dict()),
        (1, GRAM),
        (8, dict(strategy=FSDP2)),
        (256, dict(strategy=FSDP2, global_batch_size=512, **GRAM)),
        (8, dict(strategy=dict(type="FSDP2Strategy", num_replicas=2))),
        (8, dict(strategy=FSDP2, **CONVNEXT)),
    ],
)
def test_state_is_counted_exactly(world_size, changes):
    found = dry_run(config(**changes), world_size).steps[0].resident
    planned = make_plan(config(**changes), world_size).options[0].memory.resident
    assert planned["student"] == found["parameters (student)"]
    assert planned["teacher"] == found["EMA teacher"]
    assert planned.get("gram_teacher") == found.get("Gram teacher")
    assert planned["optimizer"] == found["optimizer state"]
    if "gradients" in planned:
        assert planned["gradients"] == found["gradients"]


# A width and a batch at which activations and logits count.
LARGER = dict(
    model__backbone__arch=dict(embed_dims=128, num_layers=6, num_heads=4),
    model__dino_head__num_prototypes=2048,
    model__ibot_head__num_prototypes=2048,
    global_batch_size=64,
)
OPTIONS = {
    "plain": (1, dict()),
    "bf16": (1, dict(model__compute_dtype="bf16")),
    "selective": (1, dict(model__backbone__with_cp="selective")),
    "everything": (1, dict(model__backbone__with_cp=True, model__compute_dtype="bf16")),
    "chunks": (1, dict(model__prototype_chunk_size=512)),
    "stochastic depth": (1, dict(model__backbone__drop_path_rate=0.3)),
    "SwiGLU": (1, dict(model__backbone__ffn_layer="swiglu", model__backbone__ffn_ratio=6.0)),
    "Gram": (1, GRAM),
    "DDP": (2, dict(model__compute_dtype="bf16")),
    "micro batches": (2, dict(train_cfg__accumulate=2)),
    "FSDP2": (2, dict(strategy=dict(param_dtype="bf16", **FSDP2), model__compute_dtype="bf16")),
    "gathered": (2, dict(strategy=dict(reshard_after_forward=False, **FSDP2))),
    "gradients wait whole": (4, dict(strategy=FSDP2, train_cfg__accumulate=4)),
    "gradients wait in shards": (4, dict(strategy=EVERY, train_cfg__accumulate=4)),
    "ConvNeXt": (1, CONVNEXT),
    "ConvNeXt, bf16, DDP": (2, dict(model__compute_dtype="bf16", **CONVNEXT)),
    "ConvNeXt, selective": (1, dict(convnext_with_cp="selective", **CONVNEXT)),
    "ConvNeXt, everything": (
        1,
        dict(convnext_with_cp=True, model__compute_dtype="bf16", **CONVNEXT),
    ),
    "ConvNeXt, FSDP2": (2, dict(strategy=FSDP2, **CONVNEXT)),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_peak_is_that_of_the_fake_step(name):
    world_size, changes = OPTIONS[name]
    changes = {**LARGER, **changes}
    found = dry_run(config(**changes), world_size).steps[0].peak
    memory = make_plan(config(**changes), world_size).options[0].memory
    assert memory.peak == pytest.approx(found.total, rel=0.1)


@pytest.mark.parametrize("name", ["plain", "chunks", "stochastic depth", "SwiGLU", "Gram"])
def test_operations_are_those_that_torch_counts(name, monkeypatch):
    _, changes = OPTIONS[name]
    counter = FlopCounterMode(display=False)
    run_step = dry_run_module.run_step

    def counted(*args, **kwargs):
        with counter:
            return run_step(*args, **kwargs)

    monkeypatch.setattr(dry_run_module, "run_step", counted)
    changes = {**LARGER, **changes}
    dry_run(config(**changes), 1)
    planned = make_plan(config(**changes), 1).options[0].total_flops
    # Attention is another count: the counter adds what a kernel multiplies again in its backward
    # pass. What is left is what the plan counts.
    attention = _attention(config(**changes))
    counted = sum(
        count
        for operator, count in counter.get_flop_counts()["Global"].items()
        if "scaled_dot_product" not in str(operator)
    )
    assert planned - attention == pytest.approx(counted, rel=0.01)


def test_operations_of_a_convnext_are_those_that_torch_counts():
    """Forward only: of depthwise convolutions the counter takes the backward pass to be dense."""
    with torch.device("meta"):
        backbone = DINOv3ConvNeXt(dict(depths=[2, 2, 6, 2], dims=[32, 64, 128, 256]))
        counter = FlopCounterMode(display=False)
        with counter:
            backbone.forward_tokens(
                [torch.zeros(n, 3, side, side) for n, side in ((2, 64), (4, 32))]
            )
    planned = read_backbone(backbone).flops(((2, 64), (4, 32))).total
    assert planned == counter.get_total_flops()


def _attention(cfg) -> float:
    work = make_plan(cfg, 1).options[0].work
    student = work.backbone.flops(work.student_crops, grad=True).attention
    others = (work.backbone.flops(crops) for crops in (work.teacher_crops, work.gram_crops))
    return student * 7 // 2 + sum(each.attention for each in others)


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(train_cfg__accumulate=2),
        dict(strategy=FSDP2),
        dict(strategy=dict(type="FSDP2Strategy", param_dtype="bf16", reshard_after_forward=False)),
        dict(strategy=dict(type="FSDP2Strategy", num_replicas=2)),
        dict(strategy=FSDP2, train_cfg__accumulate=2),
        dict(strategy=EVERY, train_cfg__accumulate=2),
        dict(strategy=dict(num_replicas=2, **EVERY), train_cfg__accumulate=2),
        dict(strategy=FSDP2, model__prototype_chunk_size=7),
        dict(strategy=FSDP2, **GRAM),
        dict(strategy=FSDP2, **CONVNEXT),
    ],
)
def test_traffic_is_that_of_the_fake_step(changes):
    changes = {"global_batch_size": 16, **changes}
    found: dict[str, int] = {}
    for entry, _, size in dry_run(config(**changes), 4).steps[0].collectives:
        if entry.purpose != "gradient norm":
            found[entry.operation] = found.get(entry.operation, 0) + size
    planned: dict[str, int] = {}
    for row in make_plan(config(**changes), 4).options[0].traffic:
        planned[row.operation] = planned.get(row.operation, 0) + row.size
    assert planned == found


def test_cheapest_option_is_one_that_fits():
    plan = make_plan(config(**LARGER, model__compute_dtype="bf16"), 8)
    peaks = sorted(each.memory.peak for each in plan.options)
    roomy, tight = plan.cheapest(10 * peaks[-1]), plan.cheapest(1.2 * peaks[0])
    assert roomy.option.recompute is False and roomy.option.chunk_size is None
    assert roomy.option.strategy == "ddp"
    assert tight.memory.peak <= 0.9 * 1.2 * peaks[0] < roomy.memory.peak
    assert plan.cheapest(peaks[0]) is None


def test_config_lines_make_the_option():
    base = config(**LARGER, model__compute_dtype="bf16")
    plan = make_plan(base, 16, gpus_per_node=8)
    own = plan.options[0]
    assert own.option.config_lines(own.option) == []
    other = next(
        each
        for each in plan.options
        if each.option.recompute is True and each.option.num_replicas == 2
    )
    changed = config(**LARGER, model__compute_dtype="bf16")
    namespace: dict = {}
    for line in other.option.config_lines(own.option):
        exec(line, {}, namespace)
    changed.merge_from_dict({"strategy": {}})
    strategy = namespace["strategy"]
    assert strategy.pop("_delete_") is True
    changed.strategy = strategy
    changed.merge_from_dict({"model": namespace["model"]})
    assert make_plan(changed, 16).options[0].memory.peak == other.memory.peak


def test_backbones_without_a_formula_are_named():
    pytest.importorskip("timm")
    cfg = config(**CONVNEXT)
    cfg.model.backbone = dict(type="TimmBackbone", name="resnet10t", batch_norm="group")
    with pytest.raises(ConfigError, match="not of TimmBackbone"):
        make_plan(cfg, 1)


def test_what_fits_is_said_where_nothing_does():
    base = config(**LARGER, model__compute_dtype="bf16")
    least = min(each.memory.peak for each in make_plan(base, 1).options)
    gib = 0.7 * least / 2**30
    plan = make_plan(base, 1, memory_gib=gib)
    assert plan.cheapest(gib * 2**30) is None
    assert [list(each.setting) for each in plan.smaller] == [["accumulate"], ["global_batch_size"]]
    for each in plan.smaller:
        changed = config(**LARGER, model__compute_dtype="bf16")
        changed.train_cfg.update(each.setting)
        changed.model.backbone.with_cp = each.best.option.recompute
        changed.model.prototype_chunk_size = each.best.option.chunk_size
        found = dry_run(changed, 1).steps[0]
        assert found.crops.images == each.best.work.crops.images < 64
        assert found.peak.total < 0.95 * gib * 2**30


def test_an_option_keeps_what_all_strategies_have():
    cfg = config(strategy=dict(type="PretrainDDPStrategy", compile_blocks=True))
    plan = make_plan(cfg, 2)
    sharded = next(each for each in plan.options if each.option.is_sharded)
    (line,) = [
        line
        for line in sharded.option.config_lines(plan.options[0].option, plan.common)
        if line.startswith("strategy")
    ]
    assert "_delete_=True" in line and "compile_blocks=True" in line


def test_machines_decide_the_replicas():
    replicas = {
        each.option.num_replicas
        for each in make_plan(config(strategy=FSDP2), 8, gpus_per_node=4).options
    }
    assert replicas == {1, 2}


@pytest.mark.parametrize(
    ("gpus", "settings", "message"),
    [
        (0, dict(), "at least 1, got 0"),
        (2, dict(memory_gib=0.0), "more than 0 GiB"),
        (2, dict(num_images=0), "images must be at least 1"),
        (2, dict(gpus_per_node=0), "at least 1 GPU"),
    ],
)
def test_impossible_numbers_are_refused(gpus, settings, message):
    with pytest.raises(ConfigError, match=message):
        make_plan(config(), gpus, **settings)
