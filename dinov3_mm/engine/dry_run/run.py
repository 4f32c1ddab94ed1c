"""The dry run: a config, a number of ranks, one CPU process, no data, no weights."""

import copy
import sys
from collections.abc import Iterable
from dataclasses import dataclass

from mmengine.config import Config
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from dinov3_mm.engine.hooks import DistillationHook, GramAnchorHook
from dinov3_mm.errors import ConfigError
from dinov3_mm.models.wrapping import unwrapped

from .batches import batch_layout, crop_sets
from .collectives import sent_per_rank
from .config import check_numbers, needs_process_group, settle_config, strategy_name
from .fake_world import fake_device, fake_ranks
from .memory import MemoryLedger
from .model import all_networks, begin, build_on_meta, prepare, students_of
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
            algorithm = unwrapped(model)
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


# --- A dry run's findings as tables ---


PAGE_WIDTH = 140
# Bytes below which a kind of memory has no row.
NEGLIGIBLE = 1024


def print_report(report: DryRunReport, console: Console | None = None) -> None:
    """Print everything that a dry run found out."""
    console = console or make_console()
    for line in report.derived:
        console.print(line, highlight=False)
    units = f", {report.num_units} units" if report.num_units else ""
    line = f"{report.strategy}, {report.world_size} rank(s){units}{_group(report)}"
    console.print(line, highlight=False)
    console.print(_parameters(report))
    for student, schedules in report.schedules.items():
        of = f" of student {student}" if student else ""
        console.print(make_table(f"schedules{of}", *schedules.table()))
    for record in report.steps:
        crops = record.crops
        share = "" if len(report.steps) == 1 else f" ({crops.ratio:.0%} of the iterations)"
        console.rule(f"{crops}{share}", align="left")
        console.print(_batch(report, record))
        console.print(_memory(record, report.rank))
        console.print(_collectives(record))


def _group(report: DryRunReport) -> str:
    """Who trains what, with rank groups."""
    size = report.steps[0].crops.group
    if size is None:
        return ""
    (student,) = report.tokens
    return f"; student {student} on ranks {report.rank} to {report.rank + size - 1}"


def _parameters(report: DryRunReport) -> Table:
    rows = [
        (name, f"{total / 1e6:,.2f} M", f"{local / 1e6:,.2f} M")
        for name, (total, local) in report.networks.items()
    ]
    return make_table("parameters", ("network", "total", f"rank {report.rank}"), rows)


def _batch(report: DryRunReport, record: StepRecord) -> Table:
    crops = record.crops
    rows = [*record.batch]
    for student, (prefix, stride) in report.tokens.items():
        whose = f"{student}: " if student else ""
        for name, count, side in (
            ("global", 2, crops.global_size),
            ("local", crops.num_local, crops.local_size),
            ("Gram", 2, crops.gram_size),
        ):
            if side is not None:
                grid = side // stride
                shape = f"{count * crops.student_images} x ({prefix} + {grid} x {grid})"
                rows.append((f"{whose}{name} tokens", shape, ""))
    micro = f", one of {report.accumulate} micro batches" if report.accumulate > 1 else ""
    first = crops.rank if crops.group is None else report.rank + crops.rank
    title = f"batch of rank {first}{micro}: {crops.images} images"
    if crops.group is not None:
        title += f" read, {crops.student_images} of all ranks' given to the student"
    title += "\n(no rank of the student hides more patches in the first iteration)"
    return make_table(title, ("tensor", "shape", "dtype"), rows)


def _memory(record: StepRecord, rank: int) -> Table:
    kinds = {**dict.fromkeys(record.resident, 0), **record.peak.by_kind}
    rows = [
        (kind, as_bytes(record.resident.get(kind, 0)), as_bytes(size))
        for kind, size in sorted(kinds.items(), key=lambda item: -item[1])
        if max(size, record.resident.get(kind, 0)) >= NEGLIGIBLE
    ]
    resident = as_bytes(sum(record.resident.values()))
    rows.append(("total", resident, as_bytes(record.peak.total)))
    title = f"memory of rank {rank}; fullest in the {record.peak.phase}"
    return make_table(title, ("kind", "between steps", "fullest moment"), rows)


def _collectives(record: StepRecord) -> Table:
    rows = []
    total = 0.0
    for entry, count, size in record.collectives:
        sent = sent_per_rank(entry.operation, size, entry.ranks)
        total += sent
        dtype = str(entry.dtype).removeprefix("torch.")
        rows.append(
            (
                entry.operation,
                entry.purpose,
                entry.phase,
                dtype,
                f"{entry.ranks:,}",
                f"{count:,}",
                as_bytes(size),
                as_bytes(sent),
            )
        )
    rows.append(("total", "", "", "", "", "", "", as_bytes(total)))
    header = ("collective", "of", "in", "dtype", "ranks", "calls", "whole tensors", "sent by each")
    return make_table("collectives of a step", header, rows)


def make_table(title: str, header: Iterable[str], rows: Iterable[Iterable[str]]) -> Table:
    """A table with a title on the left."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in header:
        table.add_column(name)
    for row in rows:
        table.add_row(*row)
    return table


def make_console() -> Console:
    """The terminal, or a wide page where output goes to a file."""
    return Console(width=None if sys.stdout.isatty() else PAGE_WIDTH)


def as_bytes(size: float) -> str:
    """Bytes with a unit."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"
        size /= 1024
    return f"{size:,.2f} GiB"
