"""Predictions on arrays, files, folders and videos, with the quickstart's configs of each job."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from dinov3_mm.checkpoints import export_backbone
from dinov3_mm.engine import ConfigError, read_config
from tests.checkpoints.toys import quickstart_backbone
from tests.hosts.lane import require_hosts

require_hosts()

from dinov3_mm.apis.prediction import (  # noqa: E402
    classify,
    detect,
    estimate_depth,
    load_model,
    segment,
)

CONFIGS = Path(__file__).parents[2] / "configs/quickstart"
SIZE = (48, 80)
JOBS = {
    "classification": classify,
    "segmentation": segment,
    "detection": detect,
    "depth": estimate_depth,
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "toy.safetensors"
    return export_backbone(quickstart_backbone(), path)


@pytest.fixture(scope="module")
def models(weights):
    torch.manual_seed(0)
    return {job: load_model(CONFIGS / f"{job}.py", weights=weights, device="cpu") for job in JOBS}


@pytest.fixture
def images(tmp_path):
    generator = np.random.default_rng(0)
    folder = tmp_path / "images"
    (folder / "below").mkdir(parents=True)
    pixels = generator.integers(0, 256, (2, *SIZE, 3), dtype=np.uint8)
    for image, name in zip(pixels, ("a.png", "below/b.png")):
        cv2.imwrite(str(folder / name), image[..., ::-1])
    return folder, list(pixels)


def check(job, result):
    height, width = SIZE
    if job == "classification":
        assert result.scores.shape == (12,) and np.isclose(result.scores.sum(), 1, atol=1e-4)
        assert result.best == result.classes[int(result.scores.argmax())]
    elif job == "segmentation":
        assert result.labels.shape == SIZE and set(np.unique(result.labels)) <= set(range(13))
    elif job == "detection":
        assert (np.diff(result.scores) <= 0).all() and result.boxes.shape[1] == 4
        assert (result.boxes[:, [0, 2]] <= width).all() and (result.boxes[:, 1::2] <= height).all()
    else:
        assert result.depth.shape == SIZE and (result.depth > 0).all()


def values(result) -> np.ndarray:
    for name in ("scores", "labels", "depth"):
        if hasattr(result, name):
            return getattr(result, name)


@pytest.mark.parametrize("job", JOBS)
def test_arrays_files_and_folders_agree(models, images, tmp_path, job):
    folder, pixels = images
    options = {"threshold": 0.0} if job == "detection" else {}
    from_folder = list(JOBS[job](models[job], folder, out_dir=tmp_path / "out", **options))
    from_arrays = list(JOBS[job](models[job], pixels, **options))
    assert [result.name for result in from_folder] == ["a.png", "below/b.png"]
    for one, other in zip(from_folder, from_arrays, strict=True):
        check(job, one)
        assert np.array_equal(values(one), values(other))
    for name in ("a.png", "below/b.png"):
        assert cv2.imread(str(tmp_path / "out" / name)).shape[0] >= SIZE[0]


def test_video(models, images, tmp_path):
    clip = tmp_path / "clip.mp4"
    writer = cv2.VideoWriter(str(clip), cv2.VideoWriter_fourcc(*"mp4v"), 5, SIZE[::-1])
    for image in images[1] * 2:
        writer.write(image)
    writer.release()
    results = list(segment(models["segmentation"], clip, out_dir=tmp_path / "out"))
    assert [result.name for result in results] == [f"clip.mp4/{i:06d}" for i in range(4)]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["clip.mp4"]
    capture = cv2.VideoCapture(str(tmp_path / "out/clip.mp4"))
    assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == 4 and capture.get(cv2.CAP_PROP_FPS) == 5


def test_captions_of_changing_width_make_a_video(models, images, tmp_path):
    clip = tmp_path / "clip.mp4"
    writer = cv2.VideoWriter(str(clip), cv2.VideoWriter_fourcc(*"mp4v"), 5, SIZE[::-1])
    for image in images[1] * 2:
        writer.write(image)
    writer.release()
    list(classify(models["classification"], clip, out_dir=tmp_path / "out"))
    capture = cv2.VideoCapture(str(tmp_path / "out/clip.mp4"))
    assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == 4


def test_a_video_that_is_left_half_done_leaves_nothing(models, images, tmp_path):
    clip = tmp_path / "clip.mp4"
    writer = cv2.VideoWriter(str(clip), cv2.VideoWriter_fourcc(*"mp4v"), 5, SIZE[::-1])
    for image in images[1]:
        writer.write(image)
    writer.release()
    with pytest.raises(FileNotFoundError):
        list(segment(models["segmentation"], [clip, "nothing.png"], out_dir=tmp_path / "out"))
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ("nothing.png", FileNotFoundError, "there is no image, folder or video nothing.png"),
        (np.zeros((8, 8, 3), np.float32), ValueError, "expected a uint8 array"),
        (np.zeros((8, 8, 4), np.uint8), ValueError, "expected a uint8 array"),
        (3, TypeError, "got a int"),
        ([None], TypeError, "got a NoneType"),
    ],
)
def test_unusable_inputs(models, inputs, error, message):
    with pytest.raises(error, match=message):
        list(classify(models["classification"], inputs))


def test_unreadable_file(models, tmp_path):
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(ValueError, match=r"a\.png: .*cannot identify image file"):
        list(classify(models["classification"], tmp_path / "a.png"))


def test_model_of_another_job(models):
    with pytest.raises(ValueError, match="one of classification, not of segmentation"):
        segment(models["classification"], [])


def test_weights_that_are_not_there():
    with pytest.raises(ConfigError, match=r"nowhere\.pth does not exist"):
        load_model(CONFIGS / "classification.py", weights="nowhere.pth")


def test_overlays():
    from dinov3_mm.visualization.overlays import colour_depth, draw_boxes, draw_segments

    image = np.full((20, 30, 3), 100, np.uint8)
    labels = np.zeros((20, 30), np.int64)
    labels[:, 15:], labels[0] = 1, 255
    drawn = draw_segments(image, labels, [(0, 0, 0), (200, 0, 50)], opacity=0.5)
    assert drawn[5, 3].tolist() == [50, 50, 50] and drawn[5, 20].tolist() == [150, 50, 75]
    assert (drawn[0] == 100).all()
    nothing = draw_boxes(image, np.zeros((0, 4)), np.zeros(0, int), [])
    assert (nothing == image).all()
    boxed = draw_boxes(image, np.array([[5, 8, 25, 18]]), np.array([0]), ["a"], [(255, 0, 0)])
    assert boxed[18, 10].tolist() == [255, 0, 0]
    depth = np.array([[1.0, 2.0, np.nan, 0.0]])
    near, far, *unknown = colour_depth(depth, 1, 2)[0].astype(int).sum(-1)
    assert near > 600 and far < 20 and unknown == [0, 0]


@pytest.mark.parametrize("job", JOBS)
def test_bf16_is_near_fp32_and_said(job, models, weights, images):
    """Autocast as on a GPU, on the CPU; what comes out has the dtypes of fp32."""
    torch.manual_seed(0)
    half = load_model(CONFIGS / f"{job}.py", weights=weights, device="cpu", dtype="bf16")
    assert (half.dtype, half.choice) == ("bf16", "bf16 (as asked)")
    assert (models[job].dtype, models[job].choice) == ("fp32", "fp32 (auto: cpu)")
    half.module.load_state_dict(models[job].module.state_dict())
    _, pixels = images
    for exact, rounded in zip(JOBS[job](models[job], pixels), JOBS[job](half, pixels), strict=True):
        check(job, rounded)
        if job == "classification":
            assert rounded.scores.dtype == np.float32
            np.testing.assert_allclose(rounded.scores, exact.scores, atol=0.02)
        elif job == "depth":
            assert rounded.depth.dtype == np.float32
            np.testing.assert_allclose(rounded.depth, exact.depth, rtol=0.02)


def test_the_config_decides_unless_asked_and_fp16_is_refused(weights):
    cfg = read_config(str(CONFIGS / "classification.py"))
    cfg.compute_dtype = "bf16"
    assert load_model(cfg, weights=weights, device="cpu").dtype == "bf16"
    assert load_model(cfg, weights=weights, device="cpu", dtype="fp32").dtype == "fp32"
    with pytest.raises(ValueError, match=r"fp16.*refused"):
        load_model(cfg, weights=weights, device="cpu", dtype="fp16")


def test_names_are_those_of_the_outputs_or_none(weights, monkeypatch):
    said = []
    monkeypatch.setattr(
        "dinov3_mm.apis.prediction.model.print_log", lambda line, **_: said.append(line)
    )
    cfg = read_config(CONFIGS / "classification.py")
    cfg.model.head.num_classes = 5  # and the data set names twelve
    model = load_model(cfg, weights=weights, device="cpu")
    assert model.classes == () and "has 5 outputs, and its data set names 12" in said[0]
    (result,) = classify(model, np.zeros((16, 16, 3), np.uint8))
    assert result.best == str(int(result.scores.argmax()))
