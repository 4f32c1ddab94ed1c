"""A head on the frozen toy backbone against the same head on a random one: what all jobs share."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from mmengine.config import Config

import dinov3_mm  # noqa: F401
from dinov3_mm.engine import build_runner
from dinov3_mm.engine.config.host import leave_random, set_host_weights

CONFIGS = Path(__file__).parents[2] / "configs/quickstart"
TRAINED, RANDOM = "trained", "random"

# Config and checkpoint of the first seed, by backbone.
Models = dict[str, tuple[Config, Path]]


def config(job: str, weights: str | None, work_dir: Path, seed: int) -> Config:
    """The quickstart's config with weights from a file, or random ones."""
    cfg = Config.fromfile(CONFIGS / f"{job}.py")
    if weights is None:
        leave_random(cfg)
    else:
        set_host_weights(cfg, weights)
    cfg.work_dir = str(work_dir)
    cfg.randomness = dict(seed=seed)
    cfg.experiment_name = f"{work_dir.name}_{seed}"
    cfg.log_level = "WARNING"
    return cfg


def score(cfg: Config, metric: str) -> float:
    """Train; a validation metric on scenes that training has not seen.

    The optimizer must hold nothing of the backbone.
    """
    runner = build_runner(cfg)
    runner.train()
    model = runner.model
    backbone = getattr(model.backbone, "backbone", model.backbone)  # inside of an adapter
    state = {id(parameter) for parameter in runner.optim_wrapper.optimizer.state}
    frozen = {id(parameter) for parameter in backbone.parameters()}
    assert state and not state & frozen, "the backbone has optimizer state"
    return float(runner.message_hub.get_scalar(f"val/{metric}").current())


def run(
    job: str,
    metric: str,
    draw: Callable[[Models, Path], str],
    *,
    factor: float = 1.0,
    lower_is_better: bool = False,
) -> None:
    """The command line of a job's script; exits with 1 if a random backbone is as good.

    Args:
        job: name of the config.
        metric: name of the validation metric.
        draw: writes a picture from the checkpoints of the first seed, through the host's own
            inference, which must find the backbone by the record in the checkpoint; returns what it
            found.
        factor: by which the metric is multiplied for printing.
        lower_is_better: as for errors.
    """
    parser = argparse.ArgumentParser(description=f"The {job} quickstart against a random backbone.")
    parser.add_argument("--weights", required=True, help="backbone of tools/quickstart.sh")
    parser.add_argument("--out", type=Path, default=Path(f"work_dirs/{job}_quickstart"))
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    scores: dict[str, list[float]] = {TRAINED: [], RANDOM: []}
    models: Models = {}
    for seed in range(args.seeds):
        for name, weights in ((TRAINED, args.weights), (RANDOM, None)):
            work_dir = args.out / f"{name}_{seed}"
            scores[name].append(factor * score(config(job, weights, work_dir, seed), metric))
            print(f"seed {seed}, {name} backbone: {metric} {scores[name][-1]:.3f}", flush=True)
            if seed == 0:
                last = Path((work_dir / "last_checkpoint").read_text())
                models[name] = (config(job, weights, work_dir, seed), work_dir / last.name)
    picture = args.out / f"{job}.png"
    print(f"{draw(models, picture)}; {picture}")
    sign = -1 if lower_is_better else 1
    worst = min(scores[TRAINED], key=lambda value: sign * value)
    best = max(scores[RANDOM], key=lambda value: sign * value)
    passed = sign * worst > sign * best
    verdict = "passed" if passed else "FAILED"
    print(f"worst with weights {worst:.3f}, best without {best:.3f}: {verdict}")
    sys.exit(not passed)
