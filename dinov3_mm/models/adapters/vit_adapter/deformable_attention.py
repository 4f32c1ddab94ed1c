"""Deformable attention in float32, with or without mmcv's CUDA operator."""

import torch
from mmcv.ops import get_compiling_cuda_version
from mmcv.ops.multi_scale_deform_attn import (
    MultiScaleDeformableAttention,
    MultiScaleDeformableAttnFunction,
    multi_scale_deformable_attn_pytorch,
)
from torch import Tensor

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
