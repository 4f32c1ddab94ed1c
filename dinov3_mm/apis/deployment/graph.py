"""What an exported file computes, and the sizes of images and batches that it takes."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from dinov3_mm.errors import hint

# --- Image sizes and batch sizes that an exported file takes ---


Size = tuple[int, int]  # height and width in pixels

DEFAULT_SIZES: tuple[Size, ...] = ((224, 224),)
DEFAULT_DYNAMIC_SIZES: tuple[Size, ...] = ((224, 224), (512, 512), (336, 448))
# A batch of one is traced as the constant 1.
_TRACED_BATCH = 2


def parse_size(text: str) -> Size:
    """``224`` or ``224x336``, height first.

    Raises:
        ValueError: if it is neither.
    """
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise ValueError(f"image size {text!r}; expected a side like 224, or HEIGHTxWIDTH: 224x336")
    return int(sides[0]), int(sides[-1])


@dataclass(frozen=True)
class InputShapes:
    """Which shapes of ``images`` a file takes, and which of them it is checked with.

    Attributes:
        sizes: (height, width) that the file is checked with; the first is traced.
        dynamic: height and width vary; else there is one size.
        batch: the number of images, or None where it varies.
        multiple: sides are multiples of this many pixels.
        channels: image channels.
        min_side: least side in pixels.
    """

    sizes: tuple[Size, ...]
    dynamic: bool
    batch: int | None
    multiple: int
    channels: int
    min_side: int

    @classmethod
    def resolve(
        cls,
        backbone: nn.Module,
        sizes: Sequence[Size] | None,
        *,
        dynamic: bool,
        batch: int | None,
    ) -> "InputShapes":
        """Shapes for a backbone, checked.

        Raises:
            ValueError: if a size or the batch does not fit.
        """
        sizes = tuple(sizes or (DEFAULT_DYNAMIC_SIZES if dynamic else DEFAULT_SIZES))
        if not dynamic and len(sizes) > 1:
            raise ValueError(
                f"{len(sizes)} image sizes for a file of fixed size; give one, or export with "
                "--dynamic (dynamic=True)"
            )
        if batch is not None and batch < 1:
            raise ValueError(f"batch is {batch}; expected at least one image, or None if it varies")
        # A ConvNeXt loses trailing pixels from its second stage on, as in PyTorch.
        multiple = getattr(backbone, "input_pad_size", backbone.token_stride)
        min_side = 2 * backbone.token_stride if dynamic else backbone.token_stride
        for side in (side for size in sizes for side in size):
            if side % multiple or side < min_side:
                lower = max(side // multiple * multiple, min_side)
                raise ValueError(
                    f"an image side is {side}; expected a multiple of {multiple} pixels, at least "
                    f"{min_side}: {lower} or {lower + multiple}"
                )
        channels = backbone.arch_settings["in_channels"]
        return cls(sizes, dynamic, batch, multiple, channels, min_side)

    @property
    def traced_shape(self) -> tuple[int, int, int, int]:
        """(B, C, H, W) to trace with."""
        return (self.batch or _TRACED_BATCH, self.channels, *self.sizes[0])

    @property
    def varying(self) -> dict[int, str]:
        """Names of the dimensions of ``images`` that vary."""
        names = {} if self.batch else {0: "batch"}
        return names | ({2: "height", 3: "width"} if self.dynamic else {})

    def dynamic_shapes(self) -> dict[str, dict[int, Any]]:
        """The ``dynamic_shapes`` argument of ``torch.export.export``."""
        dims: dict[int, Any] = {} if self.batch else {0: Dim("batch", min=1)}
        if self.dynamic:
            least = -(-self.min_side // self.multiple)
            dims |= {
                2: self.multiple * Dim("rows", min=least),
                3: self.multiple * Dim("columns", min=least),
            }
        return {"images": dims}


# --- What an exported file computes: named outputs of one input, ``images`` ---


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
