"""A linear segmentation head on the frozen toy backbone beats one on a random backbone.

    python -m tests.acceptance.segmentation_quickstart --weights FILE [--out DIR] [--seeds 2]

``FILE`` is the backbone that ``tools/quickstart.sh`` exports. The same config is trained with its
weights and with random ones, frozen both times, once per seed; the worst mIoU with the weights must
exceed the best without. The checkpoint of the first run is read back by mmseg's ``init_model``,
which must find the backbone through the record in it; its predictions are drawn beside the truth
into ``DIR/segmentation.png``.
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
from dinov3_mm.visualization.figures import saved_figure, show_image

CONFIG = Path(__file__).parents[2] / "configs/quickstart/segmentation.py"
COLUMNS = 6


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


def score(weights: str | None, work_dir: Path, seed: int) -> float:
    """MIoU in percent on scenes that training has not seen."""
    runner = build_runner(config(weights, work_dir, seed))
    runner.train()
    state = runner.optim_wrapper.optimizer.state
    head = {id(parameter) for parameter in runner.model.decode_head.parameters()}
    assert {id(parameter) for parameter in state} == head, "the backbone has optimizer state"
    return float(runner.message_hub.get_scalar("val/mIoU").current())


def draw(checkpoint: Path, cfg: Config, path: Path) -> float:
    """Draw image, truth and prediction of a checkpoint.

    Returns:
        mIoU in percent of mmseg's inference on all validation scenes.
    """
    from mmseg.apis import inference_model, init_model

    scenes = DATASETS.build({**cfg.val_dataloader.dataset, "pipeline": []})
    # mmseg's inference gives arrays: the pipeline takes them as scenes' images.
    model = init_model(cfg, str(checkpoint), device="cpu")
    samples = [scenes[i] for i in range(len(scenes))]
    answers = [
        inference_model(model, sample["img"]).pred_sem_seg.data[0].numpy() for sample in samples
    ]
    classes = len(scenes.metainfo["classes"])
    confusion = np.zeros((classes, classes))
    for sample, answer in zip(samples, answers):
        np.add.at(confusion, (sample["gt_seg_map"].ravel(), answer.ravel()), 1)
    hits = np.diag(confusion)
    iou = hits / np.maximum(confusion.sum(0) + confusion.sum(1) - hits, 1)
    palette = np.array(scenes.metainfo["palette"], np.uint8)
    with saved_figure(path, (2.1 * COLUMNS, 6.6)) as figure:
        for column, (sample, answer) in enumerate(zip(samples[:COLUMNS], answers)):
            truth = sample["gt_seg_map"]
            pictures = {
                "image": sample["img"][..., ::-1].copy(),
                "truth": palette[truth],
                f"prediction, {(truth == answer).mean():.0%}": palette[answer],
            }
            for row, (title, picture) in enumerate(pictures.items()):
                axes = figure.add_subplot(3, COLUMNS, row * COLUMNS + column + 1)
                show_image(axes, torch.from_numpy(picture), title)
    return 100 * iou.mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", required=True, help="backbone of tools/quickstart.sh")
    parser.add_argument("--out", default="work_dirs/segmentation_quickstart", type=Path)
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    trained, random = [], []
    for seed in range(args.seeds):
        trained.append(score(args.weights, args.out / f"trained_{seed}", seed))
        random.append(score(None, args.out / f"random_{seed}", seed))
        print(f"seed {seed}: mIoU {trained[-1]:.1f} % trained, {random[-1]:.1f} % random backbone")
    (checkpoint,) = (args.out / "trained_0").glob("iter_*.pth")
    cfg = config(args.weights, args.out / "trained_0", 0)
    again = draw(checkpoint, cfg, args.out / "segmentation.png")
    print(f"the checkpoint in mmseg's inference: {again:.1f} %; {args.out}/segmentation.png")
    passed = min(trained) > max(random) and abs(again - trained[0]) < 0.2
    print(f"worst with weights {min(trained):.1f} %, best without {max(random):.1f} %: ", end="")
    print("passed" if passed else "FAILED")
    sys.exit(not passed)


if __name__ == "__main__":
    main()
