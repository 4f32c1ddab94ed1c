"""What a backbone keeps, holds and computes for images of given sizes.

Sizes are in bytes, k is the number of tokens (of those images that take part in the branch) and c
the bytes of an activation. For its backward pass a ViT block of width D and hidden width H keeps

- norm 1: its input (k D), mean and reciprocal deviation (2 k, fp32); under bf16 autocast on a GPU
  the norm runs in fp32 and keeps an fp32 copy of the input;
- qkv: its input (k D); its output (3 k D), of which v is a view; rotated q and k (2 k D);
- attention: its output (k D), log sum exp (k heads, fp32), the outputs of all crops in one
  matrix (k D);
- projection: its output (k D), which the layer scale keeps; with stochastic depth also the scaled
  output (k D), which is added to the images that take part; so after the feed-forward;
- norm 2 as norm 1; feed-forward: its input (k D), output (k D), and two hidden matrices (k H), four
  where it is gated.

A ConvNeXt block of width D keeps its input (k D), the norm's input, statistics and output as above,
two hidden matrices (4 k D each) and the output that the layer scale keeps (k D).

With ``with_cp='selective'`` the results of products, convolutions and attention stay, and the
block's input; with ``with_cp=True`` the input alone. The same holds for compiled blocks, which
contain their checkpoint. Operations: a product of (n, a) and (a, b) counts 2 n a b; norms and
activations are left out.
"""

from dataclasses import dataclass
from itertools import pairwise

from torch import nn

from dinov3_mm.errors import ConfigError
from dinov3_mm.models.backbones import DINOv3ConvNeXt
from dinov3_mm.models.backbones.vit_trunk import ViTTrunk
from dinov3_mm.models.layers import ffn_hidden_dims

FP32 = 4
# Images and the pixels of their sides.
Crops = tuple[int, int]


@dataclass(frozen=True)
class Group:
    """Equal blocks in a row, on what they see in one pass. Bytes of one block:

    Attributes:
        count: blocks.
        saved: what a block keeps without recomputation.
        stream: its input.
        products: results of its matrix products, convolutions and attention.
        working: most that its backward pass holds beside what was kept: gradients.
        forward: most that it holds without grad.
        entry: bytes that what comes before the group keeps.
        norm_copies: whether its norms copy their inputs, so that the backward pass of a recomputed
            block holds another input than the one that was kept.
    """

    count: int
    saved: int
    stream: int
    products: int
    working: int
    forward: int
    entry: int
    norm_copies: bool

    def kept(self, recompute: bool | str) -> int:
        """What a block keeps from the forward to the backward pass."""
        if not recompute:
            return self.saved
        return self.stream + (self.products if recompute == "selective" else 0)

    def again(self, recompute: bool | str) -> int:
        """What the backward pass of a block brings back beside what was kept."""
        if not recompute:
            return 0
        kept = self.products if recompute == "selective" else 0
        return self.saved - kept - (0 if self.norm_copies else self.stream)


@dataclass(frozen=True)
class Flops:
    """Operations of a forward pass: linear layers and convolutions, attention, and the embedding,
    whose backward pass has no gradient of the images.
    """

    linear: int
    attention: int
    embedding: int

    @property
    def total(self) -> int:
        return self.linear + self.attention + self.embedding


@dataclass(frozen=True)
class Transformer:
    """Sizes of a ViT: width, hidden width of the feed-forward, blocks, heads, CLS and register
    tokens, pixels between tokens, channels of the images, whether the feed-forward is a SwiGLU
    (three matrices), and the share of the images that skip a branch.
    """

    dims: int
    hidden: int
    num_layers: int
    num_heads: int
    num_prefix: int
    stride: int
    channels: int
    is_gated: bool
    drop_path_rate: float

    def tokens(self, side: int) -> int:
        """Tokens of an image."""
        return self.num_prefix + (side // self.stride) ** 2

    def passes(self, crops: tuple[Crops, ...]) -> int:
        """How often each block runs: once, on all crops."""
        return 1

    def groups(
        self, crops: tuple[Crops, ...], width: int, *, on_gpu: bool, grad: bool = True
    ) -> list[Group]:
        """All blocks, which see all crops at once.

        Args:
            crops: images and sides.
            width: bytes of an activation.
            on_gpu: fused attention for all lengths, norms in fp32.
            grad: as the student; a teacher drops no images.
        """
        seen = [(images, self.tokens(side)) for images, side in crops]
        kept = self._branch(seen) if grad else seen
        tokens, all_tokens = (sum(n * length for n, length in each) for each in (kept, seen))
        dims, stream = tokens * self.dims, all_tokens * self.dims * width
        norm_input = FP32 if on_gpu else width
        saved = 2 * (dims * (norm_input + width) + 2 * tokens * FP32)
        saved += dims * (3 + 2 + 1 + (len(crops) > 1) + 1) * width
        saved += ((4 if self.is_gated else 2) * tokens * self.hidden + dims) * width
        saved += 2 * dims * width if self.drop_path_rate else 0
        gates = 2 if self.is_gated else 1
        products = (6 * dims + gates * tokens * self.hidden) * width
        for images, length in kept:
            # Log sum exp; dense attention, of short 16-bit sequences on a CPU, has a matrix.
            dense = not on_gpu and width < FP32 and length <= 256
            scores = images * self.num_heads * length * (length if dense else 1)
            saved += scores * (width if dense else FP32)
            products += scores * FP32
        pixels = sum(n * (length - self.num_prefix) for n, length in seen)
        return [
            Group(
                self.num_layers,
                saved,
                stream,
                products,
                # Gradients of the output and input of the hidden layer at a time, of the residual
                # stream those of the block and of the branch.
                working=gates * tokens * self.hidden * width + 2 * stream,
                forward=max((1 + gates) * tokens * self.hidden + 2 * dims, 7 * dims) * width,
                entry=pixels * self.channels * self.stride**2 * width + stream,
                norm_copies=bool(self.drop_path_rate) or (on_gpu and width < FP32),
            )
        ]

    def flops(self, crops: tuple[Crops, ...], *, grad: bool = False) -> Flops:
        """Operations of a forward pass; with ``grad`` of the images that the student keeps."""
        seen = [(images, self.tokens(side)) for images, side in crops]
        kept = self._branch(seen) if grad else seen
        tokens = sum(images * length for images, length in kept)
        pairs = sum(images * length**2 for images, length in kept)
        patches = sum(images * (length - self.num_prefix) for images, length in seen)
        matrices = 4 * self.dims**2 + (3 if self.is_gated else 2) * self.dims * self.hidden
        return Flops(
            2 * self.num_layers * tokens * matrices,
            4 * self.num_layers * pairs * self.dims,
            2 * patches * self.channels * self.stride**2 * self.dims,
        )

    def _branch(self, seen: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """What is left of the sequences in a residual branch of the student."""
        if not self.drop_path_rate:
            return seen
        rate = 1 - self.drop_path_rate
        return [(max(int(images * rate), 1), length) for images, length in seen]


@dataclass(frozen=True)
class ConvNet:
    """Sizes of a ConvNeXt: width and blocks of each stage, channels of the images, pixels between
    positions after the stem.
    """

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    channels: int
    stem: int
    num_prefix: int = 1  # CLS is the mean of the positions

    @property
    def dims(self) -> int:
        """Width of a token."""
        return self.widths[-1]

    @property
    def stride(self) -> int:
        """Pixels between tokens."""
        return self.stem * 2 ** (len(self.widths) - 1)

    def tokens(self, side: int) -> int:
        """Tokens of an image."""
        return self.num_prefix + (side // self.stride) ** 2

    def passes(self, crops: tuple[Crops, ...]) -> int:
        """How often each block runs: once for each kind of crops."""
        return sum(images > 0 for images, _ in crops)

    def groups(
        self, crops: tuple[Crops, ...], width: int, *, on_gpu: bool, grad: bool = True
    ) -> list[Group]:
        """Each stage on one kind of crops, then on the next; see :meth:`Transformer.groups`."""
        norm_input = FP32 if on_gpu else width
        groups = []
        for images, side in crops:
            maps = self._maps(images, side)
            entry = maps[0] * self.stem**2 * self.channels * width
            for index, (count, dims, k) in enumerate(zip(self.depths, self.widths, maps)):
                # The stem's norm comes after its convolution; the others come before theirs, which
                # keeps the norm's output.
                at = max(index - 1, 0)
                normed = width if index else 0
                entry += maps[at] * (self.widths[at] * (norm_input + normed) + 2 * FP32)
                saved = k * dims * (11 * width + norm_input) + 2 * k * FP32
                groups.append(
                    Group(
                        count,
                        saved,
                        k * dims * width,
                        6 * k * dims * width,
                        working=6 * k * dims * width,
                        forward=10 * k * dims * width,
                        entry=entry,
                        norm_copies=False,
                    )
                )
                entry = 0
        return groups

    def flops(self, crops: tuple[Crops, ...], *, grad: bool = False) -> Flops:
        """Operations of a forward pass."""
        linear = embedding = 0
        for images, side in crops:
            maps = self._maps(images, side)
            embedding += 2 * maps[0] * self.stem**2 * self.channels * self.widths[0]
            for count, dims, k in zip(self.depths, self.widths, maps):
                linear += count * 2 * k * (8 * dims**2 + 49 * dims)
            for (narrow, wide), k in zip(pairwise(self.widths), maps[1:]):
                linear += 2 * k * 4 * narrow * wide
        return Flops(linear, 0, embedding)

    def _maps(self, images: int, side: int) -> list[int]:
        """Positions of all images in each stage."""
        return [images * (side // (self.stem * 2**stage)) ** 2 for stage in range(len(self.widths))]


Backbone = Transformer | ConvNet


class UnknownStepError(ConfigError):
    """A step for which the plan has no formula; a dry run measures it."""


def read_backbone(module: nn.Module) -> Backbone:
    """Sizes of a backbone.

    Raises:
        UnknownStepError: one that is neither a ViT nor a ConvNeXt.
    """
    if isinstance(module, DINOv3ConvNeXt):
        settings = module.arch_settings
        return ConvNet(
            tuple(settings["dims"]),
            tuple(settings["depths"]),
            settings["in_channels"],
            module.stage_stride(0),
        )
    if not isinstance(module, ViTTrunk):
        raise UnknownStepError(
            "model: the plan knows the activations of a ViT and of a ConvNeXt, not of "
            f"{type(module).__name__}; tools/train.py --dry-run measures any backbone"
        )
    settings = module.arch_settings
    ffn, dims = settings["ffn_layer"], module.embed_dims
    return Transformer(
        dims,
        ffn_hidden_dims(ffn, dims, settings["ffn_ratio"]),
        module.num_layers,
        module.num_heads,
        1 + module.num_registers,
        module.patch_size,
        settings["in_channels"],
        ffn != "mlp",
        module.drop_path_rate,
    )
