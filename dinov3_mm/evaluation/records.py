"""Evaluation records of a training run: one JSON line per evaluation, and the clock they carry."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

RECORD_FILE = "evaluations.jsonl"


class TrainingClock:
    """Seconds spent training: without evaluations, with the earlier parts of a resumed run."""

    def __init__(self) -> None:
        self._accumulated = 0.0
        self._running_since: float | None = None

    def start(self) -> None:
        """Begin to count; a running clock runs on."""
        if self._running_since is None:
            self._running_since = time.perf_counter()

    def stop(self) -> None:
        """Stop counting, after the device has finished the work that training queued."""
        if self._running_since is not None:
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            self._accumulated += time.perf_counter() - self._running_since
            self._running_since = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the enclosed work out of the count."""
        running = self._running_since is not None
        self.stop()
        try:
            yield
        finally:
            if running:
                self.start()

    @property
    def seconds(self) -> float:
        """Training seconds so far."""
        if self._running_since is None:
            return self._accumulated
        return self._accumulated + time.perf_counter() - self._running_since

    def restore(self, seconds: float) -> None:
        """Continue from the count of an earlier part of the run."""
        self._accumulated = float(seconds)


def append_record(path: str | Path, record: dict) -> None:
    """Append one record as a line of JSON; a line that a killed run left unfinished is dropped."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    line = (json.dumps(record) + "\n").encode()
    with path.open("ab+") as file:
        file.seek(0)
        written = file.read()
        file.truncate(written.rfind(b"\n") + 1)
        file.write(line)


def read_records(path: str | Path, name: str | None = None) -> list[dict]:
    """Evaluation records in order of step, of one evaluation ``name`` or all.

    A resumed run evaluates some steps again: the last record of a step counts. An unfinished last
    line is left out; a missing file reads as no records.

    Raises:
        ValueError: if a finished line is not JSON.
    """
    path = Path(path)
    if not path.exists():
        return []
    latest: dict[tuple[int, str], dict] = {}
    finished = path.read_text().split("\n")[:-1]
    for number, line in enumerate(finished, start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
        if name is None or record["name"] == name:
            latest[record["step"], record["name"]] = record
    return [latest[key] for key in sorted(latest)]
