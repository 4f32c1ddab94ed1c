"""Classifiers and segmentors under other class names; the cases are those of acceptance."""

from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope
from PIL import Image

from dinov3_mm.checkpoints import export_backbone
from dinov3_mm.commands.heads import load_config, parse_args
from dinov3_mm.datasets.class_names import ClassNameError
from dinov3_mm.engine import ConfigError, build_runner
from dinov3_mm.engine import downstream as testing
from dinov3_mm.engine.config.host import set_data_root, settle_loading
from dinov3_mm.engine.downstream import build_tester
from tests.acceptance import class_names
from tests.acceptance.image_kinds import encoded, exif
from tests.checkpoints.toys import quickstart_backbone, toy_backbone
from tests.hosts.lane import require_hosts

require_hosts()
import dinov3_mm.datasets.segmentation  # noqa: E402, F401

CONFIGS = Path(__file__).parents[2] / "configs/quickstart"
TRAINED = (
    "the other lacks the first",
    "training has an empty one more",
    "training's first is empty",
    "one renamed",
    "names are numbers",
)


@pytest.fixture(autouse=True, scope="module")
def plain_config_files():
    """Formatting what runners print of their config takes most of their time."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("yapf.yapflib.yapf_api.FormatCode", lambda text, **_: (text, True))
        yield


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return export_backbone(toy_backbone(), tmp_path_factory.mktemp("weights") / "toy.safetensors")


@pytest.fixture(scope="module")
def trained(weights, tmp_path_factory):
    """Config and checkpoint of a classifier of the four."""
    folder = tmp_path_factory.mktemp("trained")
    four = class_names.AS_THEY_ARE
    assert class_names.trained(folder, four, four, weights) == 100.0
    (checkpoint,) = (folder / "run").glob("epoch_*.pth")
    return class_names.classifier(folder, weights), checkpoint


@pytest.mark.parametrize("case", TRAINED)
def test_training(case, weights, tmp_path):
    train, other, expected = class_names.PAIRS[case]
    found = class_names.outcome(class_names.trained, tmp_path, train, other, weights)
    assert class_names.is_right(found, expected), found


@pytest.mark.parametrize(
    "case", [name for name, pair in class_names.PAIRS.items() if pair[0] is class_names.AS_THEY_ARE]
)
def test_testing(case, trained, tmp_path):
    _, other, expected = class_names.PAIRS[case]
    found = class_names.outcome(class_names.tested, tmp_path, *trained, other)
    assert class_names.is_right(found, expected), found


def test_other_folders_keep_the_outputs_of_the_checkpoint(trained, tmp_path):
    """``--data`` with a folder without training images: the checkpoint says how many classes."""
    cfg, checkpoint = trained
    cfg = cfg.copy()
    cfg.model.head.num_classes = cfg.model.data_preprocessor.num_classes = 1000
    cfg.dump(tmp_path / "config.py")
    class_names.paint(tmp_path / "data/val", class_names.WITHOUT_FIRST)
    arguments = [str(tmp_path / "config.py"), str(checkpoint), "--data", str(tmp_path / "data")]
    cfg = load_config(parse_args([*arguments, "--work-dir", str(tmp_path / "test")]))
    assert testing.test(build_tester(cfg, str(checkpoint)))["accuracy/top1"] == 100.0


def test_a_run_goes_on_with_the_classes_of_its_checkpoint(trained, tmp_path):
    """A folder that was renamed between two starts would shift all labels."""
    cfg, checkpoint = trained
    for part in ("train", "val"):
        class_names.paint(tmp_path / part, {"eel": "ant", **class_names.WITHOUT_FIRST})
    cfg = cfg.copy()
    set_data_root(cfg, str(tmp_path))
    cfg.update(resume=True, load_from=str(checkpoint), work_dir=str(tmp_path / "run"))
    cfg.train_cfg.update(max_epochs=13, val_interval=13)
    with pytest.raises(ClassNameError, match=r"only there \['ant'\], only in .*train\) \['eel'\]"):
        class_names.run_training(cfg)


def test_a_list_of_files_is_no_folder_of_classes(weights, tmp_path):
    class_names.paint(tmp_path / "train", class_names.AS_THEY_ARE)
    cfg = class_names.classifier(tmp_path, weights, num_classes=7)
    cfg.train_dataloader.dataset.update(type="CustomDataset", ann_file="train.txt")
    set_data_root(cfg, str(tmp_path))
    assert cfg.model.head.num_classes == 7


def test_stock_data_sets_are_matched_too(weights, tmp_path):
    """mmpretrain's own folders, and a list of numbers that names no classes."""
    class_names.paint(tmp_path / "train", class_names.AS_THEY_ARE)
    class_names.paint(tmp_path / "val", class_names.WITHOUT_FIRST, seed=1)
    cfg = class_names.classifier(tmp_path, weights)
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.dataset.type = "CustomDataset"
    cfg.custom_hooks = [hook for hook in cfg.custom_hooks if hook.type != "ClassCheckHook"]
    assert class_names.run_training(cfg.copy()) == 100.0
    (tmp_path / "val.txt").write_text("bee/0.png 0\ncat/0.png 1\n")
    cfg.val_dataloader.dataset.ann_file = "val.txt"
    with pytest.raises(ValueError, match=r"val\.txt\) has numbers only: they cannot be matched"):
        class_names.run_training(cfg)


# ---------------------------------------------------------------------------------------------
# Segmentation


def write_maps(folder: Path, classes: tuple[str, ...], split: str = "val") -> None:
    """Images in stripes of the colours of a class, and their label maps."""
    rng = np.random.default_rng(0)
    (folder / "classes.txt").parent.mkdir(parents=True, exist_ok=True)
    (folder / "classes.txt").write_text("\n".join(classes))
    for number in range(4):
        stripes = np.array([classes.index(name) for name in rng.permutation(sorted(classes))])
        labels = stripes[np.arange(48) * len(stripes) // 48][:, None].repeat(48, 1)
        colours = np.array([class_names.COLOURS[name] for name in classes])
        for kind, pixels in (("images", colours[labels]), ("labels", labels)):
            path = folder / kind / split / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(path)


def segmentor(folder: Path, backbone: Path) -> Config:
    cfg = Config.fromfile(CONFIGS / "segmentation.py")
    cfg.model.backbone.init_cfg.checkpoint = str(backbone)
    cfg.model.decode_head.num_classes = 4
    cfg.model.data_preprocessor.size = (48, 48)
    load = [dict(type="LoadMissingImage"), dict(type="LoadLabelMap"), dict(type="PackSegInputs")]
    for split, part in (("train", "train"), ("val", "val"), ("test", "val")):
        cfg[f"{split}_dataloader"].batch_size = 4
        cfg[f"{split}_dataloader"].dataset = dict(
            type="SegmentationFolder", data_root=str(folder), split=part, pipeline=load
        )
    cfg.train_cfg.update(max_iters=20, val_interval=20)
    cfg.optim_wrapper.optimizer.lr = 0.03
    cfg.default_hooks.checkpoint.interval = 20
    cfg.work_dir = str(folder / "run")
    return cfg


def test_segmentors_are_validated_and_tested_by_name(tmp_path):
    backbone = export_backbone(quickstart_backbone(), tmp_path / "toy.safetensors")
    write_maps(tmp_path / "four", class_names.FOUR, "train")
    write_maps(tmp_path / "another order", class_names.FOUR[::-1])
    cfg = segmentor(tmp_path / "four", backbone)
    cfg.val_dataloader.dataset.data_root = str(tmp_path / "another order")
    torch.manual_seed(0)
    runner = build_runner(cfg)
    runner.train()
    validated = runner.message_hub.get_scalar("val/mIoU").current()
    checkpoint = str(tmp_path / "four/run/iter_20.pth")
    scores = {}
    for case, classes in {
        "as trained": class_names.FOUR,
        "another order": class_names.FOUR[::-1],
        "one more, one less": ("elk", "dog", "bee", "cat"),
    }.items():
        write_maps(tmp_path / case, classes)
        other = segmentor(tmp_path / case, backbone)
        scores[case] = testing.test(build_tester(other, checkpoint))["mIoU"]
    assert scores["as trained"] > 90
    assert scores["another order"] == pytest.approx(scores["as trained"])
    assert validated == pytest.approx(scores["as trained"])
    assert scores["one more, one less"] > 60  # what is taken for the class that is not there counts
    (tmp_path / "as trained/classes.txt").write_text("ant\nbee\ncatt\ndog\n")
    with pytest.raises(ConfigError, match=r"has 'catt' \(nearest 'cat'\); the checkpoint has no"):
        build_tester(segmentor(tmp_path / "as trained", backbone), checkpoint)


# ---------------------------------------------------------------------------------------------
# Images and maps that are turned together


def pipeline_config(*steps: dict, scope: str = "mmseg") -> Config:
    loader = dict(dataset=dict(type="RepeatDataset", dataset=dict(pipeline=list(steps))))
    return Config(dict(default_scope=scope, val_dataloader=loader))


def test_foreign_map_loading_turns_with_our_images(tmp_path):
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4] = 255
    (tmp_path / "a.jpg").write_bytes(encoded(pixels, "JPEG", exif=exif(6)))
    Image.fromarray(pixels[..., 0] // 255).save(tmp_path / "a.png")
    cfg = pipeline_config(
        dict(type="LoadMissingImage", broken="replace"),
        dict(type="LoadAnnotations", reduce_zero_label=False, imdecode_backend="cv2"),
    )
    (line,) = settle_loading(cfg)
    assert "LoadAnnotations beside LoadMissingImage" in line and "without imdecode_backend" in line
    steps = cfg.val_dataloader.dataset.dataset.pipeline
    assert steps[1].to_dict() == dict(
        type="LoadLabelMap", broken="replace", reduce_zero_label=False
    )
    assert settle_loading(cfg) == []
    with DefaultScope.overwrite_default_scope("mmseg"):
        data = DATASETS.build(
            dict(
                type="BaseSegDataset",
                data_prefix=dict(img_path=str(tmp_path), seg_map_path=str(tmp_path)),
                metainfo=dict(classes=("dark", "bright")),
                pipeline=steps,
            )
        )
    sample = data[0]
    assert np.array_equal(sample["gt_seg_map"], sample["img"][..., 0] > 128)


def test_map_loading_of_ours_brings_its_image_loading():
    cfg = pipeline_config(
        dict(type="LoadImageFromFile", to_float32=True), dict(type="LoadDepthMap", broken="replace")
    )
    (line,) = settle_loading(cfg)
    assert "LoadMissingImage takes its place" in line
    assert cfg.val_dataloader.dataset.dataset.pipeline[0].to_dict() == dict(
        type="LoadMissingImage", broken="replace", to_float32=True
    )


@pytest.mark.parametrize(
    ("step", "scope"),
    [
        (dict(type="LoadDepthAnnotation"), "mmseg"),
        (dict(type="LoadAnnotations", with_bbox=True, with_seg=True), "mmdet"),
        (dict(type="LoadPanopticAnnotations"), "mmdet"),
    ],
)
def test_other_map_loading_is_refused(step, scope):
    with pytest.raises(ConfigError, match="beside LoadMissingImage: it does not turn the map"):
        settle_loading(pipeline_config(dict(type="LoadMissingImage"), step, scope=scope))


def test_pipelines_without_a_mixture_stay():
    for steps, scope in (
        ((dict(type="LoadImageFromFile"), dict(type="LoadAnnotations")), "mmseg"),
        ((dict(type="LoadMissingImage"), dict(type="LoadAnnotations", with_bbox=True)), "mmdet"),
    ):
        assert settle_loading(pipeline_config(*steps, scope=scope)) == []
