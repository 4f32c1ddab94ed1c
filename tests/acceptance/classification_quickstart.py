"""A linear classifier of scenes on the frozen toy backbone beats one on a random backbone.

    python -m tests.acceptance.classification_quickstart --weights FILE [--out DIR] [--seeds 2]

``FILE`` is the backbone that ``tools/quickstart.sh`` exports. The same config is trained with its
weights and with random ones, frozen both times, once per seed; the worst score with the weights
must exceed the best without. The checkpoint of the first run is read back by mmpretrain's
inferencer, which must find the backbone through the record in it and give the labels that training
counted; its predictions are drawn beside the truth into ``DIR/classification.png``.
"""

from pathlib import Path

import torch
from mmengine.registry import DATASETS

from dinov3_mm.visualization.figures import saved_figure, show_image
from tests.acceptance.frozen_quickstart import TRAINED, Models, run

METRIC = "accuracy/top1"
ROWS, COLUMNS = 3, 8


def draw(models: Models, path: Path) -> str:
    """Predictions of the first checkpoint beside the truth."""
    from mmpretrain import ImageClassificationInferencer

    cfg, checkpoint = models[TRAINED]
    scenes = DATASETS.build({**cfg.val_dataloader.dataset, "pipeline": []})
    samples = [scenes[i] for i in range(len(scenes))]
    predict = ImageClassificationInferencer(cfg, pretrained=str(checkpoint), device="cpu")
    answers = predict([sample["img"] for sample in samples], batch_size=64)
    right = [
        answer["pred_label"] == int(sample["gt_label"]) for answer, sample in zip(answers, samples)
    ]
    with saved_figure(path, (2.1 * COLUMNS, 2.6 * ROWS)) as figure:
        for axes, sample, answer, is_right in zip(
            figure.subplots(ROWS, COLUMNS).flat, samples, answers, right
        ):
            image = torch.from_numpy(sample["img"][..., ::-1].copy())
            truth = predict.classes[int(sample["gt_label"])]
            verdict = truth if is_right else f"{answer['pred_class']}\n(truth: {truth})"
            show_image(axes, image, f"{verdict} {answer['pred_score']:.2f}")
            axes.title.set_color("#009E73" if is_right else "#D55E00")
            axes.title.set_fontsize(9)
    share = 100 * sum(right) / len(right)
    return f"top-1 of the first checkpoint in mmpretrain's inferencer: {share:.1f} %"


if __name__ == "__main__":
    run("classification", METRIC, draw)
