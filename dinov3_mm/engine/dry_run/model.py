"""The algorithm without storage, wrapped as its strategy would wrap it."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.model import MMDistributedDataParallel, is_model_wrapper
from mmengine.optim import OptimWrapperDict, build_optim_wrapper
from mmengine.registry import MODELS
from torch import nn

from dinov3_mm.engine.config import ConfigError
from dinov3_mm.engine.fsdp2.accumulation import GradientReduction
from dinov3_mm.engine.fsdp2.alignment import check_alignment
from dinov3_mm.engine.fsdp2.initialisation import materialise
from dinov3_mm.engine.fsdp2.sharding import ShardingPolicy, build_mesh, shard_model
from dinov3_mm.engine.networks import backbones_of, networks_of
from dinov3_mm.engine.optim import PretrainOptimWrapper
from dinov3_mm.engine.strategy import DDP_SETTINGS
from dinov3_mm.models.layers.fp8 import enable_fp8
from dinov3_mm.models.pretraining.groups import group_as_world

from .settle import DDP, FSDP2, MULTI, strategy_name

_SHARDING = ("param_dtype", "reduce_dtype", "reshard_after_forward", "num_prefetch")


def build_on_meta(cfg: Config) -> nn.Module:
    """The algorithm on the meta device.

    Raises:
        ConfigError: what the model's own checks refuse.
    """
    try:
        with torch.device("meta"):
            model = MODELS.build(copy.deepcopy(cfg.model))
        pattern = cfg.strategy.get("fp8_filter")
        if pattern is not None:
            for backbone in backbones_of(model):
                enable_fp8(backbone, pattern)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"model: {error}") from error
    return model


def shard(model: nn.Module, cfg: Config) -> None:
    """Shard the meta tensors of a model with an FSDP2 strategy; leave others as they are.

    Raises:
        ConfigError: arguments of the strategy that do not fit the ranks.
    """
    if strategy_name(cfg) != FSDP2:
        return
    try:
        policy = ShardingPolicy.of(**{k: cfg.strategy[k] for k in _SHARDING if k in cfg.strategy})
        mesh = build_mesh("cpu", cfg.strategy.get("num_replicas", 1))
    except ValueError as error:
        raise ConfigError(f"strategy: {error}") from error
    shard_model(model, mesh, policy)
    check_alignment(model)


def wrap(model: nn.Module, cfg: Config) -> nn.Module:
    """Give a model fake storage and the wrapper of its strategy; under ``FakeTensorMode``."""
    materialise(model, torch.device("cpu"))
    # What was on the CPU already is moved by nobody, and becomes fake here.
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.clone()
    settings = {**DDP_SETTINGS, **(cfg.strategy.get("model_wrapper") or {})}
    if strategy_name(cfg) == DDP:
        return _in_ddp(model, settings)
    if strategy_name(cfg) == MULTI and dist.is_initialized():
        for name, student in list(model.students.items()):
            with group_as_world(model.groups[name]):
                model.students[name] = _in_ddp(student, settings)
    return model


def _in_ddp(model: nn.Module, settings: Mapping[str, Any]) -> nn.Module:
    wrapped = MMDistributedDataParallel(module=model, init_sync=False, **settings)
    wrapped.register_comm_hook(None, _all_reduce_bucket)
    wrapped.reducer = _FixedBuckets(wrapped.reducer)
    return wrapped


def build_optimizer(model: nn.Module, cfg: Config) -> PretrainOptimWrapper | OptimWrapperDict:
    """The optimizer wrapper of the config, with the state that it has after its first step.

    Raises:
        ConfigError: an optimizer that the wrapper or the strategy refuses.
    """
    try:
        wrapper = build_optim_wrapper(model, copy.deepcopy(dict(cfg.optim_wrapper)))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"optim_wrapper: {error}") from error
    is_sharded = strategy_name(cfg) == FSDP2
    if is_sharded and not isinstance(wrapper.optimizer, torch.optim.Adam):  # AdamW is one
        raise ConfigError(
            f"optim_wrapper.optimizer: the fused {type(wrapper.optimizer).__name__} of torch does "
            "not step on shards; use AdamW or Adam with FSDP2Strategy"
        )
    for each in wrappers_of(wrapper):
        _take_first_step(each)
    if is_sharded:
        every = cfg.strategy.get("reduce_every_micro_batch", False)
        wrapper.reduce_gradients = GradientReduction(model, every_micro_batch=every)
    return wrapper


def wrappers_of(
    wrapper: PretrainOptimWrapper | OptimWrapperDict,
) -> list[PretrainOptimWrapper]:
    """The optimizer wrapper, or those of several students."""
    return [*wrapper.values()] if isinstance(wrapper, OptimWrapperDict) else [wrapper]


def _take_first_step(wrapper: PretrainOptimWrapper) -> None:
    params = [param for group in wrapper.param_groups for param in group["params"]]
    for param in params:
        param.grad = torch.zeros_like(param)
    wrapper.optimizer.step()
    for param in params:
        param.grad = None


def algorithm_of(model: nn.Module) -> nn.Module:
    """The model without a distributed wrapper."""
    return model.module if is_model_wrapper(model) else model


def students_of(algorithm: nn.Module) -> dict[str, nn.Module]:
    """The algorithm of each student of this rank, without a distributed wrapper; of one as ''."""
    if not hasattr(algorithm, "local_students"):
        return {"": algorithm}
    return dict(algorithm.local_students())


def all_networks(algorithm: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of every network of this rank, also of students in distributed wrappers."""
    for student, each in students_of(algorithm).items():
        prefix = f"{student}: " if student else ""
        for name, network in networks_of(each):
            yield f"{prefix}{name}", network
    if hasattr(algorithm, "local_students"):
        yield "distillation_teacher", algorithm.distillation_teacher


def _all_reduce_bucket(_state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """DDP's own all-reduce; a fake process group has no future of it."""
    dist.all_reduce(bucket.buffer())
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


class _FixedBuckets:
    """DDP's reducer, without the exchange of bucket sizes, which reads values."""

    def __init__(self, reducer: Any) -> None:
        self._reducer = reducer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reducer, name)

    def _rebuild_buckets(self) -> bool:
        return False
