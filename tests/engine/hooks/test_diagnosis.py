"""Diagnoses come in their iterations and as numbers."""

import pytest
import torch

from dinov3_mm.engine.hooks.guards import DiagnosisHook
from tests.engine.hooks.toy import ToyAlgorithm, ToyRunner


def test_diagnoses_every_interval_and_first(caplog):
    model = ToyAlgorithm()
    model.diagnoses = {"feature_rank": 3.25, "cls_spread": 0.5}
    runner = ToyRunner(model, [DiagnosisHook(interval=3)], max_iters=8)
    with caplog.at_level("INFO", logger="toy"):
        runner.train()
    diagnosed = [it for it, outputs in enumerate(runner.history) if "diag/feature_rank" in outputs]
    assert diagnosed == [0, 3, 6]
    assert runner.history[3]["diag/feature_rank"] == 3.25
    assert isinstance(runner.history[3]["diag/cls_spread"], float)
    assert isinstance(runner.history[3]["loss"], torch.Tensor)
    assert "diagnosis after iteration 4: feature_rank 3.25  cls_spread 0.5" in caplog.text


def test_interval_is_a_positive_integer():
    with pytest.raises(ValueError, match="interval must be an integer >= 1"):
        DiagnosisHook(interval=0)
