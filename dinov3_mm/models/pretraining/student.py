"""The trained networks: a backbone with a DINO and an iBOT head."""

import copy
import os
from collections.abc import Mapping

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm

from dinov3_mm.checkpoints import install_weights, load_weights
from dinov3_mm.checkpoints.sharding import shard_state

from ..layers.batch_norm import FrozenBatchNorm2d, SyncedBatchNorm2d

HEADS = ("dino_head", "ibot_head")
# Values from which a tensor of the EMA teacher is moved by a kernel of its own.
_OWN_KERNEL = 2**16


def build_student(backbone: dict | nn.Module, dino_head: dict, ibot_head: dict) -> nn.ModuleDict:
    """Build ``backbone``, ``dino_head`` and ``ibot_head``; the heads take the backbone's width.

    Raises:
        TypeError: a head that is no config dict.
        ValueError: a head whose ``in_dims`` is not the backbone's width.
    """
    backbone = backbone if isinstance(backbone, nn.Module) else MODELS.build(backbone)
    heads = {}
    for name, cfg in zip(HEADS, (dino_head, ibot_head), strict=True):
        if not isinstance(cfg, Mapping):
            raise TypeError(f"{name} must be a config dict, got {type(cfg).__name__}")
        width = backbone.embed_dims
        if cfg.get("in_dims", width) != width:
            raise ValueError(
                f"{name}: in_dims is {cfg['in_dims']}, but the backbone's features have {width}; "
                "leave in_dims out"
            )
        heads[name] = MODELS.build({**copy.deepcopy(dict(cfg)), "in_dims": width})
    return nn.ModuleDict({"backbone": backbone, **heads})


def check_batch_norm(student: nn.ModuleDict, *, has_frozen_teacher: bool) -> None:
    """Refuse batch norms whose statistics are of the batch, unless the teacher is frozen.

    Raises:
        ValueError: a batch norm that is neither frozen nor, under a frozen teacher, synced.
    """
    allowed = (FrozenBatchNorm2d, SyncedBatchNorm2d) if has_frozen_teacher else FrozenBatchNorm2d
    for name, module in student.named_modules():
        if isinstance(module, _BatchNorm) and not isinstance(module, allowed):
            raise ValueError(
                f"{name} is a {type(module).__name__}: batch normalisation leaks information "
                "between the images of a batch and has no meaning in the EMA teacher. Use a "
                "backbone without it, or TimmBackbone or FeatureMapBackbone with "
                "batch_norm='group', 'frozen' (trained statistics) or, as the student of a frozen "
                "teacher, 'sync'"
            )


def check_mask_token(backbone: nn.Module) -> None:
    """Raise a ``ValueError`` for a backbone from which patches cannot be hidden."""
    if not hasattr(backbone, "mask_token"):
        raise ValueError(
            f"{type(backbone).__name__} has no mask token, so patches cannot be hidden from it; "
            "set mask_student=False, which evaluates the iBOT term on patches that the student sees"
        )


def _running_statistics(network: nn.Module) -> list[Tensor]:
    norms = [child for child in network.modules() if isinstance(child, SyncedBatchNorm2d)]
    return [tensor for norm in norms for tensor in (norm.running_mean, norm.running_var)]


@torch.no_grad()
def follow(ema: nn.Module, network: nn.Module, momentum: float | Tensor) -> None:
    """Move an EMA copy: ``m * ema + (1 - m) * network``.

    It follows the parameters, and the running statistics of synced batch norms.

    Args:
        ema: the copy.
        network: what it follows.
        momentum: ``m``, a number or a scalar tensor, which is not read to the host.
    """
    _lerp(list(ema.parameters()), list(network.parameters()), momentum)
    statistics = _running_statistics(ema)
    if statistics:  # apart, because those of a sharded network are whole
        _lerp(statistics, _running_statistics(network), momentum)


def _lerp(averages: list[Tensor], values: list[Tensor], momentum: float | Tensor) -> None:
    # Shards of a network and of its copy lie alike, so each rank moves its own.
    averages, values = ([_local(t) for t in tensors] for tensors in (averages, values))
    if not isinstance(momentum, Tensor):
        torch._foreach_lerp_(averages, values, 1.0 - momentum)
        return
    step = (1.0 - momentum).to(averages[0].device, averages[0].dtype, non_blocking=True)
    # torch has no kernel of many tensors for a weight that is on the device. A matrix is moved in
    # one pass by a kernel of its own; vectors are too small for that and moved together, with
    # temporaries of their size.
    small: tuple[list[Tensor], list[Tensor]] = ([], [])
    for average, value in zip(averages, values, strict=True):
        if average.numel() >= _OWN_KERNEL:
            average.lerp_(value, step)
        else:
            small[0].append(average)
            small[1].append(value)
    if small[0]:
        change = torch._foreach_sub(small[1], small[0])
        torch._foreach_mul_(change, step)
        torch._foreach_add_(small[0], change)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def load_network(network: nn.ModuleDict, path: str | os.PathLike, *, what: str) -> str:
    """Load backbone and both heads of a training state or teacher export, strictly.

    Args:
        network: ``backbone``, ``dino_head`` and ``ibot_head``.
        path: the file.
        what: who needs it, for messages.

    Returns:
        One line about what was loaded.

    Raises:
        FileNotFoundError: no such file.
        ValueError: weights that lack a head or do not fit.
    """
    checkpoint = load_weights(path, heads=True, arch=network["backbone"].arch_settings)
    missing = [name for name in HEADS if name not in checkpoint.heads]
    if missing:
        raise ValueError(f"{path} holds no {' and no '.join(missing)}; {what} needs both heads")
    report = install_weights(network["backbone"], checkpoint)
    for name in HEADS:
        head, state = network[name], checkpoint.heads[name]
        try:
            head.load_state_dict(shard_state(state, head.state_dict()), strict=True)
        except RuntimeError as error:
            raise ValueError(f"the {name} of {path} does not fit the config: {error}") from None
    return str(report)
