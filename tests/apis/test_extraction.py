"""Extraction to disk: order, failures, interruption, other options, ranks."""

import contextlib
import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from dinov3_mm.apis import extract_to_files, load_features
from dinov3_mm.datasets import ImageFolder
from tests.apis.toys import toy_extractor, toy_pictures, write_pictures
from tests.checkpoints.toys import toy_backbone


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eleven pictures and two files that are none."""
    folder = tmp_path_factory.mktemp("pictures")
    write_pictures(folder, 11)
    (folder / "03x.png").write_bytes(b"no picture")
    (folder / "zz.jpg").write_bytes(b"\xff\xd8\xff no picture either")
    return folder


def extract(folder, out, extractor=None, **options):
    options = {"shard_size": 4, "num_workers": 0, **options}
    return extract_to_files(extractor or toy_extractor(), ImageFolder(str(folder)), out, **options)


def names(left_out):
    return [Path(entry["path"]).name for entry in left_out]


def expected_features(folder, **options):
    paths = sorted(path for path in folder.iterdir() if path.stem.isdigit())
    return [str(path) for path in paths], toy_extractor(**options)(paths)


@pytest.mark.parametrize("name", ["folder", "one.safetensors"])
def test_rows_are_the_features_in_image_order(folder, tmp_path, name):
    paths, features = expected_features(folder, layers=[0])
    what = ("pooled", "patches", "cls", "registers")
    result = extract(folder, tmp_path / name, toy_extractor(layers=[0]), what=what)
    stored = load_features(tmp_path / name)
    assert stored.paths == paths and stored.index == result.index
    assert list(stored.index["fields"]) == [
        *("cls", "registers", "patches", "pooled"),
        *("layers.0.cls", "layers.0.registers", "layers.0.patches", "layers.0.pooled"),
    ]
    for prefix, tokens in (("", features), ("layers.0.", features.layers[0])):
        for field in what:
            actual = torch.from_numpy(np.array(stored[prefix + field]))
            torch.testing.assert_close(actual, getattr(tokens, field), atol=1e-5, rtol=0)
    assert stored.index["fields"]["patches"] == {"shape": [16, 32], "grid": [4, 4]}
    assert names(stored.left_out) == ["03x.png", "zz.jpg"]
    assert all(entry["reason"] for entry in stored.left_out)
    assert not list(tmp_path.glob("*.parts"))
    with pytest.raises(KeyError, match=r"no field 'pathces'; there are .*patches"):
        stored["pathces"]


def test_one_array_as_npy_in_half_precision(folder, tmp_path):
    _, features = expected_features(folder)
    extract(folder, tmp_path / "x.npy", what=["patches"], store_dtype="fp16")
    stored = load_features(tmp_path / "x.npy")
    assert isinstance(stored["patches"], np.memmap) and stored["patches"].dtype == np.float16
    np.testing.assert_allclose(stored["patches"], features.patches, atol=5e-3)


@pytest.mark.parametrize("name", ["folder", "one.safetensors", "one.parquet"])
def test_native_sizes(tmp_path, name):
    if name.endswith("parquet") and importlib.util.find_spec("pyarrow") is None:
        pytest.skip("pyarrow is not installed")
    write_pictures(tmp_path / "images/a", 3, height=40, width=56)
    write_pictures(tmp_path / "images/b", 4, height=64, width=24, seed=1)
    write_pictures(tmp_path / "images/c", 1, height=40, width=56, seed=2)
    (tmp_path / "images/b/00x.png").write_bytes(b"no picture")
    extractor = toy_extractor(image_size="native")
    extract(tmp_path / "images", tmp_path / name, extractor, what=["cls", "patches"])
    stored = load_features(tmp_path / name)
    assert len(stored.paths) == 8 and len(stored.left_out) == 1
    expected = extractor(stored.paths)
    np.testing.assert_allclose(np.asarray(stored["cls"]), expected.cls, atol=1e-5)
    assert stored["patches"].grids.tolist() == [list(grid) for grid in expected.grids]
    for index, patches in enumerate(expected.patches):
        np.testing.assert_allclose(stored["patches"][index], patches, atol=1e-5)


def test_an_interrupted_run_goes_on_and_repeats_no_shard(folder, tmp_path):
    extract(folder, tmp_path / "whole")

    def interrupt(done, left_out):
        interrupt.images += done + left_out
        if interrupt.images > 7:
            raise KeyboardInterrupt

    interrupt.images = 0
    with pytest.raises(KeyboardInterrupt):
        extract(folder, tmp_path / "out", toy_extractor(batch_size=2), on_progress=interrupt)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [path.name for path in shards] == ["features-00000-of-00004.safetensors"]
    with pytest.raises(FileNotFoundError, match=r"index\.json is missing; an interrupted run goes"):
        load_features(tmp_path / "out")
    written = shards[0].stat().st_mtime_ns
    started = []
    # Another shard size is of no account: that of the first run goes on.
    result = extract(
        folder, tmp_path / "out", shard_size=3, on_start=lambda *counts: started.append(counts)
    )
    assert result.resumed == 1 and started == [(9, 4)]
    assert shards[0].stat().st_mtime_ns == written
    stored, whole = load_features(tmp_path / "out"), load_features(tmp_path / "whole")
    assert stored.paths == whole.paths and names(stored.left_out) == names(whole.left_out)
    np.testing.assert_allclose(np.asarray(stored["cls"]), np.asarray(whole["cls"]), atol=1e-5)


@pytest.mark.parametrize("name", ["folder", "one.safetensors"])
def test_a_finished_run_is_not_repeated(folder, tmp_path, name):
    extract(folder, tmp_path / name)
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    started = []
    result = extract(folder, tmp_path / name, on_start=lambda *counts: started.append(counts))
    assert started == [(0, 13)] and result.index["num_images"] == 11
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["folder", "one.safetensors"])
@pytest.mark.parametrize("finished", [True, False])
def test_other_options_weights_or_images_are_refused(folder, tmp_path, name, finished):
    def stop(done, left_out):
        if not finished:
            raise KeyboardInterrupt

    try:
        extract(folder, tmp_path / name, on_progress=stop)
    except KeyboardInterrupt:
        assert not finished
    for extractor, options, message in (
        (toy_extractor(image_size=64), {}, r"image_size \[32, 32\] there, \[64, 64\] asked for"),
        (toy_extractor(toy_backbone(1)), {}, "fingerprint .* there"),
        (toy_extractor(mean=(0, 0, 0)), {}, "mean .* asked for"),
        (toy_extractor(), {"what": ["pooled"]}, "fields"),
        (toy_extractor(), {"store_dtype": "fp16"}, "store_dtype fp32 there"),
        (toy_extractor(), {"source_options": {"color": "gray"}}, "source.color None there"),
    ):
        with pytest.raises(ValueError, match=message):
            extract(folder, tmp_path / name, extractor, **options)
    write_pictures(tmp_path / "others", 3)
    with pytest.raises(ValueError, match=r"holds features of another run: source\.num_images"):
        extract(tmp_path / "others", tmp_path / name)
    assert extract(folder, tmp_path / name).index["num_images"] == 11


@pytest.mark.parametrize("name", ["out", "one.safetensors", "one.npy"])
@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("native", [True, False])
def test_images_that_changed_are_computed_anew(tmp_path, name, finished, native, monkeypatch):
    if native and name == "one.npy":
        pytest.skip("holds no images of several sizes")
    images = tmp_path / "images"
    write_pictures(images, 8)
    options = {"what": ["patches"]} if native else {}
    extractor = toy_extractor(image_size="native") if native else toy_extractor()

    def stop(done, left_out):
        if not finished and list(tmp_path.rglob("features-*.safetensors")):
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        extract(images, tmp_path / name, extractor, shard_size=3, on_progress=stop, **options)
    first, second, *_, last = sorted(images.iterdir())
    second.write_bytes(last.read_bytes())
    first.rename(images / "zz.png")
    result = extract(images, tmp_path / name, extractor, shard_size=3, **options)
    if finished:
        assert [note.split(":")[0] for note in result.notes] == [
            "1 images changed since",
            "1 images are new",
            "1 images are gone",
        ]
    stored = load_features(tmp_path / name)
    expected = load_features(
        extract(images, tmp_path / "fresh", extractor, **options).index_file.parent
    )
    assert stored.paths == expected.paths and len(stored.paths) == 8
    (field,) = stored
    for row in range(8):
        np.testing.assert_allclose(stored[field][row], expected[field][row], atol=1e-5)
    # What had not changed was not computed again.
    passes = []
    run = type(extractor).run

    def counted(self, groups, select):
        groups = list(groups)
        passes.extend(index for key, _ in groups if key is not None for index in key[1])
        return run(self, groups, select)

    monkeypatch.setattr(type(extractor), "run", counted)
    last.write_bytes(second.read_bytes() + b" ")
    extract(images, tmp_path / name, extractor, shard_size=3, **options)
    assert [Path(stored.paths[index]) for index in passes] == [last]
    assert not list(tmp_path.glob("*.earlier")) and not list(tmp_path.glob("*.parts"))


def test_a_file_with_its_old_size_and_time_is_noticed_on_request(tmp_path):
    images = tmp_path / "images"
    write_pictures(images, 3)
    first = min(images.iterdir())
    old = first.read_bytes()
    stat = first.stat()
    extract(images, tmp_path / "out", content=True)
    first.write_bytes(old[:-1] + bytes([old[-1] ^ 1]))
    os.utime(first, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert extract(images, tmp_path / "out").notes == []
    (note,) = extract(images, tmp_path / "out", content=True).notes
    assert note.startswith("1 images changed since")


def test_what_an_earlier_version_wrote_says_so(folder, tmp_path):
    index = extract(folder, tmp_path / "out").index_file
    older = {k: v for k, v in json.loads(index.read_text()).items() if k != "files"}
    index.write_text(json.dumps(older))
    (note,) = extract(folder, tmp_path / "out").notes
    assert "earlier version" in note


def test_most_images_gone_is_another_data_set(tmp_path):
    write_pictures(tmp_path / "images", 5)
    extract(tmp_path / "images", tmp_path / "out")
    for path in sorted((tmp_path / "images").iterdir())[:3]:
        path.unlink()
    with pytest.raises(ValueError, match=r"another run: source\.num_images 5 there, 2 asked"):
        extract(tmp_path / "images", tmp_path / "out")


def test_a_foreign_file_is_not_overwritten(folder, tmp_path):
    (tmp_path / "x.npy").write_bytes(b"precious")
    with pytest.raises(FileExistsError, match=r"x\.npy exists and was not written by this"):
        extract(folder, tmp_path / "x.npy")
    assert (tmp_path / "x.npy").read_bytes() == b"precious"


def test_images_of_which_none_can_be_used(tmp_path):
    (tmp_path / "images").mkdir()
    for index in range(3):
        (tmp_path / "images" / f"{index}.jpg").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"none of 3 images could be used, e\.g\. .*0\.jpg"):
        extract(tmp_path / "images", tmp_path / "out")
    source = ImageFolder(str(write_pictures(tmp_path / "grey", 1)[0].parent), color="gray")
    with pytest.raises(ValueError, match=r"1 channel\(s\), the backbone takes 3"):
        extract_to_files(toy_extractor(), source, tmp_path / "out2", num_workers=0)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"what": ["patch"]}, ValueError, "did you mean 'patches'"),
        ({"what": []}, ValueError, "cannot extract"),
        ({"store_dtype": "bf16"}, ValueError, "unknown store_dtype 'bf16'"),
        ({"shard_size": 0}, ValueError, "shard_size is 0"),
    ],
)
def test_wrong_options_leave_nothing_behind(folder, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        extract(folder, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_workers_and_float_sources_of_many_channels(tmp_path):
    class Bands:
        def __len__(self):
            return 5

        def path(self, index):
            return f"bands-{index}"

        def load_image(self, index):
            rng = np.random.default_rng(index)
            return rng.uniform(0, 255, (40, 40, 5)).astype(np.float32)

    statistics = {"mean": [0.5] * 5, "std": [0.2] * 5}
    extractor = toy_extractor(toy_backbone(in_channels=5), **statistics)
    extract_to_files(extractor, Bands(), tmp_path / "out", num_workers=2)
    stored = load_features(tmp_path / "out")
    expected = extractor([Bands().load_image(index) for index in range(5)])
    np.testing.assert_allclose(np.asarray(stored["cls"]), expected.cls, atol=1e-5)
    assert stored.paths == [f"bands-{index}" for index in range(5)]


def _rank(rank, folder, out, world_size):
    torch.set_num_threads(1)
    store = f"file://{out}.store"
    torch.distributed.init_process_group("gloo", store, rank=rank, world_size=world_size)
    shares = []
    extract(folder, out, shard_size=2, on_start=lambda mine, there: shares.append(mine))
    try:
        extract(folder, out, toy_extractor(image_size=64))
    except ValueError as error:  # found out by rank 0, raised on all
        shares.append(str(error)[-60:])
    (out.parent / f"rank{rank}.json").write_text(json.dumps(shares))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["folder", "one.safetensors"])
def test_ranks_share_the_shards(folder, tmp_path, name):
    arguments = (folder, tmp_path / name, 3)
    mp.start_processes(_rank, args=arguments, nprocs=3, start_method="fork")
    shares = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(3)]
    assert [share[0] for share in shares] == [5, 4, 4]  # 7 shards of 2, 2, 2, 2, 2, 2 and 1
    assert all(share[1] == shares[0][1] for share in shares)
    extract(folder, tmp_path / "alone")
    stored, alone = load_features(tmp_path / name), load_features(tmp_path / "alone")
    assert stored.paths == alone.paths and names(stored.left_out) == names(alone.left_out)
    np.testing.assert_allclose(np.asarray(stored["cls"]), np.asarray(alone["cls"]), atol=1e-5)


def test_the_random_state_is_left_alone(folder, tmp_path):
    extractor = toy_extractor()
    state = torch.get_rng_state()
    extract(folder, tmp_path / "out", extractor, num_workers=1)
    extractor(toy_pictures(2))
    assert torch.equal(torch.get_rng_state(), state)
