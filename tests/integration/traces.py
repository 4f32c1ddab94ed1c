"""What a run did, read from its files, for comparison with another run."""

import json
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from dinov3_mm.checkpoints.containers import SafeReader, read_index
from dinov3_mm.engine.run_files import checkpoint_path
from dinov3_mm.engine.training_state import read_training_state

# Wall-clock measurements; the rest of a record is a function of config and seed.
CLOCKS = {"img_per_s", "data_wait"}


def read_trace(work_dir: Path) -> dict[int, dict[str, float]]:
    """Metrics by step; of steps that were done twice, as after a kill, those of the last time."""
    trace: dict[int, dict[str, float]] = {}
    for file in sorted(Path(work_dir).glob("*/vis_data/scalars.json")):
        for line in file.read_text().splitlines():
            record = json.loads(line)
            step = record.pop("step")
            metrics = {name: value for name, value in record.items() if name not in CLOCKS}
            trace.setdefault(step, {}).update(metrics)
    return trace


def read_shards(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a sharded checkpoint, model and optimizer."""
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in read_index(folder).state_dict_metadata.items()
    }
    dcp.load(tensors, storage_reader=SafeReader(folder), no_dist=True)
    return tensors


def different_tensors(first: Path, second: Path, iteration: int) -> list[str]:
    """Names of tensors (model and optimizer) that differ in any bit between two checkpoints."""
    states = [read_training_state(checkpoint_path(path, iteration)) for path in (first, second)]
    flat = [dict(_tensors(state, "")) for state in states]
    assert flat[0].keys() == flat[1].keys()
    return [name for name in flat[0] if not torch.equal(flat[0][name], flat[1][name])]


def _tensors(value: object, path: str):
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors(item, f"{path}/{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _tensors(item, f"{path}/{index}")
