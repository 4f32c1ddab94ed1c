"""Weight files from one format to another, checked against the library that will read them."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor

from dinov3_mm.checkpoints.formats.conversion import (
    PERIODS_KEY,
    ConversionRequest,
    recomputed_periods,
)
from dinov3_mm.errors import hint
from dinov3_mm.models.backbones.zoo import ZOO

from .install import install_weights
from .io import PARTIAL_SUFFIX, atomic_folder
from .load import LoadReport, load_weights
from .locate import Statistics, find_statistics, statistics_of_data
from .targets import TARGETS, Source, Target

# --- How the library that reads it computes features ---


class Features(NamedTuple):
    """Features after the final norm.

    Attributes:
        cls: (B, D).
        patches: (B, N, D), row by row.
    """

    cls: Tensor
    patches: Tensor


class Reader(NamedTuple):
    """How a library reads what was written.

    Attributes:
        package: import name of the library; None for this project.
        features: of the model at a path on images (B, C, H, W), given what was written.
    """

    package: str | None
    features: Callable[[Path, Source, Tensor], Features]

    def version(self) -> str | None:
        """Name and version of the library, None if it is not installed."""
        if self.package is None:
            return "dinov3_mm"
        try:
            return f"{self.package} {import_module(self.package).__version__}"
        except ImportError:
            return None


def own_features(backbone: BaseModule, images: Tensor) -> Features:
    """Features of a backbone of this project."""
    tokens = backbone.forward_tokens(images)
    return Features(tokens.cls, tokens.patches)


def _ours(path: Path, source: Source, images: Tensor) -> Features:
    backbone = type(source.backbone)(arch=source.arch)
    install_weights(backbone, load_weights(path, arch=source.arch))
    return own_features(backbone.eval(), images)


def _transformers(path: Path, source: Source, images: Tensor) -> Features:
    from transformers import AutoModel

    model, loaded = AutoModel.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    problems = {kind: sorted(names) for kind, names in loaded.items() if names}
    if problems:
        raise ValueError(f"transformers does not load all of {path}: {problems}")
    tokens = model.eval()(images).last_hidden_state
    prefix = 1 + source.backbone.n_storage_tokens
    return Features(tokens[:, 0], tokens[:, prefix:])


def _timm(path: Path, source: Source, images: Tensor) -> Features:
    import timm

    model = timm.create_model(f"local-dir:{path}", pretrained=True).float().eval()
    if source.kind == "DINOv3ConvNeXt":
        featmap = model.head.norm(model.forward_features(images))
        return Features(model(images), featmap.flatten(2).transpose(1, 2))
    tokens = model.forward_features(images)
    return Features(tokens[:, 0], tokens[:, 1 + source.backbone.n_storage_tokens :])


READERS = {
    "official": Reader(None, _ours),
    "mm": Reader(None, _ours),
    "hf": Reader("transformers", _transformers),
    "timm": Reader("timm", _timm),
}


# --- The report ---


# Allowed difference of features, relative to the largest value.
BAR = 1e-4


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did.

    Attributes:
        source: what was read.
        target: name of the format.
        path: file or folder that was written.
        num_mapped: official tensors that have a place in the format.
        num_tensors: official tensors in all.
        dropped: what has no place: pattern of names and reason.
        made_up: what the source does not hold.
        reader: library and version that the features were compared with; None if it is missing.
        differences: largest difference of 'cls' and 'patches' over the largest value.
        periods_effect: the same between rounded periods of the source and the exact ones of the
            library, with equal weights; None if the periods are the same.
        usage: Python that loads the result.
    """

    source: LoadReport
    target: str
    path: Path
    num_mapped: int
    num_tensors: int
    dropped: tuple[str, ...]
    made_up: tuple[str, ...]
    reader: str | None
    differences: dict[str, float]
    periods_effect: float | None
    usage: str

    def __str__(self) -> str:
        check = f"{self.reader or READERS[self.target].package}: not compared"
        if self.differences:
            values = ", ".join(f"{name} {value:.1e}" for name, value in self.differences.items())
            check = f"{self.reader}: {values} of the largest value (bar {BAR:g})"
        lines = {
            "source": str(self.source),
            "target": f"{self.target} {self.path}",
            "mapped": f"{self.num_mapped} of {self.num_tensors} tensors",
            "dropped": "; ".join(self.dropped) or "nothing",
            "made up": "; ".join(self.made_up) or "nothing",
            "compared": check,
        }
        if self.periods_effect is not None:
            lines["periods"] = (
                "of the source, which are rounded, become exact in the library: features differ "
                f"by {self.periods_effect:.1e} of the largest value"
            )
        lines["load it"] = self.usage
        return "\n".join(f"{name:<9} {text}" for name, text in lines.items())


# --- The conversion ---


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def convert_checkpoint(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    *,
    to: str,
    name: str | None = None,
    periods: str = "file",
    reset_bias_mask: bool = False,
    dtype: str | None = None,
    statistics: str | None = None,
    compare: bool = True,
) -> ConversionReport:
    """Convert backbone weights and compare the features before and after.

    The result is written aside, read by the library it is for, and takes its place only if the
    features agree; otherwise nothing is left behind.

    Args:
        src: weights of any known format, see :func:`load_weights`.
        dst: what to write: a ``.pth`` file ('official'), a ``.safetensors`` file ('mm') or a folder
            ('hf', 'timm'). It must not exist yet.
        to: the format, one of 'official', 'hf', 'timm', 'mm'.
        name: row of :func:`list_backbones` that the weights belong to, where they do not show it
            (``local_cls_norm`` of satellite files is made up from ``norm``).
        periods: RoPE periods of formats that store them, see :func:`load_weights`.
        reset_bias_mask: see :func:`load_weights`.
        dtype: 'fp32', 'bf16' or 'fp16' of the weights; by default as in ``src``.
        statistics: pretraining data whose input statistics belong to the weights ('LVD-1689M',
            'SAT-493M'), where ``src`` does not tell.
        compare: compare features; needs the library and the memory of two models.

    Raises:
        FileExistsError: If ``dst`` exists.
        FileNotFoundError: If ``src`` does not.
        ValueError: If an option is wrong, the weights cannot be read, the format cannot express the
            backbone, or the features differ by more than 1e-4 of the largest value.
    """
    dst = Path(dst).expanduser()
    target = _target(to, dst)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    source, report = _read(src, name, periods, reset_bias_mask, dtype, statistics)
    exact = _exact_periods(source, target)
    reader = READERS[to].version() if compare else None
    differences: dict[str, float] = {}
    effect = None
    with atomic_folder(dst) if target.suffix is None else _staged_file(dst) as place:
        staged = place if target.suffix is None else place / dst.name
        made_up = target.write(source, staged)
        if reader is not None:
            differences, effect = _compare(source, target, staged, exact)
    dropped = target.dropped(list(source.state_dict), source.kind)
    count = len(source.state_dict)
    return ConversionReport(
        source=report,
        target=to,
        path=dst,
        num_mapped=count - sum(len(names) for _, names in dropped.values()),
        num_tensors=count,
        dropped=(
            *(f"{len(names)} {kind} ({reason})" for kind, (reason, names) in dropped.items()),
            *_lost_statistics(source.statistics, dst),
        ),
        made_up=(
            *(note.replace(" made up", "") for note in report.notes if "made up" in note),
            *made_up,
        ),
        reader=reader,
        differences=differences,
        periods_effect=effect,
        usage=target.usage.format(path=dst),
    )


def _target(to: str, dst: Path) -> Target:
    if to not in TARGETS:
        raise ValueError(f"unknown format {to!r}; expected one of {', '.join(TARGETS)}")
    target = TARGETS[to]
    if target.suffix is not None and dst.suffix != target.suffix:
        raise ValueError(f"{to!r} weights are one {target.suffix} file; dst is {dst}")
    if target.suffix is None and dst.suffix in (".pth", ".safetensors", ".bin", ".pt"):
        raise ValueError(f"{to!r} weights are a folder; dst is {dst}, which looks like a file")
    if dst.exists():
        raise FileExistsError(f"{dst} exists already; remove it or choose another name")
    return target


def _read(
    src: str | os.PathLike,
    name: str | None,
    periods: str,
    reset_bias_mask: bool,
    dtype: str | None,
    statistics: str | None,
) -> tuple[Source, LoadReport]:
    if name is not None and name not in ZOO:
        raise ValueError(f"unknown backbone {name!r}; {hint(name, ZOO)}")
    row = ZOO.get(name)
    arch = MODELS.get(row.backbone).arch_zoo[row.arch] if row else None
    checkpoint = load_weights(src, periods=periods, reset_bias_mask=reset_bias_mask, arch=arch)
    kind = checkpoint.layout.family.backbone
    if row is not None and row.backbone != kind:
        raise ValueError(f"{src} holds a {kind}; {name} is a {row.backbone}")
    backbone = MODELS.build(dict(type=kind, arch=arch or checkpoint.arch)).eval()
    report = install_weights(backbone, checkpoint)
    state_dict = {
        key: _cast(key, checkpoint.state_dict.get(key, tensor), dtype)
        for key, tensor in backbone.state_dict().items()
    }
    backbone.load_state_dict(state_dict)
    known = statistics_of_data(statistics) if statistics else checkpoint.statistics
    provenance = {"converted_from": str(report)}
    return Source(
        backbone, state_dict, known, checkpoint.metadata.get("provenance", {}) | provenance
    ), report


def _cast(name: str, tensor: Tensor, dtype: str | None) -> Tensor:
    if dtype is None or name == PERIODS_KEY:
        return tensor.clone()
    return tensor.to(DTYPES[dtype], copy=True)


@contextmanager
def _staged_file(dst: Path) -> Iterator[Path]:
    """A folder beside ``dst`` whose files move there when the body has ended normally."""
    dst.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(PARTIAL_SUFFIX, f".{dst.name}.", dst.parent) as folder:
        yield Path(folder)
        for entry in sorted(Path(folder).iterdir()):
            os.replace(entry, dst.parent / entry.name)


def _exact_periods(source: Source, target: Target) -> Tensor | None:
    """The RoPE periods that the library of ``target`` computes, None if it reads them."""
    if not target.computes_periods or PERIODS_KEY not in source.state_dict:
        return None
    request = ConversionRequest("exact", arch=source.arch)
    try:
        return recomputed_periods(source.state_dict[PERIODS_KEY], request)
    except ValueError as error:
        raise ValueError(
            f"{target.name!r} has no place for RoPE periods, and those of the source are not the "
            "ones that its library computes; convert to 'official' or 'mm'"
        ) from error


@torch.no_grad()
def _compare(
    source: Source, target: Target, staged: Path, exact: Tensor | None
) -> tuple[dict[str, float], float | None]:
    """Differences of the features, and of those with the periods of the source.

    Raises:
        ValueError: If the features differ by more than the bar.
    """
    images = noise_images(source)
    expected = as_stored = own_features(source.backbone, images)
    if exact is not None:
        twin = type(source.backbone)(arch={**source.arch, "rope_dtype": "fp32"})
        twin.load_state_dict({**source.state_dict, PERIODS_KEY: exact})
        expected = own_features(twin.eval(), images)
    reader = READERS[target.name]
    differences = _relative(reader.features(staged, source, images), expected)
    if not all(value <= BAR for value in differences.values()):
        raise ValueError(
            f"{reader.version()} computes other features from the converted weights: {differences} "
            f"of the largest value, allowed are {BAR:g}. Nothing was written"
        )
    effect = max(_relative(as_stored, expected).values())
    return differences, effect if exact is not None and effect > BAR else None


def noise_images(source: Source) -> Tensor:
    """One normalised image of noise (1, C, H, W), wider than high."""
    side = source.backbone.token_stride
    size = (1, source.arch["in_channels"], 6 * side, 8 * side)
    return torch.randn(size, generator=torch.Generator().manual_seed(0))


def _relative(actual: Features, expected: Features) -> dict[str, float]:
    """Largest difference of each field over the largest expected value."""
    return {
        name: ((a - e).abs().max() / e.abs().max()).item()
        for name, a, e in zip(expected._fields, actual, expected, strict=True)
    }


def _lost_statistics(statistics: Statistics | None, dst: Path) -> list[str]:
    """A sentence if the written files do not tell the statistics of the source."""
    if statistics is None:
        return ["input statistics (unknown; name them with statistics=)"]
    found = find_statistics(dst)
    if found is None or found[:2] != statistics[:2]:
        return [f"input statistics {statistics.name} (state them in the name of the file)"]
    return []
