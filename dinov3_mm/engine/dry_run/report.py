"""A dry run's findings as tables."""

import sys
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from .collectives import sent_per_rank
from .run import DryRunReport
from .step import StepRecord

PAGE_WIDTH = 140


def print_report(report: DryRunReport, console: Console | None = None) -> None:
    """Print everything that a dry run found out."""
    console = console or make_console()
    for line in report.derived:
        console.print(line, highlight=False)
    units = f", {report.num_units} units" if report.num_units else ""
    console.print(f"{report.strategy}, {report.world_size} rank(s){units}", highlight=False)
    console.print(_parameters(report))
    header, rows = report.schedules.table()
    console.print(make_table("schedules", header, rows))
    for record in report.steps:
        crops = record.crops
        share = "" if len(report.steps) == 1 else f" ({crops.ratio:.0%} of the iterations)"
        console.rule(f"{crops}{share}", align="left")
        console.print(_batch(report, record))
        console.print(_memory(record))
        console.print(_collectives(report, record))


def _parameters(report: DryRunReport) -> Table:
    rows = [
        (name, f"{total / 1e6:,.2f} M", f"{local / 1e6:,.2f} M")
        for name, (total, local) in report.networks.items()
    ]
    return make_table("parameters", ("network", "total", "rank 0"), rows)


def _batch(report: DryRunReport, record: StepRecord) -> Table:
    crops, (prefix, stride) = record.crops, report.tokens
    rows = [*record.batch]
    for name, count, side in (
        ("global", 2, crops.global_size),
        ("local", crops.num_local, crops.local_size),
        ("Gram", 2, crops.gram_size),
    ):
        if side is not None:
            grid = side // stride
            shape = f"{count * crops.images} x ({prefix} + {grid} x {grid})"
            rows.append((f"{name} tokens", shape, ""))
    micro = f", one of {report.accumulate} micro batches" if report.accumulate > 1 else ""
    title = (
        f"batch of rank {crops.rank}{micro}: {crops.images} images\n"
        "(in the first iteration no rank hides more patches)"
    )
    return make_table(title, ("tensor", "shape", "dtype"), rows)


def _memory(record: StepRecord) -> Table:
    kinds = {**dict.fromkeys(record.resident, 0), **record.peak.by_kind}
    rows = [
        (kind, as_bytes(record.resident.get(kind, 0)), as_bytes(size))
        for kind, size in sorted(kinds.items(), key=lambda item: -item[1])
    ]
    resident = as_bytes(sum(record.resident.values()))
    rows.append(("total", resident, as_bytes(record.peak.total)))
    title = f"memory of rank 0; fullest in the {record.peak.phase}"
    return make_table(title, ("kind", "between steps", "fullest moment"), rows)


def _collectives(report: DryRunReport, record: StepRecord) -> Table:
    rows = []
    total = 0.0
    for entry, count, size in record.collectives:
        sent = sent_per_rank(entry.operation, size, report.world_size)
        total += sent
        dtype = str(entry.dtype).removeprefix("torch.")
        rows.append(
            (
                entry.operation,
                entry.purpose,
                entry.phase,
                dtype,
                f"{count:,}",
                as_bytes(size),
                as_bytes(sent),
            )
        )
    rows.append(("total", "", "", "", "", "", as_bytes(total)))
    header = ("collective", "of", "in", "dtype", "calls", "whole tensors", "sent per rank")
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
