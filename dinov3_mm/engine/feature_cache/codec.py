"""Training samples as tensors and JSON, and back; nothing is pickled."""

import json
from importlib import import_module
from typing import Any

import numpy as np
import torch
from mmengine.structures import BaseDataElement
from torch import Tensor

# Classes that a file may name, and where they are.
_ELEMENTS = {
    "BaseDataElement": "mmengine.structures",
    "InstanceData": "mmengine.structures",
    "LabelData": "mmengine.structures",
    "PixelData": "mmengine.structures",
    "DataSample": "mmpretrain.structures",
    "SegDataSample": "mmseg.structures",
    "DetDataSample": "mmdet.structures",
}
_BOXES = {"HorizontalBoxes": "mmdet.structures.bbox"}
_MASKS = {"BitmapMasks": "mmdet.structures.mask", "PolygonMasks": "mmdet.structures.mask"}


def encode(value: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Take a sample apart.

    Args:
        value: tensors, arrays, numbers, strings, None, data elements and mmdet's boxes and masks,
            in lists, tuples and dicts with string keys.

    Returns:
        The structure as JSON in a uint8 tensor, and the tensors by name.

    Raises:
        TypeError: for anything else.
    """
    tensors: dict[str, Tensor] = {}
    structure = _encode(value, tensors)
    return torch.frombuffer(bytearray(json.dumps(structure).encode()), dtype=torch.uint8), tensors


def decode(structure: Tensor, read: Any) -> Any:
    """Put a sample together.

    Args:
        structure: of :func:`encode`.
        read: gives the tensor of a name.
    """
    return _decode(json.loads(bytes(structure.numpy())), read)


def _keep(tensor: Tensor, tensors: dict[str, Tensor]) -> str:
    name = str(len(tensors))
    tensors[name] = tensor.detach().cpu().contiguous()
    return name


def _encode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        return {"tensor": _keep(value, tensors)}
    if isinstance(value, np.ndarray):
        return {"array": _keep(torch.from_numpy(np.ascontiguousarray(value)), tensors)}
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_encode(item, tensors) for item in value]}
    if isinstance(value, dict):
        return {"dict": {name: _encode(item, tensors) for name, item in value.items()}}
    kind = type(value).__name__
    if kind in _ELEMENTS and isinstance(value, BaseDataElement):
        data = {name: _encode(item, tensors) for name, item in value.items()}
        meta = {name: _encode(item, tensors) for name, item in value.metainfo_items()}
        return {"element": kind, "data": data, "meta": meta}
    if kind in _BOXES:
        return {"boxes": kind, "tensor": _keep(value.tensor, tensors)}
    if kind in _MASKS:
        masks = value.masks if kind == "BitmapMasks" else [list(mask) for mask in value.masks]
        size = [int(value.height), int(value.width)]
        return {"masks": kind, "content": _encode(masks, tensors), "size": size}
    raise TypeError(f"a {kind} cannot be stored in a feature cache")


def _decode(part: Any, read: Any) -> Any:
    if not isinstance(part, dict):
        return part
    if "element" in part:
        kind = part["element"]
        element = getattr(import_module(_ELEMENTS[kind]), kind)()
        element.set_metainfo({name: _decode(item, read) for name, item in part["meta"].items()})
        for name, item in part["data"].items():
            element.set_field(_decode(item, read), name)
        return element
    if "boxes" in part:
        kind = part["boxes"]
        return getattr(import_module(_BOXES[kind]), kind)(read(part["tensor"]), clone=False)
    if "masks" in part:
        kind = part["masks"]
        content = _decode(part["content"], read)
        return getattr(import_module(_MASKS[kind]), kind)(content, *part["size"])
    ((kind, content),) = part.items()
    if kind == "tensor":
        return read(content)
    if kind == "array":
        return read(content).numpy()
    if kind == "dict":
        return {name: _decode(item, read) for name, item in content.items()}
    return {"list": list, "tuple": tuple}[kind](_decode(item, read) for item in content)
