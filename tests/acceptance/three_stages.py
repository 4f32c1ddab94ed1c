"""Three stages in one go: pretraining, Gram anchoring, high resolution, each from the one before.

    python -m tests.acceptance.three_stages [--iters 400] [--ranks 2] [--out DIR]

The quickstart's configs on SyntheticScenes, each started by ``tools/dist_train.sh`` with
``--from-stage``. After each stage its file is judged by a linear segmentation of patches at the
size of the pretraining and at twice that. Asserted: every stage starts from what its predecessor
left, all scores are above chance, and no later stage loses what the first has learnt.
"""

import argparse
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import dinov3_mm
from dinov3_mm.datasets import SyntheticScenes
from dinov3_mm.engine.run_files import latest_export_path
from dinov3_mm.evaluation import ImageSet, dense_linear_probe, extract_features
from dinov3_mm.evaluation.dense_probe import stack_masks
from tests.integration.toy_run import REPOSITORY, start_training

STAGES = ("pretrain", "gram", "high_res")
CLAIMS = {
    "pretrain": (),
    "gram": ("stage gram_anchor: weights, heads and optimizer moments", "Gram teacher: loaded"),
    "high_res": ("stage high_res: student, EMA teacher and heads", "Gram teacher: loaded"),
}
# Points of mIoU that a stage may lose: noise of a short run.
TOLERANCE = 2.0


def run_stage(
    stage: str, folder: Path, earlier: Path | None, ranks: int, options: Sequence[str]
) -> Path:
    """Train one stage on gloo ranks; its work folder."""
    work_dir = folder / stage
    arguments = ["--work-dir", str(work_dir)]
    if earlier is not None:
        arguments += ["--from-stage", str(earlier)]
    config = REPOSITORY / f"configs/quickstart/scenes_{stage}.py"
    run = start_training(config, *arguments, "--cfg-options", *options, ranks=ranks)
    output, _ = run.communicate()
    if run.returncode:
        raise RuntimeError(output[-4000:])
    log = "".join(path.read_text() for path in work_dir.glob("*/*.log"))
    for claim in CLAIMS[stage]:
        assert claim in log, f"{claim!r} is missing in the log of stage {stage}"
    return work_dir


def probe(weights: Path, size: int, counts: tuple[int, int]) -> tuple[float, float]:
    """MIoU of a linear segmentation of frozen patches in percent, and that of chance."""
    backbone = dinov3_mm.build_backbone(str(weights))
    patches, masks = [], []
    for count, start in zip(counts, (0, 1_000_000), strict=True):
        images = ImageSet(SyntheticScenes(length=count, start=start, image_size=size), size)
        patches.append(extract_features(backbone, images, patches=True).patches)
        masks.append(stack_masks(images))
    classes = images.source.num_semantic_classes
    scores = dense_linear_probe(patches[0], masks[0], patches[1], masks[1], classes).to_dict()
    return scores["patch_miou"], scores["chance_miou"]


def three_stages(
    folder: Path,
    options: Mapping[str, Sequence[str]],
    *,
    ranks: int = 2,
    counts: tuple[int, int] = (600, 300),
) -> dict[str, dict[int, float]]:
    """Train all stages, print and return the scores by stage and image size."""
    scores: dict[str, dict[int, float]] = {}
    earlier = None
    for stage in STAGES:
        began = time.perf_counter()
        earlier = run_stage(stage, folder, earlier, ranks, options[stage])
        spent = time.perf_counter() - began
        scores[stage] = {}
        for size in (64, 128):
            score, chance = probe(latest_export_path(earlier), size, counts)
            scores[stage][size] = score
            assert score > chance, f"{stage}: mIoU {score:.1f} at {size} px, chance {chance:.1f}"
        shown = ", ".join(f"{score:.1f} % at {size} px" for size, score in scores[stage].items())
        print(f"{stage:<9} {spent:5.0f} s   dense probe mIoU {shown} (chance {chance:.1f} %)")
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iters", type=int, default=400, help="length of the pretraining")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--out", type=Path, help="keep the work folders here")
    args = parser.parse_args()
    options = {
        "pretrain": [
            f"train_cfg.max_iters={args.iters}",
            f"custom_hooks.0.lr.warmup_iters={args.iters // 8}",
            f"custom_hooks.1.teacher_temp.total_iters={args.iters // 2}",
            f"custom_hooks.5.interval={args.iters}",
        ],
        "gram": ["custom_hooks.6.at_start=False"],
        "high_res": ["custom_hooks.6.at_start=False"],
    }
    with tempfile.TemporaryDirectory() as temporary:
        scores = three_stages(args.out or Path(temporary), options, ranks=args.ranks)
    for size in (64, 128):
        for stage in STAGES[1:]:
            lost = scores["pretrain"][size] - scores[stage][size]
            assert lost <= TOLERANCE, f"{stage} lost {lost:.1f} points at {size} px"
    print("three stages: passed")


if __name__ == "__main__":
    main()
