"""Sweeps over cached features: every combination, the right values, nothing twice."""

import pytest
from mmengine.config import Config

from dinov3_mm.engine import ConfigError
from dinov3_mm.engine.downstream import combinations, parse_grid, sweep
from dinov3_mm.engine.feature_cache import use_feature_cache
from tests.engine.feature_cache.test_feature_cache import config, weights  # noqa: F401
from tests.hosts.lane import require_hosts

LR = "optim_wrapper.optimizer.lr"


def test_grid():
    grid = parse_grid([f"{LR}=[0.1,0.2]", "model.x=a"])
    assert grid == {LR: [0.1, 0.2], "model.x": ["a"]}
    assert list(combinations(grid)) == [{LR: 0.1, "model.x": "a"}, {LR: 0.2, "model.x": "a"}]
    with pytest.raises(ConfigError, match="no values"):
        parse_grid([f"{LR}=[]"])


def test_an_unknown_path_comes_before_training(tmp_path):
    cfg = Config({"optim_wrapper": {"optimizer": {"type": "SGD", "lr": 1.0}}})
    with pytest.raises(ConfigError, match="did you mean 'lr'"):
        list(sweep(cfg, {"optim_wrapper.optimizer.lrr": [1]}, tmp_path))


def test_trials_differ_and_are_not_repeated(weights, tmp_path, monkeypatch):  # noqa: F811
    require_hosts()
    cfg = config("classification", weights, tmp_path)
    use_feature_cache(cfg, str(tmp_path / "cache"))
    grid = {LR: [1e-4, 3e-2]}
    trials = list(sweep(cfg, grid, tmp_path / "trials"))
    assert [trial.values[LR] for trial in trials] == grid[LR]
    assert all("accuracy/top1" in trial.metrics for trial in trials)
    for number, rate in enumerate(grid[LR]):
        (dumped,) = (tmp_path / f"trials/trial-{number:03d}").glob("*.py")
        assert Config.fromfile(dumped).optim_wrapper.optimizer.lr == rate
    monkeypatch.setattr("dinov3_mm.engine.downstream.build_runner", None)  # would raise if called
    assert list(sweep(cfg, grid, tmp_path / "trials")) == trials
    with pytest.raises(ConfigError, match="holds another trial"):
        list(sweep(cfg, {LR: [5e-4]}, tmp_path / "trials"))
