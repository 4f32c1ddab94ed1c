"""Heads from cached features: the same weights as from images, and what is refused."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import TRANSFORMS

from dinov3_mm.checkpoints import export_backbone
from dinov3_mm.checkpoints.run_checkpoint import read_run_checkpoint
from dinov3_mm.engine import ConfigError, build_runner
from dinov3_mm.engine.feature_cache import use_feature_cache
from dinov3_mm.engine.feature_cache.store import FeatureStore, flatten
from tests.checkpoints.toys import quickstart_backbone
from tests.hosts.lane import require_hosts

require_hosts()

CONFIGS = Path(__file__).parents[3] / "configs/quickstart"
HEADS = {
    "classification": "head",
    "segmentation": "decode_head",
    "depth": "decode_head",
    "detection": "bbox_head",
    "mask2former": "decode_head",
}
# Where a large step would enlarge the rounding of features, through matching and sampling.
LR = {"detection": 1e-3, "mask2former": 1e-3}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "toy.safetensors"
    return str(export_backbone(quickstart_backbone(), path))


def config(job: str, weights: str, work_dir: Path, *, random: bool = False) -> Config:
    """The quickstart of a job, short, with or without random steps."""
    cfg = Config.fromfile(CONFIGS / f"{job}.py")
    backbone = cfg.model.backbone
    backbone.get("backbone", backbone).init_cfg.checkpoint = weights
    for loader, length in (("train_dataloader", 16), ("val_dataloader", 6)):
        dataset = cfg[loader].dataset
        dataset.update(length=length)
        if not random:
            dataset.pipeline = [s for s in dataset.pipeline if "Random" not in s["type"]]
        cfg[loader].batch_size = 4
        cfg[loader].sampler = dict(type="DefaultSampler", shuffle="train" in loader)
    cfg.train_cfg = dict(by_epoch=True, max_epochs=2, val_interval=2)
    cfg.param_scheduler = []
    # Adam would divide small gradients by themselves, and so enlarge the rounding of features.
    cfg.optim_wrapper = dict(
        type="OptimWrapper", optimizer=dict(type="SGD", lr=LR.get(job, 0.1), momentum=0.9)
    )
    cfg.randomness = dict(seed=1)
    if job == "detection":
        cfg.model.test_cfg.score_thr = 0.0  # two epochs find nothing to be sure of
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
    assert "computed features of 16 samples" in lines[0]
    assert any("computed features of 6 samples" in line for line in lines), lines
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
    sizes = []
    for dtype in ("fp32", "bf16"):
        cfg = config("segmentation", weights, tmp_path)
        use_feature_cache(cfg, str(tmp_path / dtype), dtype)
        files = (tmp_path / dtype / "train").glob("*.safetensors")
        sizes.append(sum(len(file.read_bytes()) for file in files))
    assert sizes[0] / sizes[1] == pytest.approx(2, rel=0.1)


@TRANSFORMS.register_module()
class Wobble:
    """Random under a name that does not say so."""

    def __call__(self, results):
        results["img"] = results["img"] + np.random.randint(0, 9, dtype=np.uint8)
        return results


def test_random_steps_by_another_name_are_noticed(weights, tmp_path):
    cfg = config("classification", weights, tmp_path)
    cfg.train_dataloader.dataset.pipeline.insert(1, dict(type="Wobble"))
    with pytest.raises(ConfigError, match="came out differently"):
        use_feature_cache(cfg, str(tmp_path / "cache"))
    # The folder is still free for the mended config.
    use_feature_cache(config("classification", weights, tmp_path), str(tmp_path / "cache"))


def test_a_backbone_that_trains_is_refused(weights, tmp_path):
    cfg = config("classification", weights, tmp_path)
    cfg.model.backbone.frozen_stages = 2
    with pytest.raises(ConfigError, match="the backbone is not frozen"):
        use_feature_cache(cfg, str(tmp_path / "cache"))


def test_a_cache_of_something_else_is_refused(weights, tmp_path):
    use_feature_cache(config("classification", weights, tmp_path), str(tmp_path / "cache"))
    cfg = config("classification", weights, tmp_path)
    cfg.model.data_preprocessor.mean = [0.0, 0.0, 0.0]
    with pytest.raises(ConfigError, match=r"made from something else: preprocessor\.mean differ"):
        use_feature_cache(cfg, str(tmp_path / "cache"))


def test_other_images_are_added(weights, tmp_path):
    use_feature_cache(config("classification", weights, tmp_path), str(tmp_path / "cache"))
    cfg = config("classification", weights, tmp_path)
    cfg.train_dataloader.dataset.start = 12
    lines = use_feature_cache(cfg, str(tmp_path / "cache"))
    assert any("16 images are new" in line for line in lines), lines


def test_an_interrupted_cache_goes_on(weights, tmp_path, monkeypatch):
    from dinov3_mm.engine.feature_cache import compute

    monkeypatch.setattr(compute, "SHARD_BYTES", 1)  # a batch a shard
    cache = tmp_path / "cache"
    samples = compute._Computation.samples
    calls = []

    def dying(self, prepared):
        calls.append(len(prepared))
        if len(calls) == 4:  # one of them is the first look
            raise KeyboardInterrupt
        return samples(self, prepared)

    monkeypatch.setattr(compute._Computation, "samples", dying)
    with pytest.raises(KeyboardInterrupt):
        use_feature_cache(config("classification", weights, tmp_path), str(cache))
    there = {path: path.stat().st_mtime_ns for path in (cache / "train").glob("*.safetensors")}
    assert len(there) == 2
    calls.clear()
    monkeypatch.setattr(compute._Computation, "samples", dying)
    calls.extend([0] * 9)
    use_feature_cache(config("classification", weights, tmp_path), str(cache))
    assert sum(calls[10:12]) == 8  # of 16 training images eight were left
    for path, modified in there.items():
        assert path.stat().st_mtime_ns == modified


def test_unknown_dtype(weights, tmp_path):
    with pytest.raises(ConfigError, match="dtype is 'fp8'"):
        use_feature_cache(config("classification", weights, tmp_path), str(tmp_path), "fp8")


def test_the_cache_states_what_it_was_computed_in(weights, tmp_path):
    """Rounded as on a GPU; a cache of the other dtype is refused."""
    cache = tmp_path / "cache"
    cfg = config("classification", weights, tmp_path)
    cfg.compute_dtype = "bf16"
    lines = use_feature_cache(cfg, str(cache))
    assert "fp32; computed in bf16 (as asked)" in lines[0]
    origin = cache / "train/origin.json"
    assert json.loads(origin.read_text())["compute_dtype"] == "bf16"
    store = FeatureStore(cache / "train")
    (call,) = store.read(next(iter(store.places.values()))).calls
    tensor = flatten(call.outputs)[0][-1]
    assert tensor.dtype == torch.float32 and torch.equal(tensor, tensor.bfloat16().float())
    with pytest.raises(ConfigError, match=r"compute_dtype differ; .* \(compute_dtype=bf16 goes on"):
        use_feature_cache(config("classification", weights, tmp_path), str(cache))


def test_a_run_says_what_it_computes_in(weights, tmp_path):
    cfg = config("classification", weights, tmp_path / "run")
    cfg.compute_dtype = "bf16"
    lines = use_feature_cache(cfg, str(tmp_path / "cache"))
    train(cfg)
    (log,) = (tmp_path / "run").glob("*/*.log")
    assert "compute dtype: bf16 (as asked); autocast of backbone" in log.read_text()
    assert "Off: --cfg-options compute_dtype=fp32" in log.read_text() and lines
