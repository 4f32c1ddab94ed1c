"""A run that goes back to an older checkpoint, dies, and is queued again.

    python -m tests.acceptance.branching [--iters 40] [--kinds file ddp shards]

Train to the end; go back to half of it with another learning rate (``--resume PATH``); kill every
process at three quarters; start again with ``--resume``, as a scheduler does. The run must end on
the new branch: losses and the last checkpoint are, to the bit, those of a run that trained to the
half in a work folder of its own and went on from there with the new rate. Nothing of the old branch
may be lost, and the records in the work folder are those of the new branch alone.

``file``: one process; ``ddp``: two ranks, one file; ``shards``: two FSDP2 ranks, a folder.
"""

import argparse
import signal
import tempfile
import time
from pathlib import Path

import psutil
import torch
from mmengine.config import Config

from dinov3_mm.engine.run_files import checkpoint_path, list_checkpoints
from tests.acceptance.rank_parity import parity_config
from tests.integration.toy_run import start_training, write_images
from tests.integration.traces import different_tensors, read_shards, read_trace

FIRST_RATE, SECOND_RATE = 2e-3, 1e-3
KINDS = {"file": None, "ddp": 2, "shards": 2}


def configure(images: Path, work_dir: Path, kind: str, iters: int, rate: float) -> Config:
    """The run of the rank parity with eight checkpoints, all kept.

    On the new branch of the old folder it stands still at three quarters, unless it starts there.
    """
    cfg = parity_config(images, work_dir, iters)
    cfg.custom_hooks[0].lr.base = rate
    cfg.default_hooks.checkpoint.update(interval=iters // 8, max_to_keep=None)
    if rate == SECOND_RATE and work_dir.name == "old":
        cfg.custom_imports = dict(imports=["tests.integration.fault_hook"])
        cfg.custom_hooks = [*cfg.custom_hooks, dict(type="WaitHook", iteration=iters * 3 // 4)]
    if kind == "shards":
        cfg.strategy = dict(type="FSDP2Strategy")
    return cfg


def dump(cfg: Config, folder: Path, name: str) -> Path:
    path = folder / f"{name}.py"
    cfg.dump(path)
    return path


def run_to_end(config: Path, *arguments: str, ranks: int | None) -> str:
    process = start_training(config, *arguments, ranks=ranks)
    output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(output[-4000:])
    return output


def run_and_kill(config: Path, *arguments: str, ranks: int | None, work_dir: Path) -> None:
    """SIGKILL to all processes of a run once all of them stand still."""
    process = start_training(config, *arguments, ranks=ranks)
    while process.poll() is None and len(list(work_dir.glob("waiting_*"))) < (ranks or 1):
        time.sleep(0.01)
    if process.poll() is None:
        for each in [process, *psutil.Process(process.pid).children(recursive=True)]:
            each.kill()
    output, _ = process.communicate()
    if process.returncode != -signal.SIGKILL:
        raise SystemExit(f"it ended before it was killed: {output[-4000:]}")


def branch(folder: Path, images: Path, kind: str, iters: int) -> bool:
    """The story of one kind of checkpoint; whether it ends as it must."""
    ranks, sharded, half = KINDS[kind], kind == "shards", iters // 2
    old, new = folder / "old", folder / "new"
    configs = {
        (work_dir.name, rate): dump(
            configure(images, work_dir, kind, iters, rate), folder, f"{work_dir.name}_{rate}"
        )
        for work_dir in (old, new)
        for rate in (FIRST_RATE, SECOND_RATE)
    }
    run_to_end(configs["old", FIRST_RATE], ranks=ranks)
    was = {step: path.name for step, path in list_checkpoints(old).items()}
    back = ["--resume", str(checkpoint_path(old, half, sharded=sharded))]
    run_and_kill(configs["old", SECOND_RATE], *back, ranks=ranks, work_dir=old)
    if max(list_checkpoints(old)) != iters * 3 // 4:
        raise SystemExit(f"killed in iteration {iters * 3 // 4}, it has {[*list_checkpoints(old)]}")
    run_to_end(configs["old", SECOND_RATE], "--resume", ranks=ranks)
    # The run that never knew the old branch.
    until = ["--cfg-options", f"train_cfg.max_iters={half}"]
    run_to_end(configs["new", FIRST_RATE], *until, ranks=ranks)
    run_to_end(configs["new", SECOND_RATE], "--resume", ranks=ranks)
    expected, actual = read_trace(new), read_trace(old)
    different = [step for step in range(1, iters + 1) if expected.get(step) != actual.get(step)]
    unequal = compare(old, new, iters, sharded=sharded)
    lost = [
        name
        for step, name in was.items()
        if step > half and not list((old / "abandoned").glob(f"*/checkpoints/{name}"))
    ]
    print(
        f"{kind}: {iters} iterations, {len(different)} differ from a run that never knew the old "
        f"branch; last checkpoint: {len(unequal)} tensors differ; checkpoints of the old branch "
        f"that are gone: {len(lost)}",
        flush=True,
    )
    return not (different or unequal or lost)


def compare(old: Path, new: Path, iters: int, *, sharded: bool) -> list[str]:
    """Tensors of the last checkpoint that differ."""
    if not sharded:
        return different_tensors(old, new, iters)
    first, second = (read_shards(checkpoint_path(run, iters, sharded=True)) for run in (old, new))
    return [name for name in first if not torch.equal(first[name], second[name])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iters", type=int, default=40, help="a multiple of 8")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    arguments = parser.parse_args()
    passed = True
    for kind in arguments.kinds:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            images = write_images(folder / "images")
            passed &= branch(folder, images, kind, arguments.iters)
    raise SystemExit(not passed)


if __name__ == "__main__":
    main()
