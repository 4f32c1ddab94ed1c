"""What every conversion between layouts is told and what it returns."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..models.backbones.vit_variants import VIT_ARCHITECTURES

PERIODS = ("file", "exact")


@dataclass(frozen=True)
class ConversionRequest:
    """What the tensors alone do not say.

    Attributes:
        periods: 'file' for the RoPE periods of the official files (stored ones, or the formula
            rounded to bf16), 'exact' for the formula in fp32.
        config: ``config.json`` of the source, or empty.
        arch: architecture values of the backbone to be loaded, or empty.
    """

    periods: str = "file"
    config: Mapping[str, Any] = field(default_factory=dict)
    arch: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.periods not in PERIODS:
            raise ValueError(f"periods is {self.periods!r}; expected one of {PERIODS}")

    def likely_arch(self, embed_dims: int, num_layers: int) -> Mapping[str, Any]:
        """The wanted architecture, else the one in the table with this width and depth, else {}."""
        rows = [self.arch, *VIT_ARCHITECTURES.values()]
        size = (embed_dims, num_layers)
        return next((r for r in rows if r and (r["embed_dims"], r["num_layers"]) == size), {})

    def head_dims(self, embed_dims: int, num_layers: int) -> tuple[int, list[str]]:
        """Channels per attention head, and a note if they had to be assumed.

        Taken from the source's configuration, the wanted architecture or the table of
        architectures; else 64, as in every released model but the 7B.

        Raises:
            ValueError: If nothing states a number of heads that divides ``embed_dims``.
        """
        row = self.likely_arch(embed_dims, num_layers)
        timm_arguments = self.config.get("model_args", {})
        stated = self.config.get("num_attention_heads") or timm_arguments.get("num_heads")
        num_heads = stated or row.get("num_heads")
        if num_heads is None and embed_dims % 64 == 0:
            return 64, ["64 channels per head assumed"]
        # Weights of the wrong width for the wanted backbone are told apart by strict loading.
        num_heads = num_heads or self.arch.get("num_heads")
        if num_heads is None or embed_dims % (4 * num_heads):
            raise ValueError(
                f"cannot tell the channels per head of {embed_dims}-wide weights (number of heads: "
                f"{num_heads}); put the model's config.json beside the file, or load it into a "
                "backbone built with the right num_heads"
            )
        return embed_dims // num_heads, []


@dataclass
class Conversion:
    """A state dict under official names.

    Attributes:
        state_dict: the tensors; what has no official name keeps its foreign one.
        arch: architecture values that the source states beside its tensors.
        notes: what was dropped, made up or chosen.
    """

    state_dict: dict[str, Tensor]
    arch: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
