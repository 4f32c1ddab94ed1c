"""``teacher_latest`` follows the newest export, be it a file or a folder."""

from dinov3_mm.checkpoints import build_backbone, export_backbone
from dinov3_mm.engine.run_files import (
    export_path,
    latest_export_path,
    list_exports,
    point_latest_to,
    remove,
    remove_partial_files,
)
from tests.checkpoints.toys import assert_same_tensors, tensors_of, toy_backbone


def export(work_dir, iteration, *, seed, **options):
    backbone = toy_backbone(seed)
    path = export_backbone(backbone, export_path(work_dir, iteration), **options)
    point_latest_to(path)
    latest = latest_export_path(work_dir)
    assert_same_tensors(build_backbone(latest).state_dict(), tensors_of(backbone))
    description = path.with_suffix(".json").read_bytes()
    assert latest.with_name("teacher_latest.json").read_bytes() == description
    return path


def test_files_and_folders_take_turns(tmp_path):
    first = export(tmp_path, 1, seed=1)
    second = export(tmp_path, 2, seed=2, max_file_size=9000)
    third = export(tmp_path, 3, seed=3, max_file_size=9000)
    assert list(list_exports(tmp_path).items()) == [(1, first), (2, second), (3, third)]
    assert second.is_dir() and latest_export_path(tmp_path).name == "teacher_latest"
    remove(second)
    assert list(list_exports(tmp_path)) == [1, 3]
    fourth = export(tmp_path, 4, seed=4)
    assert fourth.is_file() and latest_export_path(tmp_path).suffix == ".safetensors"


def test_half_made_links_and_folders_are_removed(tmp_path):
    path = export(tmp_path, 1, seed=1, max_file_size=9000)
    (path.parent / ".teacher_latest.partial").symlink_to(path.name)
    (path.parent / ".iter_00000002_teacher.partial").mkdir()
    assert len(remove_partial_files(tmp_path)) == 2
    assert len(list(path.iterdir())) > 2
