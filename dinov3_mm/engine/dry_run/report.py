"""A dry run's findings as tables."""

import sys
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from .collectives import sent_per_rank
from .run import DryRunReport
from .step import StepRecord

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
