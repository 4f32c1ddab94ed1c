"""``tools/extract_features.py``: a killed run, sources, and what users type wrong."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dinov3_mm.apis import load_features
from dinov3_mm.checkpoints import export_backbone
from dinov3_mm.commands.extract import build_source, image_size, main
from tests.apis.toys import STATISTICS, write_pictures
from tests.checkpoints.toys import toy_backbone

ROOT = Path(__file__).parents[2]
# Runs the script that is its first argument.
DIES_WITH_ITS_SECOND_SHARD = """
import os, runpy, signal, sys

replace, shards = os.replace, []

def count(source, target):
    replace(source, target)
    shards.extend([target] * str(target).endswith(".safetensors"))
    if len(shards) == 2:
        os.kill(os.getpid(), signal.SIGKILL)

os.replace = count
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "toy.safetensors"
    return str(export_backbone(toy_backbone(), path, {"statistics": STATISTICS}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    write_pictures(folder, 12)
    (folder / "broken.jpg").write_bytes(b"no picture")
    return folder


def command(images, weights, out, *options):
    images = [images] if isinstance(images, (str, Path)) else images
    options = ("--image-size", "32", "--num-workers", "0", *options)
    return [*map(str, images), "--weights", weights, "--out", str(out), *options]


def test_a_folder_a_list_and_files_give_the_same(folder, weights, tmp_path, capsys):
    paths = sorted(folder.glob("[0-9]*.png"))
    (tmp_path / "list.txt").write_text("\n".join(map(str, paths)))
    (tmp_path / "list.csv").write_text("path\n" + "\n".join(map(str, paths)))
    stored = []
    images = (folder, tmp_path / "list.txt", tmp_path / "list.csv", paths)
    for number, source in enumerate(images):
        main(command(source, weights, tmp_path / str(number), "--what", "cls", "pooled"))
        stored.append(load_features(tmp_path / str(number)))
    printed = capsys.readouterr().out
    assert f"left out: {folder / 'broken.jpg'}: " in printed
    assert "12 images in" in printed and "1 left out" in printed and "images/s" in printed
    for features in stored:
        assert features.paths == [str(path) for path in paths]
        for field in ("cls", "pooled"):
            np.testing.assert_array_equal(features[field], stored[0][field])
        assert features.index["statistics"]["mean"] == list(STATISTICS["mean"])
        assert features.index["model"]["arch"]["embed_dims"] == 32


def test_options_reach_the_extractor(folder, weights, tmp_path):
    options = ("--what", "cls", "--layers", "0", "--store-dtype", "fp16", "--dtype", "bf16")
    options += ("--resize", "short_side_crop", "--interpolation", "bicubic", "--no-norm")
    options += ("--mean", "0.1", "0.2", "0.3", "--std", "1", "1", "1", "--image-size", "32x40")
    main(command(folder, weights, tmp_path / "out", *options))
    stored = load_features(tmp_path / "out")
    assert list(stored) == ["cls", "layers.0.cls"] and stored["cls"].dtype == np.float16
    settings = stored.index["settings"]
    assert settings["image_size"] == [32, 40] and settings["layers"] == [0]
    assert settings["resize"] == "short_side_crop" and settings["interpolation"] == "bicubic"
    assert settings["dtype"] == "bf16" and settings["norm"] is False
    assert settings["mean"] == [0.1, 0.2, 0.3]
    main(command(folder, weights, tmp_path / "t", "--image-size", "native", "--tile", "16"))
    assert load_features(tmp_path / "t").index["settings"]["tile"] == [16, 0]


def test_the_dtype_is_said_and_another_one_does_not_go_on(folder, weights, tmp_path, capsys):
    out = tmp_path / "out"
    main(command(folder, weights, out))
    assert "computing in fp32 (auto: cpu)" in capsys.readouterr().out
    assert load_features(out).index["settings"]["dtype"] == "fp32"
    with pytest.raises(ValueError, match=r"dtype fp32 there, bf16 asked for.*; --dtype fp32 "):
        main(command(folder, weights, out, "--dtype", "bf16"))
    # Not the fingerprint: it is of the weights, whatever they are rounded to.
    with pytest.raises(ValueError) as caught:
        main(command(folder, weights, out, "--dtype", "bf16"))
    assert "fingerprint" not in str(caught.value)
    main(command(folder, weights, out, "--dtype", "fp32"))


def test_sixteen_bit_bands(tmp_path):
    import tifffile

    rng = np.random.default_rng(0)
    (tmp_path / "tiles").mkdir()
    for index in range(2):
        bands = rng.integers(0, 65536, (40, 40, 5), dtype=np.uint16)
        tifffile.imwrite(tmp_path / f"tiles/{index}.tif", bands, photometric="minisblack")
    export_backbone(toy_backbone(), tmp_path / "toy.safetensors", {"statistics": STATISTICS})
    options = ("--color", "unchanged", "--channels", "3", "2", "1")
    main(command(tmp_path / "tiles", str(tmp_path / "toy.safetensors"), tmp_path / "out", *options))
    stored = load_features(tmp_path / "out")
    assert stored["cls"].shape == (2, 32) and stored.left_out == []
    assert stored.index["settings"]["source"]["channels"] == [3, 2, 1]


@pytest.mark.slow
def test_a_killed_run_goes_on(folder, weights, tmp_path):
    many = tmp_path / "many"
    write_pictures(many, 90)
    options = ("--shard-size", "3", "--batch-size", "3")
    main(command(many, weights, tmp_path / "whole", *options))
    arguments = command(many, weights, tmp_path / "out", *options)
    script = [sys.executable, "-c", DIES_WITH_ITS_SECOND_SHARD, ROOT / "tools/extract_features.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.run([*script, *arguments], env=environment, stdout=subprocess.DEVNULL)
    assert killed.returncode == -signal.SIGKILL
    shards = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.safetensors")}
    assert len(shards) == 2 and not (tmp_path / "out/index.json").exists()
    main(arguments)
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in shards.items())
    stored, whole = load_features(tmp_path / "out"), load_features(tmp_path / "whole")
    assert stored.paths == whole.paths
    np.testing.assert_allclose(np.asarray(stored["cls"]), np.asarray(whole["cls"]), atol=1e-5)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"images": "nowhere"}, FileNotFoundError, "nowhere does not exist; expected a folder"),
        ({"images": "EMPTY"}, ValueError, "no image below"),
        ({"weights": "dinov3_vits61"}, ValueError, "did you mean 'dinov3_vits16'"),
        ({"weights": "nowhere.pth"}, FileNotFoundError, r"nowhere\.pth"),
        ({"out": "x.csv"}, ValueError, r"unknown output format '\.csv'"),
        ({"out": "x.npy", "options": ["--what", "cls", "pooled"]}, ValueError, "one array"),
        ({"options": ["--layers", "7"]}, ValueError, r"layers is \[7\]; expected .* from 0 to 1"),
        ({"options": ["--what", "layers"]}, ValueError, "at least 4, the backbone has 2"),
        ({"options": ["--image-size", "30"]}, ValueError, "patch size 8; use 24 or 32"),
        ({"options": ["--color", "grau"]}, ValueError, "color must be one of"),
        ({"options": ["--resize", "pad"]}, ValueError, "goes with squash or short_side_crop"),
        ({"options": ["--mean", "0.5"]}, ValueError, "pass both"),
        ({"options": ["--launcher", "slurm"]}, ValueError, "SLURM_PROCID"),
    ],
)
def test_wrong_commands(folder, weights, tmp_path, changes, error, message):
    (tmp_path / "empty").mkdir()
    images = changes.get("images", folder)
    images = tmp_path / "empty" if images == "EMPTY" else images
    out = tmp_path / changes.get("out", "out")
    arguments = command(images, changes.get("weights", weights), out)
    with pytest.raises(error, match=message):
        main([*arguments, *changes.get("options", [])])
    assert sorted(tmp_path.iterdir()) == [tmp_path / "empty"]


def test_wrong_words(capsys):
    for options in (["--what", "patch"], ["--image-size", "big"], ["--dtype", "fp16"]):
        with pytest.raises(SystemExit):
            main(["x", "--weights", "w", "--out", "o", *options])
    printed = capsys.readouterr().err
    assert "expected 224, 480x640 or native, got 'big'" in printed
    assert "dtype is 'fp16', which is refused: activations" in printed
    assert image_size("native") == "native" and image_size("224") == 224
    assert image_size("480x640") == (480, 640)


def test_a_folder_is_given_alone(folder):
    picture = str(next(folder.glob("*.png")))
    with pytest.raises(ValueError, match="is a folder or a list; give it alone"):
        build_source([str(folder), picture], {})
    assert len(build_source([picture, picture], {})) == 2
