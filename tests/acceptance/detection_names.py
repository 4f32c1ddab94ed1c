"""Detection on files whose order, ids and names differ: the score stays, or the file is refused.

``python -m tests.acceptance.detection_names [--iters N]`` paints scenes of three shapes, trains the
quickstart's detector on their files with ``--data`` alone, and tests the one checkpoint on the same
images under files whose categories stand in another order, have other ids, or other names. It draws
the detector's pictures and prints a table.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from dinov3_mm.checkpoints import export_backbone
from tests.checkpoints.toys import toy_backbone

ROOT = Path(__file__).parents[2]
COLOURS = {"apple": (220, 40, 40), "pear": (60, 200, 70), "plum": (110, 50, 190)}
SIDE = 96
CASES = {
    "as trained": {1: "apple", 2: "pear", 3: "plum"},
    "another order": {1: "plum", 2: "apple", 3: "pear"},
    "ids 7, 300, 12": {7: "apple", 300: "pear", 12: "plum"},
    "one name misspelt": {1: "aple", 2: "pear", 3: "plum"},
    "other case": {1: "Apple", 2: "Pear", 3: "Plum"},
    "a category more": {1: "fig", 2: "apple", 3: "pear", 4: "plum"},
    "a category less": {2: "pear", 3: "plum"},
}
CONFIG = """
_base_ = {base!r}
image_size = ({side}, {side})
model = dict(backbone=dict(arch=dict(embed_dims=32, num_layers=4, num_heads=2, ffn_ratio=2.0,
    num_registers=2), patch_size=16, frozen_stages=-1, init_cfg=None, out_indices=(0, 1, 2, 3)))
model['neck'] = dict(in_channels=4 * 32, in_stride=16)
load = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True)]
data = dict(type='CocoDataset', ann_file='', _delete_=True)
train_dataloader = dict(dataset=dict(data, pipeline=[*load, dict(type='PackDetInputs')]))
val_dataloader = dict(dataset=dict(data, test_mode=True, pipeline=[*load,
    dict(type='Resize', scale=image_size, keep_ratio=True), dict(type='PackDetInputs',
    meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))]))
test_dataloader = val_dataloader
val_evaluator = dict(type='CocoMetric', ann_file='', metric='bbox', classwise=True)
test_evaluator = val_evaluator
"""


def paint(folder: Path, split: str, count: int, categories: dict[int, str], seed: int) -> None:
    """Squares of three colours on noise, with their annotation file."""
    rng = np.random.default_rng(seed)
    number = {name: id_ for id_, name in categories.items()}
    (folder / split).mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for index in range(1, count + 1):
        pixels = rng.integers(60, 140, (SIDE, SIDE, 3))
        taken = np.zeros((SIDE, SIDE), bool)
        for _ in range(3):
            name = list(COLOURS)[rng.integers(3)]
            w, h = rng.integers(18, 40, 2)
            x, y = rng.integers(0, SIDE - w), rng.integers(0, SIDE - h)
            if taken[y : y + h, x : x + w].any():
                continue
            taken[y : y + h, x : x + w] = True
            pixels[y : y + h, x : x + w] = COLOURS[name]
            if name in number:
                box = [int(v) for v in (x, y, w, h)]
                entry = {"id": len(annotations) + 1, "image_id": index, "bbox": box}
                annotations.append({**entry, "category_id": number[name], "area": box[2] * box[3]})
        Image.fromarray(pixels.astype(np.uint8)).save(folder / split / f"{index}.png")
        images.append({"id": index, "file_name": f"{index}.png", "width": SIDE, "height": SIDE})
    listed = [{"id": id_, "name": name} for id_, name in categories.items()]
    content = {"images": images, "annotations": annotations, "categories": listed}
    (folder / f"{split}.json").write_text(json.dumps(content))


def run(*arguments: str) -> tuple[int, str]:
    """A tool of the checkout; its exit status and what it printed."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iters", type=int, default=300)
    parser.add_argument("--out", default="work_dirs/acceptance/detection_names")
    args = parser.parse_args()
    out = Path(args.out).absolute()
    shutil.rmtree(out, ignore_errors=True)
    paint(out / "data", "train", 200, CASES["ids 7, 300, 12"], seed=0)
    paint(out / "data", "val", 60, CASES["as trained"], seed=1)
    export_backbone(toy_backbone(patch_size=16), out / "toy.safetensors")
    config = out / "fruit.py"
    config.write_text(CONFIG.format(base=str(ROOT / "configs/quickstart/detection.py"), side=SIDE))
    lengths = [f"train_cfg.max_iters={args.iters}", f"train_cfg.val_interval={args.iters}"]
    lengths += [f"default_hooks.checkpoint.interval={args.iters}"]
    lengths += [f"param_scheduler.1.end={args.iters}"]
    common = ["--data", str(out / "data")]
    code, text = run(
        "tools/train.py",
        str(config),
        *common,
        "--work-dir",
        str(out / "run"),
        "--cfg-options",
        *lengths,
    )
    print(f"training on ids 7, 300, 12 with --data alone: exit {code}")
    print(
        "\n".join(
            line for line in text.splitlines() if "classes are" in line or "num_classes" in line
        )
    )
    if code:
        sys.exit(text[-3000:])
    checkpoint = str(next((out / "run").glob("iter_*.pth")))
    for name, categories in CASES.items():
        folder = out / name.replace(" ", "_").replace(",", "")
        paint(folder, "val", 60, categories, seed=1)
        paint(folder, "train", 2, categories, seed=0)
        work = str(folder / "test")
        code, text = run(
            "tools/test.py", str(config), checkpoint, "--data", str(folder),
            "--work-dir", work, "--show-dir", str(folder / "pictures"),
        )  # fmt: skip
        if code:
            print(f"{name:20s} refused: {text.strip().splitlines()[-1]}")
            continue
        scores = json.loads((folder / "test/metrics.json").read_text())
        each = {key: round(scores.get(f"coco/{key}_precision", float("nan")), 3) for key in COLOURS}
        print(f"{name:20s} mAP {scores['coco/bbox_mAP']:.3f}  {each}")


if __name__ == "__main__":
    main()
