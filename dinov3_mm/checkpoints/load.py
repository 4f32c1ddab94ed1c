"""Weights of any known format under official names, as far as a rank's shards need them."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import all_reduce, broadcast, broadcast_object_list, get_rank, get_world_size
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from dinov3_mm.checkpoints.formats.conversion import (
    PERIODS_KEY,
    ConversionRequest,
    reset_bias_masks,
    trained_rope_dtype,
)
from dinov3_mm.checkpoints.formats.layouts import LAYOUTS, Layout

from .containers import OpenedCheckpoint, StoredTensor, open_checkpoint
from .locate import Statistics, check_released, find_statistics, local_path, located

# --- The line that says what a load did ---


@dataclass(frozen=True)
class LoadReport:
    """What was loaded, from where, and what was chosen on the way.

    Attributes:
        source: path that was given.
        layout: whose names the tensors carried, in words.
        container: kind of file or folder, in words.
        num_tensors: tensors of the backbone.
        statistics: name of the input normalisation, or 'unknown'.
        heads: projection heads in the file, e.g. ``('dino_head', 'ibot_head')``.
        notes: what was dropped, made up or chosen.
        missing: tensors of the backbone that the source lacks; they kept their values.
        unexpected: tensors of the source that the backbone has no place for.
        other_shape: tensors that have other shapes in the backbone, which kept its values.
    """

    source: str
    layout: str
    container: str
    num_tensors: int
    statistics: str
    heads: tuple[str, ...]
    notes: tuple[str, ...]
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    other_shape: tuple[str, ...] = ()

    @property
    def num_loaded(self) -> int:
        """Tensors of the backbone that were loaded: all, unless a partial load was allowed."""
        return self.num_tensors - len(self.missing) - len(self.other_shape)

    def __str__(self) -> str:
        line = (
            f"loaded {self.num_loaded}/{self.num_tensors} backbone tensors from {self.layout} "
            f"{self.container} {self.source}, statistics {self.statistics}, "
            f"heads: {', '.join(self.heads) or 'none'}"
        )
        left = (
            ("missing", self.missing),
            ("unexpected", self.unexpected),
            ("other shape", self.other_shape),
        )
        line += "".join(f", {kind}: {shortened(names)}" for kind, names in left if names)
        return "; ".join((line, *self.notes))


def shortened(names: Sequence[str], limit: int = 12) -> str:
    """Names for a message, at most ``limit`` of them."""
    more = f", ... and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


# --- Which tensors of a checkpoint are the backbone: wrapper names, sub-models, layouts ---


# Path parts that wrappers leave in names: (Distributed)DataParallel, torch.compile, activation
# checkpointing, FSDP.
_WRAPPER_PARTS = frozenset(
    ("module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
)
# Sub-models in order of preference: EMA weights before weights in training.
_PREFERENCE = (
    "model.model_ema.backbone.",
    "model_ema.backbone.",
    "model.teacher.backbone.",
    "teacher.backbone.",
    "model.backbone.",
    "model.student.backbone.",
    "student.backbone.",
    "backbone.",
    "",
)
HEADS = ("dino_head", "ibot_head")


@dataclass(frozen=True)
class Selection:
    """The backbone found in a checkpoint.

    Attributes:
        layout: whose names it carries.
        prefix: what stands before those names.
        backbone: stored name of each tensor of the backbone, by its name without prefix.
        heads: the same for each projection head beside it, e.g. ``heads['dino_head']``.
        ignored: prefixes of all other tensors.
    """

    layout: Layout
    prefix: str
    backbone: dict[str, str]
    heads: dict[str, dict[str, str]]
    ignored: tuple[str, ...]


def select_backbone(names: Iterable[str], source: str) -> Selection:
    """Find the backbone among the tensor names of a checkpoint.

    With several sub-models the EMA branch is preferred (``model_ema``, ``teacher``), then a lone
    backbone, then the student.

    Raises:
        ValueError: If no known layout is there, or several sub-models of unknown role.
    """
    stored = _without_wrappers(names, source)
    found = _find_layouts(stored)
    if not found:
        raise ValueError(
            f"{source} holds no known backbone. Known layouts: "
            f"{', '.join(f'{layout.title} ({layout.signatures[0][0]})' for layout in LAYOUTS)}; "
            f"found names such as {list(stored)[:8]}"
        )
    prefix = next((prefix for prefix in _PREFERENCE if prefix in found), None)
    if prefix is None:
        if len(found) > 1:
            raise ValueError(
                f"{source} holds several backbones, under {sorted(found)}, and none of them is a "
                f"known role ({', '.join(filter(None, _PREFERENCE))}); save one of them alone"
            )
        prefix = next(iter(found))
    return _split(stored, prefix, found[prefix])


def _without_wrappers(names: Iterable[str], source: str) -> dict[str, str]:
    stored: dict[str, str] = {}
    for name in names:
        clean = ".".join(part for part in name.split(".") if part not in _WRAPPER_PARTS)
        if clean in stored:
            raise ValueError(f"{source} holds {clean!r} twice: as {stored[clean]!r} and {name!r}")
        stored[clean] = name
    return stored


def _find_layouts(names: dict[str, str]) -> dict[str, Layout]:
    """Layout by prefix, for every prefix under which a layout's signature is complete."""
    found: dict[str, Layout] = {}
    for layout in LAYOUTS:
        for signature in layout.signatures:
            for name in names:
                if not name.endswith(signature[0]):
                    continue
                prefix = name.removesuffix(signature[0])
                if prefix and not prefix.endswith("."):
                    continue
                if all(prefix + part in names for part in signature):
                    found.setdefault(prefix, layout)
    return found


def _split(stored: dict[str, str], prefix: str, layout: Layout) -> Selection:
    backbone: dict[str, str] = {}
    heads: dict[str, dict[str, str]] = {}
    ignored: dict[str, None] = {}
    head_prefixes = {}
    if prefix.endswith("backbone."):
        head_prefixes = {head: prefix.removesuffix("backbone.") + head + "." for head in HEADS}
    for clean, name in stored.items():
        head = next((h for h, start in head_prefixes.items() if clean.startswith(start)), None)
        if clean.startswith(prefix):
            backbone[clean.removeprefix(prefix)] = name
        elif head is not None:
            heads.setdefault(head, {})[clean.removeprefix(head_prefixes[head])] = name
        else:
            parts = clean.split(".")
            ignored[".".join(parts[: 2 if parts[0] == "model" else 1])] = None
    return Selection(layout, prefix, backbone, heads, tuple(ignored))


# --- Weights that a rank reads as far as its shards need them ---
#
# Names, shapes and dtypes of a file are known from its header. A network in shards therefore takes
# its weights as :class:`UnreadTensor`, which look like meta tensors and are fetched one by one
# when their target is known:
#
# - where the file stores the tensor as it is wanted (official names, our own exports; safetensors,
#   or a torch file that can be mapped), each rank reads the slice that is its shard;
# - else (other layouts, other containers) the first rank reads and converts the weights, and each
#   tensor is scattered from there.


_FOR_SHARDS: ContextVar[bool] = ContextVar("_FOR_SHARDS", default=False)


@contextmanager
def reading_for_shards(active: bool = True) -> Iterator[None]:
    """Context in which :func:`load_weights` returns unread tensors; all ranks must take part."""
    token = _FOR_SHARDS.set(active)
    try:
        yield
    finally:
        _FOR_SHARDS.reset(token)


def reads_for_shards() -> bool:
    """Whether the weights that are loaded are for shards on several ranks."""
    return _FOR_SHARDS.get() and get_world_size() > 1


class UnreadTensor(Tensor):
    """A meta tensor that can be fetched; what is computed from it is an ordinary meta tensor."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def of(
        shape: Iterable[int], dtype: torch.dtype, fetch: Callable[[Tensor], Tensor]
    ) -> "UnreadTensor":
        """Args: what it looks like, and what reads it for a target, whole or distributed."""
        empty = torch.empty(tuple(shape), dtype=dtype, device="meta")
        tensor = Tensor._make_subclass(UnreadTensor, empty)
        tensor.fetch = fetch
        return tensor


def load_for_shards(
    opened: OpenedCheckpoint, convert: Callable[[OpenedCheckpoint], "ForeignCheckpoint"]
) -> "ForeignCheckpoint":
    """Convert a checkpoint whose tensors nobody reads yet.

    Args:
        opened: the checkpoint.
        convert: makes official tensors of what an opened checkpoint reads.
    """
    checkpoint = None if opened.stored is None else _convert_unread(opened, convert)
    return _from_first_rank(opened, convert) if checkpoint is None else checkpoint


def on_first_rank(action: Callable[[], Any]) -> Any:
    """What ``action`` returns on the first rank, None on the others; its errors reach all ranks."""
    result, errors = None, [None]
    if get_rank() == 0:
        try:
            result = action()
        except Exception as error:  # the others must fail with it instead of waiting
            errors = [error]
    broadcast_object_list(errors)
    if errors[0] is not None:
        raise errors[0]
    return result


def check_finite(fetched: dict[str, Tensor]) -> None:
    """Raise a ``ValueError`` on all ranks for values of any rank that are not finite."""
    if not fetched:
        return
    local = (t.to_local() if isinstance(t, DTensor) else t for t in fetched.values())
    broken = torch.tensor([not torch.isfinite(tensor).all() for tensor in local], dtype=torch.int32)
    all_reduce(broken, "max")
    names = [name for name, flag in zip(fetched, broken.tolist()) if flag]
    if names:
        raise ValueError(
            f"the weights hold NaN or infinite values in {len(names)} of {len(fetched)} tensors, "
            f"e.g. {', '.join(names[:5])}; nothing was loaded"
        )


def _convert_unread(
    opened: OpenedCheckpoint,
    convert: Callable[[OpenedCheckpoint], "ForeignCheckpoint"],
) -> "ForeignCheckpoint | None":
    """The conversion, if it passes every stored tensor on as it is."""
    unread: dict[str, UnreadTensor] = {}

    def read(names: Iterable[str]) -> dict[str, Tensor]:
        found = {name: _sliced(opened.stored[name]) for name in names}
        unread.update(found)
        return found

    try:
        checkpoint = convert(replace(opened, read=read))
    except (RuntimeError, NotImplementedError):
        return None  # it asks for values, which meta tensors do not have
    parts = (checkpoint.state_dict, *checkpoint.heads.values())
    tensors = [tensor for part in parts for tensor in part.values()]
    untouched = all(not t.is_meta or isinstance(t, UnreadTensor) for t in tensors)
    # A change in place would be lost.
    untouched &= all(tensor._version == 0 for tensor in unread.values())
    return checkpoint if untouched else None


def _sliced(stored: StoredTensor) -> UnreadTensor:
    def fetch(target: Tensor) -> Tensor:
        if not isinstance(target, DTensor):
            return stored.read(tuple(slice(0, size) for size in stored.shape))
        mesh, placements = target.device_mesh, target.placements
        shape, offset = compute_local_shape_and_global_offset(target.shape, mesh, placements)
        local = stored.read(tuple(slice(o, o + n) for o, n in zip(offset, shape)))
        return DTensor.from_local(
            local.to(target.device),
            mesh,
            placements,
            run_check=False,
            shape=target.shape,
            stride=target.stride(),
        )

    return UnreadTensor.of(stored.shape, stored.dtype, fetch)


def _from_first_rank(
    opened: OpenedCheckpoint, convert: Callable[[OpenedCheckpoint], "ForeignCheckpoint"]
) -> "ForeignCheckpoint":
    """Read and convert on the first rank; the others learn what there is."""
    whole = on_first_rank(lambda: convert(opened))
    described = [None]
    if whole is not None:
        described = [_map_tensors(whole, lambda tensor: (tuple(tensor.shape), tensor.dtype))]
    broadcast_object_list(described)
    if whole is not None:
        return _map_tensors(whole, lambda tensor: _scattered(tensor.shape, tensor.dtype, tensor))
    return _map_tensors(described[0], lambda pair: _scattered(*pair, None))


def _map_tensors(checkpoint: "ForeignCheckpoint", change: Callable) -> "ForeignCheckpoint":
    return replace(
        checkpoint,
        state_dict={name: change(tensor) for name, tensor in checkpoint.state_dict.items()},
        heads={
            head: {name: change(tensor) for name, tensor in part.items()}
            for head, part in checkpoint.heads.items()
        },
    )


def _scattered(shape: Iterable[int], dtype: torch.dtype, whole: Tensor | None) -> UnreadTensor:
    def fetch(target: Tensor) -> Tensor:
        source = torch.empty(tuple(shape), dtype=dtype) if whole is None else whole
        if not isinstance(target, DTensor):
            source = source.clone()
            broadcast(source)
            return source
        source = source.to(target.device)
        return distribute_tensor(source, target.device_mesh, target.placements, src_data_rank=0)

    return UnreadTensor.of(shape, dtype, fetch)


# --- Whole tensors to shards and back, for models whose parameters are distributed tensors ---


def shard_like(whole: Tensor, target: Tensor) -> Tensor:
    """What a rank keeps of a tensor that it holds whole: itself, or its shard if the target is one.

    Every rank must call this with the same values; nothing is sent. An unread tensor is read as far
    as the target needs it.
    """
    if isinstance(whole, UnreadTensor):
        return whole.fetch(target)
    if not isinstance(target, DTensor) or isinstance(whole, DTensor):
        return whole
    return distribute_tensor(
        whole.to(target.device), target.device_mesh, target.placements, src_data_rank=None
    )


def shard_state(state: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """:func:`shard_like` for a state dict; names that the target lacks stay as they are.

    Raises:
        ValueError: values of unread tensors that are not finite.
    """
    unread = [n for n, t in state.items() if isinstance(t, UnreadTensor) and n in target]
    shards = {
        name: shard_like(tensor, target[name]) if name in target else tensor
        for name, tensor in state.items()
    }
    check_finite({name: shards[name] for name in unread})
    return shards


@torch.no_grad()
def gather_whole(tensor: Tensor) -> Tensor:
    """The whole tensor on the CPU. For a distributed tensor all its ranks must take part."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().cpu()


# --- Weights of any known format under official names ---


@dataclass(frozen=True)
class ForeignCheckpoint:
    """Weights of a file or folder under official names.

    Attributes:
        state_dict: tensors of the backbone, on the CPU, in the dtype of the file.
        heads: tensors of the projection heads by head, if they were asked for:
            ``heads['dino_head']['mlp.0.weight']``.
        layout: whose names the file carries.
        stated_arch: architecture values that the source states beside its tensors, or shows: the
            RoPE precision of a training checkpoint.
        statistics: input normalisation, None if the source does not state it.
        metadata: what our own exports state in their header, else empty.
        report: what was found and done.
    """

    state_dict: dict[str, Tensor]
    heads: dict[str, dict[str, Tensor]]
    layout: Layout
    stated_arch: dict[str, Any]
    statistics: Statistics | None
    metadata: dict[str, Any]
    report: LoadReport

    @property
    def arch(self) -> dict[str, Any]:
        """Architecture dict of the backbone; a ``ValueError`` if the tensors do not show it."""
        if "embed_dims" in self.stated_arch:
            return dict(self.stated_arch)
        return {**self.layout.family.infer_arch(self.state_dict), **self.stated_arch}


def load_weights(
    path: str | os.PathLike,
    *,
    heads: bool = False,
    periods: str = "file",
    reset_bias_mask: bool = False,
    arch: Mapping[str, Any] | None = None,
) -> ForeignCheckpoint:
    """Read backbone weights of any known format and convert them to official names.

    Official ``.pth`` files, teacher exports and training states (their EMA branch), Hugging Face
    and timm files and folders, distributed checkpoint folders, and our own exports. Nothing in the
    file is executed.

    Args:
        path: file, folder, http(s) URL, or hub name (``owner/name``), see :func:`local_path`; or
            the name of a released checkpoint, see :func:`released_file`.
        heads: also return the projection heads that lie beside the backbone.
        periods: 'file' for the RoPE periods of the official files: as stored, or rounded to bf16
            where the source (Hugging Face, timm) stores none; 'exact' for unrounded ones, with
            which features equal those of these two libraries.
        reset_bias_mask: set the mask of the qkv bias to 1/0/1, so that the q and v biases train;
            the released files hold zeros. What the model computes does not change.
        arch: architecture values of the backbone that the weights are meant for. They settle what
            some formats leave open, such as the number of heads.

    Raises:
        FileNotFoundError: If nothing is there.
        PermissionError: If a hub repository is gated and access was not granted.
        ValueError: If the content is damaged, unknown, would run code, holds values that are not
            finite, is not the released file whose name it has, or lacks the heads that were asked
            for.
    """
    path = local_path(located(path))
    opened = open_checkpoint(path)
    settings = (path, heads, periods, reset_bias_mask, arch or {})
    if reads_for_shards():
        on_first_rank(lambda: check_released(path))
        return load_for_shards(opened, lambda opened: _convert(opened, *settings))
    check_released(path)
    return _convert(opened, *settings)


def _convert(
    opened: OpenedCheckpoint,
    path: Path,
    heads: bool,
    periods: str,
    reset_bias_mask: bool,
    arch: Mapping[str, Any],
) -> ForeignCheckpoint:
    """The backbone of an opened checkpoint under official names; see :func:`load_weights`."""
    selection = select_backbone(opened.names, str(path))
    if heads and not selection.heads:
        raise ValueError(f"{path} holds a backbone only; expected dino_head or ibot_head beside it")
    head_tensors = {
        name: _read_finite(opened.read, names, path)
        for name, names in (selection.heads.items() if heads else ())
    }
    conversion = selection.layout.to_official(
        _read_finite(opened.read, selection.backbone, path),
        ConversionRequest(periods, opened.config, arch),
    )
    notes = [*conversion.notes, *opened.notes]
    if reset_bias_mask:
        notes.append(reset_bias_masks(conversion.state_dict))
    if selection.ignored:
        notes.append(f"ignored: {', '.join(selection.ignored)}")
    stated = dict(opened.export.get("arch", conversion.arch))
    if not opened.export:
        stored = conversion.state_dict.get(PERIODS_KEY)
        trained = trained_rope_dtype(stored, has_heads=bool(selection.heads))
        stated.update({} if trained is None else {"rope_dtype": trained})
    statistics = find_statistics(path)
    report = LoadReport(
        source=str(path),
        layout="exported" if opened.export else selection.layout.title,
        container=opened.container,
        num_tensors=len(conversion.state_dict),
        statistics=statistics.name if statistics else "unknown",
        heads=tuple(selection.heads),
        notes=tuple(notes),
    )
    return ForeignCheckpoint(
        conversion.state_dict,
        head_tensors,
        selection.layout,
        stated,
        statistics,
        opened.export,
        report,
    )


def _read_finite(
    read: Callable[[Iterable[str]], dict[str, Tensor]], names: Mapping[str, str], path: Path
) -> dict[str, Tensor]:
    """Tensors by official or foreign name; ``names`` maps these to the names in the file."""
    stored = read(names.values())
    tensors = {name: stored[stored_name] for name, stored_name in names.items()}
    # What is unread is checked when it is.
    present = {name: tensor for name, tensor in tensors.items() if not tensor.is_meta}
    broken = [name for name, tensor in present.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ValueError(
            f"{path} holds NaN or infinite values in {len(broken)} of {len(tensors)} tensors, e.g. "
            f"{', '.join(broken[:5])}; nothing was loaded"
        )
    return tensors
