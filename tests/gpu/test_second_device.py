"""What moves tensors, on a second device: the fake GPU, where a tensor left on the CPU is refused.

Training itself runs there in the dry runs and in ``test_fake_cuda.py``.
"""

from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS

from dinov3_mm.apis.deployment.request import _check_backbone
from dinov3_mm.engine import launch
from dinov3_mm.engine.capture import random_state
from dinov3_mm.engine.config import auto as resolve
from dinov3_mm.engine.config import host as host_config
from dinov3_mm.engine.config.host import for_cpu_ranks
from dinov3_mm.engine.console import _device
from dinov3_mm.engine.dry_run.fake_cuda import CUDA, fake_cuda
from dinov3_mm.engine.hooks import progress as console
from dinov3_mm.engine.hooks.guards import _PendingFlag
from dinov3_mm.evaluation.knn import nearest_neighbours
from dinov3_mm.models.layers import attention
from dinov3_mm.models.layers.attention import SelfAttention
from tests.engine.dry_run.toys import toy_config


@pytest.mark.parametrize(
    "config", [dict(toy_config().model.backbone), dict(type="DINOv3ConvNeXt", arch="tiny")]
)
def test_inference_of_backbones(config):
    backbone = MODELS.build(config).eval()
    with fake_cuda():
        backbone.to("cuda")
        images = torch.ones(40, 3, 64, 64, device="cuda")
        for autocast in (False, True):
            with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                features = backbone(images)
                tokens = backbone.forward_tokens(images)
            assert all(feature.is_cuda for feature in features)
            assert tokens.cls.is_cuda and tokens.patches.is_cuda
            # On a GPU a batch is not cut into parts that fit a cache.
            part = backbone if hasattr(backbone, "_max_chunk_rows") else _first_convnext(backbone)
            assert part._max_chunk_rows(images) is None


def _first_convnext(backbone):
    return next(m for m in backbone.modules() if hasattr(m, "_max_chunk_rows"))


def test_packed_attention_is_for_several_sequences_on_a_gpu(monkeypatch):
    monkeypatch.setattr(attention, "fastest_backend", lambda index: "varlen")
    layer = SelfAttention(16, 2)
    with fake_cuda():
        tokens = torch.ones(8, 16, device="cuda", dtype=torch.bfloat16)
        packing = layer.pack(tokens, [(1, 4), (2, 2)])
        assert packing.backend == "varlen" and packing.longest == 4
        assert packing.starts.device == CUDA and packing.starts.shape == (4,)
        assert layer.pack(tokens, [(2, 4)]).backend == "sdpa"
        assert layer.pack(tokens.float(), [(1, 4), (2, 2)]).backend == "sdpa"
        assert layer.pack(torch.ones(8, 16), [(1, 4), (2, 2)]).backend == "sdpa"


def test_neighbours_are_found_where_the_features_are():
    with fake_cuda():
        found = nearest_neighbours(
            torch.ones(600, 8, device="cuda"), torch.ones(9000, 8, device="cuda"), 3
        )
        assert [each.device for each in found] == [CUDA, CUDA]
        with pytest.raises(RuntimeError, match="two different devices"):
            nearest_neighbours(torch.ones(5, 8, device="cuda"), torch.ones(9, 8), 3)


def test_a_flag_comes_late_from_a_gpu():
    with fake_cuda():
        flag = _PendingFlag(torch.zeros((), dtype=torch.bool, device="cuda"))
        assert flag.is_late and not flag._value.is_cuda


def test_the_generator_of_the_gpu_is_captured():
    with fake_cuda():
        assert set(random_state(CUDA)) == {"cpu", "cuda"}
        assert set(random_state(torch.device("cpu"))) == {"cpu"}


def test_memory_is_that_of_the_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**30)
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda index: SimpleNamespace(total_memory=80 * 2**30),
    )
    assert "CUDA" not in console.memory_text() and resolve.gpu_gib() is None
    with fake_cuda():
        assert console.memory_text() == "3.00 GiB CUDA"
        assert resolve.gpu_gib() == 80


def test_the_first_screen_names_the_gpu():
    with fake_cuda():
        model = torch.nn.Linear(2, 2, device=CUDA)
        assert _device(model) == f"1 process on {torch.cuda.get_device_name(CUDA)}"


def test_ranks_without_gpus_wrap_their_model_without_an_index(monkeypatch):
    monkeypatch.setattr(host_config, "is_distributed", lambda: True)
    cfg = Config(dict(find_unused_parameters=True))
    wrapper = for_cpu_ranks(cfg).model_wrapper_cfg
    assert wrapper["device_ids"] is None and wrapper["find_unused_parameters"]
    assert "model_wrapper_cfg" not in cfg
    with fake_cuda():
        assert for_cpu_ranks(cfg) is cfg


def test_a_rank_takes_the_gpu_of_its_number():
    placement = launch.Placement(rank=1, world_size=2, local_rank=1, local_world_size=2)
    for gpus, expected in ((2, 1), (1, 0)):  # srun --gpus-per-task=1 shows each its own
        with fake_cuda(), patch.object(torch.cuda, "device_count", lambda gpus=gpus: gpus):
            assert launch.device_index(placement) == expected
            assert launch.sees_one_of_several(placement) == (gpus == 1)


def test_only_backbones_on_the_cpu_are_exported():
    backbone = MODELS.build(dict(toy_config().model.backbone)).eval()
    with fake_cuda():
        backbone.to("cuda")
        with pytest.raises(ValueError, match=r"float32 on cuda:0; give it in fp32 on the CPU"):
            _check_backbone(backbone, None)
