"""Networks of timm as students."""

from types import ModuleType
from typing import Any

import torch
from mmengine.model.weight_init import initialize
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from dinov3_mm.suggest import nearest

from ..layers.batch_norm import convert_batch_norm
from .feature_map import FeatureMapBackbone


@MODELS.register_module()
class TimmBackbone(FeatureMapBackbone):
    """A timm model without its classifier; see :class:`FeatureMapBackbone`.

    What ``forward_features`` gives becomes tokens: of a map, CLS is the mean and patches are the
    positions; of a transformer, CLS is its class token (the mean where it has none) and other
    prefix tokens are left out. An exported file holds timm's names:
    ``timm.create_model(name, num_classes=0, checkpoint_path=FILE)`` loads it.

    Args:
        name: as in ``timm.list_models()``.
        pretrained: start from timm's weights, which timm looks for in its cache and then fetches.
        batch_norm: see :class:`FeatureMapBackbone`.
        in_channels: image channels.
        model_args: further arguments of ``timm.create_model``, such as ``drop_path_rate``, or
            ``dynamic_img_size=True``, which timm's ViTs need for crops of several sizes.
        init_cfg: MMEngine initialisation config.

    Raises:
        ImportError: timm is not installed.
        ValueError: timm has no such model, or see :class:`FeatureMapBackbone`.
    """

    def __init__(
        self,
        name: str,
        *,
        pretrained: bool = False,
        batch_norm: str | None = None,
        in_channels: int = 3,
        model_args: dict[str, Any] | None = None,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super(FeatureMapBackbone, self).__init__(init_cfg)
        self.pretrained = pretrained
        settings = dict(
            name=name,
            batch_norm=batch_norm,
            in_channels=in_channels,
            model_args=dict(model_args or {}),
        )
        self._adopt(_create(settings, pretrained=False), settings)

    def init_weights(self) -> None:
        """Take timm's weights, or draw new ones as timm does."""
        fresh = _create(self.arch_settings, pretrained=self.pretrained)
        if self.arch_settings["batch_norm"] is not None:
            fresh = convert_batch_norm(fresh, self.arch_settings["batch_norm"])
        target = self.module.state_dict()
        with torch.no_grad():
            for key, value in fresh.state_dict().items():
                target[key].copy_(_placed(value, target[key]))
        if self.init_cfg:
            initialize(self, self.init_cfg)
        self._is_init = True

    def _run(self, module: nn.Module, images: Tensor) -> Tensor:
        features = module.forward_features(images)
        if features.ndim == 4 and getattr(module, "output_fmt", "NCHW") == "NHWC":
            return features.permute(0, 3, 1, 2)
        return features

    def _tokens_of(self, output: Tensor) -> tuple[Tensor, Tensor]:
        if output.ndim != 3:
            return super()._tokens_of(output)
        num_prefix = getattr(self.module, "num_prefix_tokens", 0)
        patches = output[:, num_prefix:]
        has_cls = getattr(self.module, "cls_token", None) is not None
        return (output[:, 0] if has_cls else patches.mean(1)), patches


def _create(settings: dict[str, Any], *, pretrained: bool) -> nn.Module:
    timm = _timm()
    name = settings["name"]
    if not timm.is_model(name):
        match = nearest(name, timm.list_models())
        raise ValueError(
            f"timm {timm.__version__} has no model {name!r}; "
            + (f"did you mean {match!r}?" if match else "timm.list_models() names all of them")
        )
    # timm computes with tensors while it builds, which a device without storage cannot.
    with torch.device("cpu"):
        return timm.create_model(
            name,
            pretrained=pretrained,
            num_classes=0,
            in_chans=settings["in_channels"],
            **settings["model_args"],
        )


def _timm() -> ModuleType:
    try:
        import timm
    except ImportError as error:
        raise ImportError("TimmBackbone needs timm: pip install 'timm>=1.0.20'") from error
    return timm


def _placed(value: Tensor, target: Tensor) -> Tensor:
    """``value`` on the device of ``target``, or this rank's shard of it."""
    value = value.to(target.device)
    if not isinstance(target, DTensor):
        return value
    return distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
