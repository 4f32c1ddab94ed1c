"""The record that stands for a frozen backbone in a checkpoint, and the way back to its weights."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from mmengine.registry import WEIGHT_INITIALIZERS
from torch import Tensor, nn

from dinov3_mm.models.backbones.zoo import zoo_row

from .install import load_backbone_weights
from .locate import is_url, located, parse_hub_name

# Environment variable: a weight file, or the folder in which such files are looked for by name.
WEIGHTS = "DINOV3_MM_WEIGHTS"


def make_record(module: nn.Module) -> dict[str, Any]:
    """What a checkpoint states about a backbone that it leaves out.

    Args:
        module: a backbone whose ``weights_origin`` is known.

    Returns:
        JSON values: class and architecture, the arguments of the initializer, the absolute path of
        a local file, and a fingerprint of the tensors.
    """
    origin = dict(module.weights_origin)
    source = os.fspath(origin.pop("checkpoint"))
    return {
        "backbone": type(module).__name__,
        "arch": module.arch_settings,
        "source": source if _is_name(source) else str(Path(source).expanduser().absolute()),
        "options": origin,
        "fingerprint": fingerprint(module),
    }


def record_to_tensor(record: dict[str, Any]) -> Tensor:
    """The record as a uint8 tensor, so that a state dict can hold it."""
    return torch.frombuffer(bytearray(json.dumps(record).encode()), dtype=torch.uint8)


def record_from_tensor(tensor: Tensor) -> dict[str, Any]:
    """Read what :func:`record_to_tensor` wrote."""
    return json.loads(bytes(tensor.cpu().tolist()))


@WEIGHT_INITIALIZERS.register_module()
class DINOv3Recorded:
    """MMEngine initializer that loads the weights that a checkpoint's record names.

    The environment variable ``DINOV3_MM_WEIGHTS`` may name another file, or the folder in which it
    is looked for first; then comes where it lay, then torch hub's cache.

    Args:
        record: see :func:`record_to_tensor`.

    Raises:
        FileNotFoundError: On use, if the weights are nowhere.
        ValueError: On use, if they do not fit, or are not those of the record.
    """

    def __init__(self, record: Tensor) -> None:
        self.record = record_from_tensor(record)

    def __call__(self, module: nn.Module) -> None:
        """Load the weights into ``module`` and check that they are the recorded ones."""
        source = _find(self.record["source"])
        load_backbone_weights(module, source, **self.record["options"])
        if fingerprint(module) != self.record["fingerprint"]:
            raise ValueError(
                f"the weights in {source} are not those of the frozen backbone on which this "
                f"checkpoint was trained ({self.record['source']}): their values differ. Put the "
                f"right file there, or name it in the environment variable {WEIGHTS}"
            )
        module.weights_origin = {"checkpoint": source, **self.record["options"]}


def _is_name(source: str) -> bool:
    """Whether a source is no path: a URL, a hub name, or a released checkpoint's name."""
    if Path(source).expanduser().exists():
        return False
    return is_url(source) or parse_hub_name(source) is not None or zoo_row(source) is not None


def _find(source: str) -> str | os.PathLike:
    given = os.environ.get(WEIGHTS)
    if given and Path(given).expanduser().is_file():
        return Path(given).expanduser()
    if _is_name(source):
        return located(source)
    name = Path(source).name
    folders = [given, Path(source).parent, Path(torch.hub.get_dir()) / "checkpoints"]
    places = [Path(folder).expanduser() / name for folder in folders if folder]
    for place in places:
        if place.exists():
            return place
    raise FileNotFoundError(
        "this checkpoint holds a head that was trained on a frozen backbone, and the backbone's "
        f"weights {name} are not at {', '.join(map(str, places))}. Put the file there, or name it "
        f"or its folder in the environment variable {WEIGHTS}"
    )


_SAMPLES_PER_TENSOR = 1024


@torch.no_grad()
def fingerprint(module: nn.Module) -> str:
    """Hash of the names, shapes and up to 1024 values of every tensor of a module.

    It is the same for the same weights in any file format, and takes no time for large models.
    """
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        step = max(1, tensor.numel() // _SAMPLES_PER_TENSOR)
        values = tensor.detach().reshape(-1)[::step].double().cpu()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:16]
