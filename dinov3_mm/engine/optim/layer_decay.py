"""Layer-wise learning-rate decay for backbones that are fine-tuned inside a host's model."""

import copy
import re
from collections.abc import Iterator
from numbers import Real

from mmengine.logging import print_log
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, OPTIMIZERS
from torch import nn

from dinov3_mm.errors import hint
from dinov3_mm.models.backbones.convnext import ConvNeXtTrunk
from dinov3_mm.models.backbones.vit_trunk import ViTTrunk
from dinov3_mm.models.wrapping import unwrapped

from .optimizer import param_multipliers, plain_name

PARAMWISE_KEYS = ("layerwise_decay", "patch_embed_lr_mult", "head_lr_mult", "custom_keys")
CUSTOM_KEYS = ("lr_mult", "decay_mult")

_CONVNEXT_LAYER = re.compile(r"(downsample_layers|stages)\.(\d+)\.(\d+)\.")
_LONG_STAGE = 2
_BLOCKS_PER_LAYER = 3


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimConstructor:
    """Optimizer over a host's model whose learning rate falls towards the backbone's first layer.

    Works for every :class:`DINOv3ViT`, :class:`DINOv2ViT` and :class:`DINOv3ConvNeXt` in a model of
    mmpretrain, mmseg or mmdet, also inside adapters and ``LoRAModel``. The final norm of the
    backbone has its full learning rate, every layer below ``layerwise_decay`` times that of the
    layer above, tokens and patch embedding lie below the first block. The layers of a ConvNeXt are
    its stages, the long third one in groups of three blocks (arXiv 2201.03545, appendix A).

    Frozen parameters are left out, so that they have neither state nor decay. Weight decay applies
    to matrices and kernels: not to biases, norms, layer scales, tokens, queries and embeddings.

    Args:
        optim_wrapper_cfg: ``dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=...))``.
        paramwise_cfg: ``layerwise_decay`` (1.0); ``patch_embed_lr_mult`` (1.0), an extra factor of
            the patch embedding; ``head_lr_mult`` (1.0), the factor of all parameters outside the
            backbone; ``custom_keys``, for parameters whose name contains the key
            ``dict(lr_mult=1.0, decay_mult=...)``, factors of the learning rate, and of the weight
            decay in place of the rule above. Of several keys the longest counts.

    Raises:
        ValueError: An unknown or negative setting, an optimizer without ``lr``, a custom key that
            matches nothing, a model without such a backbone or with nothing to train.

    Example:
        >>> optim_wrapper = dict(
        ...     constructor="LayerDecayOptimConstructor",
        ...     optimizer=dict(type="AdamW", lr=1e-4, weight_decay=0.05),
        ...     paramwise_cfg=dict(layerwise_decay=0.75),
        ... )
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        if "lr" not in optim_wrapper_cfg.get("optimizer", {}):
            raise ValueError(
                "LayerDecayOptimConstructor needs optimizer=dict(type='AdamW', lr=...), "
                f"given {optim_wrapper_cfg}"
            )
        self.wrapper_cfg = copy.deepcopy(dict(optim_wrapper_cfg))
        self.optimizer_cfg = self.wrapper_cfg.pop("optimizer")
        settings = dict(paramwise_cfg or {})
        self.custom_keys = dict(settings.pop("custom_keys", {}))
        _check("paramwise_cfg", settings, PARAMWISE_KEYS)
        for key, custom in self.custom_keys.items():
            _check(f"custom_keys[{key!r}]", custom, CUSTOM_KEYS)
        self.head_lr_mult = settings.pop("head_lr_mult", 1.0)
        self.backbone_settings = settings

    def __call__(self, model: nn.Module):
        """Return the optimizer wrapper of the trainable parameters of ``model``."""
        model = unwrapped(model)
        backbones = {
            f"{name}." if name else "": module
            for name, module in model.named_modules()
            if isinstance(module, ViTTrunk | ConvNeXtTrunk)
        }
        if not backbones:
            raise ValueError(
                f"{type(model).__name__} has no backbone of this package, whose layers "
                "LayerDecayOptimConstructor knows; use the host's own constructor"
            )
        groups = self._groups(model, backbones)
        if not groups:
            raise ValueError(
                f"no parameter of this {type(model).__name__} requires a gradient: nothing to train"
            )
        optimizer = OPTIMIZERS.build({**self.optimizer_cfg, "params": groups})
        _log(optimizer.param_groups)
        return OPTIM_WRAPPERS.build(
            {"type": "OptimWrapper", **self.wrapper_cfg, "optimizer": optimizer}
        )

    def _groups(self, model: nn.Module, backbones: dict[str, nn.Module]) -> list[dict]:
        groups: dict[tuple[float, float], list] = {}
        used = set()
        for name, param, is_decayed in _trainable(model):
            lr_mult = self._lr_multiplier(name, backbones)
            wd_mult = float(is_decayed)
            key = max((k for k in self.custom_keys if k in name), key=len, default=None)
            if key is not None:
                used.add(key)
                lr_mult *= self.custom_keys[key].get("lr_mult", 1.0)
                wd_mult = self.custom_keys[key].get("decay_mult", wd_mult)
            groups.setdefault((lr_mult, wd_mult), []).append((name, param))
        if unused := [key for key in self.custom_keys if key not in used]:
            raise ValueError(f"custom_keys: no trainable parameter has {unused[0]!r} in its name")
        lr, weight_decay = self.optimizer_cfg["lr"], self.optimizer_cfg.get("weight_decay")
        return [
            {
                "params": params,
                "lr": lr * lr_mult,
                "lr_scale": lr_mult,
                **({} if weight_decay is None else {"weight_decay": weight_decay * wd_mult}),
            }
            for (lr_mult, wd_mult), params in groups.items()
        ]

    def _lr_multiplier(self, name: str, backbones: dict[str, nn.Module]) -> float:
        prefix = next((prefix for prefix in backbones if name.startswith(prefix)), None)
        if prefix is None:
            return self.head_lr_mult
        backbone, name = backbones[prefix], name.removeprefix(prefix)
        if isinstance(backbone, ConvNeXtTrunk):
            decay = self.backbone_settings.get("layerwise_decay", 1.0)
            stem = name.startswith("downsample_layers.0.")
            extra = self.backbone_settings.get("patch_embed_lr_mult", 1.0) if stem else 1.0
            return extra * decay ** convnext_layers_above(name, backbone.arch_settings["depths"])
        depth = len(backbone.blocks)
        return param_multipliers(name, depth=depth, **self.backbone_settings).lr_multiplier


def convnext_layers_above(name: str, depths: list[int]) -> int:
    """Number of layers between a parameter of a ConvNeXt and its final norm.

    The stem is the lowest layer. The first, second and fourth stage are one layer each, the third
    one of groups of three blocks; the downsampling before a stage belongs to its first layer.

    Args:
        name: parameter name relative to the backbone.
        depths: blocks of the four stages.
    """
    long_layers = -(-depths[_LONG_STAGE] // _BLOCKS_PER_LAYER)
    top = 1 + _LONG_STAGE + long_layers + 1  # of the final norm; the stem is layer 0
    match = _CONVNEXT_LAYER.match(name)
    if match is None:
        return 0
    part, stage, block = match.group(1), int(match.group(2)), int(match.group(3))
    if part == "downsample_layers":
        if stage == 0:
            return top
        block = 0
    if stage < _LONG_STAGE:
        layer = 1 + stage
    elif stage == _LONG_STAGE:
        layer = 1 + stage + block // _BLOCKS_PER_LAYER
    else:
        layer = top - 1
    return top - layer


def _trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, bool]]:
    """Name, parameter and whether it is decayed, each parameter once."""
    seen = set()
    for prefix, module in model.named_modules():
        is_kernel = not isinstance(module, nn.Embedding)
        for own_name, param in module.named_parameters(recurse=False):
            if not param.requires_grad or id(param) in seen:
                continue
            seen.add(id(param))
            name = plain_name(f"{prefix}.{own_name}" if prefix else own_name)
            yield name, param, is_kernel and own_name.endswith("weight") and param.ndim > 1


def _check(where: str, settings: dict, known: tuple[str, ...]) -> None:
    for key, value in settings.items():
        if key not in known:
            raise ValueError(f"{where} has no setting {key!r}: {hint(key, known)}")
        if not isinstance(value, Real) or value < 0:
            raise ValueError(f"{where}: {key} must be a number >= 0, given {value!r}")


def _log(groups: list[dict]) -> None:
    rates = sorted(group["lr"] for group in groups)
    count = sum(param.numel() for group in groups for param in group["params"])
    print_log(
        f"LayerDecayOptimConstructor: {count / 1e6:.2f} M parameters in {len(groups)} groups, "
        f"learning rates from {rates[0]:.3g} to {rates[-1]:.3g}",
        logger="current",
    )
