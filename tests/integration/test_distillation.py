"""Distillation runs: several students as alone, resumed to the bit, and what users get wrong."""

import json
import shutil

import pytest
import torch

import dinov3_mm
from dinov3_mm.engine import ConfigError, build_runner
from dinov3_mm.engine.run_files import latest_export_path
from dinov3_mm.engine.training_state import read_training_state
from tests.acceptance.multi_distillation import student_tensors, student_trace
from tests.integration.distill_run import distill_config, multi_config, write_teacher
from tests.integration.toy_run import train
from tests.integration.traces import read_trace

ITERS = 4
# With noise and its own settings for one student.
NOISY = {"drop_path_rate": 0.2, "rope_jitter_coords": 1.1}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Images and the teacher's checkpoint."""
    return write_teacher(tmp_path_factory.mktemp("sources"))


def noisy(cfg):
    students = cfg.model.get("students") or {"": cfg.model}
    for student in students.values():
        student.backbone.update(NOISY)
    return cfg


@pytest.fixture(scope="module")
def multi(sources, tmp_path_factory):
    """Work folder of both students in one run."""
    folder = tmp_path_factory.mktemp("multi")
    train(noisy(multi_config(*sources, folder / "work", ITERS)), folder)
    return folder / "work"


@pytest.mark.parametrize("name", ["narrow", "deep"])
def test_a_student_is_trained_as_if_alone(sources, multi, tmp_path, name):
    train(noisy(distill_config(*sources, tmp_path / "alone", name, ITERS)), tmp_path)
    alone = read_trace(tmp_path / "alone")
    assert len(alone) == ITERS
    for step, record in student_trace(multi, name).items():
        assert record == alone[step]
    state = read_training_state(tmp_path / f"alone/checkpoints/iter_{ITERS:08d}.pth")
    tensors = student_tensors(multi, name, ITERS)
    assert tensors.keys() == state["state_dict"].keys()
    assert all(torch.equal(tensors[key], value) for key, value in state["state_dict"].items())


def test_each_student_has_an_export_and_a_checkpoint_of_its_own(sources, multi, tmp_path):
    widths = {}
    for name in ("narrow", "deep"):
        backbone = dinov3_mm.build_backbone(latest_export_path(multi, name))
        widths[name] = backbone.embed_dims
        tensors = student_tensors(multi, name, ITERS)
        for key, value in backbone.state_dict().items():
            assert torch.equal(value, tensors[f"teacher.backbone.{key}"]), key
    assert widths == {"narrow": 16, "deep": 24}
    cfg = noisy(distill_config(*sources, tmp_path / "work", "deep", ITERS + 1))
    stored = multi / f"checkpoints/iter_{ITERS:08d}/students/deep.pth"
    train(cfg, tmp_path, "--resume", str(stored))
    assert list(read_trace(tmp_path / "work")) == [ITERS + 1]


def test_an_interrupted_run_ends_like_an_uninterrupted_one(sources, multi, tmp_path):
    half = noisy(multi_config(*sources, tmp_path / "work", ITERS // 2))
    train(half, tmp_path)
    train(noisy(multi_config(*sources, tmp_path / "work", ITERS)), tmp_path, "--resume")
    for name in ("narrow", "deep"):
        assert student_trace(tmp_path / "work", name) == student_trace(multi, name)
        folder = f"checkpoints/iter_{ITERS:08d}/students/{name}.pth"
        states = [read_training_state(path / folder) for path in (multi, tmp_path / "work")]
        moments = [state["optimizer"]["state"] for state in states]
        assert moments[0].keys() == moments[1].keys()
        for index, entry in moments[0].items():
            assert all(torch.equal(entry[key], moments[1][index][key]) for key in entry)


def test_another_teacher_is_noticed_on_resume(sources, multi, tmp_path):
    images, teacher = sources
    shutil.copytree(multi, tmp_path / "work")
    state = read_training_state(teacher)
    state["state_dict"]["teacher.dino_head.mlp.0.weight"] *= 1.01
    torch.save(state, tmp_path / "other.pth")
    cfg = multi_config(images, tmp_path / "other.pth", tmp_path / "work", ITERS + 1)
    with pytest.raises(ValueError, match=r"other.pth is not the teacher.*of its dino_head"):
        train(noisy(cfg), tmp_path, "--resume")


def test_settings_of_one_student(sources, tmp_path):
    cfg = multi_config(*sources, tmp_path / "work", 1)
    cfg.optim_wrapper.paramwise_cfg.students = dict(
        deep=dict(layerwise_decay=0.5, optimizer=dict(betas=(0.5, 0.9)))
    )
    cfg.custom_hooks[0].students = dict(narrow=dict(lr=dict(base=1e-3)))
    train(cfg, tmp_path)
    trace = read_trace(tmp_path / "work")[1]
    assert trace["student/narrow/weight_decay"] == trace["student/deep/weight_decay"]
    folder = tmp_path / "work/checkpoints/iter_00000001/students"
    groups = {
        name: read_training_state(folder / f"{name}.pth")["optimizer"]["param_groups"]
        for name in ("narrow", "deep")
    }
    assert {tuple(group["betas"]) for group in groups["deep"]} == {(0.5, 0.9)}
    assert {tuple(group["betas"]) for group in groups["narrow"]} == {(0.9, 0.999)}
    assert min(group["lr_multiplier"] for group in groups["deep"]) == 0.5**4 * 0.2


def test_scores_of_each_student_have_their_own_file(sources, tmp_path):
    images, teacher = sources
    cfg = multi_config(images, teacher, tmp_path / "work", 1)
    source = dict(type="ImageFolder", root=str(images))
    cfg.custom_hooks.append(
        dict(
            type="PerStudentHook",
            hook=dict(type="RetrievalEvalHook", interval=1, source=source, image_size=32),
            students=dict(deep=dict(at_start=False)),
        )
    )
    train(cfg, tmp_path)
    steps = {}
    for name in ("narrow", "deep"):
        lines = (tmp_path / f"work/students/{name}/evaluations.jsonl").read_text().splitlines()
        steps[name] = [json.loads(line)["step"] for line in lines]
    assert steps == {"narrow": [0, 1], "deep": [1]}
    scores = read_trace(tmp_path / "work").values()
    assert any("student/deep/eval/retrieval_cls_top1" in record for record in scores)


def test_mistakes(sources, tmp_path):
    images, teacher = sources
    cfg = multi_config(images, teacher, tmp_path / "work", 1)
    cfg.custom_hooks[0].students = dict(dep=dict(weight_decay=0.1))
    with pytest.raises(ValueError, match=r"OptimScheduleHook: no student is called 'dep'.*'deep'"):
        train(cfg, tmp_path)
    cfg = multi_config(images, teacher, tmp_path / "work", 1)
    cfg.custom_hooks[-1].checkpoint = None
    with pytest.raises(
        ConfigError, match="no teacher to distil from: give its file with --teacher"
    ):
        build_runner(cfg)
    cfg = multi_config(images, teacher, tmp_path / "work", 1)
    cfg.custom_hooks[0] = cfg.custom_hooks[0].hook
    message = r"custom_hooks.0: OptimScheduleHook is a student's; write dict\(type='PerStudentHook'"
    with pytest.raises(ConfigError, match=message):
        build_runner(cfg)
    cfg = distill_config(images, teacher, tmp_path / "work", "deep", 1)
    cfg.custom_hooks[0] = dict(type="PerStudentHook", hook=cfg.custom_hooks[0])
    with pytest.raises(ConfigError, match="PerStudentHook needs a model of type MultiDistillation"):
        build_runner(cfg)


def test_a_file_without_heads_is_no_teacher(sources, multi, tmp_path):
    cfg = distill_config(*sources, tmp_path / "work", "deep", 1)
    export = latest_export_path(multi, "deep")
    with pytest.raises(ValueError, match=r"holds a backbone only; expected dino_head or ibot_head"):
        train(cfg, tmp_path, "--teacher", str(export))
