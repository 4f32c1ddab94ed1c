"""Weights of any known format under official names."""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .conversion import ConversionRequest
from .download import local_path
from .layouts import Layout
from .opening import open_checkpoint
from .periods import PERIODS_KEY, trained_rope_dtype
from .qkv_bias import reset_bias_masks
from .released import check_released, located
from .report import LoadReport
from .selecting import select_backbone
from .source import OpenedCheckpoint
from .statistics import Statistics, find_statistics
from .unread import load_for_shards, on_first_rank, reads_for_shards


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
