"""The dry run: a config, a number of ranks, one CPU process, no data, no weights."""

from dataclasses import dataclass

from mmengine.config import Config
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from dinov3_mm.engine.hooks import DistillationHook, GramAnchorHook
from dinov3_mm.engine.networks import networks_of

from .accelerator_paths import accelerator_paths
from .batches import batch_layout, crop_sets
from .fake_world import fake_ranks, fake_tensors
from .memory import MemoryLedger
from .model import algorithm_of, build_on_meta, build_optimizer, shard, wrap
from .schedules import Schedules, read_schedules
from .settle import needs_process_group, settle_config, strategy_name
from .step import StepRecord, run_step, tell_state


@dataclass(frozen=True)
class DryRunReport:
    """Everything that a dry run finds out.

    Attributes:
        strategy: name of the strategy.
        world_size: ranks.
        accumulate: micro batches per step.
        derived: how values 'auto' were derived.
        networks: parameters of each network, total and on rank 0.
        num_units: parts that FSDP2 gathers one at a time.
        tokens: (tokens before the patches, pixels between tokens) of the student's sequences.
        schedules: the schedules.
        steps: one record for each set of crop sizes.
    """

    strategy: str
    world_size: int
    accumulate: int
    derived: list[str]
    networks: dict[str, tuple[int, int]]
    num_units: int
    tokens: tuple[int, int]
    schedules: Schedules
    steps: list[StepRecord]


def dry_run(
    cfg: Config,
    world_size: int,
    *,
    num_images: int | None = None,
    memory_gib: float | None = None,
    on_gpu: bool = True,
) -> DryRunReport:
    """Check a pretraining config and run one step of each set of crop sizes on fake tensors.

    Args:
        cfg: a pretraining config, completed in place.
        world_size: number of ranks that would train.
        num_images: size of the data set, for values 'auto'; None counts the config's source.
        memory_gib: memory of a GPU, for values 'auto'.
        on_gpu: take the code paths of a GPU, otherwise those of a CPU.

    Raises:
        ConfigError: a config that so many ranks cannot train.
        UnpredictableStepError: a step that reads values of tensors.
        RuntimeError: a hook that the model needs is missing, or this process belongs to a process
            group already.
    """
    ranks = world_size if needs_process_group(cfg, world_size) else None
    with fake_ranks(ranks), accelerator_paths(on_gpu):
        derived = settle_config(cfg, world_size, num_images=num_images, memory_gib=memory_gib)
        sets = crop_sets(cfg, world_size)
        model = build_on_meta(cfg)
        schedules = read_schedules(cfg, model, batch_layout(cfg, world_size))
        shard(model, cfg)
        ledger = MemoryLedger()
        with fake_tensors(), ledger, ledger.watching_resizes():
            model = wrap(model, cfg)
            algorithm = algorithm_of(model)
            optim_wrapper = build_optimizer(model, cfg.optim_wrapper)
            tell_state(ledger, algorithm, optim_wrapper)
            _fill_teachers(algorithm, schedules)
            channels = len(algorithm.data_preprocessor.statistics[0])
            steps = [
                run_step(
                    model,
                    optim_wrapper,
                    cfg,
                    crops,
                    schedules,
                    ledger,
                    channels=channels,
                    on_gpu=on_gpu,
                )
                for crops in sets
            ]
        backbone = algorithm.student.backbone
        return DryRunReport(
            strategy_name(cfg),
            world_size,
            cfg.train_cfg.get("accumulate", 1),
            derived,
            _count_parameters(algorithm),
            sum(isinstance(module, FSDPModule) for module in algorithm.modules()),
            (1 + getattr(backbone, "num_registers", 0), backbone.token_stride),
            schedules,
            steps,
        )


def _fill_teachers(algorithm: nn.Module, schedules: Schedules) -> None:
    """Do what the hooks do before the first step: frozen teachers get their weights."""
    if GramAnchorHook in schedules.hooks and hasattr(algorithm, "gram_teacher"):
        algorithm.copy_teacher_to_gram()
    if DistillationHook in schedules.hooks:
        algorithm.distillation_teacher.is_ready = True


def _count_parameters(algorithm: nn.Module) -> dict[str, tuple[int, int]]:
    counts = {}
    for name, network in networks_of(algorithm):
        params = list(network.parameters())
        local = [p.to_local() if isinstance(p, DTensor) else p for p in params]
        counts[name] = sum(p.numel() for p in params), sum(p.numel() for p in local)
    return counts
