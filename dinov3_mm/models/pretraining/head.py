"""Projection head of the DINO and iBOT losses (arXiv 2508.10104 section 3.2)."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmengine.model import BaseModule
from mmengine.model.weight_init import initialize
from mmengine.registry import MODELS
from torch import Tensor


@MODELS.register_module()
class DINOv3Head(BaseModule):
    """MLP to a bottleneck, L2 normalisation, linear layer onto the prototypes.

    Unlike the heads of DINO and DINOv2, the prototypes carry no weight normalisation.

    Args:
        in_dims: width of the backbone features.
        num_prototypes: K, number of outputs.
        hidden_dims: width of the hidden layers.
        bottleneck_dims: width in which features are normalised and compared with the prototypes.
        num_layers: linear layers of the MLP (at least 1).
        init_cfg: MMEngine initialisation config, applied after the truncated-normal initialisation.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(
        self,
        in_dims: int,
        num_prototypes: int,
        hidden_dims: int = 2048,
        bottleneck_dims: int = 256,
        num_layers: int = 3,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        sizes = dict(
            in_dims=in_dims,
            num_prototypes=num_prototypes,
            hidden_dims=hidden_dims,
            bottleneck_dims=bottleneck_dims,
            num_layers=num_layers,
        )
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"DINOv3Head: {name} must be at least 1, got {value}")
        self.num_prototypes = num_prototypes
        self.mlp = _build_mlp(in_dims, hidden_dims, bottleneck_dims, num_layers)
        self.last_layer = nn.Linear(bottleneck_dims, num_prototypes, bias=False)

    def init_weights(self) -> None:
        """Draw all weights from a normal of std 0.02 (truncated at +-2) and zero the biases."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.init_cfg:
            initialize(self, self.init_cfg)
        self._is_init = True

    def project(self, x: Tensor) -> Tensor:
        """Return the normalised bottleneck features: (..., in_dims) -> (..., bottleneck_dims)."""
        x = self.mlp(x)
        return F.normalize(x, dim=-1, eps=1e-6 if x.dtype == torch.float16 else 1e-12)

    def project_and_prototypes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The factors of the logits in the compute dtype: features (n, b) and prototypes (K, b).

        The prototypes are a copy, which outlives the gathered parameter of a sharded head.
        """
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        return self.project(x).to(dtype), self.last_layer.weight.to(dtype, copy=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return the prototype logits: (..., in_dims) -> (..., num_prototypes)."""
        return self.last_layer(self.project(x))


def _build_mlp(in_dims: int, hidden_dims: int, out_dims: int, num_layers: int) -> nn.Module:
    """Linear layers with GELU between them; a single layer stands alone (key ``mlp.weight``)."""
    if num_layers == 1:
        return nn.Linear(in_dims, out_dims)
    layers: list[nn.Module] = [nn.Linear(in_dims, hidden_dims), nn.GELU()]
    for _ in range(num_layers - 2):
        layers += [nn.Linear(hidden_dims, hidden_dims), nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(hidden_dims, out_dims))
