"""The dry run: a config, a number of ranks, one CPU process, no data, no weights."""

import copy
from dataclasses import dataclass

from mmengine.config import Config
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from dinov3_mm.engine.config import ConfigError
from dinov3_mm.engine.hooks import DistillationHook, GramAnchorHook

from .batches import batch_layout, crop_sets
from .config import check_numbers, needs_process_group, settle_config, strategy_name
from .fake_world import fake_device, fake_ranks
from .memory import MemoryLedger
from .model import (
    algorithm_of,
    all_networks,
    begin,
    build_on_meta,
    prepare,
    students_of,
)
from .schedules import Schedules, read_schedules
from .step import StepRecord, run_step, tell_state


@dataclass(frozen=True)
class DryRunReport:
    """Everything that a dry run finds out.

    Attributes:
        strategy: name of the strategy.
        world_size: ranks.
        rank: the one that was imitated; with rank groups the first of a group.
        accumulate: micro batches per step.
        derived: how values 'auto' were derived.
        networks: parameters of each network, total and on rank 0.
        num_units: parts that FSDP2 gathers one at a time.
        tokens: (tokens before the patches, pixels between tokens) of the sequences, by student.
        schedules: the schedules by student; a single student is called ''.
        steps: one record for each set of crop sizes.
    """

    strategy: str
    world_size: int
    rank: int
    accumulate: int
    derived: list[str]
    networks: dict[str, tuple[int, int]]
    num_units: int
    tokens: dict[str, tuple[int, int]]
    schedules: dict[str, Schedules]
    steps: list[StepRecord]


def dry_runs(cfg: Config, world_size: int, **settings) -> list[DryRunReport]:
    """A dry run for each kind of rank: one, or one for each student in a rank group.

    Args:
        cfg: a pretraining config; it stays as it is.
        world_size: number of ranks that would train.
        **settings: see :func:`dry_run`, which also says what is raised.
    """
    return [
        dry_run(copy.deepcopy(cfg), world_size, rank=rank, **settings)
        for rank in _kinds_of_ranks(cfg, world_size)
    ]


def _kinds_of_ranks(cfg: Config, world_size: int) -> list[int]:
    """The first rank of every group; building the model finds what is wrong with the groups."""
    if world_size == 1:
        return [0]
    students = (cfg.get("model") or {}).get("students") or {}
    groups = [student.get("ranks") for student in students.values()]
    first = {group[0] for group in groups if isinstance(group, (tuple, list)) and group}
    return sorted(rank for rank in first if 0 <= rank < world_size) or [0]


def dry_run(
    cfg: Config,
    world_size: int,
    *,
    rank: int = 0,
    num_images: int | None = None,
    memory_gib: float | None = None,
    on_gpu: bool = True,
) -> DryRunReport:
    """Check a pretraining config and run one step of each set of crop sizes on fake tensors.

    Args:
        cfg: a pretraining config, completed in place.
        world_size: number of ranks that would train.
        rank: which of them to be; they differ where students are in rank groups.
        num_images: size of the data set, for values 'auto'; None counts the config's source.
        memory_gib: memory of a GPU, for values 'auto'.
        on_gpu: take the code paths of a GPU, otherwise those of a CPU.

    Raises:
        ConfigError: a config that so many ranks cannot train.
        UnpredictableStepError: a step that reads values of tensors.
        RuntimeError: this process belongs to a process group already.
    """
    check_numbers(world_size)
    ranks = world_size if needs_process_group(cfg, world_size) else None
    with fake_ranks(ranks, rank):
        derived = settle_config(cfg, world_size, num_images=num_images, memory_gib=memory_gib)
        model = build_on_meta(cfg)
        sets = crop_sets(cfg, world_size, _share(model, cfg))
        layout = batch_layout(cfg, world_size)
        schedules = {name: read_schedules(cfg, model, layout, name) for name in students_of(model)}
        ledger = MemoryLedger(device="cuda" if on_gpu else "cpu")
        with fake_device(on_gpu), ledger, ledger.watching_resizes():
            strategy = prepare(model, cfg)
            model, optim_wrapper = strategy.model, strategy.optim_wrapper
            algorithm = algorithm_of(model)
            begin(strategy)
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
        return DryRunReport(
            strategy_name(cfg),
            world_size,
            rank,
            cfg.train_cfg.get("accumulate", 1),
            derived,
            _count_parameters(algorithm),
            sum(isinstance(module, FSDPModule) for module in algorithm.modules()),
            {name: _tokens(student) for name, student in students_of(algorithm).items()},
            schedules,
            steps,
        )


def _share(model: nn.Module, cfg: Config) -> tuple[int, int] | None:
    """Of students in rank groups this rank's position in its group, and the group's ranks."""
    if not hasattr(model, "share_of"):
        return None
    train_cfg = cfg.train_cfg
    try:
        return model.share_of(train_cfg["global_batch_size"] // train_cfg.get("accumulate", 1))
    except ValueError as error:
        raise ConfigError(f"model: {error}") from error


def _fill_teachers(algorithm: nn.Module, schedules: dict[str, Schedules]) -> None:
    """Do what the hooks do before the first step: frozen teachers get their weights."""
    for name, student in students_of(algorithm).items():
        hooks = schedules[name].hooks
        if GramAnchorHook in hooks and hasattr(student, "gram_teacher"):
            student.copy_teacher_to_gram()
        if DistillationHook in hooks:
            algorithm.distillation_teacher.is_ready = True


def _tokens(student: nn.Module) -> tuple[int, int]:
    backbone = student.student.backbone
    return 1 + getattr(backbone, "num_registers", 0), backbone.token_stride


def _count_parameters(algorithm: nn.Module) -> dict[str, tuple[int, int]]:
    counts = {}
    for name, network in all_networks(algorithm):
        params = list(network.parameters())
        local = [p.to_local() if isinstance(p, DTensor) else p for p in params]
        counts[name] = sum(p.numel() for p in params), sum(p.numel() for p in local)
    return counts
