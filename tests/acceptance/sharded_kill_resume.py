"""FSDP2 runs that lose ranks, and runs that change their number of ranks.

    python -m tests.acceptance.sharded_kill_resume [--iters 40] [--skip-kills] [--skip-elastic]

Kills: two ranks; a random rank dies at three random moments, one dies while the others write a
checkpoint, the first dies inside the export. Losses and the last checkpoint must be those of a run
that was left alone, to the bit.

Elastic: 4, then 2, then 3 ranks at a global batch of 12, against 4 ranks throughout. Losses within
1e-4 relative, and every sample of every iteration seen once.
"""

import argparse
import json
import random
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil
import torch
from mmengine.config import Config

from dinov3_mm.engine.run_files import checkpoint_path, list_checkpoints
from tests.acceptance.rank_parity import parity_config, relative
from tests.integration.toy_run import start_training, write_images
from tests.integration.traces import read_shards, read_trace

INTERVAL = 5
LOSS_BAR = 1e-4


def configure(images: Path, work_dir: Path, iters: int) -> Config:
    """The run of the rank parity, sharded, with a checkpoint every five iterations."""
    cfg = parity_config(images, work_dir, iters)
    cfg.strategy = dict(type="FSDP2Strategy")
    cfg.default_hooks.checkpoint.interval = INTERVAL
    cfg.custom_imports = dict(imports=["tests.integration.kill_hook"])
    cfg.custom_hooks = [*cfg.custom_hooks, dict(type="RecordPositionsHook")]
    return cfg


def run_to_end(config: Path, *arguments: str, ranks: int) -> None:
    process = start_training(config, "--resume", *arguments, ranks=ranks)
    output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(output[-4000:])


def dump(cfg: Config, folder: Path, name: str) -> Path:
    path = folder / f"{name}.py"
    cfg.dump(path)
    return path


def kills(folder: Path, images: Path, iters: int, rng: random.Random) -> bool:
    """Compare a run that dies five times with one that does not."""
    straight, killed = folder / "straight", folder / "killed"
    run_to_end(dump(configure(images, straight, iters), folder, "straight"), ranks=2)
    in_shards, in_export = rng.sample(range(2 * INTERVAL, iters, INTERVAL), 2)
    cfg = configure(images, killed, iters)
    cfg.custom_hooks = [
        *cfg.custom_hooks,
        dict(type="KillShardedSaveHook", iteration=in_shards, where="shards"),
        dict(type="KillShardedSaveHook", iteration=in_export, where="export"),
    ]
    deaths = die_and_resume(dump(cfg, folder, "killed"), killed, iters, rng)
    expected, actual = read_trace(straight), read_trace(killed)
    different = [step for step in expected if expected[step] != actual.get(step)]
    tensors = [read_shards(checkpoint_path(run, iters, sharded=True)) for run in (straight, killed)]
    unequal = [name for name in tensors[0] if not torch.equal(tensors[0][name], tensors[1][name])]
    print(
        f"{deaths} deaths, {len(expected)} iterations x {len(expected[1])} metrics: "
        f"{len(different)} iterations differ; {len(tensors[0])} tensors of model and optimizer: "
        f"{len(unequal)} differ"
    )
    return deaths == 5 and not different and not unequal


def die_and_resume(config: Path, work_dir: Path, iters: int, rng: random.Random) -> int:
    """Start, lose a rank, resume, until the run ends; how often it died."""
    steps = sorted(rng.sample(range(2, iters - 2), 3))
    deaths = 0
    while True:
        process = start_training(config, "--resume", ranks=2)
        while process.poll() is None:
            done = max(read_trace(work_dir), default=0)
            if steps and done >= steps[0]:
                steps.pop(0)
                workers = psutil.Process(process.pid).children(recursive=True)
                ranks = [worker for worker in workers if "LOCAL_RANK" in worker.environ()]
                rng.choice(ranks or workers).kill()
                break
            time.sleep(0.01)
        output, _ = process.communicate()
        if process.returncode == 0:
            return deaths
        deaths += 1
        newest = max(list_checkpoints(work_dir), default=0)
        print(f"death {deaths}: newest complete checkpoint {newest}", flush=True)
        if deaths > 5:
            raise SystemExit(output[-4000:])


def elastic(folder: Path, images: Path) -> bool:
    """Compare 4 -> 2 -> 3 ranks with 4 ranks throughout."""
    iters = 6 * INTERVAL
    steady, changing = folder / "steady", folder / "changing"
    run_to_end(dump(configure(images, steady, iters), folder, "steady"), ranks=4)
    config = dump(configure(images, changing, iters), folder, "changing")
    for ranks, until in ((4, iters // 3), (2, 2 * iters // 3), (3, iters)):
        options = ["--cfg-options", f"train_cfg.max_iters={until}"]
        run_to_end(config, *options, ranks=ranks)
    traces = [read_trace(run) for run in (steady, changing)]
    worst = max(
        relative(traces[1][step][name], value)
        for step, record in traces[0].items()
        for name, value in record.items()
        if name.endswith("loss")
    )
    seen = Counter(
        position
        for file in changing.glob("positions_*.jsonl")
        for line in file.read_text().splitlines()
        for position in json.loads(line)["positions"]
    )
    complete = seen == Counter(range(12 * iters))
    print(
        f"4 -> 2 -> 3 ranks, {iters} iterations: losses within {worst:.2e} relative; "
        f"{len(seen)} samples, each seen once: {complete}"
    )
    return worst <= LOSS_BAR and complete


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iters", type=int, default=40)
    parser.add_argument("--seed", type=int, help="of the moments of the kills")
    parser.add_argument("--skip-kills", action="store_true")
    parser.add_argument("--skip-elastic", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = write_images(folder / "images")
        passed = arguments.skip_elastic or elastic(folder, images)
        if not arguments.skip_kills:
            passed &= kills(folder, images, arguments.iters, random.Random(arguments.seed))
    raise SystemExit(not passed)


if __name__ == "__main__":
    main()
