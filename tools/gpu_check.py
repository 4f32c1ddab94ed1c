"""Everything that needs a GPU: ``bash tools/gpu_check.sh [--plan] [--only ITEM ...]``.

Each item runs in a process of its own and can fail, hang or crash without stopping the others.
Items that only compare run side by side; those that measure time run alone. Writes
``gpu_check_<gpu>_<date>.json`` and ``.md``; the exit code is 1 if an item failed.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.gpu_check.items import ITEMS  # noqa: E402
from tests.gpu_check.report import describe_plan, line_of, write_report  # noqa: E402

PACKAGES = ROOT / "work_dirs/gpu_check/packages"
# torch brings its own; of these the machine's versions are what is to be tested.
FROM_THE_MACHINE = re.compile(r"^(torch|torchvision|triton|nvidia-.*|cuda-.*)$")
# Modules that other distributions install too.
SAME_MODULE = {"opencv-python-headless": "cv2", "onedl-mmengine": "mmengine"}
# Seconds below which the remaining time is not worth a start.
LEAST = 10
MOST_JOBS = 4
# Processes of items that run.
LIVE: set[subprocess.Popen] = set()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plan", action="store_true", help="list what would run, and stop")
    parser.add_argument("--only", nargs="+", choices=ITEMS, metavar="ITEM", help="these items only")
    parser.add_argument(
        "--device", default="cuda", choices=("cuda", "cpu"), help="cpu: tiny shapes, as a rehearsal"
    )
    parser.add_argument(
        "--minutes", type=float, help="of all items together; default: 8, with cpu 60"
    )
    parser.add_argument(
        "--jobs", type=int, help="items side by side; default: 1 per 4 cores, 4 at most"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of the results; default: benchmarks/results, with cpu work_dirs/gpu_check",
    )
    args = parser.parse_args()
    args.names = [name for name in ITEMS if not args.only or name in args.only]
    if args.minutes is None:
        args.minutes = 8 if args.device == "cuda" else 60
    if args.jobs is None:
        args.jobs = max(1, min(MOST_JOBS, len(os.sched_getaffinity(0)) // 4))
    if args.out is None:
        args.out = ROOT / ("benchmarks/results" if args.device == "cuda" else "work_dirs/gpu_check")
    return args


def environment() -> dict[str, str]:
    """Of the items: the checkout first, what was installed for this check last."""
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(":"))]
    if PACKAGES.is_dir():
        paths.append(str(PACKAGES))
    # No item may reach for weights of the network.
    offline = {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    return {**os.environ, "PYTHONPATH": ":".join(paths), **offline}


def missing_packages() -> list[str]:
    """Core packages that this interpreter lacks, by the names of requirements/core.txt."""
    lines = (ROOT / "requirements/core.txt").read_text().splitlines()
    names = [re.split(r"[#;]", line)[0].strip() for line in lines]
    wanted = [name for name in names if name and not FROM_THE_MACHINE.match(name)]
    pairs = [(name, SAME_MODULE.get(name)) for name in wanted]
    return json.loads(_in_items("-c", _PROBE, json.dumps(pairs)).stdout)


_PROBE = """
import importlib.metadata, importlib.util, json, sys
missing = []
for name, module in json.loads(sys.argv[1]):
    try:
        if module is None or importlib.util.find_spec(module) is None:
            importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        missing.append(name)
print(json.dumps(missing))
"""


def prepare() -> str:
    """Install missing core packages beside this interpreter's own; what is still missing."""
    missing = missing_packages()
    if not missing:
        return ""
    print(f"Installing {', '.join(missing)} into {PACKAGES}", flush=True)
    message = _install(*missing)
    if message:  # a machine without a network may have wheels of the most
        for name in missing:
            message = _install(name, patient=False) or message
    run = _in_items("-c", "import tests.gpu_check.check, dinov3_mm.engine, dinov3_mm.apis")
    if not run.returncode:
        return ""
    lines = run.stderr.strip().splitlines() or ["no message"]
    return (
        f"{sys.executable} lacks core packages ({lines[-1]}), and pip could not install them "
        f"({message}). Without a network: bring wheels of {', '.join(missing)} in a folder and set "
        "PIP_NO_INDEX=1 PIP_FIND_LINKS=FOLDER, or set PYTHON to an interpreter that has them"
    )


def _install(*names: str, patient: bool = True) -> str:
    """Let pip install packages into the folder of this check; what went wrong, or nothing."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += [] if patient else ["--retries", "0", "--timeout", "5"]
    command += ["--no-deps", "-c", str(ROOT / "requirements/lock.txt"), "--target", str(PACKAGES)]
    run = subprocess.run([*command, *names], capture_output=True, text=True)
    lines = (run.stderr or run.stdout).strip().splitlines() or ["no message"]
    errors = [line for line in lines if line.startswith("ERROR")]
    return (errors or lines)[0] if run.returncode else ""


def _in_items(*arguments: str) -> subprocess.CompletedProcess:
    """Run Python as the items run."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True)


def look_at_machine(device: str) -> dict:
    """Hardware and versions, from a process of its own, or what is wrong with its torch."""
    run = _in_items("-m", "tests.gpu_check.report", device)
    if run.returncode:
        lines = run.stderr.strip().splitlines() or ["no message"]
        return {"error": f"{sys.executable}: {lines[-1]}"}
    return json.loads(run.stdout.splitlines()[-1])


class Clock:
    """Time that all items together have left."""

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60 * minutes

    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()


def command_of(name: str, device: str, out: Path) -> list[str]:
    """What runs an item."""
    command = [sys.executable, "-m", "tests.gpu_check", name, "--device", device]
    return [*command, "--out", str(out)]


def run_item(name: str, args: argparse.Namespace, clock: Clock, folder: Path) -> dict:
    """Run an item within its budget; its record, whatever happened."""
    item, out = ITEMS[name], folder / f"{name}.json"
    record = {"item": name, "figures": [], "skipped": [], "seconds": 0.0}
    if item.needs_cuda and args.device == "cpu":
        return {**record, "status": "skipped", "reason": "needs cuda"}
    # A slow machine may take twice the estimate; one that takes less than half is not known.
    needed = item.estimate / 2 if args.device == "cuda" else LEAST
    if clock.left() < max(LEAST, needed):
        return {**record, "status": "not reached", "reason": f"{max(0, clock.left()):.0f} s left"}
    limit = min(clock.left(), item.budget if args.device == "cuda" else 10 * item.budget)
    # A cache of its own: an item that is stopped may leave half a compiled file.
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(folder / f"{name}_inductor")}
    began = time.monotonic()
    log = folder / f"{name}.log"
    with open(log, "w") as stream:
        # A group of its own: what an item started ends with it.
        process = subprocess.Popen(
            command_of(name, args.device, out),
            env={**environment(), **cache},
            cwd=ROOT,
            stdout=stream,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
        LIVE.add(process)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        _end_group(process)
        LIVE.discard(process)
    record["seconds"] = round(time.monotonic() - began, 1)
    if out.exists():
        record.update(json.loads(out.read_text()))
    if code is None:
        last = record["figures"][-1]["name"] if record["figures"] else "nothing"
        reason = f"stopped after {limit:.0f} s; last figure: {last}"
        return {**record, "status": "failed", "reason": reason}
    if record.get("status") not in ("passed", "failed", "skipped"):
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        reason = f"ended with {code}: {lines[-1][:300] if lines else 'no message'}"
        return {**record, "status": "failed", "reason": reason}
    return record


def _end_group(process: subprocess.Popen) -> None:
    """End a process that is still there, and what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def end_all(number: int, _frame: object) -> None:
    """A signal ends the items too; their figures so far are written."""
    for process in list(LIVE):
        _end_group(process)
    os._exit(128 + number)


def run_all(args: argparse.Namespace, clock: Clock, folder: Path, finished: Callable) -> list[dict]:
    """Comparisons side by side, then measurements one by one; records in the order of the table.

    Args:
        args: the command line.
        clock: the time that is left.
        folder: for the items' files.
        finished: called with the records so far after each item.
    """
    lock = threading.Lock()
    records: dict[str, dict] = {}

    def run(name: str) -> None:
        record = run_item(name, args, clock, folder)
        with lock:
            records[name] = record
            print(line_of(record), flush=True)
            finished([records[each] for each in args.names if each in records])

    together = [name for name in args.names if not ITEMS[name].alone]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(run, together))
    for name in args.names:
        if ITEMS[name].alone:
            run(name)
    return [records[name] for name in args.names]


def main() -> int:
    args = parse_args()
    clock, began = Clock(args.minutes), time.monotonic()
    if args.plan:
        machine = look_at_machine(args.device)
        jobs = args.jobs if "memory_gib" in machine else MOST_JOBS
        print(describe_plan(args.names, args.minutes, jobs, machine, missing_packages()))
        return 0
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end_all)
    machine = {"error": prepare()}
    if not machine["error"]:
        machine = look_at_machine(args.device)
    if machine.get("error"):
        print(f"gpu_check: {machine['error']}", file=sys.stderr)
        return 2
    print(f"{machine['gpu']}, torch {machine['torch']}, {args.minutes:g} minutes", flush=True)
    stem = re.sub(r"[^a-z0-9]+", "_", machine["gpu"].lower()).strip("_")
    target = args.out / f"gpu_check_{stem}_{time.strftime('%Y-%m-%d')}"
    args.out.mkdir(parents=True, exist_ok=True)

    def finished(records: list[dict]) -> None:
        write_report(target, machine, args.device, records, time.monotonic() - began)

    with tempfile.TemporaryDirectory(prefix="gpu_check_") as folder:
        records = run_all(args, clock, Path(folder), finished)
    finished(records)
    print(f"{target}.json\n{target}.md")
    return int(any(record["status"] == "failed" for record in records))


if __name__ == "__main__":
    sys.exit(main())
