"""The entry points of ``hubconf.py``: official names, official calls, weights of any format."""

import os
from collections.abc import Callable
from typing import Any

from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor

from dinov3_mm.checkpoints import build_backbone
from dinov3_mm.checkpoints.locate import released_file
from dinov3_mm.models.backbones import ZOO, ZooRow


class OfficialCalls:
    """The call of the official code, for a class of backbones.

    All else that the official models offer, ``forward_features``, ``get_intermediate_layers`` and
    the attributes, our backbones have themselves; parameters carry the same names.
    """

    def forward(
        self,
        x: Tensor | list[Tensor],
        masks: Tensor | list[Tensor | None] | None = None,
        *,
        is_training: bool = False,
    ) -> Any:
        """CLS after the final norm, or all tokens.

        Args:
            x: normalised images (B, C, H, W); with ``is_training`` also a list of such batches.
            masks: patches to replace by the mask token, bool (B, N), or a list.
            is_training: return the dict of ``forward_features``, or a list of dicts for a list.

        Returns:
            CLS (B, D) by default.

        Raises:
            TypeError: if a list comes without ``is_training``.
        """
        if not is_training and not isinstance(x, Tensor):
            raise TypeError(
                f"model(x) takes one tensor (B, C, H, W), got a {type(x).__name__}; for several "
                "batches call model(x, is_training=True)"
            )
        output = self.forward_features(x, masks)
        return output if is_training else self.head(output["x_norm_clstoken"])


def _official_class(name: str) -> type[BaseModule]:
    attributes = {
        "__module__": __name__,
        "__doc__": f"``{name}`` behind the official calls, see :class:`OfficialCalls`.",
    }
    return type(f"Official{name}", (OfficialCalls, MODELS.get(name)), attributes)


_CLASSES = {name: _official_class(name) for name in {row.backbone for row in ZOO.values()}}
# Instances are pickled by the name of their class.
globals().update({cls.__name__: cls for cls in _CLASSES.values()})


def official_model(
    name: str,
    *,
    pretrained: bool = True,
    weights: str | os.PathLike | None = None,
    **overrides: Any,
) -> BaseModule:
    """Build a model by its official name, in eval mode, behind the official calls.

    As in the official code, ``model(x)`` gives CLS (B, D). The RoPE coordinates of a DINOv3 ViT are
    rescaled at random in training mode (``rope_rescale_coords=2``); unlike there, the model comes
    in eval mode.

    Args:
        name: official name, e.g. ``dinov3_vitl16``.
        pretrained: load weights; False initialises at random.
        weights: a file, folder, URL or hub name of any known format, or the pretraining data of a
            released file, ``'LVD1689M'`` or ``'SAT493M'``, to be taken from torch hub's cache. By
            default the data of the first released file of that name.
        **overrides: arguments of the backbone, e.g. ``drop_path_rate``.

    Raises:
        FileNotFoundError: If the weights are not there; the message says where to get them.
        TypeError: If the backbone has no such argument.
        ValueError: If the name is unknown, or the weights cannot be read or do not fit.
    """
    rows = {_tag(row.data): row for row in ZOO.values() if row.official_name == name and row.file}
    if not rows:
        raise ValueError(f"{name!r} is no official name; known: {', '.join(official_names())}")
    if not pretrained and weights is not None:
        raise ValueError(f"pretrained=False takes no weights, got {weights}")
    row = next(iter(rows.values()))
    if pretrained:
        weights = _resolve(name, weights, rows)
    if row.backbone == "DINOv3ViT":
        overrides = {"rope_rescale_coords": 2.0, **overrides}
    model = build_backbone(name, weights, **overrides)
    model.__class__ = _CLASSES[row.backbone]
    return model


def _resolve(
    name: str, weights: str | os.PathLike | None, rows: dict[str, ZooRow]
) -> str | os.PathLike:
    """What is given for ``weights``, with data names replaced by the released file."""
    tag = next(iter(rows)) if weights is None else _tag(str(weights))
    if tag in rows:
        return released_file(rows[tag])
    if tag in {_tag(row.data) for row in ZOO.values() if row.data}:
        known = ", ".join(repr(known.upper()) for known in rows)
        raise ValueError(f"no weights of {name} were trained on {weights}; known: {known}")
    return weights


def _tag(data: str) -> str:
    return data.replace("-", "").lower()


def official_names() -> list[str]:
    """The names of the official hub, in the order of the zoo."""
    return list(dict.fromkeys(row.official_name for row in ZOO.values() if row.file))


def hub_entry_points() -> dict[str, Callable[..., BaseModule]]:
    """A function per official name, as ``torch.hub`` calls them."""
    return {name: _entry_point(name) for name in official_names()}


def _entry_point(name: str) -> Callable[..., BaseModule]:
    def entry_point(
        *, pretrained: bool = True, weights: str | os.PathLike | None = None, **overrides: Any
    ) -> BaseModule:
        return official_model(name, pretrained=pretrained, weights=weights, **overrides)

    entry_point.__name__ = entry_point.__qualname__ = name
    data = ", ".join(row.data for row in ZOO.values() if row.official_name == name and row.file)
    entry_point.__doc__ = (
        f"{name}, pretrained on {data}: ``pretrained``, ``weights`` and arguments of the backbone "
        "as for ``dinov3_mm.apis.hub.official_model``."
    )
    return entry_point
