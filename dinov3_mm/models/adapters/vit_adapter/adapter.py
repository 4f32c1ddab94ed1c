"""The ViT adapter: a pyramid of features around a ViT that does not change."""

import math
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from mmengine.model import BaseModule
from mmengine.model.weight_init import initialize
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ...backbones.outputs import resolve_out_indices
from .deformable_attention import DeformableAttention
from .extractor import Interaction, Sampling, split_levels
from .spatial_prior import SpatialPrior

_NUM_LAYERS = 4
_COARSEST = 32
_NUM_EXTRA = 2


@MODELS.register_module()
class DINOv3ViTAdapter(BaseModule):
    """Maps of strides 4, 8, 16 and 32 from a ViT and convolutions on its image.

    The ViT-Adapter (arXiv 2205.08534) without injectors: convolutions give tokens of three levels,
    extractors let them collect features of four layers of the ViT, and the four layers, resized,
    are added at the end. The tokens of the ViT are never changed (paper section 6.3.2), so that a
    frozen one runs once without a graph; a ViT with trainable parameters gets gradients.

    Outside of ``backbone``, parameters carry the names of the official segmentor's first stage.

    Args:
        backbone: config of the ViT, e.g. ``dict(type='DINOv3ViT', arch='base',
            frozen_stages=12)``, or the module.
        interaction_indexes: the four layers, ascending; for released models every fourth part of
            the depth (``four_layers`` in configs/_base_/backbones).
        conv_channels: channels of the first convolutions.
        num_heads: heads of the deformable attention; must divide the width of the ViT and of the
            attention's values.
        num_points: points that each head samples.
        value_proj_ratio: width of the attention's values over that of the ViT.
        ffn_ratio: hidden width of the extractors' FFNs over the width of the ViT.
        drop_path_rate: share of the images that skip an FFN in training.
        backbone_autocast: run the ViT under bfloat16 autocast on a GPU, as the official segmentor
            does, whatever the precision around it.
        with_cp: recompute the extractors in the backward pass instead of storing their activations.
        init_cfg: MMEngine initialisation config for everything but the ViT, e.g.
            ``dict(type='DINOv3HeadPretrained', kind='mask2former_adapter', checkpoint=FILE)``.

    Attributes:
        embed_dims: channels of every map.
        size_divisor: what the sides of images must be multiples of: 32, and of the patch size.

    Raises:
        ValueError: if the arguments do not fit the backbone.
    """

    strides = (4, 8, 16, 32)

    def __init__(
        self,
        backbone: dict | nn.Module,
        *,
        interaction_indexes: Sequence[int],
        conv_channels: int = 64,
        num_heads: int = 16,
        num_points: int = 4,
        value_proj_ratio: float = 0.5,
        ffn_ratio: float = 0.25,
        drop_path_rate: float = 0.3,
        backbone_autocast: bool = False,
        with_cp: bool = False,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        self.backbone = MODELS.build(backbone) if isinstance(backbone, dict) else backbone
        _check_backbone(self.backbone)
        dims = self.backbone.embed_dims
        _check_widths(dims, num_heads, value_proj_ratio)
        layers = resolve_out_indices(list(interaction_indexes), self.backbone.num_layers)
        if len(layers) != _NUM_LAYERS:
            raise ValueError(
                f"interaction_indexes is {list(interaction_indexes)}; expected {_NUM_LAYERS} blocks"
            )
        self.interaction_indexes = layers
        self.embed_dims = dims
        self.size_divisor = math.lcm(_COARSEST, self.backbone.patch_size)
        self.backbone_autocast = backbone_autocast
        self.with_cp = with_cp
        self.level_embed = nn.Parameter(torch.zeros(3, dims))
        self.spm = SpatialPrior(self.backbone.arch_settings["in_channels"], conv_channels, dims)
        self.interactions = nn.ModuleList(
            Interaction(
                _NUM_EXTRA if index == _NUM_LAYERS - 1 else 0,
                embed_dims=dims,
                num_heads=num_heads,
                num_points=num_points,
                value_proj_ratio=value_proj_ratio,
                ffn_ratio=ffn_ratio,
                drop_path_rate=drop_path_rate,
            )
            for index in range(_NUM_LAYERS)
        )
        self.up = nn.ConvTranspose2d(dims, dims, kernel_size=2, stride=2)
        self.norm1, self.norm2, self.norm3, self.norm4 = (nn.BatchNorm2d(dims) for _ in range(4))

    def own_modules(self) -> nn.Module:
        """Everything but the ViT as one module, which shares the parameters: what head files hold.

        ``load_head(adapter.own_modules(), FILE, kind='mask2former_adapter')`` loads one.
        """
        view = nn.Module()
        view.level_embed = self.level_embed
        for name, child in self.named_children():
            if name != "backbone":
                view.add_module(name, child)
        return view

    @torch.no_grad()
    def init_weights(self) -> None:
        """Write every parameter and buffer: the adapter's, by ``init_cfg`` if given, the ViT's."""
        nn.init.normal_(self.level_embed)
        own = self.own_modules()
        for module in own.modules():
            _init_module(module)
        for module in own.modules():
            if isinstance(module, DeformableAttention):
                module.init_weights()
        if self.init_cfg:
            initialize(own, self.init_cfg)
        self.backbone.init_weights()
        self._is_init = True

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Features of normalised images.

        Args:
            images: (B, 3, H, W), sides multiples of :attr:`size_divisor`.

        Returns:
            Maps (B, ``embed_dims``, H / s, W / s) for s = 4, 8, 16, 32.

        Raises:
            ValueError: if a side is no such multiple.
        """
        self._check_size(images)
        height, width = images.shape[-2:]
        features = self._run_backbone(images)
        c1, *levels = self.spm(images)
        grids = [(height // stride, width // stride) for stride in self.strides[1:]]
        tokens = torch.cat(
            [
                level.flatten(2).transpose(1, 2) + embedding
                for level, embedding in zip(levels, self.level_embed)
            ],
            dim=1,
        )
        patch = self.backbone.patch_size
        patches = (height // patch, width // patch)
        sampling = Sampling.between(grids, patches, images.device)
        for interaction, feature in zip(self.interactions, features):
            for extractor in interaction.extractors():
                if self.with_cp and torch.is_grad_enabled():
                    tokens = checkpoint(extractor, tokens, feature, sampling, use_reentrant=False)
                else:
                    tokens = extractor(tokens, feature, sampling)
        c2, c3, c4 = split_levels(tokens, grids)
        norms = (self.norm1, self.norm2, self.norm3, self.norm4)
        return tuple(
            norm(level + _resized(feature, patches, level.shape[-2:]))
            for norm, level, feature in zip(norms, (c1 + self.up(c2), c2, c3, c4), features)
        )

    def _check_size(self, images: Tensor) -> None:
        if any(side % self.size_divisor for side in images.shape[-2:]):
            raise ValueError(
                f"images have shape {tuple(images.shape)}; {type(self).__name__} needs sides that "
                f"are multiples of {self.size_divisor}. Choose such a crop_size, or let the data "
                f"preprocessor pad: SegDataPreProcessor(size_divisor={self.size_divisor}), "
                f"DetDataPreprocessor(pad_size_divisor={self.size_divisor}); "
                "DINOv3PaddedEncoderDecoder pads in prediction"
            )

    def _run_backbone(self, images: Tensor) -> tuple[Tensor, ...]:
        """Patch tokens (B, N, C) of the four layers after the final norm."""
        trains = any(parameter.requires_grad for parameter in self.backbone.parameters())
        is_cast = self.backbone_autocast and images.is_cuda
        precision = torch.autocast("cuda", torch.bfloat16) if is_cast else nullcontext()
        with torch.set_grad_enabled(trains and torch.is_grad_enabled()), precision:
            return self.backbone.get_intermediate_layers(
                images, n=self.interaction_indexes, norm=True
            )


def _resized(tokens: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Tokens (B, N, C) of a grid as a map (B, C, *size)."""
    featmap = tokens.transpose(1, 2).unflatten(2, grid)
    return F.interpolate(featmap, size=size, mode="bilinear", align_corners=False)


def _init_module(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
    elif isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
        module.reset_parameters()
        return
    if getattr(module, "bias", None) is not None:
        nn.init.zeros_(module.bias)


def _check_backbone(backbone: nn.Module) -> None:
    needed = ("get_intermediate_layers", "patch_size", "num_layers")
    if not all(hasattr(backbone, name) for name in needed) or hasattr(backbone, "feature_dims"):
        raise ValueError(
            f"DINOv3ViTAdapter is made for a ViT; got {type(backbone).__name__}. A ConvNeXt has a "
            "pyramid of its own: use it without adapter, with out_indices=(0, 1, 2, 3)"
        )


def _check_widths(dims: int, num_heads: int, value_proj_ratio: float) -> None:
    if dims % num_heads or int(dims * value_proj_ratio) % num_heads:
        raise ValueError(
            f"num_heads is {num_heads}; expected a divisor of the ViT's width {dims} and of the "
            f"values' width {int(dims * value_proj_ratio)}"
        )
