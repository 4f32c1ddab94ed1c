"""Dry runs of a distillation into several students, together and in rank groups."""

import pytest
import torch.distributed as dist

from dinov3_mm.engine import ConfigError
from dinov3_mm.engine.dry_run import dry_run, dry_runs
from dinov3_mm.engine.plan import make_plan
from tests.engine.dry_run.real_step import measured_peak
from tests.engine.dry_run.students import TEACHER_BOTTLENECK, two_students
from tests.engine.dry_run.toys import PROTOTYPES, toy_config

GROUPS = dict(narrow=(0, 1), wide=(1, 4))
SHARE = "crops and features of all ranks"


def collectives(report) -> dict[tuple[str, str, str], tuple[int, int, int]]:
    return {
        (entry.operation, entry.purpose, str(entry.dtype)): (entry.ranks, count, size)
        for entry, count, size in report.steps[0].collectives
    }


def test_a_dry_run_for_each_group():
    cfg = two_students(ranks=GROUPS, global_batch_size=12)
    narrow, wide = dry_runs(cfg, 4)
    assert [list(report.schedules) for report in (narrow, wide)] == [["narrow"], ["wide"]]
    assert [report.rank for report in (narrow, wide)] == [0, 1]
    crops = wide.steps[0].crops
    assert (crops.images, crops.group, crops.student_images) == (3, 3, 4)
    assert narrow.steps[0].crops.student_images == 12
    teacher = wide.networks["distillation_teacher"]
    assert teacher == narrow.networks["distillation_teacher"] and teacher[0] == teacher[1]
    assert wide.networks["wide: student"][0] > narrow.networks["narrow: student"][0]
    assert wide.steps[0].resident["distillation teacher"] == 4 * teacher[0]
    assert not dist.is_initialized()


def test_what_travels_between_all_ranks_and_within_a_group():
    wide = dry_runs(two_students(ranks=GROUPS, global_batch_size=12), 4)[1]
    found = collectives(wide)
    images = 4 * 3  # of all ranks
    pixels = 3 * images * (2 * 32**2 + 2 * 16**2)
    assert found["all-gather", SHARE, "torch.uint8"] == (4, 2, pixels)
    # CLS and sixteen patches of both global crops.
    features = 4 * images * 2 * 17 * TEACHER_BOTTLENECK
    assert found["all-gather", SHARE, "torch.float32"] == (4, 2, features)
    assert found["all-reduce", "Sinkhorn-Knopp", "torch.float32"] == (3, 8, 8 * 4 * PROTOTYPES)
    trained = wide.networks["wide: student"][0]
    ranks, _, size = found["all-reduce", "gradients (DDP)", "torch.float32"]
    assert (ranks, size) == (3, 4 * trained)


def test_surplus_images_are_read_and_dropped():
    cfg = two_students(ranks=GROUPS, global_batch_size=6, train_cfg__surplus=True)
    crops = dry_runs(cfg, 4)[1].steps[0].crops
    assert (crops.images, crops.student_images) == (2, 2)


def test_students_together():
    (report,) = dry_runs(two_students(), 2)
    assert list(report.schedules) == ["narrow", "wide"] == list(report.tokens)
    _, _, size = collectives(report)["all-reduce", "gradients (DDP)", "torch.float32"]
    assert size == 4 * sum(report.networks[f"{name}: student"][0] for name in report.schedules)


def test_batch_norms_and_koleo_are_told_apart():
    pytest.importorskip("timm")
    cfg = two_students()
    cfg.model.student.pop("backbone")
    cfg.model.student.koleo = dict(weight=0.1, distributed=True)
    network = dict(type="TimmBackbone", name="resnet10t", batch_norm="sync")
    sizes = dict(channels=[8, 16, 24, 32], stem_width=8, output_stride=8)
    cfg.model.students = dict(resnet=dict(backbone=dict(**network, model_args=sizes)))
    found = {
        (entry.operation, entry.purpose, entry.phase)
        for entry, *_ in dry_run(cfg, 2).steps[0].collectives
    }
    for phase in ("forward pass", "backward pass"):
        assert ("all-reduce", "batch norm", phase) in found
        assert ("all-reduce", "KoLeo", phase) not in found
    assert ("all-gather", "KoLeo", "forward pass") in found
    assert ("reduce-scatter", "KoLeo", "backward pass") in found


def test_settings_of_one_student():
    cfg = two_students()
    cfg.custom_hooks[1].students = dict(wide=dict(lr=dict(base=1e-3)))
    schedules = dry_run(cfg, 1).schedules
    assert schedules["narrow"].values["lr"](10) == 2e-3
    assert schedules["wide"].values["lr"](10) == 1e-3


def test_peak_is_that_of_the_profiler():
    peak = dry_run(two_students(global_batch_size=64), 1, on_gpu=False).steps[0].peak
    measured = measured_peak(two_students(global_batch_size=64))
    assert 0.99 * measured <= peak.total <= 1.0005 * measured


@pytest.mark.parametrize("world_size", [1, 4])
def test_one_student_of_several_teachers(world_size):
    cfg = toy_config(strategy=dict(type="FSDP2Strategy"))
    backbone, head = dict(cfg.model.backbone), dict(cfg.model.dino_head)
    teacher = dict(backbone=backbone, dino_head=head, ibot_head=head)
    cfg.model.distillation = dict(teachers=dict(first=teacher, second=teacher))
    cfg.model.dino_head.pop("num_prototypes")
    cfg.model.ibot_head.pop("num_prototypes")
    cfg.custom_hooks.append(dict(type="DistillationHook", checkpoint=None))
    report = dry_run(cfg, world_size)
    teachers = [name for name in report.networks if name.startswith("distillation_teacher")]
    assert teachers == ["distillation_teacher.first", "distillation_teacher.second"]
    local = sum(report.networks[name][1] for name in teachers)
    assert report.steps[0].resident["distillation teacher"] == 4 * local
    with pytest.raises(ConfigError, match="one distillation teacher"):
        make_plan(cfg, world_size)


@pytest.mark.parametrize(
    ("groups", "changes", "world_size", "message"),
    [
        (dict(narrow=(0, 2), wide=(2, 5)), dict(), 5, "'wide' has 3 ranks, which do not divide"),
        (GROUPS, dict(global_batch_size=12), 6, "6 processes, but the students' ranks"),
        (dict(narrow=(0, 4)), dict(), 4, "give all of them ranks, or none"),
        (None, dict(), 3, "global_batch_size=8 is not divisible"),
        (None, dict(train_cfg__surplus=True), 3, "surplus=True is for students in rank groups"),
    ],
)
def test_impossible_groups_are_refused_in_words(groups, changes, world_size, message):
    changes = {"train_cfg__surplus": groups is not None, **changes}
    with pytest.raises(ConfigError, match=message):
        dry_runs(two_students(ranks=groups, **changes), world_size)


def test_what_is_missing_or_unknown_is_named():
    cfg = two_students()
    cfg.custom_hooks.pop(0)
    with pytest.raises(ConfigError, match="DistillationHook"):
        dry_run(cfg, 1)
    cfg = two_students()
    cfg.custom_hooks[1].students = dict(wid=dict(weight_decay=0.1))
    with pytest.raises(ConfigError, match="did you mean 'wide'"):
        dry_run(cfg, 1)
