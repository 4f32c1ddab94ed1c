"""What conversions between formats are made of, and the official layout itself."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dinov3_mm.models.backbones.convnext import NUM_STAGES
from dinov3_mm.models.backbones.zoo import VIT_ARCHITECTURES
from dinov3_mm.models.layers import RotaryEmbedding2D

# --- What a conversion is told and what it returns ---


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


# --- Renaming of tensors between two layouts by table ---


class NameTable:
    """Renaming between the official layout and another one.

    Args:
        top: names outside the blocks, official to foreign.
        block: names inside a block, official to foreign.
        foreign_root: what the foreign layout calls its list of blocks ('blocks' officially).
    """

    def __init__(
        self, top: Mapping[str, str], block: Mapping[str, str], foreign_root: str = "blocks"
    ) -> None:
        self._forward = (dict(top), dict(block), "blocks", foreign_root)
        self._backward = (_inverse(top), _inverse(block), foreign_root, "blocks")

    def to_foreign(
        self, tensors: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Tensors under foreign names, and those that the table does not know."""
        return _rename(tensors, *self._forward)

    def to_official(
        self, tensors: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Tensors under official names, and those that the table does not know."""
        return _rename(tensors, *self._backward)


def with_bias(*pairs: tuple[str, str]) -> dict[str, str]:
    """Table entries for the weight and the bias of each pair of modules."""
    return {
        f"{ours}.{leaf}": f"{theirs}.{leaf}"
        for ours, theirs in pairs
        for leaf in ("weight", "bias")
    }


def num_blocks(names: Iterable[str], root: str = "blocks") -> int:
    """Highest block index plus one among names such as ``blocks.11.norm1.weight``."""
    indices = (name.split(".")[1] for name in names if name.startswith(root + "."))
    return max((int(index) + 1 for index in indices if index.isdigit()), default=0)


def _inverse(names: Mapping[str, str]) -> dict[str, str]:
    return {foreign: official for official, foreign in names.items()}


def _rename(
    tensors: Mapping[str, Tensor], top: dict, block: dict, root_from: str, root_to: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    renamed: dict[str, Tensor] = {}
    left: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        root, _, rest = name.partition(".")
        index, _, inside = rest.partition(".")
        if name in top:
            renamed[top[name]] = tensor
        elif root == root_from and index.isdigit() and inside in block:
            renamed[f"{root_to}.{index}.{block[inside]}"] = tensor
        else:
            left[name] = tensor
    return renamed, left


# --- The bias of the fused q, k, v projection and the buffer that masks it ---
#
# The effective bias is ``bias * bias_mask``. Trained models hold a mask of 1 for q and v and 0 for
# k; the released files hold zeros throughout, bias included.


def effective_bias(
    state_dict: Mapping[str, Tensor], block: int
) -> tuple[Tensor, Tensor, Tensor] | None:
    """The q, k and v biases (D,) of an official block after masking; None if it has no bias."""
    bias = state_dict.get(f"blocks.{block}.attn.qkv.bias")
    if bias is None:
        return None
    mask = state_dict.get(f"blocks.{block}.attn.qkv.bias_mask")
    return (bias if mask is None else bias * mask.to(bias.dtype)).chunk(3)


def add_masked_bias(state_dict: dict[str, Tensor], biases: Mapping[int, Tensor]) -> str:
    """Write bias and mask of blocks whose K bias is zero, and return a note for the report.

    The mask is 1/0/1 as in a trained model. Where every bias of every block is zero it is 0
    throughout, as in the released files, so that all sources of those give the same backbone.

    Args:
        state_dict: official state dict to complete.
        biases: fused bias (3 D,) by block.
    """
    released = not any(bias.any() for bias in biases.values())
    for block, bias in biases.items():
        mask = torch.zeros(bias.numel()) if released else trained_mask(bias.numel())
        state_dict[f"blocks.{block}.attn.qkv.bias"] = bias
        state_dict[f"blocks.{block}.attn.qkv.bias_mask"] = mask
    return f"bias masks made up ({'0/0/0, as all biases are 0' if released else '1/0/1'})"


def trained_mask(size: int) -> Tensor:
    """Bias mask (size,) of a model in training: thirds of 1, 0, 1."""
    mask = torch.ones(size)
    mask[size // 3 : 2 * size // 3] = 0
    return mask


def reset_bias_masks(state_dict: dict[str, Tensor]) -> str:
    """Set every bias mask to 1/0/1 without changing what the model computes; return a note.

    A bias that the stored mask switched off is set to zero first.

    Raises:
        ValueError: If the model has no bias mask.
    """
    masks = [
        name
        for name in state_dict
        if name.endswith(".attn.qkv.bias_mask") and name.removesuffix("_mask") in state_dict
    ]
    if not masks:
        raise ValueError("reset_bias_mask=True, but these weights have no qkv bias mask to reset")
    for name in masks:
        bias_name = name.removesuffix("_mask")
        bias, mask = state_dict[bias_name], state_dict[name]
        state_dict[bias_name] = bias * mask.to(bias.dtype)
        state_dict[name] = trained_mask(mask.numel()).to(mask.dtype)
    return "bias masks reset to 1/0/1"


# --- RoPE periods for sources that store none, or in place of the stored ones ---
#
# The released official files hold periods that were rounded to bf16; Hugging Face and timm compute
# exact ones. With equal weights the features differ by a few 1e-3, so the choice is the user's.
#
# The precision in which RoPE is computed is another matter. The released models compute in fp32;
# the reference's trainer always computes in bf16, whatever its config says, and its checkpoints
# hold their periods in bf16 beside the projection heads. That, too, changes features by a few
# 1e-3.


PERIODS_KEY = "rope_embed.periods"


def made_up_periods(
    head_dims: int, request: ConversionRequest, base: float | None = None
) -> tuple[Tensor, str]:
    """Periods (head_dims / 4,) in fp32 for a source that stores none, and a note for the report.

    Args:
        head_dims: channels of one head.
        request: ``periods='file'`` rounds to bf16 as the released files do, 'exact' does not.
        base: RoPE base that the source states, if it does.
    """
    dtype, manner = ("fp32", "exact") if request.periods == "exact" else ("bf16", "rounded to bf16")
    rope = _formula(request) if base is None else {"base": float(base)}
    values = RotaryEmbedding2D(head_dims, dtype=dtype, **rope).periods.float()
    return values, f"periods made up ({manner})"


def recomputed_periods(stored: Tensor, request: ConversionRequest) -> Tensor:
    """Exact fp32 periods in place of stored ones that are the same up to bf16 rounding.

    Raises:
        ValueError: If the stored periods follow another formula.
    """
    rope = _formula(request)
    exact, rounded = (
        RotaryEmbedding2D(4 * stored.numel(), dtype=dtype, **rope).periods.float()
        for dtype in ("fp32", "bf16")
    )
    stored = stored.float()
    if not (torch.equal(stored, rounded) or torch.allclose(stored, exact, rtol=1e-5, atol=0)):
        raise ValueError(
            f"periods='exact' does not fit this file: its RoPE periods {stored.tolist()[:4]}... "
            f"are not those of {rope}; use periods='file' to take them as stored"
        )
    return exact


def trained_rope_dtype(stored: Tensor | None, *, has_heads: bool) -> str | None:
    """``'bf16'`` where the tensors show that RoPE was computed so in training, else None.

    Released files store bf16 periods too, but no projection heads.

    Args:
        stored: the periods as stored.
        has_heads: whether projection heads lie beside the backbone.
    """
    is_narrow = stored is not None and stored.dtype == torch.bfloat16
    return "bf16" if is_narrow and has_heads else None


def rope_note(stored: Tensor | None, trained: str | None, module: nn.Module) -> list[str]:
    """What a load line says about the precision of RoPE: nothing unless periods came in bf16.

    Args:
        stored: the periods that are loaded.
        trained: see :func:`trained_rope_dtype`.
        module: the backbone.
    """
    rope = getattr(module, "rope_embed", None)
    if rope is None or stored is None or stored.dtype != torch.bfloat16:
        return []
    here = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[rope.dtype]
    if trained is None:
        as_released = "as" if here == "fp32" else "not in fp32 as"
        return [f"RoPE computed in {here}, {as_released} in the released models (rope_dtype)"]
    if trained == here:
        return [f"RoPE computed in {here} as in the training of these weights (rope_dtype)"]
    return [
        f"RoPE computed in {here}, but in {trained} in the training of these weights, which "
        f"changes features by a few 1e-3: rope_dtype={trained!r} on the backbone computes it as "
        "there"
    ]


def _formula(request: ConversionRequest) -> dict[str, float | None]:
    """Arguments of the formula: those of the wanted architecture, else base 100."""
    arch = request.arch
    if arch.get("rope_min_period") is not None:
        ends = {"min_period": arch["rope_min_period"], "max_period": arch["rope_max_period"]}
        return {"base": None, **ends}
    return {"base": float(arch.get("rope_base") or 100.0)}


# --- Names of ConvNeXt tensors in two layouts ---


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
        return _rename_all(tensors, names)

    def to_official(self, tensors: Mapping[str, Tensor]) -> Renamed:
        """Tensors of this layout under official names, and those that are unknown."""
        names = self._foreign_names(self.depths(tensors))
        return _rename_all(tensors, {foreign: official for official, foreign in names.items()})

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


def _rename_all(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> Renamed:
    known = {names[name]: tensor for name, tensor in tensors.items() if name in names}
    return known, {name: tensor for name, tensor in tensors.items() if name not in names}


# --- The official ViT layout: nothing to convert, but the periods may be replaced ---


def official_to_official(tensors: Mapping[str, Tensor], request: ConversionRequest) -> Conversion:
    """Take the tensors as they are; ``periods='exact'`` rewrites the RoPE periods.

    Raises:
        ValueError: If exact periods are asked for and the stored ones follow another formula.
    """
    state_dict = dict(tensors)
    if request.periods == "exact" and PERIODS_KEY in state_dict:
        state_dict[PERIODS_KEY] = recomputed_periods(state_dict[PERIODS_KEY], request)
        return Conversion(state_dict, notes=["periods recomputed (exact)"])
    return Conversion(state_dict, notes=["periods as stored"])


def refuse_special_norms(state_dict: Mapping[str, Tensor], library: str) -> None:
    """Raise a ``ValueError`` for norms that neither Hugging Face nor timm can express."""
    if "cls_norm.weight" in state_dict:
        raise ValueError(f"{library} has no separate norm for CLS (untie_cls_and_patch_norms)")
    if "norm.bias" not in state_dict:
        raise ValueError(f"{library} has no RMSNorm; only LayerNorm models can be converted")


# --- The official ConvNeXt layout, which holds the final norm twice ---


# The final norm, and the same as norm of the last stage.
_NORM, _TWIN = "norm.", "norms.3."


def official_convnext_to_official(
    tensors: Mapping[str, Tensor], request: ConversionRequest
) -> Conversion:
    """Take the tensors as they are; of ``norm`` and ``norms.3`` one may be absent.

    Raises:
        ValueError: If the two differ.
    """
    state_dict = dict(tensors)
    notes = []
    for leaf in ("weight", "bias"):
        norm, twin = state_dict.get(_NORM + leaf), state_dict.get(_TWIN + leaf)
        if norm is None and twin is not None:
            state_dict[_NORM + leaf] = twin
            notes.append(f"{_NORM}{leaf} made up (copy of {_TWIN}{leaf})")
        elif twin is None and norm is not None:
            state_dict[_TWIN + leaf] = norm
            notes.append(f"{_TWIN}{leaf} made up (copy of {_NORM}{leaf})")
        elif norm is not None and not torch.equal(norm, twin):
            raise ValueError(
                f"{_NORM}{leaf} and {_TWIN}{leaf} differ, but they are one tensor of the model; "
                "remove the wrong one from the file"
            )
    return Conversion(state_dict, notes=notes)


def with_twin_norm(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add ``norms.3`` beside ``norm``."""
    names = [_NORM + leaf for leaf in ("weight", "bias")]
    twins = {_TWIN + n.removeprefix(_NORM): state_dict[n] for n in names if n in state_dict}
    return {**state_dict, **twins}


def without_twin_norm(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official weights with the final norm as ``norm`` only.

    Raises:
        ValueError: If the two differ.
    """
    state_dict = official_convnext_to_official(state_dict, ConversionRequest()).state_dict
    return {name: tensor for name, tensor in state_dict.items() if not name.startswith(_TWIN)}


def missing_scales(state_dict: Mapping[str, Tensor], suffix: str) -> dict[str, Tensor]:
    """Factors of 1 for blocks without ``gamma``.

    Args:
        state_dict: weights under foreign names.
        suffix: what follows the name of a block in the name of its last bias.
    """
    blocks = {name.removesuffix(suffix): name for name in state_dict if name.endswith(suffix)}
    return {
        f"{block}.gamma": torch.ones_like(state_dict[name])
        for block, name in blocks.items()
        if f"{block}.gamma" not in state_dict
    }
