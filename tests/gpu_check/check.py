"""What an item of the GPU check knows of the machine, and how it leaves figures with bounds."""

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov3_mm.engine.strategies.ddp import compile_obstacle

ROOT = Path(__file__).parents[2]
GIB = 2**30
# Cards below this many GiB get smaller shapes.
LARGE_CARD = 40


class Skip(Exception):
    """Why an item, or a part of it, does not run here: what is missing."""


class Check:
    """What an item knows about the machine, and where it leaves its figures.

    Args:
        device: 'cuda' or 'cpu'; on a CPU all shapes are tiny.
        out: JSON file.

    Attributes:
        figures: dicts with ``name``, ``value``, ``unit``, ``bound`` (text) and ``holds`` (None
            where nothing is asked of it).
        skipped: parts that did not run, with the reason.
    """

    def __init__(self, device: str, out: Path) -> None:
        self.device = torch.device(device)
        self.out = out
        self.figures: list[dict[str, Any]] = []
        self.skipped: list[str] = []

    @property
    def on_gpu(self) -> bool:
        """Whether this is a run on a GPU, with full shapes."""
        return self.device.type == "cuda"

    @property
    def memory_gib(self) -> float:
        """Memory of the card; of a CPU as much as its tiny shapes need."""
        if not self.on_gpu:
            return 2.0
        return torch.cuda.get_device_properties(self.device).total_memory / GIB

    @property
    def is_large(self) -> bool:
        """Whether the card takes the shapes of a data-centre GPU."""
        return self.memory_gib >= LARGE_CARD

    def note(self, name: str, value: Any, unit: str = "") -> None:
        """A figure of which nothing is asked."""
        self._add(name, value, unit, "", None)

    def at_most(self, name: str, value: float, bound: float, unit: str = "") -> None:
        """A figure that fails the item if it exceeds the bound, or is no number."""
        self._add(name, value, unit, f"<= {bound:g}", bool(value <= bound))

    def at_least(self, name: str, value: float, bound: float, unit: str = "") -> None:
        """A figure that fails the item if it is below the bound."""
        self._add(name, value, unit, f">= {bound:g}", bool(value >= bound))

    def holds(self, name: str, value: Any, bound: str, holds: bool, unit: str = "") -> None:
        """A figure whose bound was tested elsewhere."""
        self._add(name, value, unit, bound, holds)

    def skip_part(self, reason: str) -> None:
        """Name a part of the item that cannot run here."""
        self.skipped.append(reason)
        self.save("running")

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Turn what is raised in a part into a figure that fails, or a skip, and go on."""
        try:
            yield
        except Skip as skip:
            self.skip_part(f"{name}: {skip}")
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            self._add(name, last_line(error), "", "runs", False)

    def _add(self, name: str, value: Any, unit: str, bound: str, holds: bool | None) -> None:
        if isinstance(value, Tensor):
            value = value.item()
        self.figures.append(
            {"name": name, "value": value, "unit": unit, "bound": bound, "holds": holds}
        )
        shown = f"{value:.4g}" if isinstance(value, float) else value
        mark = {None: " ", True: "+", False: "FAILED"}[holds]
        print(f"{mark} {name}: {shown} {unit} {bound}".rstrip(), flush=True)
        self.save("running")

    def save(self, status: str, reason: str = "") -> None:
        """Write all that is known, aside and then in place."""
        record = {"status": status, "reason": reason}
        record |= {"figures": self.figures, "skipped": self.skipped}
        partial = self.out.with_suffix(".partial")
        partial.write_text(json.dumps(record))
        os.replace(partial, self.out)

    def require_compiler(self) -> None:
        """Skip what is to be compiled where ``torch.compile`` cannot run.

        Raises:
            Skip: with what is missing.
        """
        obstacle = compile_obstacle(self.device)
        if obstacle is not None:
            raise Skip(obstacle)

    def json_of(self, command: list[str], out: Path) -> Any:
        """Run a script of the repository, which writes ``out``, and read that.

        Raises:
            RuntimeError: with the script's last line.
        """
        environment = (
            dict(os.environ) if self.on_gpu else {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        )
        run = subprocess.run(
            [sys.executable, *command], env=environment, capture_output=True, text=True
        )
        if run.returncode:
            print(run.stdout[-4000:], run.stderr[-4000:], flush=True)
            lines = (run.stderr.strip() or run.stdout.strip()).splitlines() or ["no message"]
            raise RuntimeError(f"{Path(command[0]).name}: {lines[-1]}")
        return json.loads(out.read_text())

    def sync(self) -> None:
        """Wait for the device."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def seconds(self, function: Callable[[], Any], repeats: int) -> float:
        """Median seconds of a call, after two for warming up."""
        times = []
        for index in range(repeats + 2):
            self.sync()
            began = time.perf_counter()
            function()
            self.sync()
            if index >= 2:
                times.append(time.perf_counter() - began)
        return sorted(times)[len(times) // 2]


def last_line(error: BaseException) -> str:
    """An error in one line."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1].strip()}" if lines else type(error).__name__


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected, in double precision on the CPU."""
    actual, expected = (t.detach().to("cpu", torch.float64) for t in (actual, expected))
    return ((actual - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def largest_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over max(1, largest expected value): the project's measure of parity."""
    actual, expected = (t.detach().to("cpu", torch.float64) for t in (actual, expected))
    return ((actual - expected).abs().max() / expected.abs().max().clamp(min=1)).item()


def exact_products() -> None:
    """float32 products in float32: no TF32 in matrix products and convolutions."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
