"""Five kills in one run, against a run that was left alone: the traces must be equal to the bit.

    python -m tests.acceptance.kill_resume [--iters 60]

Three kills come at random moments, two inside the write of a checkpoint.
"""

import argparse
import random
import signal
import tempfile
import time
from pathlib import Path

from dinov3_mm.engine.run_files import list_checkpoints
from tests.integration.toy_run import start_training, toy_config, train, write_images
from tests.integration.traces import different_tensors, read_trace

INTERVAL = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iters", type=int, default=60)
    parser.add_argument("--seed", type=int, default=None, help="of the moments of the kills")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = write_images(folder / "images")
        straight, killed = folder / "straight", folder / "killed"
        train(configure(images, straight, arguments.iters), folder)
        interrupt(configure(images, killed, arguments.iters), folder, rng, arguments.iters)
        report(straight, killed, arguments.iters)


def configure(images: Path, work_dir: Path, iters: int):
    """The toy run with its schedules over ``iters`` iterations and a checkpoint every five."""
    cfg = toy_config(images, work_dir, train_cfg__max_iters=iters)
    cfg.default_hooks.checkpoint.interval = INTERVAL
    cfg.train_dataloader.num_workers = 2
    cfg.custom_hooks[0].lr.total_iters = iters
    cfg.custom_hooks[0].weight_decay.total_iters = iters
    cfg.custom_hooks[1].momentum.total_iters = iters
    return cfg


def interrupt(cfg, folder: Path, rng: random.Random, iters: int) -> None:
    """Start, kill and resume until the run has died five times, then let it end."""
    work_dir = Path(cfg.work_dir)
    moments = range(INTERVAL, iters - INTERVAL, INTERVAL)
    saves = sorted(rng.sample(moments, 2))
    cfg.custom_imports = dict(imports=["tests.integration.kill_hook"])
    cfg.custom_hooks = [
        *cfg.custom_hooks,
        *(dict(type="KillWhileSavingHook", iteration=iteration) for iteration in saves),
    ]
    config = folder / "killed.py"
    cfg.dump(config)
    steps = sorted(rng.sample(range(2, iters - 2), 3))
    kills = 0
    while True:
        run = start_training(config, "--resume")
        while run.poll() is None:
            done = max(read_trace(work_dir), default=0)
            if steps and done >= steps[0]:
                time.sleep(rng.uniform(0, 0.05))
                run.kill()
                steps.pop(0)
                break
            time.sleep(0.001)
        output, _ = run.communicate()
        if run.returncode == 0:
            break
        if run.returncode != -signal.SIGKILL:
            raise SystemExit(output)
        kills += 1
        newest = max(list_checkpoints(work_dir), default=0)
        half = len(list((work_dir / "checkpoints").glob(".*.partial")))
        print(
            f"kill {kills}: log at iteration {max(read_trace(work_dir), default=0)}, newest "
            f"checkpoint {newest}, half-written files {half}"
        )
    if kills != 5:
        raise SystemExit(f"expected five kills, got {kills}")


def report(straight: Path, killed: Path, iters: int) -> None:
    """Print both traces and fail on any difference."""
    expected, actual = read_trace(straight), read_trace(killed)
    print("iteration  loss uninterrupted     loss killed 5 times")
    for step in sorted(expected):
        print(f"{step:9d}  {expected[step]['loss']:.16f}  {actual[step]['loss']:.16f}")
    different = [step for step in expected if expected[step] != actual.get(step)]
    tensors = different_tensors(straight, killed, iters)
    metrics = len(expected[1])
    print(
        f"{len(expected)} iterations x {metrics} metrics: {len(different)} iterations differ; "
        f"final model and optimizer: {len(tensors)} tensors differ"
    )
    if different or tensors:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
