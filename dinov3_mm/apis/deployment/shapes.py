"""Image sizes and batch sizes that an exported file takes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.export import Dim

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
