"""What a run extracts and how it is cut into shards; kept on disk so that a run can go on."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinov3_mm.checkpoints import atomic_write

PLAN_FILE = "plan.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class ExtractionPlan:
    """Shards of one run.

    Attributes:
        settings: everything that decides the values: model, statistics, options, fields, images.
        num_images: images of the source.
        shard_size: images per shard; the last one may have fewer.
    """

    settings: dict[str, Any]
    num_images: int
    shard_size: int

    @property
    def num_shards(self) -> int:
        return -(-self.num_images // self.shard_size)

    @property
    def key(self) -> str:
        """Hash of the settings; shards carry it."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:16]

    def shard_file(self, shard: int) -> str:
        """File name of a shard."""
        return f"features-{shard:05d}-of-{self.num_shards:05d}.safetensors"

    def images_of(self, shard: int) -> range:
        """Image indices of a shard."""
        first = shard * self.shard_size
        return range(first, min(first + self.shard_size, self.num_images))

    def save(self, folder: Path) -> None:
        """Write the plan into the folder of the shards."""
        record = {"format_version": FORMAT_VERSION, **vars(self)}
        with atomic_write(folder / PLAN_FILE) as partial:
            partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "ExtractionPlan | None":
        """The plan in a folder, None if there is none."""
        if not (folder / PLAN_FILE).is_file():
            return None
        record = json.loads((folder / PLAN_FILE).read_text(encoding="utf-8"))
        return cls(record["settings"], record["num_images"], record["shard_size"])


def check_same(found: dict[str, Any], asked: dict[str, Any], out: Path) -> None:
    """Raise ValueError if settings on disk are not those asked for, naming what differs."""
    differences = _differences(found, asked)
    if differences:
        advice = ""
        if found.get("dtype") != asked.get("dtype"):  # the same command may choose another one
            advice = f"; --dtype {found.get('dtype')} computes as there, whatever the device"
        raise ValueError(
            f"{out} holds features of another run: {'; '.join(differences)}. Choose another --out, "
            f"repeat the earlier options, or delete it{advice}"
        )


def hash_paths(paths: Sequence[str]) -> str:
    """Hash of the names and the order of images."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.encode(errors="surrogateescape") + b"\0")
    return digest.hexdigest()[:16]


def _differences(found: Any, asked: Any, name: str = "") -> list[str]:
    if isinstance(found, dict) and isinstance(asked, dict):
        return [
            difference
            for key in {**found, **asked}
            for difference in _differences(
                found.get(key), asked.get(key), f"{name}.{key}" if name else key
            )
        ]
    return [] if found == asked else [f"{name} {found} there, {asked} asked for"]
