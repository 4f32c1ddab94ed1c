"""Distillation runs with two teachers: files by name, log, export, resume, and errors."""

import pytest

import dinov3_mm
from dinov3_mm.engine import ConfigError
from dinov3_mm.engine.run_files import checkpoint_path, latest_export_path
from tests.integration.distill_run import distill_config, write_teacher
from tests.integration.toy_run import toy_config, train
from tests.integration.traces import read_trace


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Images, and two checkpoints of a run."""
    folder = tmp_path_factory.mktemp("sources")
    images, teacher = write_teacher(folder)
    cfg = toy_config(images, folder / "other", train_cfg__max_iters=3)
    cfg.randomness = dict(seed=7)
    train(cfg, folder)
    return images, teacher, checkpoint_path(folder / "other", 3)


def config(sources, work_dir, iters=2):
    images, teacher, _ = sources
    cfg = distill_config(images, teacher, work_dir, "deep", iters)
    parts = cfg.model.pop("distillation")
    cfg.model.distillation = dict(teachers=dict(web=parts, sat=dict(**parts, weight=0.25)))
    cfg.custom_hooks[-1] = dict(type="DistillationHook", checkpoint=None)
    cfg.default_hooks.checkpoint.interval = 1
    return cfg


def files(sources):
    return "--teacher", f"web={sources[1]}", "--teacher", f"sat={sources[2]}"


@pytest.fixture(scope="module")
def work(sources, tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    train(config(sources, folder / "work"), folder, *files(sources))
    return folder / "work"


def test_log_and_export(work):
    trace = read_trace(work)
    assert len(trace) == 2
    for record in trace.values():
        for term in ("dino_local_loss", "dino_global_loss", "ibot_loss"):
            web, sat = (record[f"teacher/{name}/{term}"] for name in ("web", "sat"))
            assert web != sat
            assert record[term] == pytest.approx(0.5 * web + 0.25 * sat, rel=1e-6)
        assert "diag/web/teacher_entropy" in trace[1] and "diag/teacher_entropy" in trace[1]
    backbone = dinov3_mm.build_backbone(latest_export_path(work))
    assert backbone.embed_dims == 24
    assert dinov3_mm.build_backbone(checkpoint_path(work, 2)).embed_dims == 24


def test_resumed_to_the_bit(sources, work, tmp_path):
    train(config(sources, tmp_path / "parts", 1), tmp_path, *files(sources))
    train(config(sources, tmp_path / "parts"), tmp_path, "--resume", *files(sources))
    resumed = read_trace(tmp_path / "parts")[2]
    assert {k: v for k, v in resumed.items() if not k.startswith("diag")} == {
        key: value for key, value in read_trace(work)[2].items() if not key.startswith("diag")
    }


def test_teachers_that_changed_places_are_refused(sources, tmp_path):
    train(config(sources, tmp_path / "work", 1), tmp_path, *files(sources))
    swapped = ("--teacher", f"web={sources[2]}", "--teacher", f"sat={sources[1]}")
    with pytest.raises(ValueError, match="not the teacher with which the resumed run began"):
        train(config(sources, tmp_path / "work"), tmp_path, "--resume", *swapped)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("",), r"several teachers; give --teacher sat=FILE --teacher web=FILE"),
        (("web=",), r"web given; each teacher needs one"),
        (("web=", "web="), r"web, web given; each teacher needs one"),
        (("web=", "sta="), r"no teacher is called 'sta'; did you mean 'sat'"),
        (("web=", "sat=no/"), r"no/.* does not exist"),
        (
            (),
            r"no teacher to distil from: give its file with --teacher sat=FILE --teacher web=FILE",
        ),
    ],
)
def test_bad_command_lines(sources, tmp_path, names, message):
    arguments = [part for name in names for part in ("--teacher", f"{name}{sources[1]}")]
    with pytest.raises(ConfigError, match=message):
        train(config(sources, tmp_path / "work"), tmp_path, *arguments)


def test_several_files_for_one_teacher(sources, tmp_path):
    cfg = distill_config(*sources[:2], tmp_path / "work", "deep", 1)
    with pytest.raises(ConfigError, match="2 files, but this config has one teacher"):
        train(cfg, tmp_path, *files(sources))
    cfg.custom_hooks[-1]["checkpoint"] = dict(web=str(sources[1]))
    with pytest.raises(ValueError, match="the model has one distillation teacher"):
        train(cfg, tmp_path)


def test_other_input_statistics_are_refused(sources, tmp_path, monkeypatch):
    from dinov3_mm.checkpoints.locate import statistics_of_data
    from dinov3_mm.engine.config import read as starting_point

    stated = {str(sources[1]): "LVD-1689M", str(sources[2]): "SAT-493M"}
    monkeypatch.setattr(
        starting_point, "_statistics_of", lambda file: statistics_of_data(stated[file])
    )
    with pytest.raises(ConfigError, match=r"inputs of different statistics.*trained alike"):
        train(config(sources, tmp_path / "work"), tmp_path, *files(sources))
