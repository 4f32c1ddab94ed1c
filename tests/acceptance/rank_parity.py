"""One process against several gloo ranks on the same global batch: losses and parameters.

    python -m tests.acceptance.rank_parity [--ranks 2 3 4] [--iters 20] [--strategy ddp fsdp2 ...]

DDP and FSDP2, the latter also with replicas (HSDP), gathered parameters kept, activations
recomputed, losses in chunks of prototypes, and checkpoints written in the background.
Stochastic depth and RoPE augmentation are off: their noise belongs to a rank's own batch. All else
is on, KoLeo across ranks and image-level Gram included. Sums over the batch are taken in another
order, so equality is to rounding: losses to 1e-5 relative in each iteration, parameters to 1e-4
relative L2 per tensor at the end.
"""

import argparse
import itertools
import tempfile
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from dinov3_mm.checkpoints.distributed_folder import open_distributed_folder
from dinov3_mm.engine.runner.files import checkpoint_path
from dinov3_mm.engine.runner.training_state import read_training_state
from tests.integration.toy_run import start_training, toy_config, train, write_images
from tests.integration.traces import read_trace

LOSS_BAR = 1e-5
PARAMETER_BAR = 1e-4


@dataclass
class Difference:
    """Largest differences between two runs, and where."""

    loss: float
    loss_at: str
    parameter: float
    parameter_at: str

    @property
    def is_within_bars(self) -> bool:
        return self.loss <= LOSS_BAR and self.parameter <= PARAMETER_BAR

    def __str__(self) -> str:
        return (
            f"losses {self.loss:.2e} relative ({self.loss_at}), "
            f"parameters {self.parameter:.2e} relative L2 ({self.parameter_at})"
        )


def parity_config(images: Path, work_dir: Path, iters: int):
    """The toy run with a global batch of 12, distributed KoLeo and a live image-level Gram term."""
    cfg = toy_config(images, work_dir)
    # With the default layer scale of 1e-5 all images start with the same feature, and KoLeo follows
    # rounding errors.
    cfg.model.backbone.layer_scale_init_value = 1.0
    cfg.model.backbone.update(drop_path_rate=0.0, rope_jitter_coords=None, rope_rescale_coords=None)
    cfg.model.koleo = dict(weight=0.1, distributed=True)
    cfg.model.gram = dict(weight=1.0, img_level=True, teacher="ema")
    cfg.custom_hooks.append(dict(type="GramAnchorHook"))
    cfg.train_cfg.update(global_batch_size=12, max_iters=iters)
    for schedule in (
        cfg.custom_hooks[0].lr,
        cfg.custom_hooks[0].weight_decay,
        cfg.custom_hooks[1].momentum,
    ):
        schedule.total_iters = iters
    cfg.default_hooks.checkpoint.update(interval=iters)
    return cfg


def train_alone(folder: Path, images: Path, iters: int, *arguments: str) -> Path:
    """One process; its work folder."""
    train(parity_config(images, folder / "alone", iters), folder, *arguments)
    return folder / "alone"


STRATEGIES = {
    "ddp": {},
    "fsdp2": dict(strategy=dict(type="FSDP2Strategy")),
    "fsdp2-whole-checkpoints": dict(strategy=dict(type="FSDP2Strategy", checkpoint="whole")),
    "fsdp2-background": dict(strategy=dict(type="FSDP2Strategy", save_in_background=True)),
    "fsdp2-replicas": dict(strategy=dict(type="FSDP2Strategy", num_replicas=2)),
    "fsdp2-gathered": dict(strategy=dict(type="FSDP2Strategy", reshard_after_forward=False)),
    "ddp-compile": dict(strategy=dict(type="PretrainDDPStrategy", compile_blocks=True)),
    "fsdp2-compile": dict(strategy=dict(type="FSDP2Strategy", compile_blocks=True)),
    "fsdp2-selective": {
        "strategy": dict(type="FSDP2Strategy"),
        "model.backbone.with_cp": "selective",
    },
    "fsdp2-recompute": {
        "strategy": dict(type="FSDP2Strategy"),
        "model.backbone.with_cp": True,
        "model.prototype_chunk_size": 10,
    },
}


def train_ranks(
    folder: Path, images: Path, iters: int, ranks: int, *arguments: str, strategy: str = "ddp"
) -> Path:
    """Gloo ranks started by ``tools/dist_train.sh``; their work folder."""
    name = f"{strategy}-ranks{ranks}"
    work_dir = folder / name
    config = folder / f"{name}.py"
    cfg = parity_config(images, work_dir, iters)
    cfg.merge_from_dict(STRATEGIES[strategy])
    cfg.dump(config)
    run = start_training(config, *arguments, ranks=ranks)
    output, _ = run.communicate()
    if run.returncode:
        raise RuntimeError(output[-4000:])
    return work_dir


def compare(first: Path, second: Path, iters: int) -> Difference:
    """Largest relative difference of a loss in any iteration, and of a parameter at the end."""
    traces = [read_trace(path) for path in (first, second)]
    losses = {
        f"{name} at iteration {step}": relative(traces[1][step][name], value)
        for step, record in traces[0].items()
        for name, value in record.items()
        if name.endswith("loss")
    }
    assert len(losses) == iters * len([name for name in traces[0][1] if name.endswith("loss")])
    expected, actual = (read_model(path, iters) for path in (first, second))
    parameters = {
        name: ((actual[name] - tensor).norm() / tensor.norm().clamp(min=1e-12)).item()
        for name, tensor in expected.items()
        if tensor.is_floating_point() and "bias_mask" not in name
    }
    worst_loss, worst_parameter = max(losses, key=losses.get), max(parameters, key=parameters.get)
    return Difference(losses[worst_loss], worst_loss, parameters[worst_parameter], worst_parameter)


def read_model(work_dir: Path, iteration: int) -> dict[str, Tensor]:
    """Tensors of the algorithm in a checkpoint, whatever its form."""
    folder = checkpoint_path(work_dir, iteration, sharded=True)
    if not folder.is_dir():
        return read_training_state(checkpoint_path(work_dir, iteration))["state_dict"]
    opened = open_distributed_folder(folder)
    tensors = opened.read([name for name in opened.names if name.startswith("model.")])
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def relative(actual: float, expected: float) -> float:
    return abs(actual - expected) / max(abs(expected), 1e-8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--iters", type=int, default=20)
    parser.add_argument("--strategy", nargs="+", default=list(STRATEGIES), choices=STRATEGIES)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = write_images(folder / "images")
        alone = train_alone(folder, images, arguments.iters)
        passed = True
        for strategy, ranks in itertools.product(arguments.strategy, arguments.ranks):
            if strategy == "fsdp2-replicas" and ranks % 2:
                continue
            work_dir = train_ranks(folder, images, arguments.iters, ranks, strategy=strategy)
            difference = compare(alone, work_dir, arguments.iters)
            passed &= difference.is_within_bars
            print(
                f"1 process vs {ranks} ranks, {strategy}, {arguments.iters} iterations: "
                f"{difference}",
                flush=True,
            )
    raise SystemExit(not passed)


if __name__ == "__main__":
    main()
