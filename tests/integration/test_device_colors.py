"""Runs whose colours are applied on the device: resumed to the bit, and with several students."""

import pytest

from tests.integration.distill_run import multi_config, write_teacher
from tests.integration.toy_run import toy_config, train, write_images
from tests.integration.traces import read_trace


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


def on_device(cfg, place="device"):
    cfg.train_dataloader.transform.update(color_on=place)
    return cfg


def test_a_resumed_run_sees_the_same_colors(images, tmp_path):
    def run(folder, iters, *arguments):
        cfg = toy_config(images, tmp_path / folder, train_cfg__max_iters=iters)
        cfg.default_hooks.checkpoint.interval = 2
        train(on_device(cfg), tmp_path, *arguments)

    run("whole", 4)
    run("parts", 2)
    run("parts", 4, "--resume")
    assert read_trace(tmp_path / "whole") == read_trace(tmp_path / "parts")


def test_losses_are_those_of_the_other_place(images, tmp_path):
    """A few pixels differ by a grey level."""
    traces = []
    for place in ("worker", "device"):
        cfg = toy_config(images, tmp_path / place, train_cfg__max_iters=2)
        train(on_device(cfg, place), tmp_path)
        traces.append(read_trace(tmp_path / place))
    assert traces[0].keys() == traces[1].keys()
    for step, record in traces[0].items():
        assert traces[1][step]["loss"] == pytest.approx(record["loss"], rel=1e-4)
        assert record["loss"] > 1


def test_several_students_see_distorted_crops(tmp_path):
    images, teacher = write_teacher(tmp_path)
    traces = []
    for place in ("worker", "device"):
        cfg = multi_config(images, teacher, tmp_path / place, iters=2)
        train(on_device(cfg, place), tmp_path)
        traces.append(read_trace(tmp_path / place))
    for step, record in traces[0].items():
        for name in ("narrow", "deep"):
            key = f"student/{name}/loss"
            assert traces[1][step][key] == pytest.approx(record[key], rel=1e-4)
