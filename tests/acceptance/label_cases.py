"""Label and depth maps as users have them: what a training says before its first iteration.

    python -m tests.acceptance.label_cases [NAME ...]

writes small folders, trains the shipped configs of folders on each for two iterations with
``tools/train.py``, and prints case, outcome and message word for word. The exit status is 1 if a
case has another outcome than the one stated here.
"""

import contextlib
import copy
import functools
import io
import logging
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import cv2
import numpy as np
import tifffile
from mmengine.config import Config
from mmengine.registry import DefaultScope
from PIL import Image

from dinov3_mm.engine import ConfigError
from tests.shrink import CROP, shrink

CONFIGS = Path(__file__).parents[2] / "configs"
HEIGHT, WIDTH = 48, 64
NUM_IMAGES = {"train": 4, "val": 2}
RED, GREEN, BLUE = (200, 30, 30), (30, 200, 30), (30, 30, 200)

Write = Callable[[Path, np.ndarray, str, int], None]


class Case(NamedTuple):
    """Maps of a kind.

    Attributes:
        name: what is peculiar.
        write: stores the map of an image: path without ending, right map, split, number.
        outcome: 'trains', 'warned' or 'refused'.
        message: pattern of the message; of a case that trains, of the note on the training data.
        classes: lines of ``classes.txt``.
        dataset: further arguments of the data sets.
        options: ``--cfg-options``.
        source: public report of the kind.
    """

    name: str
    write: Write
    outcome: str
    message: str
    classes: tuple[str, ...] = ("ground", "object")
    dataset: Mapping = MappingProxyType({})
    options: tuple[str, ...] = ()
    source: str = ""


def true_labels(number: int) -> np.ndarray:
    """A right label map (H, W) of two classes."""
    labels = np.zeros((HEIGHT, WIDTH), np.uint8)
    labels[8 : 20 + 4 * number, 10:40] = 1
    return labels


def true_depth(number: int) -> np.ndarray:
    """A right depth map (H, W), in metres, 1 to 8, a tenth of it not measured."""
    depth = np.linspace(1, 7 + 0.2 * number, HEIGHT * WIDTH, dtype=np.float32)
    depth = depth.reshape(HEIGHT, WIDTH)
    depth[:, : WIDTH // 10] = 0
    return depth


def png(change: Callable[[np.ndarray], np.ndarray | Image.Image], splits: str = "train val"):
    """Store a changed map as PNG, in the named splits; the right one elsewhere."""

    def write(path: Path, labels: np.ndarray, split: str, number: int) -> None:
        changed = change(labels) if split in splits.split() else labels
        image = changed if isinstance(changed, Image.Image) else Image.fromarray(changed)
        image.save(path.with_suffix(".png"))

    return write


def only(numbers: tuple[int, ...], change: Write, splits: str = "train") -> Write:
    """Change some images of some splits."""

    def write(path: Path, labels: np.ndarray, split: str, number: int) -> None:
        chosen = split in splits.split() and number in numbers
        (change if chosen else png(lambda x: x))(path, labels, split, number)

    return write


def colored(*colors: tuple[int, int, int]) -> Callable[[np.ndarray], np.ndarray]:
    """Labels as colours."""
    return lambda labels: np.array(colors, np.uint8)[labels]


def paletted(labels: np.ndarray, number: int) -> Image.Image:
    """Indices whose palette is another in every second file, as a program leaves it that sorts."""
    swapped = number % 2 == 1
    image = Image.fromarray(1 - labels if swapped else labels)
    image.putpalette([*(GREEN if swapped else RED), *(RED if swapped else GREEN)])
    return image


def _store_paletted(path: Path, labels: np.ndarray, split: str, number: int) -> None:
    paletted(labels, number).save(path.with_suffix(".png"))


def _one_blue(path: Path, labels: np.ndarray, split: str, number: int) -> None:
    is_other = split == "train" and number == 3
    png(colored(RED, BLUE if is_other else GREEN))(path, labels, split, number)


def _with_alpha(labels: np.ndarray, alpha: np.ndarray) -> Image.Image:
    return Image.merge("LA", [Image.fromarray(labels), Image.fromarray(alpha)])


def _nothing(path: Path, labels: np.ndarray, split: str, number: int) -> None:
    """No map at all."""


def _damaged(path: Path, labels: np.ndarray, split: str, number: int) -> None:
    noise = np.random.default_rng(0).integers(0, 2, labels.shape, dtype=np.uint8)
    Image.fromarray(noise).save(path.with_suffix(".png"))
    data = path.with_suffix(".png").read_bytes()
    path.with_suffix(".png").write_bytes(data[: len(data) // 2])


def _with_third(labels: np.ndarray) -> np.ndarray:
    """Labels with a third class beside the two."""
    return np.where(np.arange(WIDTH) > 50, 2, labels).astype(np.uint8)


def _blurred(labels: np.ndarray) -> np.ndarray:
    return cv2.GaussianBlur(labels * 200, (9, 9), 3)


THREE = ("ground", "object", "tree")
LABELS = [
    Case("as documented", png(lambda x: x), "trains", r"all 4 maps looked at, 2 of 2 classes"),
    Case(
        "0 and 255",
        png(lambda x: x * 255),
        "refused",
        r"training: all 4 maps hold the values 0 \(.*%\), 255 \(.*%\): the only class is 0 "
        r"\(ground\).*palette=\[0, 255\]",
        source="open-mmlab/mmsegmentation#1609",
    ),
    Case(
        "0 and 255 in validation",
        png(lambda x: x * 255, "val"),
        "refused",
        r"^validation: all 2 maps hold .*the others have no score; 255 is ignored: palette",
    ),
    Case(
        "0 and 255, palette of greys",
        png(lambda x: x * 255),
        "trains",
        "2 of 2 classes",
        dataset={"palette": [0, 255]},
    ),
    Case(
        "0, 1 and 255 of three classes",
        png(lambda x: np.where(x * np.arange(WIDTH) > 25, 255, x).astype(np.uint8)),
        "warned",
        r"hold no pixel of 2 \(tree\); .*% of the pixels are 255, which is ignored",
        classes=THREE,
    ),
    Case(
        "one map of one class",
        only((1,), png(np.zeros_like)),
        "trains",
        "2 of 2 classes",
        source="lightly-ai/lightly-train#221",
    ),
    Case(
        "0 unlabelled, 1 background",
        png(lambda x: np.where(np.arange(WIDTH) > 50, 0, x + 1).astype(np.uint8)),
        "trains",
        r"2 of 2 classes, 20\.3% of the pixels ignored",
        dataset={"reduce_zero_label": True},
        source="lightly-ai/lightly-train#403",
    ),
    Case(
        "uint16 beyond 255",
        png(lambda x: x.astype(np.uint16) * 256),
        "refused",
        r"train/0\.png holds labels from 0 to 256; .*\(4 of 4 maps",
    ),
    Case(
        "uint16, 65535 for none",
        only((2,), png(lambda x: np.where(x, 65535, 0).astype(np.uint16))),
        "refused",
        r"train/2\.png holds labels from 0 to 65535; .*store what belongs to none as 255",
    ),
    Case(
        "all ignored",
        png(lambda x: np.full_like(x, 255)),
        "refused",
        "every pixel is ignored, first",
    ),
    Case(
        "all ignored in one map",
        only((1,), png(lambda x: np.full_like(x, 255))),
        "warned",
        r"in 1 of 4 maps every pixel is ignored, first .*train/1\.png",
    ),
    Case(
        "one class alone",
        png(lambda x: x // 255),
        "refused",
        "nothing to tell it from",
        source="HasnainRaz/FC-DenseNet-TensorFlow#16",
    ),
    Case(
        "classes from 1",
        png(lambda x: x + 1),
        "refused",
        r"no class is 2: the model has 2.*begin at 1: set reduce_zero_label=True",
    ),
    Case(
        "classes from 1 in validation",
        png(lambda x: x + 1, "val"),
        "refused",
        r"^validation: .*no class is 2",
    ),
    Case(
        "zero removed that is a class",
        png(lambda x: x),
        "refused",
        "reduce_zero_label=True ignores the stored 0: set it to False",
        dataset={"reduce_zero_label": True},
        source="open-mmlab/mmsegmentation#2146, #2425",
    ),
    Case(
        "zero removed that is a class, three",
        png(_with_third),
        "warned",
        r"no pixel of 2 \(tree\); reduce_zero_label=True ignores the stored 0",
        classes=THREE,
        dataset={"reduce_zero_label": True},
        source="open-mmlab/mmsegmentation#2146, #2425",
    ),
    Case(
        "a class in validation alone",
        png(lambda x: x * 2, "val"),
        "warned",
        r"validation holds 2 \(tree\), first .*val/0\.png, and all 4 maps of training hold none",
        classes=THREE,
    ),
    Case(
        "greys 0 and 128",
        png(lambda x: x * 128),
        "refused",
        r"no class is 128.*palette=\[0, 128\]",
        source="open-mmlab/mmsegmentation#1335",
    ),
    Case("blurred by resizing", png(_blurred), "refused", "values are no labels: were the maps"),
    Case(
        "colours",
        png(colored(RED, GREEN)),
        "refused",
        r"train/0\.png holds colours: \[200, 30, 30\] \(.*%\), \[30, 200, 30\].*palette=\[\[R, G,",
        source="open-mmlab/mmsegmentation#2556",
    ),
    Case(
        "colours, list",
        png(colored(RED, GREEN)),
        "trains",
        "2 of 2 classes",
        dataset={"palette": [RED, GREEN]},
    ),
    Case(
        "colours, from_file",
        png(colored(RED, GREEN)),
        "trains",
        "2 of 2 classes",
        classes=("ground 200 30 30", "object 30 200 30"),
        dataset={"palette": "from_file"},
        source="NVIDIA/DIGITS#1476, #1605",
    ),
    Case(
        "colours, class_dict.csv",
        png(colored(RED, GREEN)),
        "trains",
        "2 of 2 classes",
        classes=("name,r,g,b", "ground,200,30,30", "object,30,200,30"),
        dataset={"palette": "from_file"},
    ),
    Case(
        "colours, labelmap.txt of CVAT",
        png(colored(RED, GREEN)),
        "trains",
        "2 of 2 classes",
        classes=("# label:color_rgb:parts:actions", "ground:200,30,30::", "object:30,200,30::"),
        dataset={"palette": "from_file"},
    ),
    Case(
        "a colour that the palette lacks",
        _one_blue,
        "refused",
        r"train/3\.png holds colours that the palette does not name: \[30, 30, 200\]",
        dataset={"palette": [RED, GREEN]},
        source="ooooverflow/BiSeNet#4",
    ),
    Case(
        "a colour of no class",
        png(lambda x: colored(RED, GREEN, BLUE)(_with_third(x))),
        "trains",
        r"2 of 2 classes, [1-9][\d.]*% of the pixels ignored",
        dataset={"palette": [RED, GREEN], "ignored_colors": [BLUE]},
    ),
    Case(
        "colours of too few classes",
        png(colored(RED, GREEN)),
        "refused",
        r"palette has 1 colours, .*classes\.txt 2 classes",
        dataset={"palette": [RED]},
    ),
    Case(
        "classes in the red channel",
        png(colored((0, 0, 0), (1, 0, 0))),
        "refused",
        r"holds colours: \[0, 0, 0\] \(.*\), \[1, 0, 0\]",
        source="Lightning-Universe/lightning-flash#1400",
    ),
    Case(
        "classes in the red channel, list",
        png(colored((0, 0, 0), (1, 0, 0))),
        "trains",
        "2 of 2 classes",
        dataset={"palette": [[0, 0, 0], [1, 0, 0]]},
    ),
    Case(
        "three equal channels",
        png(lambda x: np.repeat(x[..., None], 3, 2)),
        "trains",
        "2 of 2 classes",
        source="ultralytics/ultralytics#21049, #22043",
    ),
    Case(
        "grey with opaque alpha",
        png(lambda x: _with_alpha(x, np.full_like(x, 255))),
        "trains",
        "2 of 2 classes",
    ),
    Case(
        "the mask in the alpha channel",
        png(lambda x: _with_alpha(np.zeros_like(x), x * 255)),
        "refused",
        r"train/0\.png has an alpha channel from 0 to 255",
        source="NVIDIA/DIGITS#1676",
    ),
    Case(
        "palettes in other orders",
        _store_paletted,
        "refused",
        r"the colour \[.*30\] is label \d in .*train/\d\.png and \d in .*train/\d\.png: each",
        source="NVIDIA/DIGITS#1676",
    ),
    Case(
        "palettes in other orders, list",
        _store_paletted,
        "trains",
        "2 of 2 classes",
        dataset={"palette": [RED, GREEN]},
    ),
    Case(
        "maps of another size",
        only((1,), png(lambda x: x[::2, ::2])),
        "refused",
        r"train/1\.png has 24 x 32 pixels, its image .*train/1\.jpg has 48 x 64",
    ),
    Case(
        "maps of another size in validation",
        only((1,), png(lambda x: x[::2, ::2]), "val"),
        "refused",
        r"val/1\.png has 24 x 32 pixels, its image .*val/1\.jpg has 48 x 64",
    ),
    Case(
        "images without a map",
        only((0, 2), _nothing),
        "warned",
        "2 of 4 images in .*images/train have no label map and are left out, e.g. 0",
    ),
    Case(
        "a damaged map",
        only((2,), _damaged),
        "warned",
        r"training: 1 of 4 maps cannot be read, first .*train/2\.png: .*; other samples take",
    ),
    Case(
        "a damaged map in validation",
        only((1,), _damaged, "val"),
        "refused",
        r"validation: 1 of 2 maps cannot be read, first .*val/1\.png: ",
    ),
]


def stored(change: Callable[[np.ndarray], np.ndarray], splits: str = "train val") -> Write:
    """Store a changed depth map, in the named splits, by its dtype; millimetres elsewhere."""

    def write(path: Path, depth: np.ndarray, split: str, number: int) -> None:
        changed = change(depth) if split in splits.split() else (depth * 1000).astype(np.uint16)
        if changed.dtype.kind == "f":
            tifffile.imwrite(path.with_suffix(".tif"), changed)
        else:
            Image.fromarray(changed).save(path.with_suffix(".png"))

    return write


def _millimetres(factor: float = 1.0) -> Callable[[np.ndarray], np.ndarray]:
    return lambda depth: (depth * factor * 1000).clip(0, 65535).astype(np.uint16)


def _first_empty(path: Path, depth: np.ndarray, split: str, number: int) -> None:
    stored(np.zeros_like if split == "train" and number == 0 else lambda x: x)(
        path, (depth * 1000).astype(np.uint16), split, number
    )


def _unmeasured(depth: np.ndarray) -> np.ndarray:
    values = (depth * 1000).astype(np.uint16)
    values[:, 40:] = 65535
    return values


DEPTHS = [
    Case(
        "as documented",
        stored(_millimetres()),
        "trains",
        r"depths of training: all 4 maps looked at, .* median .* with depth_scale=1000; 90\.\d% of",
    ),
    Case(
        "65535 for nothing",
        stored(_unmeasured),
        "trains",
        r"53\.\d% of the pixels measured, 37\.5% are 65535 in 16 bits, taken for nothing measured",
    ),
    Case(
        "65535 everywhere",
        stored(lambda x: np.full(x.shape, 65535, np.uint16)),
        "refused",
        r"hold no measured pixel, 100\.0% are 65535",
    ),
    Case(
        "all zero",
        stored(lambda x: np.zeros(x.shape, np.uint16)),
        "refused",
        r"training: all 4 maps hold no measured pixel, first .*train/depth/0\.png",
    ),
    Case(
        "all zero in validation",
        stored(lambda x: np.zeros(x.shape, np.uint16), "val"),
        "refused",
        "validation: all 2 maps hold no measured pixel",
    ),
    Case(
        "one map all zero",
        _first_empty,
        "warned",
        r"1 of 4 maps hold no measured pixel, first .*train/depth/0\.png: they teach nothing",
    ),
    Case(
        "metres read as millimetres",
        stored(lambda x: x),
        "refused",
        r"training: depths are 0\.0010\d* to 0\.007\d*.*depth_scale=1 \(median",
        source="cleinc/bts#68",
    ),
    Case(
        "metres in validation",
        stored(lambda x: x, "val"),
        "refused",
        r"validation: depths are 0\.0010.*depth_scale=1 \(median",
    ),
    Case(
        "millimetres read as metres",
        stored(_millimetres()),
        "refused",
        r"100\.0% are outside; the unit seems another: set depth_scale=1000 \(median",
        dataset={"depth_scale": 1.0},
    ),
    Case(
        "tenths of a millimetre",
        stored(lambda x: (x * 10000).clip(0, 65535).astype(np.uint16)),
        "refused",
        r"are outside; set model\.decode_head\.max_depth .*the unit is another, depth_scale=10000",
        source="vsitzmann/deepvoxels#5",
    ),
    Case(
        "beyond the head",
        stored(_millimetres(5)),
        "refused",
        r"the head can give 0\.001 to 10: .*% are outside; set model\.decode_head\.max_depth to",
    ),
    Case(
        "a fifth beyond the head",
        stored(_millimetres(1.7)),
        "warned",
        r"the head can give 0\.001 to 10: .*% are deeper, which it cannot reach",
        source="cleinc/bts#15",
    ),
    Case(
        "beyond the metric",
        stored(_millimetres(5), "val"),
        "refused",
        r"validation: .*the metric counts 0\.001 to 10: .*outside; .*val_evaluator\.max_depth",
    ),
    Case(
        "head and metric apart",
        stored(_millimetres(4)),
        "refused",
        r"validation: .*the metric counts 0\.001 to 10",
        options=("model.decode_head.max_depth=80",),
    ),
    Case(
        "8 bits, 255 for nothing",
        stored(lambda x: np.where(x > 5, 255, x * 30).astype(np.uint8)),
        "warned",
        r"% of the pixels are 255 in 8 bits; if that means nothing measured, set nodata=255",
        dataset={"depth_scale": 30.0},
        source="OpenDriveLab/LightwheelOcc#1",
    ),
    Case(
        "NaN and infinity",
        stored(lambda x: np.where(x > 6, np.nan, np.where(x == 0, np.inf, x)) * np.float32(1000)),
        "trains",
        r"7\d\.\d% of the pixels measured$",
    ),
    Case(
        "a picture of depth",
        stored(lambda x: np.repeat((x * 30).astype(np.uint8)[..., None], 3, 2)),
        "refused",
        r"train/depth/0\.png has the shape \(48, 64, 3\); a depth map has one channel",
    ),
    Case(
        "maps of another size",
        stored(lambda x: (x[::2, ::2] * 1000).astype(np.uint16)),
        "refused",
        r"train/depth/0\.png has 24 x 32 pixels, its image .*train/images/0\.jpg has 48 x 64",
    ),
]
CASES = {"segmentation": LABELS, "depth": DEPTHS}


def write_folder(job: str, case: Case, root: Path) -> Path:
    """Images and the maps of a case, as the folder configs expect them."""
    rng = np.random.default_rng(0)
    for split, count in NUM_IMAGES.items():
        if job == "segmentation":
            images, maps = root / "images" / split, root / "labels" / split
        else:
            images, maps = root / split / "images", root / split / "depth"
        for folder in (images, maps):
            folder.mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(images / f"{number}.jpg")
            truth = true_labels(number) if job == "segmentation" else true_depth(number)
            case.write(maps / str(number), truth, split, number)
    (root / "classes.txt").write_text("\n".join(case.classes) + "\n", encoding="utf-8")
    return root


@functools.cache
def _shrunk(job: str) -> Config:
    return shrink(Config.fromfile(CONFIGS / job / "linear_vits16_folder.py"), job)


def config_of(job: str, case: Case) -> Config:
    """The shipped config of folders, small, with what the case sets."""
    cfg = copy.deepcopy(_shrunk(job))
    for split in ("train", "val", "test"):
        loader = cfg[f"{split}_dataloader"]
        loader.update(num_workers=0, persistent_workers=False)
        # Serialising collects garbage for a second.
        loader.dataset.update({**case.dataset, "serialize_data": False})
        for step in loader.dataset.pipeline:
            if "Resize" in step["type"]:
                step["scale"] = (100000, CROP)
            if step["type"] == "RandomCrop":
                step["crop_size"] = (CROP, CROP)
    if job == "segmentation":
        header = ("name,", "#")
        names = [line for line in case.classes if not line.startswith(header)]
        cfg.model.decode_head.num_classes = len(names)
    cfg.model.test_cfg.pop("flip", None)
    cfg.train_cfg.update(max_iters=2, val_interval=2)
    cfg.param_scheduler = []
    cfg.default_hooks.checkpoint = dict(type="CheckpointHook", interval=-1, save_last=False)
    return cfg


class Lines(logging.Handler):
    """Notes and warnings of a run."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []
        self.warnings: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        kept = self.warnings if record.levelno >= logging.WARNING else self.notes
        kept.append(record.getMessage())


@contextlib.contextmanager
def logged():
    """All that is logged, by whatever logger is the current one."""
    lines, handle = Lines(), logging.Logger.handle

    def kept(self: logging.Logger, record: logging.LogRecord) -> None:
        lines.emit(record)
        handle(self, record)

    logging.Logger.handle = kept
    try:
        yield lines
    finally:
        logging.Logger.handle = handle


def outcome(case: Case, message: str, lines: Lines) -> tuple[str, str]:
    """What became of a case, and the line that says so."""
    if message:
        return "refused", message
    about = [line for line in lines.warnings if re.search(case.message, line)]
    if about:
        return "warned", about[0]
    notes = [line for line in lines.notes if line.startswith(("labels of tr", "depths of tr"))]
    others = [line for line in lines.warnings if line.startswith(("training", "validation"))]
    return ("warned", others[0]) if others else ("trains", " ".join(notes))


def is_right(case: Case, what: str, message: str) -> bool:
    """Whether a case ended as stated."""
    return what == case.outcome and re.search(case.message, message, re.MULTILINE) is not None


def train(job: str, case: Case, folder: Path) -> tuple[str, str]:
    """Train a case with the tool; what became of it."""
    from tools.train import main

    root = write_folder(job, case, folder / "data")
    config_of(job, case).dump(folder / "case.py")
    words = [str(folder / "case.py"), "--data", str(root), "--work-dir", str(folder / "run")]
    if case.options:
        words += ["--cfg-options", *case.options]
    message = ""
    silent = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
    with logged() as lines, silent[0], silent[1]:
        try:
            main(words)
        except (ConfigError, ValueError, OSError) as error:
            message = str(error)
    DefaultScope._instance_dict.clear()
    for logger in logging.Logger.manager.loggerDict.values():
        for handler in list(getattr(logger, "handlers", ())):
            logger.removeHandler(handler)
    what, line = outcome(case, message, lines)
    return what, line.replace(f"{root}/", "")


def run_all(names: list[str]) -> int:
    """Train all cases, or those named; the number of wrong ones."""
    wrong, begun = 0, time.time()
    for job, cases in CASES.items():
        for case in cases:
            if names and case.name not in names:
                continue
            folder = Path(tempfile.mkdtemp())
            try:
                what, message = train(job, case, folder)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            right = is_right(case, what, message)
            wrong += not right
            source = f"  [{case.source}]" if case.source else ""
            print(f"{'' if right else '!'}{job}: {case.name}{source} -> {what}\n    {message}")
            sys.stdout.flush()
    print(f"{wrong} cases with another outcome; {time.time() - begun:.0f} s")
    return wrong


if __name__ == "__main__":
    raise SystemExit(min(run_all(sys.argv[1:]), 1))
