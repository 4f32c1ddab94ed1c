"""A linear segmentation head on the frozen toy backbone beats one on a random backbone.

    python -m tests.acceptance.segmentation_quickstart --weights FILE [--out DIR] [--seeds 2]

``FILE`` is the backbone that ``tools/quickstart.sh`` exports. The same config is trained with its
weights and with random ones, frozen both times, once per seed; the worst mIoU with the weights must
exceed the best without. mmseg's inference on the first checkpoint must give the same mIoU; its
predictions are drawn beside the truth.
"""

from pathlib import Path

import numpy as np
import torch
from mmengine.registry import DATASETS

from dinov3_mm.visualization.figures import saved_figure, show_image
from tests.acceptance.frozen_quickstart import RANDOM, TRAINED, Models, run

COLUMNS = 6


def mean_iou(truths: list[np.ndarray], answers: list[np.ndarray], classes: int) -> float:
    """In percent; a class that appears nowhere counts as 0."""
    confusion = np.zeros((classes, classes))
    for truth, answer in zip(truths, answers):
        np.add.at(confusion, (truth.ravel(), answer.ravel()), 1)
    hits = np.diag(confusion)
    return 100 * float(np.mean(hits / np.maximum(confusion.sum(0) + confusion.sum(1) - hits, 1)))


def draw(models: Models, path: Path) -> str:
    """Image, truth and predictions of both backbones."""
    from mmseg.apis import inference_model, init_model

    cfg, _ = models[TRAINED]
    scenes = DATASETS.build({**cfg.val_dataloader.dataset, "pipeline": []})
    samples = [scenes[i] for i in range(len(scenes))]
    truths = [sample["gt_seg_map"] for sample in samples]
    answers = {}
    for name in (TRAINED, RANDOM):
        cfg, checkpoint = models[name]
        model = init_model(cfg, str(checkpoint), device="cpu")
        shown = samples if name == TRAINED else samples[:COLUMNS]
        answers[name] = [
            inference_model(model, sample["img"]).pred_sem_seg.data[0].numpy() for sample in shown
        ]
    palette = np.array(scenes.metainfo["palette"], np.uint8)
    with saved_figure(path, (2.1 * COLUMNS, 8.8)) as figure:
        for column in range(COLUMNS):
            pictures = {
                "image": samples[column]["img"][..., ::-1].copy(),
                "truth": palette[truths[column]],
            }
            for name in (TRAINED, RANDOM):
                answer = answers[name][column]
                share = (truths[column] == answer).mean()
                pictures[f"{name} backbone, {share:.0%}"] = palette[answer]
            for row, (title, picture) in enumerate(pictures.items()):
                axes = figure.add_subplot(4, COLUMNS, row * COLUMNS + column + 1)
                show_image(axes, torch.from_numpy(picture), title)
    found = mean_iou(truths, answers[TRAINED], len(palette))
    return f"mIoU of the first checkpoint in mmseg's inference: {found:.1f} %"


if __name__ == "__main__":
    run("segmentation", "mIoU", draw)
