"""Dry run of every pretraining config at the number of GPUs that it is written for.

    python -m tests.acceptance.dry_runs [CONFIG ...] [--out results.json]

A process for each config, one after the other. Prints a line for each, of students in rank groups
one for each student: parameters of the student, memory at the fullest moment of a rank, collectives
of a step and what a rank sends in them; of several crop sizes those that need most. CPU: seconds of
the whole process. 'over 80 GiB': the step is sound, but such a GPU is too small for it; see
docs/scaling.md. The exit code is 1 if a config fails.
"""

import argparse
import json
import logging
import resource
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

from mmengine.config import Config
from mmengine.logging import MMLogger

from dinov3_mm.checkpoints import atomic_write
from dinov3_mm.engine import ConfigError
from dinov3_mm.engine.dry_run import DryRunReport, dry_runs
from dinov3_mm.engine.dry_run.collectives import sent_per_rank
from dinov3_mm.engine.dry_run.run import as_bytes
from dinov3_mm.engine.plan.run import RESERVE

CONFIGS = Path("configs/dinov3")

# The first pattern that fits a name. Released: 256 GPUs for the 7B, 32 for ImageNet-1k, rank groups
# of 48, 48, 80 and 120 GPUs for the distilled ViTs; 16 nodes for the ConvNeXts. ViT-H+ is in no
# released file; the configs for one machine have eight.
WORLD_SIZES = {
    "vit7b_*": 256,
    "vitl_im1k": 32,
    "distill_multi": 296,
    "distill_vits16*": 48,
    "distill_vitb16": 80,
    "distill_vitl16": 120,
    "distill_vith16plus": 120,
    "distill_convnext_*": 128,
    "continue_*": 8,
    "vit[sbl]_*": 8,
}
# What values 'auto' follow from: ImageNet-1k, and GPUs of 80 GB.
NUM_IMAGES = 1_281_167
GPU_GIB = 80.0

HEADER = (
    f"{'config':34}{'ranks':>6}  {'parameters':>11}{'memory':>12}{'collectives':>13}{'sent':>12}"
)


def world_size_of(config: Path) -> int:
    """Number of GPUs that a config is written for.

    Raises:
        KeyError: nobody has said.
    """
    for pattern, size in WORLD_SIZES.items():
        if fnmatch(config.stem, pattern):
            return size
    raise KeyError(f"{config}: no number of GPUs; add it to WORLD_SIZES")


def try_out(config: Path) -> list[dict]:
    """Dry runs of a config in this process: a record for each kind of rank."""
    MMLogger.get_current_instance().setLevel(logging.WARNING)
    ranks = world_size_of(config)
    reports = dry_runs(Config.fromfile(config), ranks, num_images=NUM_IMAGES, memory_gib=GPU_GIB)
    return [record_of(report, config.stem) for report in reports]


def record_of(report: DryRunReport, config: str) -> dict:
    """The figures of a dry run; of several crop sizes the largest."""
    students = [
        total for name, (total, _) in report.networks.items() if name.split(": ")[-1] == "student"
    ]
    sent = [
        sum(
            sent_per_rank(entry.operation, size, entry.ranks) for entry, _, size in step.collectives
        )
        for step in report.steps
    ]
    calls = [sum(count for _, count, _ in step.collectives) for step in report.steps]
    return {
        "config": config,
        "student": ", ".join(name for name in report.schedules if name),
        "ranks": report.world_size,
        "parameters": sum(students),
        "peak_bytes": max(step.peak.total for step in report.steps),
        "collectives": max(calls),
        "sent_bytes": max(sent),
        "crop_sizes": len(report.steps),
    }


def line_of(record: dict) -> str:
    """A line of the table."""
    name = record["config"] + (f" {record['student']}" if record["student"] else "")
    return (
        f"{name:34}{record['ranks']:>6}  {record['parameters'] / 1e6:>9,.1f} M"
        f"{as_bytes(record['peak_bytes']):>12}{record['collectives']:>13,}"
        f"{as_bytes(record['sent_bytes']):>12}"
    )


def verdict_of(record: dict) -> str:
    """What the last column says of a dry run that came to its end."""
    fits = record["peak_bytes"] <= (1 - RESERVE) * GPU_GIB * 2**30
    return "ok" if fits else f"ok, over {GPU_GIB:g} GiB (with {RESERVE:.0%} in reserve)"


def run_apart(config: Path) -> tuple[list[dict], str]:
    """Records of a config from a process of its own, or what went wrong."""
    command = [sys.executable, "-m", "tests.acceptance.dry_runs", "--one", str(config)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        return [], (result.stderr.strip() or f"exit code {result.returncode}").splitlines()[-1]
    return json.loads(result.stdout.splitlines()[-1]), ""


def run_all(configs: list[Path]) -> tuple[list[dict], int]:
    """Try all configs and print a line for each; their records, and how many failed."""
    print(f"{HEADER}{'CPU':>9}")
    found, failed = [], 0
    for config in configs:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        records, error = run_apart(config)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        for record in records:
            print(f"{line_of(record)}{seconds:>7.0f} s  {verdict_of(record)}", flush=True)
        if error:
            failed += 1
            print(f"{config.stem:34}{'failed':>6}  {error}", flush=True)
        found += [{**record, "cpu_seconds": round(seconds, 1)} for record in records]
    print(f"{len(configs) - failed} of {len(configs)} configs ok")
    return found, failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("configs", nargs="*", type=Path, metavar="CONFIG", help="default: all")
    parser.add_argument("--one", type=Path, metavar="CONFIG", help=argparse.SUPPRESS)
    parser.add_argument("--out", metavar="FILE", help="JSON file of the figures")
    arguments = parser.parse_args()
    if arguments.one:
        try:
            print(json.dumps(try_out(arguments.one)))
        except ConfigError as error:
            sys.exit(" ".join(str(error).splitlines()))
        return
    missing = [str(config) for config in arguments.configs if not config.is_file()]
    if missing:
        parser.error(f"no such config: {', '.join(missing)}")
    found, failed = run_all(arguments.configs or sorted(CONFIGS.glob("*.py")))
    if arguments.out:
        with atomic_write(arguments.out) as partial:
            partial.write_text(json.dumps(found, indent=2) + "\n")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
