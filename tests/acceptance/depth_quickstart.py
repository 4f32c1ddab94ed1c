"""A linear depth head on the frozen toy backbone beats one on a random backbone.

    python -m tests.acceptance.depth_quickstart --weights FILE [--out DIR] [--seeds 2]

``FILE`` is the backbone that ``tools/quickstart.sh`` exports. The same config is trained with its
weights and with random ones, frozen both times, once per seed; the worst RMSE with the weights must
be below the best without. The first checkpoint is read back by mmseg's ``init_model``, which must
find the backbone through the record in it; what ``inference_model`` says is drawn beside the truth,
and beside the head on the random backbone, into ``DIR/depth.png``.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS

import dinov3_mm  # noqa: F401
from dinov3_mm.engine import build_runner, set_weights
from dinov3_mm.visualization.figures import saved_figure

CONFIG = Path(__file__).parents[2] / "configs/quickstart/depth.py"
ROWS = 5


def config(weights: str | None, work_dir: Path, seed: int) -> Config:
    """The quickstart's config with weights from a file, or random ones."""
    cfg = Config.fromfile(CONFIG)
    if weights is None:
        cfg.model.backbone.init_cfg = None
    else:
        set_weights(cfg, weights)
    cfg.work_dir = str(work_dir)
    cfg.randomness = dict(seed=seed)
    cfg.experiment_name = f"{work_dir.name}_{seed}"
    cfg.log_level = "WARNING"
    return cfg


def train(weights: str | None, work_dir: Path, seed: int) -> dict[str, float]:
    """RMSE and relative error on scenes that training has not seen."""
    runner = build_runner(config(weights, work_dir, seed))
    runner.train()
    tensors = runner.optim_wrapper.optimizer.state
    heads = {id(parameter) for parameter in runner.model.decode_head.parameters()}
    assert {id(parameter) for parameter in tensors} == heads, "the backbone has optimizer state"
    scalars = runner.message_hub
    return {
        name: float(scalars.get_scalar(f"val/depth/{name}").current())
        for name in ("rmse", "abs_rel")
    }


def draw(models: dict[str, tuple[Config, Path]], path: Path) -> dict[str, float]:
    """Draw what checkpoints say of the first scenes of validation.

    Args:
        models: config and checkpoint by name.
        path: picture to write.

    Returns:
        RMSE by name over the drawn scenes, by mmseg's inference.
    """
    from mmseg.apis import inference_model, init_model

    (cfg, _), *_ = models.values()
    scenes = DATASETS.build({**cfg.val_dataloader.dataset, "pipeline": []})
    samples = [scenes[i] for i in range(ROWS)]
    images = [sample["img"] for sample in samples]
    columns = {"truth": [sample["gt_depth_map"] for sample in samples]}
    for name, (cfg, checkpoint) in models.items():
        model = init_model(cfg, str(checkpoint), device="cpu")
        answers = inference_model(model, images)
        columns[name] = [answer.pred_depth_map.data[0].numpy() for answer in answers]
    low, high = np.min(columns["truth"]), np.max(columns["truth"])
    with saved_figure(path, (2.2 * (1 + len(columns)), 2.3 * ROWS)) as figure:
        axes = figure.subplots(ROWS, 1 + len(columns))
        for row, image in enumerate(images):
            axes[row, 0].imshow(image[..., ::-1])
            for column, (name, maps) in enumerate(columns.items(), 1):
                axes[row, column].imshow(maps[row], vmin=low, vmax=high, cmap="magma_r")
                axes[0, column].set_title(name, fontsize=9)
        axes[0, 0].set_title(f"image (depth {low:.1f} to {high:.1f})", fontsize=9)
        for part in axes.flat:
            part.set_axis_off()
    truth = np.stack(columns["truth"])
    return {
        name: float(np.sqrt(np.mean((np.stack(columns[name]) - truth) ** 2))) for name in models
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", required=True, help="backbone of tools/quickstart.sh")
    parser.add_argument("--out", default="work_dirs/depth_quickstart", type=Path)
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    scores = {"trained": [], "random": []}
    for seed in range(args.seeds):
        for name, weights in (("trained", args.weights), ("random", None)):
            found = train(weights, args.out / f"{name}_{seed}", seed)
            scores[name].append(found["rmse"])
            line = f"RMSE {found['rmse']:.3f}, relative error {found['abs_rel']:.3f}"
            print(f"seed {seed}, {name} backbone: {line}", flush=True)
    models = {}
    for name, weights in (("trained", args.weights), ("random", None)):
        work_dir = args.out / f"{name}_0"
        (checkpoint,) = work_dir.glob("iter_*.pth")
        models[name] = (config(weights, work_dir, 0), checkpoint)
    drawn = draw(models, args.out / "depth.png")
    print(
        f"RMSE of the drawn scenes by mmseg's inference: {drawn['trained']:.3f} trained, "
        f"{drawn['random']:.3f} random; {args.out}/depth.png"
    )
    passed = max(scores["trained"]) < min(scores["random"])
    worst, best = max(scores["trained"]), min(scores["random"])
    print(f"worst with weights {worst:.3f}, best without {best:.3f}: ", end="")
    print("passed" if passed else "FAILED")
    sys.exit(not passed)


if __name__ == "__main__":
    main()
