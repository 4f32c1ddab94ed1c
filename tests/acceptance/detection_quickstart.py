"""A detector of scenes on the frozen toy backbone beats one on a random backbone.

    python -m tests.acceptance.detection_quickstart --weights FILE [--out DIR] [--seeds 2]

``FILE`` is the backbone that ``tools/quickstart.sh`` exports. The same config is trained with its
weights and with random ones, frozen both times, once per seed; the worst box AP with the weights
must exceed the best without. The checkpoint of the first run is read back by mmdet's
``init_detector``, which must find the backbone through the record in it; its detections are drawn
beside the truth into ``DIR/detection.png``.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from mmengine.config import Config
from mmengine.registry import DATASETS

import dinov3_mm  # noqa: F401
from dinov3_mm.engine import build_runner
from dinov3_mm.engine.host_config import set_host_weights
from dinov3_mm.visualization.figures import COLOURS, saved_figure, show_image

CONFIG = Path(__file__).parents[2] / "configs/quickstart/detection.py"
METRIC = "coco/bbox_mAP"
COLUMNS = 6
MIN_SCORE = 0.3


def config(weights: str | None, work_dir: Path, seed: int) -> Config:
    """The quickstart's config with weights from a file, or random ones."""
    cfg = Config.fromfile(CONFIG)
    if weights is None:
        cfg.model.backbone.init_cfg = None
    else:
        set_host_weights(cfg, weights)
    cfg.work_dir = str(work_dir)
    cfg.randomness = dict(seed=seed)
    cfg.experiment_name = f"{work_dir.name}_{seed}"
    cfg.log_level = "WARNING"
    return cfg


def score(weights: str | None, work_dir: Path, seed: int) -> float:
    """Box AP in percent on scenes that training has not seen."""
    start = time.process_time()
    runner = build_runner(config(weights, work_dir, seed))
    runner.train()
    print(f"{work_dir.name}: {time.process_time() - start:.0f} CPU seconds", flush=True)
    state = {id(parameter) for parameter in runner.optim_wrapper.optimizer.state}
    frozen = {id(parameter) for parameter in runner.model.backbone.parameters()}
    assert state and not state & frozen, "the backbone has optimizer state"
    return 100 * float(runner.message_hub.get_scalar(f"val/{METRIC}").current())


def draw(checkpoint: Path, cfg: Config, path: Path) -> int:
    """Draw detections of a checkpoint beside the truth; return how many are above the threshold."""
    from mmdet.apis import inference_detector, init_detector

    detector = init_detector(cfg, str(checkpoint), device="cpu")
    scenes = DATASETS.build({**cfg.val_dataloader.dataset, "pipeline": [], "length": COLUMNS})
    names, count = scenes.metainfo["classes"], 0
    with saved_figure(path, (2.6 * COLUMNS, 5.6), dense=True) as figure:
        rows = figure.subplots(2, COLUMNS)
        for index in range(COLUMNS):
            sample = scenes[index]
            found = inference_detector(detector, sample["img"]).pred_instances
            found = found[found.scores > MIN_SCORE]
            count += len(found)
            image = torch.from_numpy(sample["img"][..., ::-1].copy())
            show_image(rows[0, index], image, "truth" if index == 0 else "")
            show_image(rows[1, index], image, "detected" if index == 0 else "")
            for item in sample["instances"]:
                box(rows[0, index], item["bbox"], names[item["bbox_label"]], COLOURS[2])
            for corners, label, value in zip(found.bboxes, found.labels, found.scores):
                text = f"{names[int(label)]} {value:.2f}"
                box(rows[1, index], corners.tolist(), text, COLOURS[1])
    return count


def box(axes: Axes, corners: list[float], text: str, colour: str) -> None:
    """Draw a box and its name."""
    x1, y1, x2, y2 = corners
    axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, lw=1.6))
    style = {"facecolor": colour, "edgecolor": "none", "pad": 0.8}
    axes.text(x1, max(y1, 5), text, fontsize=7, color="white", bbox=style, va="bottom")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", required=True, help="backbone of tools/quickstart.sh")
    parser.add_argument("--out", default="work_dirs/detection_quickstart", type=Path)
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    trained, random = [], []
    for seed in range(args.seeds):
        trained.append(score(args.weights, args.out / f"trained_{seed}", seed))
        random.append(score(None, args.out / f"random_{seed}", seed))
        print(f"seed {seed}: box AP {trained[-1]:.1f} trained, {random[-1]:.1f} random backbone")
    checkpoint = args.out / "trained_0" / (args.out / "trained_0/last_checkpoint").read_text()
    cfg = config(args.weights, args.out / "trained_0", 0)
    count = draw(checkpoint, cfg, args.out / "detection.png")
    print(f"{count} detections by mmdet's init_detector in {args.out}/detection.png")
    passed = min(trained) > max(random) and count > 0
    print(f"worst with weights {min(trained):.1f}, best without {max(random):.1f}: ", end="")
    print("passed" if passed else "FAILED")
    sys.exit(not passed)


if __name__ == "__main__":
    main()
