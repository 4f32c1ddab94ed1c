"""A linear classifier of scenes on the frozen toy backbone beats one on a random backbone.

    python -m tests.acceptance.classification_quickstart --weights FILE [--out DIR] [--seeds 2]

``FILE`` is the backbone that ``tools/quickstart.sh`` exports. The same config is trained with its
weights and with random ones, frozen both times, once per seed; the worst score with the weights
must exceed the best without. The checkpoint of the first run is read back by mmpretrain's
inferencer, which must find the backbone through the record in it and give the labels that training
counted; its predictions are drawn beside the truth into ``DIR/classification.png``.
"""

import argparse
import sys
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import DATASETS

import dinov3_mm  # noqa: F401
from dinov3_mm.engine import build_runner, set_weights
from dinov3_mm.visualization.figures import saved_figure, show_image

CONFIG = Path(__file__).parents[2] / "configs/quickstart/classification.py"
METRIC = "accuracy/top1"
ROWS, COLUMNS = 3, 8


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
    """Top-1 accuracy in percent on scenes that training has not seen."""
    runner = build_runner(config(weights, work_dir, seed))
    runner.train()
    tensors = runner.optim_wrapper.optimizer.state
    heads = {id(parameter) for parameter in runner.model.head.parameters()}
    assert {id(parameter) for parameter in tensors} == heads, "the backbone has optimizer state"
    return float(runner.message_hub.get_scalar(f"val/{METRIC}").current())


def draw(checkpoint: Path, cfg: Config, path: Path) -> float:
    """Draw predictions of a checkpoint beside the truth.

    Returns:
        Accuracy in percent of mmpretrain's inferencer on all validation scenes.
    """
    from mmpretrain import ImageClassificationInferencer

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
    return 100 * sum(right) / len(right)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", required=True, help="backbone of tools/quickstart.sh")
    parser.add_argument("--out", default="work_dirs/classification_quickstart", type=Path)
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    trained, random = [], []
    for seed in range(args.seeds):
        trained.append(score(args.weights, args.out / f"trained_{seed}", seed))
        random.append(score(None, args.out / f"random_{seed}", seed))
        print(f"seed {seed}: top-1 {trained[-1]:.1f} % trained, {random[-1]:.1f} % random backbone")
    (checkpoint,) = (args.out / "trained_0").glob("best_*.pth")
    cfg = config(args.weights, args.out / "trained_0", 0)
    again = draw(checkpoint, cfg, args.out / "classification.png")
    print(
        f"the checkpoint in mmpretrain's inferencer: {again:.1f} %; {args.out}/classification.png"
    )
    passed = min(trained) > max(random) and abs(again - trained[0]) < 0.2
    print(f"worst with weights {min(trained):.1f} %, best without {max(random):.1f} %: ", end="")
    print("passed" if passed else "FAILED")
    sys.exit(not passed)


if __name__ == "__main__":
    main()
