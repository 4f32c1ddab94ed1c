"""Which input normalisation a weight file was trained with."""

import os
from pathlib import Path
from typing import Any, NamedTuple

from ..models.backbones.zoo import ZOO
from ..suggest import hint
from .download import local_path
from .safetensors_file import read_export_header
from .source import read_config, read_json


class Statistics(NamedTuple):
    """Mean and standard deviation of images in [0, 1].

    Attributes:
        mean: per channel; red, green, blue for the released models.
        std: per channel.
        name: of the pretraining data, 'LVD-1689M' or 'SAT-493M', or 'custom'.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    name: str = "custom"


# By the tag that official, Hugging Face and timm names have in common, e.g. 'lvd1689m'.
_BY_TAG = {
    row.data.replace("-", "").lower(): Statistics(row.mean, row.std, row.data)
    for row in ZOO.values()
    if row.data
}


# Names without such a tag: 'dinov2_vits14' of official files, 'dinov2-small' of Hugging Face.
_BY_NAME = {
    name: Statistics(row.mean, row.std, row.data)
    for row in ZOO.values()
    if row.data and row.backbone == "DINOv2ViT"
    for name in (row.official_name, row.hf_id.rpartition("/")[2])
}


def statistics_of_data(name: str) -> Statistics:
    """Statistics of the released models by the name of their pretraining data.

    Raises:
        ValueError: If no released model was trained on such data.
    """
    known = {statistics.name: statistics for statistics in _BY_TAG.values()}
    if name not in known:
        raise ValueError(f"no released model was trained on {name!r}; {hint(str(name), known)}")
    return known[name]


def named_statistics(mean: Any, std: Any, backbone: str | None = None) -> Statistics:
    """Statistics with the name of the first data of the zoo that has these values.

    Args:
        mean, std: the values.
        backbone: class name in the MODELS registry; its own data come first.
    """
    mean, std = tuple(float(m) for m in mean), tuple(float(s) for s in std)
    rows = [row for row in ZOO.values() if row.data and (row.mean, row.std) == (mean, std)]
    own = [row for row in rows if row.backbone == backbone]
    return Statistics(mean, std, (own or rows)[0].data) if rows else Statistics(mean, std)


def read_statistics(path: str | os.PathLike) -> Statistics:
    """Input normalisation that belongs to a weight file, folder or URL; no tensor is read.

    Our exports state it. For other files the data tag in the name of the file or of its folders
    decides ('lvd1689m', 'sat493m'; DINOv2 files are known by the name of the model), then the
    preprocessor or model configuration beside it.

    Raises:
        FileNotFoundError: If nothing is there.
        ValueError: If neither the file nor its name states it.
    """
    path = local_path(path)
    if not path.exists():
        raise FileNotFoundError(f"no weights at {path}")
    statistics = find_statistics(path)
    if statistics is None:
        raise ValueError(
            f"{path} does not state its input normalisation: it is no export of dinov3_mm, no name "
            f"on its path contains {' or '.join(_BY_TAG)}, and no configuration lies beside it. "
            "Pass mean and std yourself"
        )
    return statistics


def find_statistics(path: Path) -> Statistics | None:
    """As :func:`read_statistics`, but None where nothing states the normalisation."""
    header = read_export_header(path)
    stated = header.get("statistics")
    if stated is not None:
        return named_statistics(stated["mean"], stated["std"], header.get("backbone"))
    found = _tagged(path) or _configured(path if path.is_dir() else path.parent)
    channels = header.get("arch", {}).get("in_channels")
    # An export for other channels may keep the name of the RGB weights that it came from.
    return found if found and channels in (None, len(found.mean)) else None


def _tagged(path: Path) -> Statistics | None:
    # Three levels reach the model's name in the folders of a hub cache
    # (models--facebook--dinov3-.../snapshots/<revision>/model.safetensors).
    names = [path.name, *(parent.name for parent in path.absolute().parents[:3])]
    for name in names:
        for tag, statistics in {**_BY_TAG, **_BY_NAME}.items():
            if tag in name.lower():
                return statistics
    return None


def _configured(folder: Path) -> Statistics | None:
    preprocessor = folder / "preprocessor_config.json"
    if preprocessor.is_file():
        config = read_json(preprocessor)
        if "image_mean" in config and "image_std" in config:
            return named_statistics(config["image_mean"], config["image_std"])
    pretrained = read_config(folder).get("pretrained_cfg", {})
    if "mean" in pretrained and "std" in pretrained:
        return named_statistics(pretrained["mean"], pretrained["std"])
    return None
