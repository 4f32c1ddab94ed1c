"""The algorithm without storage, and the strategy of its config, which wraps it as in a run."""

import copy
import logging
import tempfile
from collections.abc import Iterator
from unittest.mock import patch

import torch
from mmengine._strategy import base
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.optim import OptimWrapperDict
from mmengine.registry import MODELS, STRATEGIES
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.checkpoint import metadata
from torch.utils._pytree import tree_map_only

from dinov3_mm.engine.optim import PretrainOptimWrapper
from dinov3_mm.engine.strategies.ddp import (
    PretrainStrategy,
    backbones_of,
    check_settings,
    networks_of,
)
from dinov3_mm.engine.strategies.fsdp2 import materialise
from dinov3_mm.engine.training_state import allocate_moments, optimizer_tensors
from dinov3_mm.errors import ConfigError
from dinov3_mm.models.layers.fp8 import enable_fp8

from .config import FSDP2, strategy_name


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


def prepare(model: nn.Module, cfg: Config) -> PretrainStrategy:
    """The strategy of a config after its own ``prepare`` of a model that is on the meta device.

    Under a fake mode. No weights are drawn or read. Compiled blocks are counted; that they run as
    they are is up to the caller (``torch.compiler.set_stance``).

    Raises:
        ConfigError: what the strategy or the optimizer wrapper refuses.
    """
    name = strategy_name(cfg)
    try:
        check_settings(cfg)
        # Agrees on the time, which is no fake tensor, and opens a log file that nobody asked for.
        with (
            unset_fake_temporarily(),
            patch.object(base, "broadcast", lambda value: None),
            tempfile.TemporaryDirectory() as folder,
        ):
            strategy = STRATEGIES.build(
                dict(
                    copy.deepcopy(dict(cfg.strategy)),
                    work_dir=folder,
                    experiment_name="dry_run",
                    log_kwargs=dict(log_level="WARNING"),
                    env_kwargs=dict(randomness=dict(cfg.randomness)),
                )
            )
            _forget_logger(strategy.logger)
        strategy._init_model_weights = lambda model: model
        strategy._init_shards = lambda model: None
        if name != FSDP2:
            _build_on_host(model)
        strategy.prepare(
            model,
            optim_wrapper=copy.deepcopy(dict(cfg.optim_wrapper)),
            dispatch_kwargs=dict(max_iters=cfg.train_cfg["max_iters"]),
        )
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error)) from error
    return strategy


def _build_on_host(model: nn.Module) -> None:
    """Fake CPU tensors in place of all others: what a strategy gets that moves the model itself.

    Copies that a model makes of its parts while it is built would read the addresses of tensors.
    """
    materialise(model, torch.device("cpu"))
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.clone()


def _forget_logger(logger: MMLogger) -> None:
    """Close its file; a dry run in the same second would be given this logger again."""
    MMLogger._instance_dict.pop(logger.instance_name, None)
    for handler in list(logger.handlers):
        if isinstance(handler, logging.FileHandler):
            logger.removeHandler(handler)
            handler.close()


def begin(strategy: PretrainStrategy) -> None:
    """Give the optimizers the state that they have after their first step and a resume."""
    for wrapper in wrappers_of(strategy.optim_wrapper):
        _take_first_step(wrapper)
    if type(strategy).__name__ == FSDP2:
        _resume_shards(strategy.optim_wrapper.optimizer)
        return
    for wrapper in wrappers_of(strategy.optim_wrapper):
        # As it is read from a file.
        stored = tree_map_only(Tensor, lambda value: value.cpu(), wrapper.state_dict())
        wrapper.load_state_dict(stored)


def _resume_shards(optimizer: torch.optim.Optimizer) -> None:
    stored = {
        name: metadata.TensorStorageMetadata(
            metadata.TensorProperties(dtype=value.dtype), value.size(), []
        )
        for name, value in optimizer_tensors(optimizer).items()
    }
    optimizer.state.clear()
    allocate_moments(optimizer, stored)


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
