"""A detector of scenes on the frozen toy backbone beats one on a random backbone.

    python -m tests.acceptance.detection_quickstart --weights FILE [--out DIR] [--seeds 2]

``FILE`` is the backbone that ``tools/quickstart.sh`` exports. The same config is trained with its
weights and with random ones, frozen both times, once per seed; the worst box AP with the weights
must exceed the best without. The first checkpoint is read back by mmdet's ``init_detector``, which
must find the backbone through the record in it; what ``inference_detector`` finds is drawn beside
the truth, and beside the detector on the random backbone, into ``DIR/detection.png``.
"""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from mmengine.registry import DATASETS

from dinov3_mm.visualization.figures import COLOURS, saved_figure
from tests.acceptance.frozen_quickstart import Models, run

COLUMNS = 6
MIN_SCORE = 0.15


def draw(models: Models, path: Path) -> str:
    """Truth and what both checkpoints find in the first scenes of validation."""
    from mmdet.apis import inference_detector, init_detector

    (cfg, _), *_ = models.values()
    scenes = DATASETS.build({**cfg.val_dataloader.dataset, "pipeline": []})
    samples = [scenes[i] for i in range(COLUMNS)]
    names, counts = scenes.metainfo["classes"], {}
    with saved_figure(path, (2.6 * COLUMNS, 2.8 * (1 + len(models))), dense=True) as figure:
        rows = figure.subplots(1 + len(models), COLUMNS)
        for axes, sample in zip(rows[0], samples):
            _show(axes, sample)
            for item in sample["instances"]:
                _box(axes, item["bbox"], names[item["bbox_label"]], COLOURS[2])
        for row, (name, (cfg, checkpoint)) in zip(rows[1:], models.items()):
            detector = init_detector(cfg, str(checkpoint), device="cpu")
            counts[name] = 0
            for axes, sample in zip(row, samples):
                _show(axes, sample)
                found = inference_detector(detector, sample["img"]).pred_instances
                found = found[found.scores > MIN_SCORE]
                counts[name] += len(found)
                for corners, label, score in zip(found.bboxes, found.labels, found.scores):
                    _box(axes, corners.tolist(), f"{names[int(label)]} {score:.2f}", COLOURS[1])
            row[0].set_title(f"{name}, scores above {MIN_SCORE}", fontsize=9)
        rows[0, 0].set_title("truth", fontsize=9)
    total = sum(len(sample["instances"]) for sample in samples)
    found = ", ".join(f"{count} {name}" for name, count in counts.items())
    return f"boxes above {MIN_SCORE} in mmdet's inference, {total} objects: {found}"


def _show(axes: Axes, sample: dict) -> None:
    axes.imshow(sample["img"][..., ::-1])
    axes.set_axis_off()


def _box(axes: Axes, corners: list[float], text: str, colour: str) -> None:
    x1, y1, x2, y2 = corners
    axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, lw=1.6))
    style = {"facecolor": colour, "edgecolor": "none", "pad": 0.8}
    axes.text(x1, max(y1, 5), text, fontsize=7, color="white", bbox=style, va="bottom")


if __name__ == "__main__":
    run("detection", "coco/bbox_mAP", draw, factor=100.0)
