"""The official ViT layout: nothing to convert, but the periods may be replaced."""

from collections.abc import Mapping

from torch import Tensor

from .conversion import Conversion, ConversionRequest
from .periods import PERIODS_KEY, recomputed_periods


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
