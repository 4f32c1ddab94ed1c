"""A GPU without storage: what it accepts and refuses, and the faults that a real one would show.

No driver is needed. Each test of the second half failed before the code under it was mended.
"""

import pytest
import torch
from mmengine.registry import STRATEGIES
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor

from dinov3_mm.engine.dry_run.batches import crop_sets, make_batch
from dinov3_mm.engine.dry_run.config import needs_process_group, settle_config
from dinov3_mm.engine.dry_run.fake_cuda import CUDA, fake_cuda
from dinov3_mm.engine.dry_run.fake_world import fake_device, fake_ranks
from dinov3_mm.engine.strategies import fsdp2 as fsdp2_strategy
from dinov3_mm.engine.training_state import (
    load_sharded_state,
    read_training_state,
    save_sharded_state,
    write_training_state,
)
from dinov3_mm.models.layers.fp8 import fp8_linear
from tests.engine.dry_run.toys import toy_config


def test_devices_are_told_apart():
    with fake_cuda():
        host, gpu = torch.ones(3), torch.ones(3, device="cuda")
        assert (host.is_cuda, gpu.is_cuda, gpu.device) == (False, True, CUDA)
        assert gpu.cpu().device.type == "cpu" and host.to(gpu).is_cuda and host.type_as(gpu).is_cuda
        assert torch.where(gpu > 0, 1.0, 2.0).is_cuda and gpu.new_zeros(2).is_cuda
        # To where it is already: no copy.
        assert gpu.to("cuda").untyped_storage()._cdata == gpu.untyped_storage()._cdata
        with pytest.raises(RuntimeError, match="two different devices"):
            host + gpu
        with pytest.raises(RuntimeError, match="same device"):
            torch.stack([gpu.sum(), host.sum()])
    assert "is_cuda" not in vars(FakeTensor) and "device" not in vars(DTensor)


def test_backward_and_autocast_are_those_of_cuda():
    with fake_cuda():
        layer = nn.Linear(8, 8).to("cuda")
        x = torch.ones(2, 8, device="cuda")
        with torch.autocast("cuda", torch.bfloat16):
            hidden = layer(x)
            # On the CPU autocast leaves norms in bfloat16.
            normed = nn.functional.layer_norm(hidden, (8,))
            detached = layer(hidden.detach())
        assert [t.dtype for t in (hidden, normed, detached)] == [
            torch.bfloat16,
            torch.float32,
            torch.bfloat16,
        ]
        (normed.sum() + detached.sum()).backward()
        assert layer.weight.grad.is_cuda and layer.weight.grad.dtype == torch.float32


def test_attention_takes_the_kernels_of_a_gpu():
    with fake_cuda():
        for dtype, kernel in ((torch.bfloat16, "Flash"), (torch.float32, "Efficient")):
            heads = torch.ones(1, 2, 16, 8, device="cuda", dtype=dtype, requires_grad=True)
            out = nn.functional.scaled_dot_product_attention(heads, heads, heads)
            assert kernel in type(out.grad_fn).__name__
            out.sum().backward()
            assert heads.grad.shape == heads.shape


STRATEGY_RUNS = [("PretrainStrategy", 1), ("PretrainDDPStrategy", 2), ("FSDP2Strategy", 1)]


@pytest.mark.parametrize(("kind", "world_size"), [*STRATEGY_RUNS, ("FSDP2Strategy", 4)])
def test_the_first_step_of_a_strategy(kind, world_size, tmp_path, monkeypatch):
    """The data preprocessor must learn where the strategy put the model, and move batches there."""
    cfg = toy_config(strategy=dict(type=kind), model__compute_dtype="bf16")
    with fake_ranks(world_size if needs_process_group(cfg, world_size) else None):
        settle_config(cfg, world_size, num_images=1000)
        (crops,) = crop_sets(cfg, world_size)
        strategy = STRATEGIES.build(dict(cfg.strategy, work_dir=str(tmp_path)))
        model = strategy.build_model(dict(cfg.model))
        # Reads values, of which there are none.
        monkeypatch.setattr(fsdp2_strategy, "check_initialised", lambda model: None)
        with fake_device(on_gpu=True):
            strategy.prepare(
                model, optim_wrapper=cfg.optim_wrapper, dispatch_kwargs=dict(max_iters=9)
            )
            algorithm = strategy.unwrapped_model
            assert algorithm.data_preprocessor.device == CUDA
            algorithm.set_step(teacher_temp=0.07)
            batch = make_batch(cfg, crops, channels=3)
            assert not batch["global_crops"].is_cuda
            losses = strategy.model.train_step(batch, strategy.optim_wrapper)
            assert losses["loss"].is_cuda
            devices = {
                value.device
                for state in strategy.optim_wrapper.optimizer.state.values()
                for value in state.values()
            }
            assert devices == {CUDA}


OPTIMIZERS = [
    (torch.optim.AdamW, dict()),
    (torch.optim.Adam, dict(amsgrad=True)),
    (torch.optim.SGD, dict(momentum=0.9)),
]


class _Algorithm(nn.Module):
    def __init__(self, device: str) -> None:
        super().__init__()
        self.student = nn.Linear(4, 4, device=device)

    def learn(self, optimizer: torch.optim.Optimizer) -> None:
        self.student(torch.ones(2, 4, device=self.student.weight.device)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def _optimizer(model: nn.Module, kind: type, settings: dict) -> torch.optim.Optimizer:
    names, params = zip(*model.named_parameters())
    groups = [dict(params=list(params), param_names=list(names))]
    return kind(groups, lr=0.1, fused=True, **settings)


@pytest.mark.filterwarnings("ignore:torch.distributed is")
@pytest.mark.parametrize("shards", [True, False])
@pytest.mark.parametrize(("kind", "settings"), OPTIMIZERS)
def test_the_step_after_a_resume(kind, settings, shards, tmp_path):
    """The fused kernels read every moment on the device, the 0-dim step count too."""
    path, model = tmp_path / "iter_1", _Algorithm("cpu")
    optimizer = _optimizer(model, kind, settings)
    model.learn(optimizer)
    if shards:
        save_sharded_state(path, model, optimizer, dict(meta=dict(iter=1)))
    else:
        write_training_state(path, dict(optimizer=optimizer.state_dict()))
    with fake_cuda():
        model = _Algorithm("cuda")
        optimizer = _optimizer(model, kind, settings)
        if shards:
            load_sharded_state(path, model, optimizer)
        else:
            optimizer.load_state_dict(read_training_state(path)["optimizer"])
        moments = [value for state in optimizer.state.values() for value in state.values()]
        assert moments and {value.device for value in moments} == {CUDA}
        model.learn(optimizer)


def test_gradients_of_float8_products():
    """The scaled product takes row-major by column-major operands, forward and backward."""
    with fake_cuda():
        leaves = [
            torch.ones(*shape, device="cuda", requires_grad=True)
            for shape in ((2, 5, 64), (128, 64), (128,))
        ]
        product = fp8_linear(*leaves)
        # As from a transposed layer after it: no operand is contiguous.
        product.backward(torch.ones(2, 128, 5, device="cuda").transpose(1, 2).bfloat16())
        assert [leaf.grad.shape for leaf in leaves] == [leaf.shape for leaf in leaves]


def test_operations_in_place_under_autocast():
    """What timm's ResNets do: the sum of two branches, and activations."""
    with fake_cuda():
        layer = nn.Linear(4, 4).to("cuda")
        with torch.autocast("cuda", torch.bfloat16):
            one, two = (layer(torch.ones(2, 4, device="cuda")) for _ in range(2))
            one += two
            out = nn.functional.relu(one, inplace=True)
        out.sum().backward()
        assert layer.weight.grad.is_cuda
