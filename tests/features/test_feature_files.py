"""Files of features: readable by the libraries they belong to, and by load_features."""

import importlib.util

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dinov3_mm.features.store import (
    RaggedRows,
    ShardBuffer,
    ShardedRows,
    check_format,
    create_tensors,
    map_tensors,
    merge_shards,
    read_metadata,
    write_shard,
)

rng = np.random.default_rng(0)
needs_pyarrow = pytest.mark.skipif(
    importlib.util.find_spec("pyarrow") is None, reason="pyarrow is not installed"
)


def arrays(rows):
    return {
        "cls": rng.normal(size=(rows, 5)).astype(np.float32),
        "patches": rng.normal(size=(rows, 4, 5)).astype(np.float16),
    }


def test_mapped_safetensors_are_those_of_the_library(tmp_path):
    tensors = {**arrays(3), "grid": np.arange(6, dtype=np.int32).reshape(3, 2)}
    save_file(tensors, tmp_path / "theirs.safetensors", {"note": "x"})
    mapped = map_tensors(tmp_path / "theirs.safetensors")
    assert read_metadata(tmp_path / "theirs.safetensors") == {"note": "x"}
    specs = {name: (array.shape, array.dtype) for name, array in tensors.items()}
    created = create_tensors(tmp_path / "ours.safetensors", specs, {"note": "y"})
    for name, array in tensors.items():
        assert isinstance(mapped[name], np.memmap) and not mapped[name].flags.writeable
        np.testing.assert_array_equal(mapped[name], array)
        created[name][:] = array
        created[name].flush()
    loaded = load_file(tmp_path / "ours.safetensors")
    for name, array in tensors.items():
        np.testing.assert_array_equal(loaded[name], array)
        assert loaded[name].dtype == array.dtype
    assert (tmp_path / "ours.safetensors").stat().st_size >= sum(a.nbytes for a in tensors.values())


def test_a_truncated_file_is_refused(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(ValueError, match="truncated"):
        map_tensors(tmp_path / "x.safetensors")


@pytest.mark.parametrize("lengths", [(3, 0, 4), (1,), (2, 2)])
def test_sharded_rows_are_the_concatenation(lengths):
    parts = [rng.normal(size=(n, 2, 3)).astype(np.float32) for n in lengths]
    rows, whole = ShardedRows(parts), np.concatenate(parts)
    assert rows.shape == whole.shape and len(rows) == len(whole) and rows.dtype == whole.dtype
    np.testing.assert_array_equal(np.asarray(rows), whole)
    for key in (slice(None), slice(1, None, 2), slice(0, 0), [0, -1], np.arange(len(whole)) > 1):
        np.testing.assert_array_equal(rows[key], whole[key])
    for index in (*range(len(whole)), -1):
        np.testing.assert_array_equal(rows[index], whole[index])
    with pytest.raises(IndexError):
        rows[len(whole)]


def test_ragged_rows():
    grids = np.array([[1, 2], [2, 2], [1, 1]])
    tokens = rng.normal(size=(7, 3))
    ragged = RaggedRows(tokens, grids)
    assert [len(ragged[i]) for i in range(3)] == [2, 4, 1] and len(ragged) == 3
    np.testing.assert_array_equal(ragged[1], tokens[2:6])
    np.testing.assert_array_equal(ragged[-1], tokens[6:])


def test_rows_come_in_image_order_whatever_the_order_of_the_batches():
    buffer = ShardBuffer(range(10, 16))
    values = arrays(6)
    for picked in ([14, 10], [15, 11, 12]):
        assert not buffer.is_complete
        buffer.add(picked, {name: a[np.array(picked) - 10] for name, a in values.items()})
    buffer.leave_out(13, "broken")
    assert buffer.is_complete and buffer.kept == [10, 11, 12, 14, 15]
    empty = {name: array[:0] for name, array in values.items()}
    for name, array in buffer.arrays(empty, ragged=()).items():
        np.testing.assert_array_equal(array, values[name][[0, 1, 2, 4, 5]])
    nothing = ShardBuffer([1])
    nothing.leave_out(1, "broken")
    assert nothing.is_complete and nothing.arrays(empty, ())["patches"].shape == (0, 4, 5)


def write_shards(folder, fields, *row_counts):
    shards, parts = [], []
    for number, rows in enumerate(row_counts):
        parts.append({name: array for name, array in arrays(rows).items() if name in fields})
        shards.append(folder / f"{number}.safetensors")
        paths = [f"{number}-{row}.jpg" for row in range(rows)]
        write_shard(shards[-1], parts[-1], {"paths": paths, "left_out": []})
    return shards, {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def test_merged_safetensors_and_npy(tmp_path):
    shards, whole = write_shards(tmp_path, ("cls", "patches"), 3, 0, 2)
    merge_shards(shards, tmp_path / "out", ".safetensors")
    merged = load_file(tmp_path / "out")
    assert sorted(merged) == ["cls", "patches"]
    for name, array in whole.items():
        np.testing.assert_array_equal(merged[name], array)
    shards, whole = write_shards(tmp_path, ("patches",), 3, 0, 2)
    merge_shards(shards, tmp_path / "out.npy", ".npy")
    loaded = np.load(tmp_path / "out.npy", mmap_mode="r")
    np.testing.assert_array_equal(loaded, whole["patches"])
    assert loaded.dtype == np.float16


@needs_pyarrow
def test_merged_parquet(tmp_path):
    import pyarrow.parquet

    shards, whole = write_shards(tmp_path, ("cls", "patches"), 3, 2)
    merge_shards(shards, tmp_path / "out.parquet", ".parquet")
    table = pyarrow.parquet.read_table(tmp_path / "out.parquet")
    assert table.column("path").to_pylist()[-1] == "1-1.jpg"
    assert pyarrow.parquet.ParquetFile(tmp_path / "out.parquet").num_row_groups == 2
    np.testing.assert_array_equal(np.array(table.column("cls").to_pylist()), whole["cls"])
    patches = np.array(table.column("patches").to_pylist(), np.float16)
    np.testing.assert_array_equal(patches.reshape(5, 4, 5), whole["patches"])


def test_formats_are_checked_early(monkeypatch):
    check_format(".npy", ["cls"], [])
    with pytest.raises(ValueError, match=r"unknown output format '\.csv'; expected .*\.parquet"):
        check_format(".csv", ["cls"], [])
    with pytest.raises(ValueError, match="one array, cls, patches were asked for"):
        check_format(".npy", ["cls", "patches"], [])
    with pytest.raises(ValueError, match="different sizes"):
        check_format(".npy", ["patches"], ["patches"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'dinov3_mm\[data\]'"):
        check_format(".parquet", ["cls"], [])
