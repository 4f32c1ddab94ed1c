"""Checkpoints of MMEngine's runner: what loads, and what is refused."""

import os

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from torch import nn

from dinov3_mm.checkpoints.run_checkpoint import load_run_checkpoint


def checkpoint(model: nn.Module, **entries) -> dict:
    history = HistoryBuffer([1.0, 2.0], [1, 1])
    return {
        "meta": {"dataset_meta": {"classes": ("a", "b")}, "iter": 3},
        "state_dict": model.state_dict(),
        "message_hub": {"log_scalars": {"loss": history}, "runtime_info": {"iter": 3}},
        **entries,
    }


def test_a_runners_checkpoint(tmp_path):
    source, target = nn.Linear(3, 2), nn.Linear(3, 2)
    numbers = {"best": np.float64(0.5), "epoch": np.int64(3)}
    torch.save(checkpoint(source, numbers=numbers), tmp_path / "a.pth")
    meta = load_run_checkpoint(target, tmp_path / "a.pth")
    assert torch.equal(source.weight, target.weight)
    assert meta["dataset_meta"]["classes"] == ("a", "b")


def test_averaged_weights_come_first(tmp_path):
    source, average, target = nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(3, 2)
    averaged = {f"module.{name}": value for name, value in average.state_dict().items()}
    averaged["steps"] = torch.tensor(4)
    torch.save(checkpoint(source, ema_state_dict=averaged), tmp_path / "a.pth")
    load_run_checkpoint(target, tmp_path / "a.pth")
    assert torch.equal(average.weight, target.weight)


class Evil:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return self.command


@pytest.mark.parametrize(
    "command",
    [
        (os.system, ("touch owned",)),
        (getattr, (dict, "fromkeys")),
        (getattr, (HistoryBuffer, "__init__")),
    ],
    ids=["system", "getattr-dict", "getattr-private"],
)
def test_code_is_not_run(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    model = nn.Linear(3, 2)
    torch.save(checkpoint(model, extra=Evil(command)), "a.pth")
    with pytest.raises(ValueError, match="was not loaded"):
        load_run_checkpoint(model, "a.pth")
    assert not (tmp_path / "owned").exists()


def test_other_tensors_are_named(tmp_path):
    torch.save(checkpoint(nn.Linear(3, 2, bias=False)), tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"missing \(1\): bias"):
        load_run_checkpoint(nn.Linear(3, 2), tmp_path / "a.pth")
    with pytest.raises(ValueError, match="does not fit this model"):
        load_run_checkpoint(nn.Linear(3, 5, bias=False), tmp_path / "a.pth")


def test_damaged_or_absent(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        load_run_checkpoint(nn.Linear(3, 2), tmp_path / "a.pth")
    (tmp_path / "a.pth").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(ValueError, match="was not loaded"):
        load_run_checkpoint(nn.Linear(3, 2), tmp_path / "a.pth")
