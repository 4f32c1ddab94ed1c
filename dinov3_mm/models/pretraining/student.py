"""The trained networks: a backbone with a DINO and an iBOT head."""

import copy
import os
from collections.abc import Mapping

from mmengine.registry import MODELS
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dinov3_mm.checkpoints import install_weights, load_weights

HEADS = ("dino_head", "ibot_head")


def build_student(backbone: dict | nn.Module, dino_head: dict, ibot_head: dict) -> nn.ModuleDict:
    """Build ``backbone``, ``dino_head`` and ``ibot_head``; the heads take the backbone's width.

    Raises:
        TypeError: a head that is no config dict.
        ValueError: a head whose ``in_dims`` is not the backbone's width, or batch normalisation.
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
    student = nn.ModuleDict({"backbone": backbone, **heads})
    for name, module in student.named_modules():
        if isinstance(module, _BatchNorm):
            raise ValueError(
                f"{name} is a {type(module).__name__}: batch normalisation leaks information "
                "between the images of a batch and has no meaning in the EMA teacher; use a "
                "backbone without it"
            )
    return student


def load_student(student: nn.ModuleDict, path: str | os.PathLike) -> None:
    """Load backbone and both heads of a training state or teacher export, strictly.

    Raises:
        FileNotFoundError: no such file.
        ValueError: weights that lack a head or do not fit.
    """
    checkpoint = load_weights(path, heads=True, arch=student.backbone.arch_settings)
    missing = [name for name in HEADS if name not in checkpoint.heads]
    if missing:
        raise ValueError(f"{path} holds no {' and no '.join(missing)}; start_from needs both heads")
    install_weights(student.backbone, checkpoint)
    for name in HEADS:
        try:
            student[name].load_state_dict(checkpoint.heads[name], strict=True)
        except RuntimeError as error:
            raise ValueError(f"the {name} of {path} does not fit the config: {error}") from None
