"""The ViT adapter of Mask2Former on DINOv3; needs mmcv with its operators."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from mmengine.model import BaseModule
from mmengine.model.weight_init import initialize
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dinov3_mm.hosts import require_host

require_host("mmcv.ops")

from mmcv.cnn.bricks import DropPath  # noqa: E402
from mmcv.ops import get_compiling_cuda_version  # noqa: E402
from mmcv.ops.multi_scale_deform_attn import (  # noqa: E402
    MultiScaleDeformableAttention,
    MultiScaleDeformableAttnFunction,
    multi_scale_deformable_attn_pytorch,
)

from dinov3_mm.models.backbones.outputs import resolve_out_indices  # noqa: E402

# mmcv compiled without nvcc has the operator for the CPU only.
_HAS_CUDA_OPERATOR = get_compiling_cuda_version() != "not available"


class DeformableAttention(MultiScaleDeformableAttention):
    """mmcv's module, same parameters and results (arXiv 2010.04159), with three differences.

    Points are sampled in float32 whatever the autocast dtype. On a GPU, an mmcv that was compiled
    without CUDA samples with PyTorch, which takes more memory. Checks that would wait for the GPU
    are left out.

    :meth:`attend` is the attention alone; :meth:`forward` has mmcv's signature, which adds the
    query. Tensors are batch first; there is no dropout.
    """

    def attend(
        self,
        query: Tensor,
        value: Tensor,
        reference_points: Tensor,
        spatial_shapes: Tensor,
        level_start_index: Tensor,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attention without a residual.

        Args:
            query: (B, Q, C).
            value: positions of all levels (B, N, C).
            reference_points: x and y in [0, 1] per level, (1 or B, Q, L, 2).
            spatial_shapes: rows and columns of the levels (L, 2).
            level_start_index: where the levels begin in ``value`` (L,).
            key_padding_mask: True on positions of value 0, (B, N).

        Returns:
            (B, Q, C).
        """
        value = self.value_proj(value)
        if key_padding_mask is not None:
            value = value.masked_fill(key_padding_mask[..., None], 0.0)
        points = (self.num_heads, self.num_levels, self.num_points)
        value = value.unflatten(2, (self.num_heads, -1)).float()
        offsets = self.sampling_offsets(query).unflatten(2, (*points, 2)).float()
        weights = self.attention_weights(query).unflatten(2, (self.num_heads, -1)).float()
        weights = weights.softmax(-1).unflatten(3, points[1:])
        sizes = spatial_shapes.flip(1)[:, None]  # width, height
        locations = reference_points[:, :, None, :, None].float() + offsets / sizes
        with torch.autocast(value.device.type, enabled=False):
            if value.is_cuda and _HAS_CUDA_OPERATOR:
                output = MultiScaleDeformableAttnFunction.apply(
                    value, spatial_shapes, level_start_index, locations, weights, self.im2col_step
                )
            else:
                output = multi_scale_deformable_attn_pytorch(
                    value, spatial_shapes, locations, weights
                )
        return self.output_proj(output.to(self.output_proj.weight.dtype))

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        identity: Tensor | None = None,
        query_pos: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        reference_points: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        level_start_index: Tensor | None = None,
        **kwargs,
    ) -> Tensor:
        """Attention and residual, as mmcv's module is called; ``key`` is unused there too."""
        value = query if value is None else value
        identity = query if identity is None else identity
        output = self.attend(
            query if query_pos is None else query + query_pos,
            value,
            reference_points,
            spatial_shapes,
            level_start_index,
            key_padding_mask,
        )
        return identity + output


# --- Tokens of a pyramid collect features of a ViT ---


_EPS = 1e-6
Grid = tuple[int, int]  # rows and columns


class Sampling(NamedTuple):
    """Where the tokens of the pyramid look on the grid of patches.

    Attributes:
        grids: rows and columns of the levels of the pyramid.
        reference_points: centres of the tokens of all levels, x and y in [0, 1], (1, Q, 1, 2).
        spatial_shapes: rows and columns of the grid of patches, as a tensor (1, 2).
        level_start_index: zero, as a tensor (1,).
    """

    grids: Sequence[Grid]
    reference_points: Tensor
    spatial_shapes: Tensor
    level_start_index: Tensor

    @classmethod
    def between(cls, grids: Sequence[Grid], patches: Grid, device: torch.device) -> "Sampling":
        """From the levels ``grids`` to a grid of ``patches``."""
        points = torch.cat([_centres(grid, device) for grid in grids])
        return cls(
            grids,
            points[None, :, None],
            torch.tensor([patches], device=device),
            torch.zeros(1, dtype=torch.long, device=device),
        )


class Extractor(nn.Module):
    """Deformable cross-attention and a convolutional FFN (arXiv 2205.08534, section 3.4).

    Args:
        embed_dims: channels.
        num_heads, num_points: of the attention.
        value_proj_ratio: width of the attention's values over ``embed_dims``.
        ffn_ratio: hidden width of the FFN over ``embed_dims``.
        drop_path_rate: share of the images that skip the FFN in training.
    """

    def __init__(
        self,
        embed_dims: int,
        *,
        num_heads: int,
        num_points: int,
        value_proj_ratio: float,
        ffn_ratio: float,
        drop_path_rate: float,
    ) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(embed_dims, eps=_EPS)
        self.feat_norm = nn.LayerNorm(embed_dims, eps=_EPS)
        self.attn = DeformableAttention(
            embed_dims=embed_dims,
            num_heads=num_heads,
            num_levels=1,
            num_points=num_points,
            dropout=0.0,
            batch_first=True,
            value_proj_ratio=value_proj_ratio,
        )
        self.ffn = ConvFFN(embed_dims, int(embed_dims * ffn_ratio))
        self.ffn_norm = nn.LayerNorm(embed_dims, eps=_EPS)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, query: Tensor, features: Tensor, sampling: Sampling) -> Tensor:
        """New tokens (B, Q, C).

        Args:
            query: tokens of the pyramid (B, Q, C).
            features: patch tokens (B, N, C).
            sampling: geometry of both.
        """
        query = query + self.attn.attend(
            self.query_norm(query), self.feat_norm(features), *sampling[1:]
        )
        return query + self.drop_path(self.ffn(self.ffn_norm(query), sampling.grids))


class Interaction(nn.Module):
    """The extractors of one layer of the ViT.

    Args:
        num_extra: extractors after the first, on the same features.
        **extractor: see :class:`Extractor`.
    """

    def __init__(self, num_extra: int, **extractor) -> None:
        super().__init__()
        self.extractor = Extractor(**extractor)
        self.extra_extractors = (
            nn.ModuleList(Extractor(**extractor) for _ in range(num_extra)) if num_extra else None
        )

    def extractors(self) -> list[Extractor]:
        """All of them, in the order in which they run."""
        return [self.extractor, *(self.extra_extractors or [])]


class ConvFFN(nn.Module):
    """Two linears with a depthwise convolution of each level between them.

    Args:
        embed_dims: channels.
        hidden_dims: hidden width.
    """

    def __init__(self, embed_dims: int, hidden_dims: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dims, hidden_dims)
        self.dwconv = LevelwiseConv(hidden_dims)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dims, embed_dims)

    def forward(self, x: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Tokens (B, Q, C) of the levels ``grids``."""
        return self.fc2(self.act(self.dwconv(self.fc1(x), grids)))


class LevelwiseConv(nn.Module):
    """A depthwise 3x3 convolution, shared by the levels of a pyramid of tokens."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dims, dims, 3, padding=1, groups=dims)

    def forward(self, x: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Tokens (B, Q, C) of the levels ``grids``."""
        levels = [self.dwconv(level).flatten(2) for level in split_levels(x, grids)]
        return torch.cat(levels, dim=2).transpose(1, 2)


def split_levels(tokens: Tensor, grids: Sequence[Grid]) -> list[Tensor]:
    """Tokens (B, Q, C) as maps (B, C, rows, columns), one per level."""
    parts = tokens.transpose(1, 2).split([rows * columns for rows, columns in grids], dim=2)
    return [part.unflatten(2, grid) for part, grid in zip(parts, grids)]


def _centres(grid: Grid, device: torch.device) -> Tensor:
    """Centres of a grid's cells, row by row, (rows * columns, 2)."""
    y, x = ((torch.arange(n, dtype=torch.float32, device=device) + 0.5) / n for n in grid)
    y, x = torch.meshgrid(y, x, indexing="ij")
    return torch.stack((x, y), dim=-1).flatten(0, 1)


# --- A pyramid of the image itself ---


class SpatialPrior(nn.Module):
    """Maps of strides 4, 8, 16 and 32 from pixels (arXiv 2205.08534, section 3.3).

    Args:
        in_channels: image channels.
        channels: channels of the stem.
        embed_dims: channels of the outputs.
    """

    def __init__(self, in_channels: int, channels: int, embed_dims: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            *_conv_norm_relu(in_channels, channels, stride=2),
            *_conv_norm_relu(channels, channels),
            *_conv_norm_relu(channels, channels),
            nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
        )
        self.conv2 = nn.Sequential(*_conv_norm_relu(channels, 2 * channels, stride=2))
        self.conv3 = nn.Sequential(*_conv_norm_relu(2 * channels, 4 * channels, stride=2))
        self.conv4 = nn.Sequential(*_conv_norm_relu(4 * channels, 4 * channels, stride=2))
        self.fc1 = nn.Conv2d(channels, embed_dims, kernel_size=1)
        self.fc2 = nn.Conv2d(2 * channels, embed_dims, kernel_size=1)
        self.fc3 = nn.Conv2d(4 * channels, embed_dims, kernel_size=1)
        self.fc4 = nn.Conv2d(4 * channels, embed_dims, kernel_size=1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Maps (B, C, H / stride, W / stride) of images (B, 3, H, W), the finest first."""
        c1 = self.stem(images)
        c2 = self.conv2(c1)
        c3 = self.conv3(c2)
        c4 = self.conv4(c3)
        return self.fc1(c1), self.fc2(c2), self.fc3(c3), self.fc4(c4)


def _conv_norm_relu(in_channels: int, out_channels: int, stride: int = 1) -> list[nn.Module]:
    return [
        nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    ]


# --- The adapter ---


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
