"""Axial two-dimensional rotary position embedding (paper section 3.2, RoPE-box jittering)."""

import math

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

RopeTables = tuple[Tensor, Tensor]  # sine and cosine

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_NORMALIZATIONS = ("separate", "min", "max")
# Tables of this many image sizes are kept; images of thousands of sizes would fill the memory.
_KEPT_GRIDS = 32


class RotaryEmbedding2D(nn.Module):
    """Sine and cosine tables for a grid of patches; no learned weights.

    Patch centres are mapped to [-1, 1] per axis. A quarter of the channels of a head holds the
    angles ``2 pi y / T_k``, the next quarter ``2 pi x / T_k``, and the second half repeats the
    first (channel ``i`` is rotated with ``i + head_dims / 2``). Arithmetic is in ``dtype``.

    Args:
        head_dims: channels of one attention head, a multiple of 4.
        base: periods are ``base ** (4 k / head_dims)``. Excludes the two periods below.
        min_period, max_period: geometric range of periods, instead of ``base``.
        normalize_coords: 'separate' divides y by the grid's height and x by its width; 'max' and
            'min' divide both by the longer or shorter side.
        shift_coords, jitter_coords, rescale_coords: augmentation in training mode, each off when
            None: one shift per axis in U(-s, s); one log-uniform factor per axis in [1/j, j]; one
            log-uniform factor for both axes in [1/r, r].
        dtype: 'fp32', 'fp16' or 'bf16'.

    Raises:
        ValueError: for head dimensions, periods or names that do not fit the above.
    """

    def __init__(
        self,
        head_dims: int,
        *,
        base: float | None = 100.0,
        min_period: float | None = None,
        max_period: float | None = None,
        normalize_coords: str = "separate",
        shift_coords: float | None = None,
        jitter_coords: float | None = None,
        rescale_coords: float | None = None,
        dtype: str = "fp32",
    ) -> None:
        super().__init__()
        if head_dims % 4:
            raise ValueError(
                f"a head has {head_dims} channels; two-dimensional RoPE needs a multiple of 4, so "
                "embed_dims must be a multiple of 4 * num_heads"
            )
        if (min_period is None) != (max_period is None) or (base is None) == (min_period is None):
            raise ValueError(
                "RoPE needs either rope_base, or rope_min_period and rope_max_period; got "
                f"rope_base={base}, rope_min_period={min_period}, rope_max_period={max_period}"
            )
        if normalize_coords not in _NORMALIZATIONS:
            raise ValueError(
                f"rope_normalize_coords is {normalize_coords!r}; expected one of {_NORMALIZATIONS}"
            )
        if dtype not in _DTYPES:
            raise ValueError(f"rope_dtype is {dtype!r}; expected one of {tuple(_DTYPES)}")
        for name, factor in (("jitter", jitter_coords), ("rescale", rescale_coords)):
            if factor is not None and factor < 1:
                raise ValueError(f"rope_{name}_coords is {factor}; expected a factor >= 1")
        self.head_dims = head_dims
        self.base = base
        self.min_period = min_period
        self.max_period = max_period
        self.normalize_coords = normalize_coords
        self.shift_coords = shift_coords
        self.jitter_coords = jitter_coords
        self.rescale_coords = rescale_coords
        self.dtype = _DTYPES[dtype]
        self.register_buffer("periods", torch.empty(head_dims // 4, dtype=self.dtype))
        self._cache: dict[tuple[int, int], RopeTables] = {}
        self._cache_source: tuple | None = None
        self.init_weights()

    @property
    def augmented(self) -> bool:
        """Whether any coordinate augmentation is configured."""
        strengths = (self.shift_coords, self.jitter_coords, self.rescale_coords)
        return any(strength is not None for strength in strengths)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Write the periods from the formula."""
        kwargs = {"dtype": self.dtype, "device": self.periods.device}
        if self.base is not None:
            steps = torch.arange(self.head_dims // 4, **kwargs)
            periods = self.base ** (2 * steps / (self.head_dims // 2))
        else:
            ratio = self.max_period / self.min_period
            exponents = torch.linspace(0, 1, self.head_dims // 4, **kwargs)
            periods = ratio**exponents / ratio * self.max_period
        self.periods.copy_(periods)

    def forward(self, height: int, width: int, *, augment: bool = False) -> RopeTables:
        """Tables for a grid of ``height`` x ``width`` patches.

        Tables without augmentation are cached until the periods change.

        Args:
            augment: draw the configured augmentation anew (from torch's default generator).

        Returns:
            ``(sin, cos)`` for one half of the channels, each (height * width, head_dims / 2) in the
            RoPE dtype, patches row by row.
        """
        if augment and self.augmented:
            return self._tables(self._augment(self._coordinates(height, width)))
        if torch.compiler.is_compiling() or self.periods.is_inference():
            # Neither a traced nor an inference tensor tells whether it has changed.
            return self._tables(self._coordinates(height, width))
        return self._cached_tables(height, width)

    def _cached_tables(self, height: int, width: int) -> RopeTables:
        # Loading writes the periods in place, moving or casting replaces the tensor.
        source = (self.periods, self.periods._version)
        if self._cache_source is None or not (
            source[0] is self._cache_source[0] and source[1] == self._cache_source[1]
        ):
            self._cache.clear()
            self._cache_source = source
        if (height, width) not in self._cache:
            if len(self._cache) >= _KEPT_GRIDS:
                del self._cache[next(iter(self._cache))]
            # Tables made under inference mode could not be saved for a later backward pass.
            with torch.inference_mode(False), torch.no_grad():
                self._cache[height, width] = self._tables(self._coordinates(height, width))
        return self._cache[height, width]

    def _coordinates(self, height: int, width: int) -> Tensor:
        """Patch centres (height * width, 2) as (y, x), normalised to [-1, 1]."""
        y, x = self._centres(height), self._centres(width)
        if self.normalize_coords == "separate":
            y, x = y / height, x / width
        else:
            # Unlike max and min these also take the symbolic sizes of a traced graph.
            choose = torch.sym_max if self.normalize_coords == "max" else torch.sym_min
            y, x = y / choose(height, width), x / choose(height, width)
        grid = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1)
        return 2.0 * grid.flatten(0, 1) - 1.0

    def _centres(self, side: int) -> Tensor:
        """Patch centres 0.5, 1.5, ... below ``side``."""
        if torch.compiler.is_exporting():
            # Of a range of whole numbers torch.export knows the length when ``side`` is symbolic.
            whole = torch.arange(side, dtype=torch.float32, device=self.periods.device)
            return (whole + 0.5).to(self.dtype)
        return torch.arange(0.5, side, dtype=self.dtype, device=self.periods.device)

    def _augment(self, coordinates: Tensor) -> Tensor:
        def draw(size: int, bound: float) -> Tensor:
            return coordinates.new_empty(size).uniform_(-bound, bound)

        if self.shift_coords is not None:
            coordinates = coordinates + draw(2, self.shift_coords)
        if self.jitter_coords is not None:
            coordinates = coordinates * draw(2, math.log(self.jitter_coords)).exp()
        if self.rescale_coords is not None:
            coordinates = coordinates * draw(1, math.log(self.rescale_coords)).exp()
        return coordinates

    def _tables(self, coordinates: Tensor) -> RopeTables:
        angles = (2 * math.pi * coordinates[:, :, None] / self.periods).flatten(1)  # all y, all x
        return angles.sin(), angles.cos()


# --- Rotation of queries and keys by the RoPE tables ---


SequenceShape = tuple[int, int]  # (images, tokens per image)
QueryKeyValue = tuple[Tensor, Tensor, Tensor]


def rotate_packed_qkv(
    qkv: Tensor,
    num_heads: int,
    shapes: list[SequenceShape],
    tables: list[RopeTables],
) -> list[QueryKeyValue]:
    """Split packed projections into entries and rotate their queries and keys.

    Channel i of a head is rotated together with channel i + head_dims / 2. The last N tokens of an
    image, where N is the length of the tables, are rotated; the leading ones (CLS and registers)
    keep their place. All queries and keys pass through the dtype of the tables.

    Args:
        qkv: packed projections (sum of images * tokens, 3 * D).
        num_heads: heads that share the D channels.
        shapes: (images, tokens) of each packed entry.
        tables: sine and cosine (N, head_dims / 2) of each entry.

    Returns:
        Queries, keys and values of each entry, (images, heads, tokens, head_dims) each, in the
        dtype of ``qkv``.
    """
    if qkv.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        flat_tables = [table for pair in tables for table in pair]
        flat = _RotatePackedQKV.apply(qkv, num_heads, shapes, *flat_tables)
        return [flat[i : i + 3] for i in range(0, len(flat), 3)]
    return [
        _rotate_entry(entry, *pair)
        for entry, pair in zip(_split_heads(qkv, num_heads, shapes), tables, strict=True)
    ]


def split_packed_qkv(
    qkv: Tensor, num_heads: int, shapes: list[SequenceShape]
) -> list[QueryKeyValue]:
    """:func:`rotate_packed_qkv` without a rotation, for models without RoPE."""
    return [entry.permute(2, 0, 3, 1, 4).unbind() for entry in _split_heads(qkv, num_heads, shapes)]


class _RotatePackedQKV(torch.autograd.Function):
    """Saves only the tables, and writes the gradients of q, k and v straight into one matrix."""

    @staticmethod
    def forward(
        ctx,
        qkv: Tensor,
        num_heads: int,
        shapes: list[SequenceShape],
        *flat_tables: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*flat_tables)
        ctx.num_heads, ctx.shapes = num_heads, shapes
        ctx.qkv_shape, ctx.qkv_dtype = qkv.shape, qkv.dtype
        entries = zip(_split_heads(qkv, num_heads, shapes), flat_tables[::2], flat_tables[1::2])
        return tuple(t for entry, *pair in entries for t in _rotate_entry(entry, *pair))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        flat_tables = ctx.saved_tensors
        grad_qkv = grads[0].new_empty(ctx.qkv_shape, dtype=ctx.qkv_dtype)
        for index, entry in enumerate(_split_heads(grad_qkv, ctx.num_heads, ctx.shapes)):
            grad_q, grad_k, grad_v = (g.transpose(1, 2) for g in grads[3 * index : 3 * index + 3])
            # The transpose of a rotation is the rotation by the opposite angle.
            inverse = -flat_tables[2 * index], flat_tables[2 * index + 1]
            _rotate_into(entry[:, :, 0], grad_q, *inverse)
            _rotate_into(entry[:, :, 1], grad_k, *inverse)
            entry[:, :, 2].copy_(grad_v)
        return grad_qkv, None, None, *[None] * len(flat_tables)


def _split_heads(qkv: Tensor, num_heads: int, shapes: list[SequenceShape]) -> list[Tensor]:
    """Views (images, tokens, 3, heads, head_dims) of the packed entries."""
    sizes = [images * tokens for images, tokens in shapes]
    return [
        entry.view(*shape, 3, num_heads, -1)
        for entry, shape in zip(qkv.split(sizes), shapes, strict=True)
    ]


def _rotate_entry(qkv: Tensor, sin: Tensor, cos: Tensor) -> QueryKeyValue:
    """Queries, keys and values of one entry, (images, heads, tokens, head_dims) each."""
    query_key = qkv[:, :, :2]
    if torch.compiler.is_compiling():
        rotated = _rotate(query_key, sin, cos).to(qkv.dtype)
    elif query_key.dtype == sin.dtype:
        rotated = torch.empty_like(query_key, memory_format=torch.contiguous_format)
        _rotate_into(rotated, query_key, sin, cos)
    else:
        rotated = _rotate_cast(query_key, sin, cos).to(qkv.dtype)
    q, k = rotated.transpose(1, 3).unbind(2)
    return q, k, qkv[:, :, 2].transpose(1, 2)


def _rotate(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """Rotation of ``x`` (images, tokens, ..., head_dims) in plain arithmetic, for a compiler."""
    num_prefix, sin, cos = _align(x, sin, cos)
    y = x.to(sin.dtype)
    first, second = y[:, num_prefix:].chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return torch.cat((y[:, :num_prefix], rotated), dim=1)


def _rotate_into(out: Tensor, x: Tensor, sin: Tensor, cos: Tensor) -> None:
    """Write the rotation of ``x`` (images, tokens, ..., head_dims) to ``out``."""
    if not x.dtype == sin.dtype == out.dtype:
        out.copy_(_rotate_cast(x, sin, cos))
        return
    num_prefix, sin, cos = _align(x, sin, cos)
    out[:, :num_prefix] = x[:, :num_prefix]
    first, second = x[:, num_prefix:].chunk(2, dim=-1)
    out_first, out_second = out[:, num_prefix:].chunk(2, dim=-1)
    _add_product_(torch.mul(first, cos, out=out_first), second, sin, -1)
    _add_product_(torch.mul(second, cos, out=out_second), first, sin, 1)


def _rotate_cast(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """Rotation of ``x`` (images, tokens, ..., head_dims) in the dtype of the tables."""
    num_prefix, sin, cos = _align(x, sin, cos)
    x = x.to(sin.dtype, copy=True, memory_format=torch.contiguous_format)
    first, second = x[:, num_prefix:].chunk(2, dim=-1)
    product = first * sin
    _add_product_(first.mul_(cos), second, sin, -1)
    second.mul_(cos).add_(product)
    return x


def _add_product_(out: Tensor, x: Tensor, table: Tensor, sign: int) -> None:
    if out.dtype == torch.float32:
        out.addcmul_(x, table, value=sign)
    else:
        # A 16-bit RoPE rounds each product; a fused update would not.
        out.add_(x * table, alpha=sign)


def _align(x: Tensor, sin: Tensor, cos: Tensor) -> tuple[int, Tensor, Tensor]:
    """Number of leading tokens without a position, and tables that broadcast against the rest."""
    num_patches, half_dims = sin.shape
    shape = (num_patches, *[1] * (x.dim() - 3), half_dims)
    return x.shape[1] - num_patches, sin.view(shape), cos.view(shape)
