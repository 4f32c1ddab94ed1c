"""The ConvNeXt architectures that can be asked for by name."""

from typing import Any

from .architecture import resolve_arch

CONVNEXT_DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "layer_scale_init_value": 1e-6,
    "patch_size": None,
}


def _convnext(depths: list[int], dims: list[int]) -> dict[str, Any]:
    return {"depths": depths, "dims": dims, **CONVNEXT_DEFAULTS}


# Released (arXiv 2508.10104, section 5.2), with the sizes of arXiv 2201.03545.
CONVNEXT_ARCHITECTURES: dict[str, dict[str, Any]] = {
    "tiny": _convnext([3, 3, 9, 3], [96, 192, 384, 768]),
    "small": _convnext([3, 3, 27, 3], [96, 192, 384, 768]),
    "base": _convnext([3, 3, 27, 3], [128, 256, 512, 1024]),
    "large": _convnext([3, 3, 27, 3], [192, 384, 768, 1536]),
}
# As training configurations spell them.
for _name in tuple(CONVNEXT_ARCHITECTURES):
    CONVNEXT_ARCHITECTURES[f"convnext_{_name}"] = CONVNEXT_ARCHITECTURES[_name]


def resolve_convnext_arch(arch: str | dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Return every architecture value of a ConvNeXt, from ``arch`` and explicit arguments.

    Args:
        arch: name in :data:`CONVNEXT_ARCHITECTURES`, or a dict with ``depths``, ``dims`` and any
            key of :data:`CONVNEXT_DEFAULTS`.
        overrides: explicit arguments by key; None means "as in ``arch``".

    Raises:
        ValueError: for an unknown name or key, a missing size, or sizes that are not four.
    """
    settings = resolve_arch(
        arch,
        CONVNEXT_ARCHITECTURES,
        sizes=("depths", "dims"),
        defaults=CONVNEXT_DEFAULTS,
        overrides=overrides,
    )
    for key in ("depths", "dims"):
        settings[key] = [int(value) for value in settings[key]]
        if len(settings[key]) != 4 or min(settings[key]) < 1:
            raise ValueError(f"{key} is {settings[key]}; expected one positive number per stage, 4")
    settings["layer_scale_init_value"] = float(settings["layer_scale_init_value"] or 0)
    return settings
