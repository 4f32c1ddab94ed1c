"""Folders, lists and checkpoints whose class names differ: the score is right, or it is refused.

``python -m tests.acceptance.class_names`` paints four classes that a mean colour separates, gives
them to the k-NN monitor, to the training of a classifier and to the test of its checkpoint under
folders that are renamed, missing, empty or one too many, and prints a table: case, score or
message. A right score is 100.
"""

import argparse
import contextlib
import io
import logging
import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from PIL import Image
from yapf.yapflib import yapf_api

from dinov3_mm.checkpoints import export_backbone
from dinov3_mm.engine import build_runner
from dinov3_mm.engine.config.host import set_data_root
from dinov3_mm.engine.downstream import build_tester, test
from dinov3_mm.engine.hooks import KNNEvalHook
from tests.checkpoints.toys import toy_backbone
from tests.evaluation.toys import MeanColour

ROOT = Path(__file__).parents[2]
COLOURS = {
    "ant": (220, 40, 40),
    "bee": (60, 200, 70),
    "cat": (50, 60, 220),
    "dog": (220, 210, 50),
    "elk": (40, 200, 210),
}
FOUR = ("ant", "bee", "cat", "dog")
SIDE, PER_CLASS = 32, 6
# Folders of a split: class by name of the folder; None is an empty folder.
Folders = Mapping[str, str | None]
AS_THEY_ARE: Folders = {name: name for name in FOUR}
WITHOUT_FIRST = {name: name for name in FOUR[1:]}
MORE_EMPTY = {"aaa": None, **AS_THEY_ARE}
MORE = {"aaa": "elk", **AS_THEY_ARE}
RENAMED = {"ant": "ant", "bee": "bee", "catt": "cat", "dog": "dog"}
OTHER_CASE = {"Ant": "ant", "Bee": "bee", "Cat": "cat", "Dog": "dog"}
HIDDEN = {".ipynb_checkpoints": "elk", "__MACOSX": "elk", **AS_THEY_ARE}
ONE_FOLDER = {"images": "ant"}
SAME_NUMBER = {"bee": "bee", "cat": "cat", "dog": "dog", "elk": "elk"}
NUMBERS = {"0": "ant", "2": "bee", "10": "cat", "11": "dog"}
# Case: folders for training, folders for the other split, 100 or what the refusal says.
PAIRS: dict[str, tuple[Folders, Folders, float | str]] = {
    "the same four": (AS_THEY_ARE, AS_THEY_ARE, 100.0),
    "the other lacks the first": (AS_THEY_ARE, WITHOUT_FIRST, 100.0),
    "training lacks the first": (WITHOUT_FIRST, AS_THEY_ARE, "'ant' (6 images)"),
    "the other has an empty one more": (AS_THEY_ARE, MORE_EMPTY, 100.0),
    "training has an empty one more": (MORE_EMPTY, AS_THEY_ARE, 100.0),
    "the other has one more": (AS_THEY_ARE, MORE, "'aaa' (6 images)"),
    "training has one more": (MORE, AS_THEY_ARE, 100.0),
    "training's first is empty": ({**AS_THEY_ARE, "ant": None}, AS_THEY_ARE, "'ant' (6 images)"),
    "one renamed": (AS_THEY_ARE, RENAMED, "'catt' (6 images; nearest 'cat')"),
    "as many, another one": (AS_THEY_ARE, SAME_NUMBER, "'elk' (6 images)"),
    "another case": (AS_THEY_ARE, OTHER_CASE, "'Ant' (6 images; nearest 'ant')"),
    "all images of the other in one folder": (AS_THEY_ARE, ONE_FOLDER, "'images' (6 images)"),
    "hidden folders": (AS_THEY_ARE, HIDDEN, 100.0),
    "names are numbers": (NUMBERS, {n: NUMBERS[n] for n in ("0", "2", "11")}, 100.0),
}


def paint(folder: Path, folders: Folders, *, seed: int = 0) -> Path:
    """Images of one colour with noise, in one folder a class."""
    rng = np.random.default_rng(seed)
    for name, kind in folders.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(PER_CLASS if kind else 0):
            pixels = rng.normal(COLOURS[kind], 12.0, (SIDE, SIDE, 3)).clip(0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{index}.png")
    return folder


def write_list(folder: Path, folders: Folders, label: Callable[[str], str]) -> Path:
    """A table of the images of painted folders."""
    rows = [
        f"{name}/{index}.png, {label(name)}"
        for name, kind in folders.items()
        if kind
        for index in range(PER_CLASS)
    ]
    path = folder / "list.csv"
    path.write_text("\n".join(["path, label", *rows]) + "\n")
    return path


def outcome(run: Callable[..., float], *arguments: object) -> float | str:
    """A score, or the words of a refusal."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return run(*arguments)
    except (ValueError, RuntimeError, OSError, TypeError, IndexError, AssertionError) as error:
        return f"{type(error).__name__}: {error}"


def is_right(found: float | str, expected: float | str) -> bool:
    """Whether an outcome is the expected score, or a refusal with the expected words."""
    if isinstance(expected, float):
        return isinstance(found, float) and round(found, 1) == expected
    return isinstance(found, str) and expected in found


def monitored(train: dict, test: dict) -> float:
    """Top-1 of the k-NN monitor on a pair of sources."""
    hook = KNNEvalHook(1, train, test, SIDE, k=(3,), mean=(0, 0, 0), std=(1, 1, 1), dtype="fp32")
    hook.prepare()
    return hook.evaluate(MeanColour())["cls_top1_k3"]


def monitor_pair(folder: Path, train: Folders, other: Folders) -> float:
    """The k-NN monitor on two folders."""
    paint(folder / "train", train)
    paint(folder / "test", other, seed=1)
    parts = ("train", "test")
    return monitored(*(dict(type="ImageFolder", root=str(folder / part)) for part in parts))


def monitor_lists(
    folder: Path,
    train: Folders,
    other: Folders,
    label: Callable[[str], str] = str,
    *,
    train_is_folder: bool = False,
) -> float:
    """The k-NN monitor on two lists, or a folder and a list."""
    parts = []
    for part, folders, seed in (("train", train, 0), ("test", other, 1)):
        path = write_list(paint(folder / part, folders, seed=seed), folders, label)
        parts.append(dict(type="ImageList", path=str(path)))
    if train_is_folder:
        parts[0] = dict(type="ImageFolder", root=str(folder / "train"))
    return monitored(*parts)


LISTS: dict[str, tuple[Callable[[Path], float], float | str]] = {
    "two lists, the other lacks the first": (
        lambda folder: monitor_lists(folder, AS_THEY_ARE, WITHOUT_FIRST),
        100.0,
    ),
    "two lists, one renamed": (
        lambda folder: monitor_lists(folder, AS_THEY_ARE, RENAMED),
        "'catt' (6 images; nearest 'cat')",
    ),
    "a folder and a list": (
        lambda folder: monitor_lists(folder, AS_THEY_ARE, WITHOUT_FIRST, train_is_folder=True),
        100.0,
    ),
    "folders 0, 10, 11, 2 and a list of these numbers": (
        lambda folder: monitor_lists(folder, NUMBERS, NUMBERS, train_is_folder=True),
        100.0,
    ),
    "folders of names, a list of numbers": (
        lambda folder: monitor_lists(
            folder,
            AS_THEY_ARE,
            AS_THEY_ARE,
            lambda name: str(FOUR.index(name)),
            train_is_folder=True,
        ),
        "'0' (6 images)",
    ),
}


def classifier(folder: Path, weights: Path, num_classes: int | None = None) -> Config:
    """The quickstart's classifier on folders below ``folder``."""
    cfg = Config.fromfile(ROOT / "configs/quickstart/classification.py")
    cfg.model.backbone = dict(
        type="DINOv3ViT",
        arch=toy_backbone().arch_settings,
        out_type="featmap+cls",
        frozen_stages=2,
        init_cfg=dict(type="DINOv3Pretrained", checkpoint=str(weights)),
    )
    cfg.model.head.in_channels = 2 * toy_backbone().embed_dims
    load = [dict(type="LoadMissingImage"), dict(type="PackInputs")]
    for split, part in (("train", "train"), ("val", "val"), ("test", "val")):
        cfg[f"{split}_dataloader"] = dict(
            batch_size=12,
            num_workers=0,
            sampler=dict(type="DefaultSampler", shuffle=split == "train"),
            dataset=dict(
                type="ClassificationFolder", data_root="data", data_prefix=part, pipeline=load
            ),
        )
    cfg.val_evaluator = cfg.test_evaluator = dict(type="Accuracy", topk=(1,))
    cfg.optim_wrapper.optimizer.lr = 0.05
    cfg.train_cfg = dict(by_epoch=True, max_epochs=12, val_interval=12)
    cfg.default_hooks.checkpoint = dict(type="CheckpointHook", interval=12)
    cfg.visualizer = None
    cfg.work_dir = str(folder / "run")
    set_data_root(cfg, str(folder), count_classes=num_classes is None)
    if num_classes is not None:
        cfg.model.head.num_classes = cfg.model.data_preprocessor.num_classes = num_classes
    return cfg


def trained(folder: Path, train: Folders, other: Folders, weights: Path) -> float:
    """Top-1 on ``val`` of a classifier that was trained on ``train``."""
    paint(folder / "train", train)
    paint(folder / "val", other, seed=1)
    return run_training(classifier(folder, weights))


def run_training(cfg: Config) -> float:
    """Train; top-1 on the validation set."""
    torch.manual_seed(0)
    runner = build_runner(cfg)
    runner.train()
    return float(runner.message_hub.get_scalar("val/accuracy/top1").current())


def single_class(folder: Path, weights: Path, num_classes: int | None) -> float:
    """All images in a folder too much: an archive that was unpacked into one."""
    paint(folder / "train/photos", AS_THEY_ARE)
    paint(folder / "val/photos", AS_THEY_ARE, seed=1)
    return run_training(classifier(folder, weights, num_classes))


def other_outputs(folder: Path, weights: Path, num_classes: int) -> float:
    """A head of another number of outputs."""
    paint(folder / "train", AS_THEY_ARE)
    paint(folder / "val", AS_THEY_ARE, seed=1)
    return run_training(classifier(folder, weights, num_classes))


def stray_image(folder: Path, weights: Path) -> float:
    """An image beside the class folders."""
    for part in ("train", "val"):
        paint(folder / part, AS_THEY_ARE)
    shutil.copy(folder / "val/ant/0.png", folder / "val/cover.png")
    return run_training(classifier(folder, weights))


def copied_images(folder: Path, weights: Path) -> float:
    """Validation images that are training images, one of them of another class."""
    paint(folder / "train", AS_THEY_ARE)
    paint(folder / "val", AS_THEY_ARE, seed=1)
    for source, target in (("ant/0.png", "ant/a.png"), ("bee/1.png", "bee/b.png")):
        shutil.copy(folder / "train" / source, folder / "val" / target)
    shutil.copy(folder / "val/ant/a.png", folder / "train/bee/2.png")
    (folder / "train/ant/0.png").unlink()
    return run_training(classifier(folder, weights))


def listed_labels(folder: Path, weights: Path, labels: Mapping[str, int], **metainfo) -> float:
    """mmpretrain's list of files and numbers as validation set."""
    paint(folder / "train", AS_THEY_ARE)
    paint(folder / "val", AS_THEY_ARE, seed=1)
    rows = [f"{name}/{n}.png {labels[name]}" for name in labels for n in range(PER_CLASS)]
    (folder / "val.txt").write_text("\n".join(rows))
    cfg = classifier(folder, weights)
    cfg.val_dataloader.dataset.update(
        type="CustomDataset", ann_file="val.txt", metainfo=dict(metainfo) if metainfo else None
    )
    return run_training(cfg)


def stock_folders(folder: Path, weights: Path) -> float:
    """mmpretrain's own data set of folders; validation lacks the first."""
    paint(folder / "train", AS_THEY_ARE)
    paint(folder / "val", WITHOUT_FIRST, seed=1)
    cfg = classifier(folder, weights)
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.dataset.type = "CustomDataset"
    return run_training(cfg)


def names_in_the_config(folder: Path, weights: Path, classes: tuple[str, ...]) -> float:
    """``metainfo.classes`` of the training set in an order of its own."""
    paint(folder / "train", AS_THEY_ARE)
    paint(folder / "val", AS_THEY_ARE, seed=1)
    cfg = classifier(folder, weights)
    cfg.train_dataloader.dataset.metainfo = dict(classes=classes)
    return run_training(cfg)


FAULTS: dict[str, tuple[Callable[[Path, Path], float], float | str]] = {
    "one class, with --data": (partial(single_class, num_classes=None), "found 1 (photos)"),
    "one class": (partial(single_class, num_classes=1), "are of one class, 'photos'"),
    "a head of 3 outputs": (partial(other_outputs, num_classes=3), "set model.head.num_classes=4"),
    "a head of 1000 outputs": (
        partial(other_outputs, num_classes=1000),
        "set model.head.num_classes=4",
    ),
    "an image beside the class folders": (stray_image, "e.g. "),
    "images in training and validation": (copied_images, 100.0),
    "a list of numbers without names": (
        partial(listed_labels, labels=dict(bee=0, cat=1)),
        "has numbers only",
    ),
    "a list of numbers with names in another order": (
        partial(listed_labels, labels=dict(bee=0, cat=1), classes=("bee", "cat", "ant", "dog")),
        100.0,
    ),
    "a list with a number too large": (
        partial(listed_labels, labels=dict(bee=1, cat=7), classes=FOUR),
        "with 7; expected 0 to 3",
    ),
    "mmpretrain's folders, the other lacks the first": (stock_folders, 100.0),
    "names of the config in another order": (
        partial(names_in_the_config, classes=FOUR[::-1]),
        100.0,
    ),
    "names of the config, one misspelt": (
        partial(names_in_the_config, classes=("ant", "bee", "catt", "dog")),
        "'cat' (6 images; nearest 'catt')",
    ),
}


def tested(folder: Path, cfg: Config, checkpoint: Path, other: Folders) -> float:
    """Top-1 of a checkpoint on other folders."""
    paint(folder / "val", other, seed=1)
    cfg = cfg.copy()
    for part in (cfg.val_dataloader.dataset, cfg.test_dataloader.dataset):
        part.data_root = str(folder)
    cfg.work_dir = str(folder / "test")
    return float(test(build_tester(cfg, str(checkpoint)))["accuracy/top1"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="keep the painted folders there")
    args = parser.parse_args()
    out = Path(args.out or tempfile.mkdtemp()).absolute()
    torch.set_num_threads(1)
    wrong = 0
    said: list[str] = []
    handle = logging.Logger.handle

    def kept(self, record):
        text = record.getMessage()
        text = text.removeprefix("WARNING: ") if text.startswith("WARNING: ") else text
        told = text != record.getMessage() or "without a score there" in text
        if (told or "folders renamed" in text) and text not in said:
            said.append(text)
        handle(self, record)

    logging.Logger.handle = kept
    # Formatting what runners print of their config takes most of their time.
    yapf_api.FormatCode = lambda text, **_: (text, True)

    def show(job: str, case: str, found: float | str, expected: float | str) -> None:
        nonlocal wrong
        right = is_right(found, expected)
        wrong += not right
        text = f"{found:.1f}" if isinstance(found, float) else found.replace(str(out) + "/", "")
        print(f"{'' if right else 'WRONG '}{job:10s} | {case:52s} | {text}", flush=True)
        for line in said:
            print(f"{'':10s} | {'':52s} |   said: {line.replace(str(out) + '/', '')}")
        said.clear()

    for number, (case, (train, other, expected)) in enumerate(PAIRS.items()):
        folder = out / f"monitor_{number}"
        show("monitor", case, outcome(monitor_pair, folder, train, other), expected)
    for number, (case, (run, expected)) in enumerate(LISTS.items()):
        folder = out / f"list_{number}"
        show("monitor", case, outcome(run, folder), expected)
    weights = export_backbone(toy_backbone(), out / "toy.safetensors")
    for number, (case, (train, other, expected)) in enumerate(PAIRS.items()):
        folder = out / f"training_{number}"
        show("training", case, outcome(trained, folder, train, other, weights), expected)
    for number, (case, (run, expected)) in enumerate(FAULTS.items()):
        show("training", case, outcome(run, out / f"fault_{number}", weights), expected)
    cfg = classifier(out / "training_0", weights)
    (checkpoint,) = (out / "training_0/run").glob("epoch_*.pth")
    for number, (case, (train, other, expected)) in enumerate(PAIRS.items()):
        if train is AS_THEY_ARE:
            folder = out / f"test_{number}"
            found = outcome(tested, folder, cfg, checkpoint, other)
            show("test", case, found, expected)
    MMLogger.get_current_instance().handlers.clear()
    if args.out is None:
        shutil.rmtree(out)
    print(f"{wrong} wrong")
    raise SystemExit(wrong > 0)


if __name__ == "__main__":
    main()
