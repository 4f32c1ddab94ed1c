"""Networks of other libraries as backbones: a feature map or tokens become CLS and patches."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from mmengine.model import BaseModule
from mmengine.model.weight_init import initialize
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from dinov3_mm.errors import nearest
from dinov3_mm.models.layers.batch_norm import SyncedBatchNorm2d, convert_batch_norm

from .outputs import TokenOutput

# --- Any module ---


# A multiple of 14, 16 and 32.
_PROBE_SIDE = 224


@MODELS.register_module()
class FeatureMapBackbone(BaseModule):
    """Any network that gives a feature map (B, C, h, w), with the interface of ``DINOv3ViT``.

    CLS is the mean of the last map, patches are its positions row by row; nothing is added and
    nothing is trained beside the network. ``embed_dims`` and ``token_stride`` are found by running
    it once without storage.

    Batch normalisation needs a decision, because the EMA copy of a student has no batches and
    because in self-distillation the images of a batch must not see each other:

    - 'sync': batch statistics of all processes' images, for students of a frozen teacher only,
      whose targets cannot follow what a batch leaks. The running statistics are those of the global
      crops, and the EMA copy averages them like parameters.
    - 'frozen': the running statistics of trained weights, which do not change.
    - 'group': group normalisation in its place. The file that is exported is then of the changed
      network.

    Args:
        module: config of the network, e.g. ``dict(type='mmpretrain.ResNet', depth=50)``, or the
            module. Of a list of maps the last is taken.
        batch_norm: 'sync', 'frozen', 'group', or None for a network without.
        in_channels: image channels that the network takes.
        init_cfg: MMEngine initialisation config.

    Attributes:
        foreign_module (nn.Module): the network; exports hold its own parameter names.

    Raises:
        ValueError: an unknown ``batch_norm``, or outputs that are no map of square images.
    """

    def __init__(
        self,
        module: dict | nn.Module,
        *,
        batch_norm: str | None = None,
        in_channels: int = 3,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        settings = dict(module) if isinstance(module, dict) else {"type": type(module).__name__}
        self._adopt(
            MODELS.build(module) if isinstance(module, dict) else module,
            dict(module=settings, batch_norm=batch_norm, in_channels=in_channels),
        )

    def _adopt(self, module: nn.Module, settings: dict[str, Any]) -> None:
        """Take the network, and measure what it gives."""
        if settings["batch_norm"] is not None:
            module = convert_batch_norm(module, settings["batch_norm"])
        self.module = module
        self.arch_settings = settings
        self.embed_dims, self.token_stride = self._measure(settings["in_channels"])
        self.patch_size = self.token_stride
        self.num_registers = 0

    @property
    def foreign_module(self) -> nn.Module:
        """The network under its library's names."""
        return self.module

    @torch.no_grad()
    def _measure(self, in_channels: int) -> tuple[int, int]:
        """Width of a token, and pixels between neighbouring ones."""
        twin = copy.deepcopy(self.module).to("meta").eval()
        images = torch.empty(1, in_channels, _PROBE_SIDE, _PROBE_SIDE, device="meta")
        cls, patches = self._tokens_of(self._run(twin, images))
        side = round(patches.shape[1] ** 0.5)
        if side * side != patches.shape[1] or _PROBE_SIDE % side:
            raise ValueError(
                f"{type(self.module).__name__} gives {patches.shape[1]} positions for an image of "
                f"{_PROBE_SIDE} x {_PROBE_SIDE} pixels; expected a square whose side divides "
                f"{_PROBE_SIDE}"
            )
        return cls.shape[-1], _PROBE_SIDE // side

    def _run(self, module: nn.Module, images: Tensor) -> Tensor:
        """What the network gives for images."""
        output = module(images)
        return output[-1] if isinstance(output, (list, tuple)) else output

    def _tokens_of(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """CLS (B, C) and patches (B, N, C) of the network's output."""
        if output.ndim != 4:
            raise ValueError(
                f"{type(self.module).__name__} gives a tensor of shape {tuple(output.shape)}; "
                "expected a feature map (B, C, h, w)"
            )
        patches = output.flatten(2).transpose(1, 2)
        return patches.mean(1), patches

    def forward_tokens(
        self,
        images: Tensor | Sequence[Tensor],
        masks: Tensor | Sequence[Tensor | None] | None = None,
    ) -> TokenOutput | list[TokenOutput]:
        """Tokens of the last map.

        Args:
            images: normalised images (B, C, H, W), or a list of such batches. In training only the
                first moves the running statistics of synced batch norms.
            masks: accepted for the interface of the ViT and ignored.

        Returns:
            One :class:`TokenOutput` per entry, ``registers`` (B, 0, C).
        """
        if isinstance(images, Tensor):
            return self._token_output(images)
        outputs = [self._token_output(images[0])]
        with _kept_statistics(self.module):
            outputs += [self._token_output(batch) for batch in images[1:]]
        return outputs

    def _token_output(self, images: Tensor) -> TokenOutput:
        cls, patches = self._tokens_of(self._run(self.module, images))
        return TokenOutput(cls, patches[:, :0], patches, patches)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The last map (B, C, h, w) of normalised square images, as a tuple of one."""
        patches = self._token_output(x).patches
        height = x.shape[-2] // self.token_stride
        return (patches.transpose(1, 2).unflatten(2, (height, -1)),)


@contextmanager
def _kept_statistics(module: nn.Module) -> Iterator[None]:
    norms = [child for child in module.modules() if isinstance(child, SyncedBatchNorm2d)]
    for norm in norms:
        norm.keeps_statistics = False
    try:
        yield
    finally:
        for norm in norms:
            norm.keeps_statistics = True


# --- timm ---


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
