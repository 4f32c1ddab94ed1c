"""What an exported file computes: named outputs of one input, ``images``."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dinov3_mm.suggest import hint

OUTPUTS = {
    "cls": "(B, C)",
    "registers": "(B, R, C)",
    "patches": "(B, N, C)",
    "featmap": "(B, C, h, w)",
}
DEFAULT_OUTPUTS = ("cls", "patches")


class OutputGraph(nn.Module):
    """A backbone as a function of images alone that returns a tuple of fp32 tensors.

    The outputs are those of ``get_intermediate_layers`` after the final norm. They are called as
    in :data:`OUTPUTS`; with ``layers`` each has the index of its layer, ``patches_11``.

    Args:
        backbone: ``DINOv3ViT`` or ``DINOv3ConvNeXt`` in eval mode.
        outputs: names in :data:`OUTPUTS`.
        layers: blocks of a ViT or stages of a ConvNeXt, from 0 or, if negative, from the end;
            None is the last one.

    Raises:
        ValueError: if an output or a layer is unknown or given twice, or there are no registers.
    """

    def __init__(
        self,
        backbone: nn.Module,
        outputs: Sequence[str] = DEFAULT_OUTPUTS,
        layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.outputs = check_output_names(outputs)
        if "registers" in self.outputs and not backbone.num_registers:
            raise ValueError(
                f"this {type(backbone).__name__} has no registers; leave them out of the outputs"
            )
        self.layers = _resolve_layers(backbone, layers)
        self.backbone = backbone
        suffixes = [""] if layers is None else [f"_{layer}" for layer in self.layers]
        self.output_names = [name + suffix for suffix in suffixes for name in self.outputs]

    def with_backbone(self, backbone: nn.Module) -> "OutputGraph":
        """The same outputs of another backbone."""
        graph = copy.copy(self)
        graph._modules = {"backbone": backbone}
        return graph

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Outputs for normalised images (B, C, H, W), layer by layer."""
        with_featmap = "featmap" in self.outputs
        extra = {"return_extra_tokens": True} if "registers" in self.outputs else {}
        features = self.backbone.get_intermediate_layers(
            images, n=self.layers, reshape=with_featmap, return_class_token=True, **extra
        )
        results = []
        for patches, cls, *registers in features:
            named = {"cls": cls, "patches": patches}
            if registers:
                named["registers"] = registers[0]
            if with_featmap:
                named["featmap"] = patches
                named["patches"] = patches.flatten(2).transpose(1, 2)
            results += [named[name] for name in self.outputs]
        return tuple(x if x.dtype == torch.float32 else x.float() for x in results)


class ConstantTables(nn.Module):
    """RoPE tables of one grid as constants, in the place of ``RotaryEmbedding2D``."""

    augmented = False

    def __init__(self, sin: Tensor, cos: Tensor) -> None:
        super().__init__()
        self.register_buffer("sin", sin.clone())
        self.register_buffer("cos", cos.clone())

    def forward(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Sine and cosine; the size of the grid was settled before."""
        return self.sin, self.cos


def with_constant_tables(backbone: nn.Module, size: tuple[int, int]) -> nn.Module:
    """The backbone, its parameters shared, for images of one size (height, width) only.

    A backbone without RoPE is returned as it is.
    """
    rope = getattr(backbone, "rope_embed", None)
    if rope is None:
        return backbone
    clone = copy.copy(backbone)
    clone._modules = dict(backbone._modules)
    stride = backbone.token_stride
    clone.rope_embed = ConstantTables(*rope(size[0] // stride, size[1] // stride))
    return clone


def check_output_names(outputs: Sequence[str]) -> tuple[str, ...]:
    """Return the names, or raise a ``ValueError`` unless each is one of :data:`OUTPUTS`, once."""
    outputs = tuple(outputs)
    for name in outputs:
        if name not in OUTPUTS:
            raise ValueError(f"unknown output {name!r}; {hint(name, OUTPUTS)}")
    if not outputs or len(set(outputs)) < len(outputs):
        raise ValueError(f"outputs are {outputs}; expected one or more of {tuple(OUTPUTS)}, once")
    return outputs


def _resolve_layers(backbone: nn.Module, layers: Sequence[int] | None) -> list[int]:
    count = backbone.num_layers
    given = [count - 1] if layers is None else list(layers)
    resolved = [layer + count if layer < 0 else layer for layer in given]
    in_range = all(0 <= layer < count for layer in resolved)
    if not resolved or not in_range or resolved != sorted(set(resolved)):
        raise ValueError(
            f"layers are {given}; expected ascending, distinct layers out of {count}, counted from "
            "0 or, if negative, from the end"
        )
    return resolved
