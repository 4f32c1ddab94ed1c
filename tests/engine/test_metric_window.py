"""Interval means."""

import math

import pytest
import torch

from dinov3_mm.engine.hooks.progress import MetricWindow


def test_mean_over_the_steps_that_have_the_metric():
    window = MetricWindow()
    window.add({"loss": torch.tensor(1.0), "lr": 0.5})
    window.add({"loss": torch.tensor(3.0, dtype=torch.bfloat16), "lr": 1.5, "diag/x": 7})
    window.add({"loss": torch.tensor(5.0), "flag": torch.tensor(True)})
    assert window.take() == {"loss": 3.0, "lr": 1.0, "diag/x": 7.0, "flag": 1.0}
    assert window.take() == {}


def test_a_bad_step_shows():
    window = MetricWindow()
    window.add({"loss": torch.tensor(1.0)})
    window.add({"loss": torch.tensor(float("nan"))})
    window.add({"loss": torch.tensor(2.0)})
    assert math.isnan(window.take()["loss"])
    window.add({"loss": torch.tensor(2.0)})
    assert window.take() == {"loss": 2.0}


def test_adding_reads_nothing(monkeypatch):
    def fail(*_):
        pytest.fail("a value was read to the host")

    window = MetricWindow()
    monkeypatch.setattr(torch.Tensor, "item", fail)
    monkeypatch.setattr(torch.Tensor, "tolist", fail)
    monkeypatch.setattr(torch.Tensor, "__float__", fail)
    window.add({"loss": torch.tensor(1.0)})
