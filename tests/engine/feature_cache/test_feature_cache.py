"""Heads from cached features: the same weights as from images, and what is refused."""

import copy
import json
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from dinov3_mm.checkpoints import export_backbone
from dinov3_mm.checkpoints.run_checkpoint import read_run_checkpoint
from dinov3_mm.engine import ConfigError, build_runner
from dinov3_mm.engine.feature_cache import use_feature_cache
from dinov3_mm.engine.feature_cache.store import FeatureStore
from tests.checkpoints.toys import quickstart_backbone
from tests.hosts.lane import require_hosts

require_hosts()

CONFIGS = Path(__file__).parents[3] / "configs/quickstart"
HEADS = {"classification": "head", "segmentation": "decode_head"}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "toy.safetensors"
    return str(export_backbone(quickstart_backbone(), path))


def config(job: str, weights: str, work_dir: Path) -> Config:
    """The quickstart of a job, short, without random steps."""
    cfg = Config.fromfile(CONFIGS / f"{job}.py")
    cfg.model.backbone.init_cfg.checkpoint = weights
    for loader, length in (("train_dataloader", 16), ("val_dataloader", 6)):
        dataset = cfg[loader].dataset
        dataset.update(length=length)
        dataset.pipeline = [step for step in dataset.pipeline if "Random" not in step["type"]]
        cfg[loader].batch_size = 4
        cfg[loader].sampler = dict(type="DefaultSampler", shuffle="train" in loader)
    cfg.train_cfg = dict(by_epoch=True, max_epochs=2, val_interval=2)
    cfg.param_scheduler = []
    # Adam would divide small gradients by themselves, and so enlarge the rounding of features.
    cfg.optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="SGD", lr=0.1, momentum=0.9))
    cfg.randomness = dict(seed=1)
    cfg.work_dir = str(work_dir)
    cfg.default_hooks.checkpoint = dict(type="CheckpointHook", interval=2, by_epoch=True)
    cfg.default_hooks.logger = dict(type="LoggerHook", interval=1)
    cfg.log_processor = dict(by_epoch=True)
    return cfg


def train(cfg: Config) -> tuple[dict, dict]:
    runner = build_runner(copy.deepcopy(cfg))
    runner.train()
    scalars = runner.message_hub.log_scalars
    metrics = {name: buffer.current() for name, buffer in scalars.items() if name[:4] == "val/"}
    state = read_run_checkpoint(Path(cfg.work_dir) / "epoch_2.pth")["state_dict"]
    return state, {k: v for k, v in metrics.items() if "time" not in k}


@pytest.mark.parametrize("job", HEADS)
def test_same_head(job, weights, tmp_path):
    expected, metrics = train(config(job, weights, tmp_path / "images"))
    cfg = config(job, weights, tmp_path / "cached")
    lines = use_feature_cache(cfg, str(tmp_path / "cache"))
    assert len(lines) == (2 if job == "classification" else 1)
    assert "computed features of 16 samples" in lines[0]
    actual, cached_metrics = train(cfg)
    assert actual.keys() == expected.keys()
    assert any(name.startswith(HEADS[job]) for name in actual)
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-5, atol=1e-6)
    assert metrics and cached_metrics == pytest.approx(metrics, abs=1e-3)
    # A second run finds the cache.
    again = config(job, weights, tmp_path / "again")
    assert "from" in use_feature_cache(again, str(tmp_path / "cache"))[0]


def test_bf16_is_half_the_size(weights, tmp_path):
    for dtype in ("fp32", "bf16"):
        cfg = config("segmentation", weights, tmp_path)
        use_feature_cache(cfg, str(tmp_path / dtype), dtype)
    sizes = [
        sum(len(f.read_bytes()) for f in (tmp_path / dtype / "train").glob("*.safetensors"))
        for dtype in ("fp32", "bf16")
    ]
    labels = 16 * 96 * 96 * 8  # classes of pixels, stored as they are
    assert (sizes[0] - labels) / (sizes[1] - labels) == pytest.approx(2, rel=0.15)


def test_random_steps_are_refused(weights, tmp_path):
    cfg = config("classification", weights, tmp_path)
    cfg.train_dataloader.dataset.pipeline.insert(1, dict(type="RandomFlip", prob=0.5))
    with pytest.raises(ConfigError, match=r"pipeline is random \(RandomFlip\)"):
        use_feature_cache(cfg, str(tmp_path / "cache"))
    # The folder is still free for the mended config.
    use_feature_cache(config("classification", weights, tmp_path), str(tmp_path / "cache"))


def test_random_steps_by_another_name_are_noticed(weights, tmp_path):
    cfg = config("classification", weights, tmp_path)
    step = dict(type="ColorTransform", magnitude=0.9, prob=0.5, random_negative_prob=0.5)
    cfg.train_dataloader.dataset.pipeline.insert(1, step)
    torch.manual_seed(0)
    with pytest.raises(ConfigError, match="came out differently"):
        use_feature_cache(cfg, str(tmp_path / "cache"))


def test_a_backbone_that_trains_is_refused(weights, tmp_path):
    cfg = config("classification", weights, tmp_path)
    cfg.model.backbone.frozen_stages = 2
    with pytest.raises(ConfigError, match="the backbone is not frozen"):
        use_feature_cache(cfg, str(tmp_path / "cache"))


def test_a_cache_of_something_else_is_refused(weights, tmp_path):
    use_feature_cache(config("classification", weights, tmp_path), str(tmp_path / "cache"))
    cfg = config("classification", weights, tmp_path)
    cfg.train_dataloader.dataset.start = 50
    with pytest.raises(ConfigError, match=r"made from something else: dataset\.start differ"):
        use_feature_cache(cfg, str(tmp_path / "cache"))


def test_an_interrupted_cache_goes_on(weights, tmp_path, monkeypatch):
    from dinov3_mm.engine.feature_cache import compute

    monkeypatch.setattr(compute, "_SHARD_BYTES", 1)  # a sample a shard
    whole = tmp_path / "whole"
    use_feature_cache(config("classification", weights, tmp_path), str(whole))
    part = tmp_path / "part"
    written = compute.write_shard
    calls = []

    def dying(path, samples):
        if len(calls) == 5:
            raise KeyboardInterrupt
        calls.append(path)
        written(path, samples)

    monkeypatch.setattr(compute, "write_shard", dying)
    with pytest.raises(KeyboardInterrupt):
        use_feature_cache(config("classification", weights, tmp_path), str(part))
    monkeypatch.setattr(compute, "write_shard", written)
    use_feature_cache(config("classification", weights, tmp_path), str(part))
    for path in sorted((whole / "train").glob("*.safetensors")):
        assert path.read_bytes() == (part / "train" / path.name).read_bytes()


def test_unknown_dtype(weights, tmp_path):
    with pytest.raises(ConfigError, match="dtype is 'fp8'"):
        use_feature_cache(config("classification", weights, tmp_path), str(tmp_path), "fp8")


def test_the_cache_states_what_it_was_computed_in(weights, tmp_path):
    """Rounded as on a GPU; a cache of the other dtype is refused, one that does not say is fp32."""
    cache = tmp_path / "cache"
    cfg = config("classification", weights, tmp_path)
    cfg.compute_dtype = "bf16"
    lines = use_feature_cache(cfg, str(cache))
    assert "fp32; computed in bf16 (as asked)" in lines[0]
    origin = cache / "train/origin.json"
    assert json.loads(origin.read_text())["compute_dtype"] == "bf16"
    (features,) = FeatureStore(cache / "train")[0]["inputs"][-1:]
    tensor = features if isinstance(features, torch.Tensor) else features[-1]
    assert tensor.dtype == torch.float32 and torch.equal(tensor, tensor.bfloat16().float())
    with pytest.raises(ConfigError, match=r"compute_dtype differ; .* \(compute_dtype=bf16 goes on"):
        use_feature_cache(config("classification", weights, tmp_path), str(cache))
    plain = tmp_path / "plain"
    use_feature_cache(config("classification", weights, tmp_path), str(plain))
    mark = plain / "train/origin.json"
    older = {k: v for k, v in json.loads(mark.read_text()).items() if k != "compute_dtype"}
    mark.write_text(json.dumps(older))
    again = use_feature_cache(config("classification", weights, tmp_path), str(plain))
    assert "computed in fp32, stored as fp32" in again[0]


def test_a_run_says_what_it_computes_in(weights, tmp_path):
    cfg = config("classification", weights, tmp_path / "run")
    cfg.compute_dtype = "bf16"
    lines = use_feature_cache(cfg, str(tmp_path / "cache"))
    train(cfg)
    (log,) = (tmp_path / "run").glob("*/*.log")
    assert "compute dtype: bf16 (as asked); autocast of backbone" in log.read_text()
    assert "Off: --cfg-options compute_dtype=fp32" in log.read_text() and lines
