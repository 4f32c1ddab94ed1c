"""Detection configs on own annotation files: found, compared and numbered by name."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config
from PIL import Image

from tests.hosts.lane import require_hosts

require_hosts()
from mmdet.evaluation import CocoMetric  # noqa: E402

from dinov3_mm.datasets.named_coco import NamedCocoDataset, NamedCocoMetric  # noqa: E402
from dinov3_mm.engine import ConfigError, read_config  # noqa: E402
from dinov3_mm.engine.config.coco import colours, settle_objects  # noqa: E402
from dinov3_mm.engine.config.host import set_data_root  # noqa: E402
from tests.downstream.steps import CONFIGS  # noqa: E402

FRUIT = {7: "apple", 300: "pear", 12: "plum"}
# Object and box of each of four images.
TRUTH = [
    ("apple", [4, 4, 20, 20]),
    ("pear", [10, 8, 30, 16]),
    ("plum", [2, 2, 9, 9]),
    ("apple", [9, 9, 8, 8]),
]


def write_split(folder: Path, annotations: str, images: str, categories: dict) -> Path:
    (folder / images).mkdir(parents=True, exist_ok=True)
    number = {name: id_ for id_, name in categories.items()}
    content = {"images": [], "annotations": [], "categories": []}
    for index, (name, box) in enumerate(TRUTH, 1):
        file_name = f"{index}.png"
        Image.fromarray(np.full((48, 64, 3), 40 * index, np.uint8)).save(
            folder / images / file_name
        )
        content["images"].append({"id": index, "file_name": file_name, "width": 64, "height": 48})
        if name in number:
            entry = {"id": index, "image_id": index, "category_id": number[name], "bbox": box}
            content["annotations"].append({**entry, "area": box[2] * box[3], "iscrowd": 0})
    content["categories"] = [{"id": id_, "name": name} for id_, name in categories.items()]
    path = folder / annotations
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def write_folder(folder: Path, train: dict = FRUIT, val: dict | None = None) -> Path:
    write_split(folder, "train.json", "train", train)
    write_split(folder, "val.json", "val", train if val is None else val)
    return folder


def detector(name: str = "faster-rcnn_vits16_coco") -> Config:
    return read_config(CONFIGS / f"detection/{name}.py")


def settled(folder: Path, cfg: Config | None = None, **kwargs) -> tuple[Config, list[str]]:
    cfg = cfg or detector()
    set_data_root(cfg, str(folder))
    return cfg, settle_objects(cfg, splits=("train", "val"), **kwargs)


def test_a_folder_is_all_that_is_needed(tmp_path):
    cfg, lines = settled(write_folder(tmp_path))
    assert cfg.model.roi_head.bbox_head.num_classes == 3
    for split in ("train", "val", "test"):
        dataset = cfg[f"{split}_dataloader"].dataset
        assert dataset.metainfo.classes == ("apple", "plum", "pear")
        assert Path(dataset.ann_file).is_file()
    assert cfg.val_evaluator.ann_file == cfg.val_dataloader.dataset.ann_file
    assert any("apple, plum, pear" in line for line in lines)


@pytest.mark.parametrize(
    ("train", "val"),
    [
        (("train/_annotations.coco.json", "train"), ("valid/_annotations.coco.json", "valid")),
        (
            ("annotations/instances_train2017.json", "train2017"),
            ("annotations/instances_val2017.json", "val2017"),
        ),
        (
            ("annotations/instances_train.json", "images"),
            ("annotations/instances_val.json", "images"),
        ),
        (("fruit-train.json", "images/train"), ("fruit-val.json", "images/val")),
    ],
)
def test_layouts_of_labelling_tools(tmp_path, train, val):
    write_split(tmp_path, *train, FRUIT)
    write_split(tmp_path, *val, FRUIT)
    (tmp_path / "annotations").mkdir(exist_ok=True)
    (tmp_path / "annotations/captions_train.json").write_text("{}") if "annotations" in train[
        0
    ] else None
    cfg, _ = settled(tmp_path)
    data = NamedCocoDataset(
        ann_file=str(_path(cfg.val_dataloader.dataset)),
        data_prefix=dict(
            img=str(
                Path(cfg.val_dataloader.dataset.data_root or "")
                / cfg.val_dataloader.dataset.data_prefix.img
            )
        ),
        metainfo=cfg.val_dataloader.dataset.metainfo,
        test_mode=True,
        pipeline=[],
    )
    assert [Path(info["img_path"]).is_file() for info in data.load_data_list()] == [True] * 4


def _path(dataset) -> Path:
    return Path(dataset.get("data_root") or "") / dataset.ann_file


def test_no_or_several_annotation_files(tmp_path):
    write_split(tmp_path, "train.json", "train", FRUIT)
    with pytest.raises(ConfigError, match=r"no annotation file for val.*train\.json"):
        set_data_root(detector(), str(tmp_path))
    for name in ("a_val.json", "b_val.json"):
        write_split(tmp_path, name, "val", FRUIT)
    with pytest.raises(ConfigError, match=r"several annotation files for val.*a_val\.json"):
        set_data_root(detector(), str(tmp_path))


def test_absent_images_are_named(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "val/4.png").unlink()
    with pytest.raises(ConfigError, match=r"1 of the 4 images.*4\.png"):
        settled(tmp_path)


def with_classes(*names: str) -> Config:
    cfg = detector()
    cfg.train_dataloader.dataset.metainfo = dict(classes=names)
    return cfg


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("aple", "pear", "plum"), "'aple' and 'apple'"),
        (("Apple", "pear", "plum"), "'Apple' and 'apple'"),
        (("dog", "cat"), "no category 'dog', 'cat'"),
    ],
)
def test_names_that_do_not_fit_are_refused(tmp_path, names, message):
    with pytest.raises(ConfigError, match=message):
        settled(write_folder(tmp_path), with_classes(*names))


def test_a_single_name_as_text(tmp_path):
    cfg = detector()
    cfg.train_dataloader.dataset.metainfo = dict(classes="apple")
    with pytest.raises(ConfigError, match="the text 'apple'"):
        settled(write_folder(tmp_path), cfg)


def test_a_misspelt_validation_category_is_refused(tmp_path):
    folder = write_folder(tmp_path, val={1: "appel", 2: "pear", 3: "plum"})
    with pytest.raises(ConfigError, match=r"'apple' and 'appel'"):
        settled(folder)


def test_classes_of_a_trained_detector_come_first(tmp_path):
    cfg = detector()
    set_data_root(cfg, str(write_folder(tmp_path)))
    settle_objects(cfg, splits=("test",), known=("pear", "apple", "plum"))
    assert cfg.test_dataloader.dataset.metainfo.classes == ("pear", "apple", "plum")
    assert cfg.model.roi_head.bbox_head.num_classes == 3


def test_the_released_head_gives_way_to_own_classes(tmp_path):
    cfg, lines = settled(write_folder(tmp_path), detector("plain-detr_vit7b16_coco"))
    head = cfg.model.bbox_head
    assert (head.num_classes, head.category_ids, head.init_cfg) == (3, None, None)
    assert any("starts anew" in line for line in lines)


def test_stock_types_are_replaced(tmp_path):
    cfg = detector()
    cfg.train_dataloader.dataset.type = "CocoDataset"
    cfg.val_evaluator.type = "CocoMetric"
    cfg.custom_imports.imports = ["dinov3_mm"]
    cfg, _ = settled(write_folder(tmp_path), cfg)
    assert cfg.train_dataloader.dataset.type == "NamedCocoDataset"
    assert cfg.val_evaluator.type == "NamedCocoMetric"
    assert "dinov3_mm.datasets.named_coco" in cfg.custom_imports.imports


ORDERS = [
    {1: "apple", 2: "pear", 3: "plum"},
    {1: "plum", 2: "apple", 3: "pear"},
    {7: "apple", 300: "pear", 12: "plum"},
    {9: "pear", 4: "plum", 5: "apple"},
]
CLASSES = ("apple", "pear", "plum")


@pytest.mark.parametrize("categories", ORDERS)
def test_labels_follow_names(tmp_path, categories):
    path = write_split(tmp_path, "train.json", "train", categories)
    data = NamedCocoDataset(
        ann_file=str(path),
        data_prefix=dict(img="train"),
        metainfo=dict(classes=CLASSES),
        pipeline=[],
        test_mode=True,
    )
    labels = [data.get_data_info(i)["instances"][0]["bbox_label"] for i in range(4)]
    assert [CLASSES[label] for label in labels] == [name for name, _ in TRUTH]


def perfect_score(metric, classes=CLASSES) -> dict[str, float]:
    metric.dataset_meta = dict(classes=classes)
    for index, (name, (x, y, w, h)) in enumerate(TRUTH, 1):
        found = {
            "bboxes": np.array([[x, y, x + w, y + h]], float),
            "scores": np.array([0.9]),
            "labels": np.array([classes.index(name)]),
        }
        found = {key: _Tensor(value) for key, value in found.items()}
        metric.process({}, [{"img_id": index, "ori_shape": (48, 64), "pred_instances": found}])
    return metric.evaluate(len(TRUTH))


class _Tensor:
    def __init__(self, value):
        self.value = value

    def cpu(self):
        return self

    def numpy(self):
        return self.value


@pytest.mark.parametrize("categories", ORDERS)
def test_a_perfect_detector_scores_one_whatever_the_order_and_the_ids(tmp_path, categories):
    path = str(write_split(tmp_path, "val.json", "val", categories))
    scores = perfect_score(NamedCocoMetric(ann_file=path, metric="bbox", classwise=True))
    assert scores["coco/bbox_mAP"] == 1.0
    assert [scores[f"coco/{name}_precision"] for name in CLASSES] == [1.0] * 3


def test_the_stock_metric_fails_this(tmp_path):
    path = str(write_split(tmp_path, "val.json", "val", ORDERS[1]))
    assert perfect_score(CocoMetric(ann_file=path, metric="bbox"))["coco/bbox_mAP"] < 0.5


def test_class_wise_scores_have_the_right_names(tmp_path):
    """The detector misses every plum; ids do not ascend in the file."""
    path = str(write_split(tmp_path, "val.json", "val", ORDERS[2]))
    metric = NamedCocoMetric(ann_file=path, metric="bbox", classwise=True)
    scores = _score_without(metric, "plum")
    assert scores == {"apple": 1.0, "pear": 1.0, "plum": 0.0}


def _score_without(metric, missed: str) -> dict[str, float]:
    truth = copy.copy(TRUTH)
    try:
        TRUTH[:] = [("pear", box) if name == missed else (name, box) for name, box in truth]
        # A plum that is called a pear has a box of its own: the pears' precision must not suffer.
        TRUTH[2] = ("plum", [40, 30, 5, 5])
        scores = perfect_score(metric)
    finally:
        TRUTH[:] = truth
    return {name: scores[f"coco/{name}_precision"] for name in CLASSES}


def test_a_class_without_a_category_has_no_score(tmp_path):
    path = str(write_split(tmp_path, "val.json", "val", {1: "apple", 3: "plum"}))
    scores = perfect_score(NamedCocoMetric(ann_file=path, metric="bbox", classwise=True))
    assert scores["coco/bbox_mAP"] == 1.0
    assert np.isnan(scores["coco/pear_precision"])


def test_a_box_without_area_does_not_cost_a_class_its_score(tmp_path):
    path = write_split(tmp_path, "val.json", "val", ORDERS[0])
    content = json.loads(path.read_text())
    for index in range(1, 5):
        bad = {"id": 100 + index, "image_id": index, "category_id": 2, "bbox": [5, 5, 0, 0]}
        content["annotations"].append({**bad, "area": 0, "iscrowd": 0})
    path.write_text(json.dumps(content))
    scores = perfect_score(NamedCocoMetric(ann_file=str(path), metric="bbox", classwise=True))
    assert scores["coco/pear_precision"] == 1.0


def test_submissions_carry_the_ids_of_the_file(tmp_path):
    path = str(write_split(tmp_path, "val.json", "val", FRUIT))
    prefix = str(tmp_path / "out/results")
    (tmp_path / "out").mkdir()
    metric = NamedCocoMetric(ann_file=path, metric="bbox", format_only=True, outfile_prefix=prefix)
    perfect_score(metric)
    found = json.loads(Path(f"{prefix}.bbox.json").read_text())
    assert [each["category_id"] for each in found] == [7, 300, 12, 7]


def test_more_classes_than_coco_have_colours():
    many = colours(200)
    assert len(set(many)) > 150
    assert all(0 <= level <= 255 for colour in many for level in colour)
