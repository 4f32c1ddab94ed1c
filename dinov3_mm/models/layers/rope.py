"""Axial two-dimensional rotary position embedding (paper section 3.2, RoPE-box jittering)."""

import math

import torch
from torch import Tensor, nn

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
