"""Names of ConvNeXt tensors in two layouts."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from ..models.backbones.convnext_trunk import NUM_STAGES

Renamed = tuple[dict[str, Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class ConvNeXtNames:
    """Where a layout keeps the parts of a ConvNeXt.

    Attributes:
        stem: first downsampling, with ``{layer}`` 0 or 1.
        downsample: the other downsamplings, with ``{stage}`` and ``{layer}``.
        block: a block, with ``{stage}`` and ``{block}``.
        parts: modules of a block by their official name.
        norm: final norm.
    """

    stem: str
    downsample: str
    block: str
    parts: Mapping[str, str]
    norm: str

    def to_foreign(self, tensors: Mapping[str, Tensor]) -> Renamed:
        """Tensors with official names under the names of this layout, and those it lacks."""
        names = self._foreign_names(OFFICIAL.depths(tensors))
        return _rename(tensors, names)

    def to_official(self, tensors: Mapping[str, Tensor]) -> Renamed:
        """Tensors of this layout under official names, and those that are unknown."""
        names = self._foreign_names(self.depths(tensors))
        return _rename(tensors, {foreign: official for official, foreign in names.items()})

    def depths(self, names: Iterable[str]) -> list[int]:
        """Highest block index plus one of every stage."""
        names = list(names)
        return [self._depth(names, stage) for stage in range(NUM_STAGES)]

    def _depth(self, names: list[str], stage: int) -> int:
        start = self.block.format(stage=stage, block="")
        indices = (
            name.removeprefix(start).split(".")[0] for name in names if name.startswith(start)
        )
        return max((int(index) + 1 for index in indices if index.isdigit()), default=0)

    def _foreign_names(self, depths: list[int]) -> dict[str, str]:
        """Names in this layout by official name."""
        pairs = zip(OFFICIAL._modules(depths), self._modules(depths), strict=True)
        names = {
            f"{official}.{leaf}": f"{foreign}.{leaf}"
            for official, foreign in pairs
            for leaf in ("weight", "bias")
        }
        blocks = zip(OFFICIAL._blocks(depths), self._blocks(depths), strict=True)
        return names | {f"{official}.gamma": f"{foreign}.gamma" for official, foreign in blocks}

    def _blocks(self, depths: list[int]) -> list[str]:
        return [
            self.block.format(stage=stage, block=block)
            for stage, depth in enumerate(depths)
            for block in range(depth)
        ]

    def _modules(self, depths: list[int]) -> list[str]:
        """Everything with weight and bias, in one order for all layouts."""
        stem = [self.stem.format(layer=layer) for layer in range(2)]
        downsample = [
            self.downsample.format(stage=stage, layer=layer)
            for stage in range(1, NUM_STAGES)
            for layer in range(2)
        ]
        blocks = [
            f"{block}.{self.parts[part]}" for block in self._blocks(depths) for part in _PARTS
        ]
        return [*stem, *downsample, *blocks, self.norm]


_PARTS = ("dwconv", "norm", "pwconv1", "pwconv2")
OFFICIAL = ConvNeXtNames(
    stem="downsample_layers.0.{layer}",
    downsample="downsample_layers.{stage}.{layer}",
    block="stages.{stage}.{block}",
    parts={part: part for part in _PARTS},
    norm="norm",
)


def _rename(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> Renamed:
    known = {names[name]: tensor for name, tensor in tensors.items() if name in names}
    return known, {name: tensor for name, tensor in tensors.items() if name not in names}
