"""What the GPU check prints and writes: the plan, the machine, the JSON file and the table.

    python -m tests.gpu_check.report DEVICE

prints the machine as JSON. Nothing else here imports torch.
"""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.gpu_check.items import ITEMS, fits_of

ROOT = Path(__file__).parents[2]
PACKAGES = (
    "torchvision",
    "numpy",
    "onedl-mmengine",
    "onedl-mmcv",
    "onedl-mmpretrain",
    "onedl-mmsegmentation",
    "triton",
    "xformers",
    "transformers",
    "timm",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "safetensors",
)


def machine_of(device: str) -> dict[str, Any]:
    """Hardware and versions.

    Raises:
        SystemExit: if torch is missing, or sees no CUDA device and one is wanted.
    """
    try:
        import torch
    except ImportError as error:
        sys.exit(f"needs torch ({error}); set PYTHON to an interpreter that has it")
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit(
            f"torch {torch.__version__} sees no CUDA device; set PYTHON to an interpreter whose "
            "torch does, or rehearse with --device cpu"
        )
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    machine = {
        "gpu": "cpu",
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": versions,
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        machine |= {
            "gpu": card.name,
            "memory_gib": round(card.total_memory / 2**30, 1),
            "capability": f"{card.major}.{card.minor}",
            "multiprocessors": card.multi_processor_count,
            "driver": _driver(),
            "cudnn": torch.backends.cudnn.version(),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        }
    return machine


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip().splitlines()[0] if run.stdout.strip() else None


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _commit() -> str | None:
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
    except OSError:
        return None
    return run.stdout.strip() or None


def describe_plan(
    names: list[str], minutes: float, jobs: int, machine: dict, missing: list[str]
) -> str:
    """The items, what each proves, its time, and what this machine lacks for it."""
    lines = []
    if "error" in machine:
        lines.append(f"machine: {machine['error']}")
    else:
        lines.append(f"machine: {machine['gpu']}, torch {machine['torch']}")
    if missing:
        lines.append(f"to be installed: {', '.join(missing)}")
    seconds = fits_of(names, jobs)
    lines.append(
        f"{len(names)} items, about {seconds / 60:.1f} of {minutes:g} minutes on an H200 (items "
        f"that only compare run {jobs} at a time)"
    )
    for name in names:
        item = ITEMS[name]
        when = "alone" if item.alone else "beside others"
        cpu = ", needs cuda" if item.needs_cuda else ""
        lines.append(f"\n{name}: about {item.estimate} s, {item.budget} s at most, {when}{cpu}")
        lines.append(f"  proves    {item.proves}")
        lines.append(f"  estimate  {item.derivation}")
        if item.missing():
            lines.append(f"  missing   {', '.join(item.missing())}: skipped, in whole or in part")
    return "\n".join(lines)


def line_of(record: dict) -> str:
    """An item in one line."""
    reason = f"  {record['reason']}" if record["reason"] else ""
    skipped = f"  (without {'; '.join(record['skipped'])})" if record["skipped"] else ""
    return (
        f"{record['status']:<11} {record['item']:<18} {record['seconds']:6.1f} s{reason}{skipped}"
    )


def write_report(
    target: Path, machine: dict, device: str, records: list[dict], seconds: float
) -> None:
    """Write ``target``.json and .md, aside and then in place."""
    report = {"machine": machine, "device": device, "seconds": round(seconds, 1)}
    _replace(
        target.with_name(f"{target.name}.json"), json.dumps({**report, "items": records}, indent=1)
    )
    _replace(target.with_name(f"{target.name}.md"), table_of(machine, device, records, seconds))


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text.rstrip() + "\n")
    os.replace(partial, path)


def table_of(machine: dict, device: str, records: list[dict], seconds: float) -> str:
    """The report as Markdown."""
    versions = ", ".join(f"{name} {value}" for name, value in machine["versions"].items() if value)
    facts = [
        f"{name} {machine[name]}"
        for name in ("memory_gib", "capability", "driver")
        if name in machine
    ]
    lines = [
        f"# GPU check: {machine['gpu']}",
        "",
        f"`bash tools/gpu_check.sh{'' if device == 'cuda' else ' --device cpu'}`, "
        f"{machine['date']}, commit {machine['commit']}, {seconds:.0f} s.",
        "",
        f"torch {machine['torch']}, CUDA {machine['cuda']}, {', '.join([*facts, versions])}; "
        f"{machine['processor']}, {machine['cores']} cores.",
        "",
        "| item | status | s | figures that hold | note |",
        "|---|---|---|---|---|",
    ]
    for record in records:
        asked = [f for f in record["figures"] if f["holds"] is not None]
        held = sum(f["holds"] for f in asked)
        note = _cell("; ".join(filter(None, [record["reason"], *record["skipped"]])))
        lines.append(
            f"| {record['item']} | {record['status']} | {record['seconds']:.0f} | "
            f"{held} of {len(asked)} | {note} |"
        )
    for record in records:
        if record["figures"]:
            proves = ITEMS[record["item"]].proves
            lines += ["", f"## {record['item']}", "", f"{proves[0].upper()}{proves[1:]}.", ""]
            lines += ["| figure | value | bound | |", "|---|---|---|---|"]
            lines += [_row(figure) for figure in record["figures"]]
    return "\n".join(lines)


def _row(figure: dict) -> str:
    value = figure["value"]
    shown = f"{value:.4g}" if isinstance(value, float) else str(value)
    mark = {None: "", True: "holds", False: "**fails**"}[figure["holds"]]
    unit = f" {figure['unit']}" if figure["unit"] else ""
    cells = (figure["name"], shown + unit, figure["bound"], mark)
    return f"| {' | '.join(map(_cell, cells))} |"


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")


if __name__ == "__main__":
    print(json.dumps(machine_of(sys.argv[1])))
