"""A linear depth head on the frozen toy backbone beats one on a random backbone.

    python -m tests.acceptance.depth_quickstart --weights FILE [--out DIR] [--seeds 2]

``FILE`` is the backbone that ``tools/quickstart.sh`` exports. The same config is trained with its
weights and with random ones, frozen both times, once per seed; the worst RMSE with the weights must
be below the best without. The first checkpoint is read back by mmseg's ``init_model``, which must
find the backbone through the record in it; what ``inference_model`` says is drawn beside the truth,
and beside the head on the random backbone, into ``DIR/depth.png``.
"""

from pathlib import Path

import numpy as np
from mmengine.registry import DATASETS

from dinov3_mm.visualization.figures import saved_figure
from tests.acceptance.frozen_quickstart import Models, run

ROWS = 5


def draw(models: Models, path: Path) -> str:
    """Truth and what both checkpoints say of the first scenes of validation."""
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
    errors = {name: np.sqrt(np.mean((np.stack(columns[name]) - truth) ** 2)) for name in models}
    found = ", ".join(f"{error:.3f} {name}" for name, error in errors.items())
    return f"RMSE of the drawn scenes in mmseg's inference: {found}"


if __name__ == "__main__":
    run("depth", "depth/rmse", draw, lower_is_better=True)
