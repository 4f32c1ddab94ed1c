"""Dry runs of a toy on any number of ranks: what they find, and what they refuse."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp._fully_shard import _fsdp_param

import dinov3_mm.engine.dry_run.model as model_module
from dinov3_mm.engine import ConfigError
from dinov3_mm.engine.dry_run import UnpredictableStepError, dry_run
from dinov3_mm.engine.dry_run.fake_world import Chunks
from dinov3_mm.engine.training_state import allocate_moments
from dinov3_mm.models.pretraining import DINOv3
from tests.engine.dry_run.toys import LAYERS, PROTOTYPES, toy_config

FSDP2 = dict(type="FSDP2Strategy")
# Student and teacher: blocks, the rest of the backbone, two heads.
UNITS = LAYERS + 1 + 2


def collectives(report) -> dict[tuple[str, str, str], tuple[int, int]]:
    return {
        (entry.operation, entry.purpose, entry.phase): (count, size)
        for entry, count, size in report.steps[0].collectives
    }


@pytest.mark.parametrize("world_size", [1, 2, 8, 256])
@pytest.mark.parametrize("strategy", [None, FSDP2])
def test_any_number_of_ranks(world_size, strategy):
    cfg = toy_config(global_batch_size=2 * world_size)
    if strategy:
        cfg.strategy = strategy
    report = dry_run(cfg, world_size)
    total, local = report.networks["student"]
    assert report.networks["teacher"] == (total, local)
    assert local == total if strategy is None or world_size == 1 else local < total
    (step,) = report.steps
    assert step.resident["EMA teacher"] == 4 * local
    assert step.peak.total > sum(step.resident.values())
    assert not dist.is_initialized()


def test_collectives_of_fsdp2_are_those_of_its_units():
    world_size = 8
    report = dry_run(toy_config(global_batch_size=16, strategy=FSDP2), world_size)
    found = collectives(report)
    purpose = "parameters and gradients (FSDP2)"
    padded = world_size * 4 * report.networks["student"][1]
    # Rank 0 holds the largest shard of every tensor, to which all others are padded.
    assert found["all-gather", purpose, "forward pass"] == (2 * UNITS, 2 * padded)
    assert found["all-gather", purpose, "backward pass"] == (UNITS, padded)
    assert found["reduce-scatter", purpose, "backward pass"] == (UNITS, padded)
    # A vector for the peaks and one in each of three rounds, for both heads.
    assert found["all-reduce", "Sinkhorn-Knopp", "forward pass"] == (8, 8 * 4 * PROTOTYPES)
    features = 2 * 2 * 32 * 4 * world_size  # crops, images, width
    assert found["all-gather", "KoLeo", "forward pass"] == (1, features)
    assert found["reduce-scatter", "KoLeo", "backward pass"] == (1, features)
    assert len(found) == 7  # and the gradient norms


def test_collectives_of_fsdp2_that_keeps_parameters():
    strategy = dict(type="FSDP2Strategy", reshard_after_forward=False)
    found = collectives(dry_run(toy_config(strategy=strategy), 4))
    purpose = "parameters and gradients (FSDP2)"
    assert found["all-gather", purpose, "forward pass"][0] == 2 * UNITS
    assert ("all-gather", purpose, "backward pass") not in found


def test_ddp_reduces_every_gradient_once_per_step():
    cfg = toy_config(train_cfg__accumulate=2)
    report = dry_run(cfg, 2)
    found = {key: size for key, (_, size) in collectives(report).items() if "DDP" in key[1]}
    trained = report.networks["student"][0]
    assert found == {("all-reduce", "gradients (DDP)", "backward pass 2"): 4 * trained}


def test_memory_by_kind_adds_up():
    report = dry_run(toy_config(global_batch_size=64), 1)
    step, (total, _) = report.steps[0], report.networks["student"]
    assert step.resident["parameters (student)"] == 4 * total
    assert 8 * total <= step.resident["optimizer state"] <= 8 * total + 4 * 200
    assert step.peak.by_kind["activations"] > 0
    assert sum(step.peak.by_kind.values()) == step.peak.total


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_recomputation_needs_less_memory(dtype):
    changes = dict(global_batch_size=64, model__compute_dtype=dtype)
    peaks = [
        dry_run(toy_config(model__backbone__with_cp=mode, **changes), 1).steps[0].peak.total
        for mode in (False, "selective", True)
    ]
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == 3


def test_every_set_of_crop_sizes_with_a_gram_teacher():
    cfg = toy_config(model__gram=dict(weight=1.0))
    cfg.train_dataloader.transform = dict(
        type="MultiResolutionCrop",
        size_sets=[
            dict(global_size=32, local_size=16, gram_size=48, ratio=0.25),
            dict(global_size=64, local_size=16, gram_size=96, ratio=0.75),
        ],
        num_local=2,
    )
    cfg.custom_hooks.append(dict(type="GramAnchorHook", checkpoint="not/there.safetensors"))
    report = dry_run(cfg, 2)
    assert [step.crops.gram_size for step in report.steps] == [48, 96]
    assert report.steps[0].peak.total < report.steps[1].peak.total
    shapes = {name: shape for name, shape, _ in report.steps[1].batch}
    assert shapes["gram_crops"] == "8 x 3 x 96 x 96"
    assert report.steps[0].resident["Gram teacher"] > 0


def test_schedules_at_the_ends_of_warm_ups():
    header, rows = dry_run(toy_config(), 1).schedules[""].table()
    values = {int(row[0]): dict(zip(header, row)) for row in rows}
    assert list(values) == [0, 11, 50, 99]
    assert values[0]["lr"] == "0" and values[11]["lr"] == "0.002"
    assert values[11][""] == "lr warmed up"


def test_masks_are_those_of_the_fullest_rank():
    report = dry_run(toy_config(global_batch_size=16), 8)
    crops = report.steps[0].crops
    shapes = {name: shape for name, shape, _ in report.steps[0].batch}
    assert shapes["mask_indices"] == str(crops.num_masked)
    # Half of the 32 global crops of 16 patches are masked, 10 to 50 % of them.
    assert 0.3 * 16 * 2 <= crops.num_masked <= 0.5 * 16 * 4


@pytest.mark.parametrize(
    ("changes", "world_size", "message"),
    [
        (dict(), 3, "global_batch_size=8 is not divisible"),
        (dict(train_cfg__accumulate=3), 1, "global_batch_size=8 is not divisible"),
        (
            dict(train_dataloader__transform__global_size=36),
            1,
            "global_size=36 is not divisible by the patch size 8; use 32 or 40",
        ),
        (dict(model__backbone__depth=3), 1, "takes no argument 'depth'"),
        (dict(strategy=dict(type="FSDP2Strategy", num_replicas=3)), 4, "does not divide 4 ranks"),
        (dict(strategy=dict(type="FSDP2Strategy", param_dtype="bf8")), 4, "param_dtype must be"),
        (dict(model__student_temp=0.0), 1, "student_temp must be positive"),
        (dict(train_cfg__max_iters="auto"), 2, "--num-images"),
        (dict(train_cfg__global_batch_size="auto"), 2, "--gpu-memory"),
        (dict(model__koleo__distributed=False), 8, "more than topk=1 images"),
        (dict(runner_type="Runner"), 1, "for pretraining configs"),
        (dict(), 0, "processes must be at least 1, got 0"),
        (dict(), -8, "processes must be at least 1, got -8"),
        (dict(train_cfg__surplus=True), 3, "surplus=True is for students in rank groups"),
        (dict(train_cfg__max_iters=5), 1, "custom_hooks.0: cosine schedule: .* total_iters=5"),
        (dict(train_dataloder=dict()), 1, "did you mean 'train_dataloader'"),
        (dict(strategy=dict(type="DeepSpeedStrategy")), 2, "knows .*FSDP2Strategy"),
        (dict(strategy=FSDP2, optim_wrapper__optimizer__type="SGD"), 2, "AdamW or Adam"),
    ],
)
def test_impossible_configs_are_refused_in_words(changes, world_size, message):
    with pytest.raises(ConfigError, match=message):
        dry_run(toy_config(**changes), world_size)
    assert not dist.is_initialized()


def test_a_hook_that_is_missing_is_named():
    cfg = toy_config()
    cfg.custom_hooks.pop()
    with pytest.raises(ConfigError, match="TeacherEMAHook"):
        dry_run(cfg, 1)
    cfg = toy_config(model__gram=dict(weight=1.0), train_dataloader__transform__gram_size=48)
    with pytest.raises(ConfigError, match="GramAnchorHook"):
        dry_run(cfg, 1)


@pytest.mark.parametrize("settings", [dict(num_images=0), dict(memory_gib=-1.0)])
def test_impossible_numbers_are_refused(settings):
    with pytest.raises(ConfigError, match="must be"):
        dry_run(toy_config(), 1, **settings)


def test_a_step_that_reads_a_value_is_refused(monkeypatch):
    loss = DINOv3.loss

    def reads(self, batch):
        losses = loss(self, batch)
        return losses if losses["loss"].item() > 0 else {}

    monkeypatch.setattr(DINOv3, "loss", reads)
    with pytest.raises(UnpredictableStepError, match="reads a value"):
        dry_run(toy_config(), 1)


def test_images_decide_what_is_auto():
    cfg = toy_config(train_cfg__max_iters="auto")
    report = dry_run(cfg, 2, num_images=8000)
    assert cfg.train_cfg.max_iters == 20 * 8000 // 8
    assert any("iterations 20000" in line for line in report.derived)


def test_a_process_of_a_group_is_refused():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(RuntimeError, match="without a launcher"):
            dry_run(toy_config(), 2)
    finally:
        dist.destroy_process_group()


def test_nothing_is_left_replaced():
    from torch._subclasses.fake_tensor import FakeTensor
    from torch.nn.parallel import DistributedDataParallel

    def replaced():
        return (
            torch.cuda.is_available,
            torch.cuda.Stream,
            torch.UntypedStorage.resize_,
            dist.get_backend,
            DistributedDataParallel.__init__,
            vars(FakeTensor).get("is_cuda"),
        )

    before = replaced()
    dry_run(toy_config(), 2)
    assert before == replaced()


def test_graphs_of_shards_are_refused():
    cfg = toy_config(strategy=dict(type="FSDP2Strategy", compile_blocks=True, cuda_graphs=True))
    with pytest.raises(ConfigError, match="does not go with FSDP2Strategy, which gathers"):
        dry_run(cfg, 2)


@pytest.mark.parametrize("strategy", ["PretrainStrategy", "FSDP2Strategy"])
def test_compiled_blocks_and_float8_go_through_the_strategy(strategy):
    """The products of the blocks are in float8, forward and backward, at a width that allows it."""
    arch = dict(embed_dims=64, num_layers=LAYERS, num_heads=2)
    settings = dict(type=strategy, compile_blocks=True, fp8_filter="blocks")
    report = dry_run(toy_config(strategy=settings, model__backbone__arch=arch), 1)
    assert report.steps[0].peak.total > 0


def test_a_batch_that_stays_on_the_cpu_is_refused(monkeypatch):
    """What was wrong with FSDP2 on CUDA until the model was moved by its own ``to``."""
    monkeypatch.setattr(nn.Module, "to", lambda self, *args, **kwargs: self)
    with pytest.raises(RuntimeError, match="two different devices"):
        dry_run(toy_config(strategy=FSDP2), 1)


def test_a_step_count_that_stays_on_the_cpu_is_refused(monkeypatch):
    """What was wrong with resuming shards on CUDA."""

    def forgets(optimizer, stored):
        tensors = allocate_moments(optimizer, stored)
        for state in optimizer.state.values():
            state["step"] = state["step"].cpu()
        return tensors

    monkeypatch.setattr(model_module, "allocate_moments", forgets)
    with pytest.raises(RuntimeError, match=r"same device.*_fused_adamw_"):
        dry_run(toy_config(strategy=FSDP2), 1)


@pytest.mark.parametrize(("rows", "num_chunks"), [(12, 4), (10, 4), (3, 8), (7, 7), (1, 256)])
def test_chunks_of_a_parameter_are_those_of_torch(rows, num_chunks):
    parameter = torch.arange(2.0 * rows).view(rows, 2)
    wanted = _fsdp_param._chunk_with_empty(parameter, num_chunks, dim=0)
    found = Chunks(parameter, num_chunks, dim=0)
    assert len(found) == len(wanted)
    assert all(map(torch.equal, found, wanted))
