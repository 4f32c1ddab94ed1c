"""Mask2Former on the frozen toy backbone segments scenes better than on a random backbone.

    python -m tests.acceptance.mask2former_quickstart --weights FILE [--out DIR] [--seeds 2]

``FILE`` is the backbone that ``tools/quickstart.sh`` exports. The same config is trained with its
weights and with random ones, frozen both times, once per seed; the worst mIoU with the weights must
exceed the best without. Predictions of the first run are drawn beside the truth into
``DIR/mask2former.png``, by mmseg's own ``init_model`` and ``inference_model`` on its checkpoint,
which must find the backbone through the record in it.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS

import dinov3_mm  # noqa: F401
from dinov3_mm.engine import build_runner
from dinov3_mm.engine.host_config import leave_random, set_host_weights
from dinov3_mm.visualization.figures import saved_figure, show_image

CONFIG = Path(__file__).parents[2] / "configs/quickstart/mask2former.py"
COLUMNS = 6


def config(weights: str | None, work_dir: Path, seed: int) -> Config:
    """The quickstart's config with weights from a file, or random ones."""
    cfg = Config.fromfile(CONFIG)
    if weights is None:
        leave_random(cfg)
    else:
        set_host_weights(cfg, weights)
    cfg.work_dir = str(work_dir)
    cfg.randomness = dict(seed=seed)
    cfg.experiment_name = f"{work_dir.name}_{seed}"
    cfg.log_level = "WARNING"
    return cfg


def score(weights: str | None, work_dir: Path, seed: int) -> float:
    """mIoU in percent on scenes that training has not seen."""
    runner = build_runner(config(weights, work_dir, seed))
    backbone = runner.model.backbone.backbone
    runner.train()
    moments = {id(parameter) for parameter in runner.optim_wrapper.optimizer.state}
    frozen = {id(parameter) for parameter in backbone.parameters()}
    assert moments and not moments & frozen, "the backbone has optimizer state"
    return float(runner.message_hub.get_scalar("val/mIoU").current())


def draw(checkpoint: Path, cfg: Config, path: Path) -> None:
    """Draw predictions of a checkpoint beside images and truth."""
    from mmseg.apis import inference_model, init_model

    scenes = DATASETS.build({**cfg.val_dataloader.dataset, "pipeline": []})
    model = init_model(cfg, str(checkpoint), device="cpu")
    palette = np.array(scenes.metainfo["palette"], np.uint8)
    with saved_figure(path, (1.8 * COLUMNS, 6)) as figure:
        for column, axes in enumerate(figure.subplots(3, COLUMNS).T):
            sample = scenes[column]
            labels = inference_model(model, sample["img"]).pred_sem_seg.data[0].numpy()
            share = 100 * (labels == sample["gt_seg_map"]).mean()
            maps = (sample["img"][..., ::-1], palette[sample["gt_seg_map"]], palette[labels])
            titles = ("image", "truth", f"predicted: {share:.0f} %")
            for ax, picture, title in zip(axes, maps, titles):
                show_image(ax, torch.from_numpy(np.ascontiguousarray(picture)), title)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", required=True, help="backbone of tools/quickstart.sh")
    parser.add_argument("--out", default="work_dirs/mask2former_quickstart", type=Path)
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    trained, random = [], []
    for seed in range(args.seeds):
        trained.append(score(args.weights, args.out / f"trained_{seed}", seed))
        if seed == 0:
            (checkpoint,) = (args.out / "trained_0").glob("best_*.pth")
            cfg = config(args.weights, args.out / "trained_0", 0)
            draw(checkpoint, cfg, args.out / "mask2former.png")
        random.append(score(None, args.out / f"random_{seed}", seed))
        print(
            f"seed {seed}: mIoU {trained[-1]:.1f} % trained, {random[-1]:.1f} % random backbone",
            flush=True,
        )
    passed = min(trained) > max(random)
    print(f"worst with weights {min(trained):.1f} %, best without {max(random):.1f} %: ", end="")
    print("passed" if passed else "FAILED", f"; {args.out}/mask2former.png")
    sys.exit(not passed)


if __name__ == "__main__":
    main()
