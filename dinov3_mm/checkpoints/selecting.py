"""Which tensors of a checkpoint are the backbone: wrapper names, sub-models, layouts."""

from collections.abc import Iterable
from dataclasses import dataclass

from .layouts import LAYOUTS, Layout

# Path parts that wrappers leave in names: (Distributed)DataParallel, torch.compile, activation
# checkpointing, FSDP.
_WRAPPER_PARTS = frozenset(
    ("module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
)
# Sub-models in order of preference: EMA weights before weights in training.
_PREFERENCE = (
    "model.model_ema.backbone.",
    "model_ema.backbone.",
    "model.teacher.backbone.",
    "teacher.backbone.",
    "model.backbone.",
    "model.student.backbone.",
    "student.backbone.",
    "backbone.",
    "",
)
HEADS = ("dino_head", "ibot_head")


@dataclass(frozen=True)
class Selection:
    """The backbone found in a checkpoint.

    Attributes:
        layout: whose names it carries.
        prefix: what stands before those names.
        backbone: stored name of each tensor of the backbone, by its name without prefix.
        heads: the same for each projection head beside it, e.g. ``heads['dino_head']``.
        ignored: prefixes of all other tensors.
    """

    layout: Layout
    prefix: str
    backbone: dict[str, str]
    heads: dict[str, dict[str, str]]
    ignored: tuple[str, ...]


def select_backbone(names: Iterable[str], source: str) -> Selection:
    """Find the backbone among the tensor names of a checkpoint.

    With several sub-models the EMA branch is preferred (``model_ema``, ``teacher``), then a lone
    backbone, then the student.

    Raises:
        ValueError: If no known layout is there, or several sub-models of unknown role.
    """
    stored = _without_wrappers(names, source)
    found = _find_layouts(stored)
    if not found:
        raise ValueError(
            f"{source} holds no known backbone. Known layouts: "
            f"{', '.join(f'{layout.title} ({layout.signatures[0][0]})' for layout in LAYOUTS)}; "
            f"found names such as {list(stored)[:8]}"
        )
    prefix = next((prefix for prefix in _PREFERENCE if prefix in found), None)
    if prefix is None:
        if len(found) > 1:
            raise ValueError(
                f"{source} holds several backbones, under {sorted(found)}, and none of them is a "
                f"known role ({', '.join(filter(None, _PREFERENCE))}); save one of them alone"
            )
        prefix = next(iter(found))
    return _split(stored, prefix, found[prefix])


def _without_wrappers(names: Iterable[str], source: str) -> dict[str, str]:
    stored: dict[str, str] = {}
    for name in names:
        clean = ".".join(part for part in name.split(".") if part not in _WRAPPER_PARTS)
        if clean in stored:
            raise ValueError(f"{source} holds {clean!r} twice: as {stored[clean]!r} and {name!r}")
        stored[clean] = name
    return stored


def _find_layouts(names: dict[str, str]) -> dict[str, Layout]:
    """Layout by prefix, for every prefix under which a layout's signature is complete."""
    found: dict[str, Layout] = {}
    for layout in LAYOUTS:
        for signature in layout.signatures:
            for name in names:
                if not name.endswith(signature[0]):
                    continue
                prefix = name.removesuffix(signature[0])
                if prefix and not prefix.endswith("."):
                    continue
                if all(prefix + part in names for part in signature):
                    found.setdefault(prefix, layout)
    return found


def _split(stored: dict[str, str], prefix: str, layout: Layout) -> Selection:
    backbone: dict[str, str] = {}
    heads: dict[str, dict[str, str]] = {}
    ignored: dict[str, None] = {}
    head_prefixes = {}
    if prefix.endswith("backbone."):
        head_prefixes = {head: prefix.removesuffix("backbone.") + head + "." for head in HEADS}
    for clean, name in stored.items():
        head = next((h for h, start in head_prefixes.items() if clean.startswith(start)), None)
        if clean.startswith(prefix):
            backbone[clean.removeprefix(prefix)] = name
        elif head is not None:
            heads.setdefault(head, {})[clean.removeprefix(head_prefixes[head])] = name
        else:
            parts = clean.split(".")
            ignored[".".join(parts[: 2 if parts[0] == "model" else 1])] = None
    return Selection(layout, prefix, backbone, heads, tuple(ignored))
