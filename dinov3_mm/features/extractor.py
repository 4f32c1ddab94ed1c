"""Features of images in one call."""

import inspect
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dinov3_mm.checkpoints import Statistics, build_backbone, read_statistics
from dinov3_mm.checkpoints.frozen import fingerprint
from dinov3_mm.checkpoints.locate import named_statistics, released_file
from dinov3_mm.datasets.images import read_image
from dinov3_mm.models.backbones.zoo import ZooRow, zoo_row
from dinov3_mm.models.precision import AUTO, DTYPES, choose_dtype, describe_choice

from .frozen import evaluating
from .preparation import (
    NATIVE,
    GivenPixels,
    ImageLike,
    ImagePreparation,
    all_usable,
    group_by_size,
    load_batches,
    parse_image_size,
)
from .tokens import ImageFeatures, Layers, Tiling, Tokens, join_features, resolve_layers

# --- From a name, a file or a module to a backbone with its statistics ---


@dataclass(frozen=True)
class OpenedBackbone:
    """A backbone and what is known about it.

    Attributes:
        module: in eval mode unless it was given as a module.
        statistics: input normalisation, None if nothing states it.
        origin: where the weights come from, in words.
    """

    module: nn.Module
    statistics: Statistics | None
    origin: str


def open_backbone(
    model: str | os.PathLike | nn.Module,
    weights: str | os.PathLike | None = None,
    *,
    random_init: bool = False,
) -> OpenedBackbone:
    """Find or build the backbone.

    Args:
        model: a name of ``list_backbones()``, a weight file, folder, URL or hub name, or a module.
        weights: weights for a name; None takes the official file from torch hub's cache.
        random_init: for a name, leave its weights random (seed 0): a baseline.

    Raises:
        FileNotFoundError: If there are no such weights.
        ValueError: If the name is unknown, or the arguments exclude each other.
    """
    row = zoo_row(model) if isinstance(model, (str, os.PathLike)) else None
    if row is None and (weights is not None or random_init):
        raise ValueError(
            "weights and random_init belong to the name of an architecture; got "
            f"{model if not isinstance(model, nn.Module) else 'a module'!r}, which has its weights"
        )
    if isinstance(model, nn.Module):
        return OpenedBackbone(model, None, "a module")
    if row is None:
        # The module first: its errors say more about a file that is none.
        return OpenedBackbone(build_backbone(model), _statistics(model), str(model))
    of_row = Statistics(row.mean, row.std, row.data or "custom")
    if random_init:
        if weights is not None:
            raise ValueError(f"random_init=True leaves no use for weights={weights!r}")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return OpenedBackbone(build_backbone(model), of_row, f"{model}, random weights")
    weights = weights or _released(row)
    module = build_backbone(model, weights)
    return OpenedBackbone(module, _statistics(weights) or of_row, str(weights))


def describe(module: nn.Module, origin: str) -> dict[str, Any]:
    """Provenance of features as JSON: class, architecture, origin and a hash of the weights."""
    return {
        "backbone": type(module).__name__,
        "arch": getattr(module, "arch_settings", {}),
        "weights": origin,
        "fingerprint": fingerprint(module),
    }


def _statistics(weights: str | os.PathLike) -> Statistics | None:
    try:
        return read_statistics(weights)
    except ValueError:  # nothing states them
        return None


def _released(row: ZooRow) -> Path:
    try:
        return released_file(row)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(
            f"{error}. random_init=True gives the features of random weights, a baseline"
        ) from error


# --- The threads of a CPU side by side, or one device in a row ---


class ForwardThreads:
    """Runs small batches side by side on a CPU, each on one thread.

    Several passes of one thread each get more out of the cores than one pass that shares every
    operation among them: nothing waits for the slowest thread dozens of times per block. While the
    context is open torch works with one thread per pass; on exit it has its threads back.

    Args:
        num_threads: passes at a time; 1 runs them at once in the calling thread.
    """

    def __init__(self, num_threads: int) -> None:
        self.num_threads = num_threads
        self._pool: ThreadPoolExecutor | None = None
        self._pending: list[Future] = []

    def __enter__(self) -> "ForwardThreads":
        if self.num_threads > 1:
            torch.set_num_threads(1)
            self._pool = ThreadPoolExecutor(self.num_threads)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            torch.set_num_threads(self.num_threads)

    def submit(self, function: Callable, *args: Any) -> Future:
        """Start a pass; the result is that of the future."""
        if self._pool is None:
            return _done(function, args)
        self._pending = [future for future in self._pending if not future.done()]
        self._pending.append(self._pool.submit(function, *args))
        return self._pending[-1]

    def run_alone(self, function: Callable, *args: Any) -> Future:
        """Run a pass with all threads to itself, after those that are under way."""
        if self._pool is None:
            return _done(function, args)
        for future in self._pending:
            future.exception()  # waits; the error is raised where the result is used
        torch.set_num_threads(self.num_threads)
        try:
            return _done(function, args)
        finally:
            torch.set_num_threads(1)


def _done(function: Callable, args: tuple) -> Future:
    future: Future = Future()
    future.set_result(function(*args))
    return future


# --- The extractor ---


# Tokens of one pass on one CPU thread: enough for efficient matrix products, small enough that its
# activations stay in the caches and that the threads finish together.
_TOKENS_PER_THREAD = 2048
_BATCHES_IN_FLIGHT = 2

Tag = TypeVar("Tag")
Result = TypeVar("Result")


class FeatureExtractor:
    """CLS, register and patch tokens of images from frozen weights.

    The default preprocessing is the reference one: both sides resized to ``image_size`` whatever
    the aspect ratio (bilinear, antialiased, on 8-bit pixels), scaled to [0, 1], normalised with the
    statistics of the weights.

    Args:
        model: a name of ``dinov3_mm.list_backbones()``, a weight file, folder, URL or hub name, or
            a backbone (``forward_tokens``, ``get_intermediate_layers``, ``token_stride``).
        weights: weights for a name; None takes the official file from torch hub's cache.
        random_init: for a name, keep random weights (seed 0), as a baseline.
        image_size: side in pixels, (height, width), or 'native' for the size of each image;
            multiples of the patch size. Default: 256, or 224 for patches of 14 pixels.
        resize: 'squash' or 'short_side_crop'; for 'native' 'crop' or 'pad'. See
            :class:`ImagePreparation`. Default: the first of the two.
        interpolation: 'bilinear' or 'bicubic'.
        layers: further blocks whose tokens are returned: the last n, block indices from 0, or
            'four_even' for four evenly spaced ones.
        norm: apply the final norm to every output.
        dtype: compute in 'fp32' or 'bf16'; 'auto' is bf16 on a GPU that has it, fp32 elsewhere, and
            for a module in bf16 its own. Products are in bf16 then, norms and rotations stay fp32.
            Features are fp32 on the CPU either way.
        device: where to compute; by default that of the module, else CUDA if it is there.
        mean, std: normalisation of pixels in [0, 1], one value per channel; by default those that
            the weights state.
        batch_size: images per pass at most.
        max_tokens_per_batch: patch tokens per pass at most, the bound of the memory; larger images
            run one at a time.
        tile: cut images with a longer side into tiles of this side and stitch their patch tokens;
            CLS and registers are the mean over the tiles. An approximation: tokens see their tile.
        overlap: pixels that neighbouring tiles share at least; default: an eighth of the tile.
        read: decodes the image file at a path to an array (H, W, C) in 0..255.

    Attributes:
        device: where the backbone is.
        dtype: what it computes in, 'fp32' or 'bf16'.
        choice: that in words, with the reason.

    Raises:
        FileNotFoundError: If there are no such weights.
        ValueError: If an argument is unknown or does not fit the others; fp16 is refused.

    Example:
        >>> extractor = FeatureExtractor("dinov3_vits16_pretrain_lvd1689m-08c60483.pth")
        >>> features = extractor(["cat.jpg", "dog.jpg"])
        >>> features.cls.shape, features.patches.shape, features.grid
        (torch.Size([2, 384]), torch.Size([2, 256, 384]), (16, 16))
    """

    def __init__(
        self,
        model: str | os.PathLike | nn.Module,
        *,
        weights: str | os.PathLike | None = None,
        random_init: bool = False,
        image_size: int | tuple[int, int] | str | None = None,
        resize: str | None = None,
        interpolation: str = "bilinear",
        layers: Layers = None,
        norm: bool = True,
        dtype: str = AUTO,
        device: str | torch.device | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        batch_size: int = 32,
        max_tokens_per_batch: int = 32768,
        tile: int | None = None,
        overlap: int | None = None,
        read: Callable[[str], np.ndarray] = read_image,
    ) -> None:
        choose_dtype(dtype, "cpu")  # refuses an unknown one before weights are read
        for name, value in (("batch_size", batch_size), ("max_tokens", max_tokens_per_batch)):
            if value < 1:
                raise ValueError(f"{name} is {value}; expected 1 or more")
        opened = open_backbone(model, weights, random_init=random_init)
        backbone = opened.module
        self.statistics = _of_each_channel(opened.statistics, mean, std)
        self.backbone, self.origin = backbone, opened.origin
        self.norm, self.read = norm, read
        self.layers = resolve_layers(layers, backbone.num_layers)
        self.batch_size, self.max_tokens = batch_size, max_tokens_per_batch
        size = parse_image_size(image_size, backbone.token_stride)
        self.preparation = ImagePreparation(
            channels=len(self.statistics.mean),
            stride=backbone.token_stride,
            size=size,
            resize=resize or ("crop" if size is None else "squash"),
            interpolation=interpolation,
        )
        self.tiling = None if tile is None else Tiling(tile, overlap, backbone.token_stride)
        self._place(device, dtype, owned=not isinstance(model, nn.Module))
        channels = getattr(backbone, "arch_settings", {}).get(
            "in_channels", len(self.statistics[0])
        )
        if channels != len(self.statistics.mean):
            raise ValueError(
                f"the backbone takes {channels} channels, mean and std have "
                f"{len(self.statistics.mean)} values; pass one value per channel"
            )

    def _place(self, device: str | torch.device | None, asked: str, *, owned: bool) -> None:
        if device is None and owned and torch.cuda.is_available():
            device = "cuda"
        if device is not None:
            self.backbone.to(device)
        parameter = next(self.backbone.parameters())
        self.device = parameter.device
        if asked == AUTO and parameter.dtype == torch.bfloat16:
            asked = "bf16"
        self.dtype = choose_dtype(asked, self.device)
        self.choice = describe_choice(asked, self.dtype, self.device)
        if parameter.dtype != torch.float32 and parameter.dtype != DTYPES[self.dtype]:
            raise ValueError(
                f"the parameters are {parameter.dtype}, dtype is {self.dtype!r}; pass the dtype of "
                "the parameters, or a float32 module"
            )
        self._described: dict[str, Any] | None = None
        if owned and self.dtype == "bf16":
            # Of the weights as they were given, from which bf16 and fp32 features come alike.
            self._described = describe(self.backbone, self.origin)
            # Autocast would round these weights anew in every pass, to the same values.
            for module in self.backbone.modules():
                if isinstance(module, (nn.Linear, nn.Conv2d)):
                    module.to(torch.bfloat16)
        mean, std = (torch.tensor(v, device=self.device) for v in self.statistics[:2])
        self._offset, self._scale = 255 * mean.view(-1, 1, 1), 1 / (255 * std.view(-1, 1, 1))

    @property
    def options(self) -> dict[str, Any]:
        """What decides the values of the features besides the weights, as JSON."""
        tiling = self.tiling
        return {
            "image_size": NATIVE if self.preparation.size is None else list(self.preparation.size),
            "resize": self.preparation.resize,
            "interpolation": self.preparation.interpolation,
            "layers": list(self.layers),
            "norm": self.norm,
            "dtype": self.dtype,
            "mean": list(self.statistics.mean),
            "std": list(self.statistics.std),
            "tile": tiling and [tiling.tile, tiling.overlap],
        }

    def describe(self) -> dict[str, Any]:
        """Provenance of the features as JSON: backbone, architecture, weights, fingerprint."""
        return dict(self._described or describe(self.backbone, self.origin))

    def __call__(
        self, images: ImageLike | Sequence[ImageLike], *, num_workers: int = 0
    ) -> ImageFeatures:
        """Features of one image or of several, in their order, as fp32 tensors on the CPU.

        Args:
            images: paths, PIL images, arrays (H, W, C) or tensors (C, H, W), or a batch as one
                array or tensor; pixels are uint8, or floating point in the 0..255 scale.
            num_workers: processes that decode and resize; 0 does it in this one.

        Raises:
            BrokenImageError: If a file cannot be decoded.
            FileNotFoundError: If there is no such file.
            TypeError: If an image is of another kind.
            ValueError: If there are no images, or one does not fit the backbone.
        """
        images = _as_list(images)
        tags, parts = zip(*self.stream(self._load(images, num_workers)))
        positions = np.concatenate(tags)
        return join_features(parts, np.argsort(positions).tolist())

    def stream(self, batches: Iterable[tuple[Tag, Tensor]]) -> Iterator[tuple[Tag, ImageFeatures]]:
        """Features of prepared batches, in order; reading and computing overlap.

        Args:
            batches: (tag, pixels (B, C, h, w)); the tag comes back with the features. The sides are
                multiples of the stride, as :attr:`preparation` makes them.
        """
        for tag, parts in self.run(batches, to_cpu):
            yield tag, join_features(parts, range(sum(map(len, parts))))

    def run(
        self, batches: Iterable[tuple[Tag, Tensor]], finish: Callable[[ImageFeatures], Result]
    ) -> Iterator[tuple[Tag, list[Result]]]:
        """As :meth:`stream`, with ``finish(features on the device)`` for each pass of a batch."""
        on_cpu = self.device.type == "cpu"
        started: deque[tuple[Tag, list[Future]]] = deque()
        with (
            evaluating(self.backbone),
            ForwardThreads(torch.get_num_threads() if on_cpu else 1) as threads,
        ):
            self._fill_caches()
            for tag, pixels in batches:
                started.append((tag, self._start(pixels, finish, threads)))
                if len(started) > _BATCHES_IN_FLIGHT:
                    yield _collect(*started.popleft())
            for tag, futures in started:
                yield _collect(tag, futures)

    def _load(
        self, images: Sequence[ImageLike], num_workers: int
    ) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """(positions, pixels (B, C, h, w)) of images of equal size."""
        pixels = GivenPixels(images, self.read)
        if num_workers == 0:
            prepared = ((index, self.preparation(pixels(index))) for index in range(len(images)))
            return group_by_size(prepared, self.capacity)
        size = 1 if self.preparation.size is None else self.capacity(*self.preparation.size)
        batches = [range(len(images))[i : i + size] for i in range(0, len(images), size)]
        loaded = load_batches(pixels, batches, self.preparation, num_workers=num_workers)
        groups = all_usable(loaded, images)
        if size > 1:
            return groups
        return group_by_size(((index[0], batch[0]) for index, batch in groups), self.capacity)

    def capacity(self, height: int, width: int) -> int:
        """Images of a size per pass."""
        if self.tiling is not None and self.tiling.applies_to(height, width):
            return 1
        return max(1, min(self.batch_size, self.max_tokens // self._num_patches(height, width)))

    def _num_patches(self, height: int, width: int) -> int:
        stride = self.preparation.stride
        return (height // stride) * (width // stride)

    def _start(
        self, pixels: Tensor, finish: Callable[[ImageFeatures], Result], threads: ForwardThreads
    ) -> list[Future]:
        height, width = pixels.shape[-2:]
        if self.tiling is not None and self.tiling.applies_to(height, width):
            return [threads.run_alone(self._run_tiles, image, finish) for image in pixels]
        patches = self._num_patches(height, width)
        share = min(_TOKENS_PER_THREAD, self.max_tokens // threads.num_threads)
        if threads.num_threads > 1 and patches <= share:
            chunks = pixels.split(min(share // patches, -(-len(pixels) // threads.num_threads)))
            return [threads.submit(self._run, chunk, finish) for chunk in chunks]
        chunks = pixels.split(self.capacity(height, width))
        return [threads.run_alone(self._run, chunk, finish) for chunk in chunks]

    def _run(self, pixels: Tensor, finish: Callable[[ImageFeatures], Result]) -> Result:
        return finish(self._features(pixels))

    def _run_tiles(self, image: Tensor, finish: Callable[[ImageFeatures], Result]) -> Result:
        tiles = self.tiling.cut(image)
        parts = [self._features(part) for part in tiles.split(self.capacity(*tiles.shape[-2:]))]
        features = join_features(parts, range(len(tiles)))

        def stitched(tokens: Tokens) -> tuple:
            maps = self.tiling.stitch(tokens.feature_maps, *image.shape[-2:])
            means = tokens.cls.mean(0, keepdim=True), tokens.registers.mean(0, keepdim=True)
            return *means, maps.flatten(1).T[None], (tuple(maps.shape[1:]),)

        layers = {index: Tokens(*stitched(tokens)) for index, tokens in features.layers.items()}
        return finish(ImageFeatures(*stitched(features), layers))

    @torch.no_grad()
    def _features(self, pixels: Tensor) -> ImageFeatures:
        """Features (on the device) of pixels (B, C, h, w) in 0..255."""
        images = pixels.to(self.device, non_blocking=True).float()
        images = images.sub_(self._offset) if images is not pixels else images - self._offset
        images = images.mul_(self._scale)
        bf16 = self.dtype == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16) if bf16 else nullcontext():
            if self.layers or not self.norm:
                return self._intermediate(images)
            tokens = self.backbone.forward_tokens(images)
        grid = tuple(side // self.preparation.stride for side in images.shape[-2:])
        return ImageFeatures(tokens.cls, tokens.registers, tokens.patches, (grid,) * len(images))

    def _intermediate(self, images: Tensor) -> ImageFeatures:
        last = self.backbone.num_layers - 1
        wanted = sorted({*self.layers, last})
        arguments = {"n": wanted, "reshape": True, "return_class_token": True, "norm": self.norm}
        method = self.backbone.get_intermediate_layers
        has_registers = "return_extra_tokens" in inspect.signature(method).parameters
        if has_registers:
            arguments["return_extra_tokens"] = True
        outputs = {}
        for index, (maps, cls, *registers) in zip(wanted, method(images, **arguments)):
            registers = registers[0] if registers else cls[:, None][:, :0]
            patches = maps.flatten(2).transpose(1, 2)
            grids = (tuple(maps.shape[2:]),) * len(images)
            outputs[index] = (cls, registers, patches, grids)
        layers = {index: Tokens(*outputs[index]) for index in self.layers}
        return ImageFeatures(*outputs[last], layers)

    def _fill_caches(self) -> None:
        """One tiny pass: what a backbone builds on first use is there before threads need it."""
        side = self.preparation.stride
        self._features(torch.zeros(1, self.preparation.channels, side, side, dtype=torch.uint8))


def to_cpu(features: ImageFeatures) -> ImageFeatures:
    """The same features as contiguous fp32 tensors on the CPU, which share no memory."""

    def moved(tokens: Tokens) -> tuple:
        tensors = (tokens.cls, tokens.registers, tokens.patches)
        return *(to_host(tensor) for tensor in tensors), tokens.grids

    layers = {index: Tokens(*moved(tokens)) for index, tokens in features.layers.items()}
    return ImageFeatures(*moved(features), layers)


def to_host(tensor: Tensor) -> Tensor:
    """A contiguous fp32 copy on the CPU."""
    return tensor.to("cpu", torch.float32, copy=True).contiguous()


def _collect(tag: Tag, futures: list[Future]) -> tuple[Tag, list]:
    return tag, [future.result() for future in futures]


def _as_list(images: ImageLike | Sequence[ImageLike]) -> list[ImageLike]:
    is_batch = isinstance(images, (np.ndarray, Tensor)) and images.ndim == 4
    if isinstance(images, (str, os.PathLike, Image.Image, np.ndarray, Tensor)) and not is_batch:
        return [images]
    images = list(images)
    if not images:
        raise ValueError("got no images: the list is empty")
    return images


def _of_each_channel(
    stated: Statistics | None, mean: Sequence[float] | None, std: Sequence[float] | None
) -> Statistics:
    if mean is None and std is None:
        if stated is None:
            raise ValueError(
                "nothing states the input normalisation of this backbone; pass mean and std (for "
                "web images mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))"
            )
        return stated
    if mean is None or std is None or len(mean) != len(std) or min(std) <= 0:
        raise ValueError(
            f"mean={mean} and std={std}: pass both, with one value per channel and std above 0"
        )
    return named_statistics(mean, std)
