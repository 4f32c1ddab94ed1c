"""An ONNX file under ONNX Runtime."""

import importlib
import importlib.metadata
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dinov3_mm.suggest import hint

_NEEDED = ("onnx", "onnxscript", "onnxruntime")
DEFAULT_PROVIDER = "CPUExecutionProvider"


class RuntimeRefusalError(RuntimeError):
    """ONNX Runtime cannot run a file on the provider that was asked for."""


def require_onnx() -> dict[str, str]:
    """Versions of the packages that an ONNX export needs.

    Raises:
        ImportError: if one is missing.
    """
    for name in _NEEDED:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ImportError(
                f"an ONNX export needs {', '.join(_NEEDED)}, and {name} cannot be imported "
                f"({error}); install them with: pip install 'dinov3_mm[export]'"
            ) from error
    return {name: importlib.import_module(name).__version__ for name in _NEEDED}


def check_provider(provider: str) -> str:
    """Return the name of an execution provider that this ONNX Runtime has.

    Raises:
        ValueError: if it has none of that name.
    """
    import onnxruntime

    available = onnxruntime.get_available_providers()
    if provider not in available:
        raise ValueError(
            f"this onnxruntime has no provider {provider!r}; {hint(provider, available)}"
        )
    return provider


class OnnxModel:
    """A function from ``images`` to the outputs of a file.

    Args:
        path: the file.
        provider: execution provider.

    Raises:
        RuntimeRefusalError: if the provider cannot run the file.
    """

    def __init__(self, path: Path, provider: str = DEFAULT_PROVIDER) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # warnings concern its own placement of shape operators
        self.version = onnxruntime.__version__
        try:
            self.session = onnxruntime.InferenceSession(path, options, providers=[provider])
        except _runtime_errors() as error:
            raise RuntimeRefusalError(self._refusal(provider, error)) from error
        if self.session.get_providers()[0] != provider:
            raise RuntimeRefusalError(
                f"onnxruntime {self.version} did not start {provider} and fell back to "
                f"{self.session.get_providers()[0]}; see its messages above"
            )

    def _refusal(self, provider: str, error: Exception) -> str:
        return (
            f"onnxruntime {self.version} cannot run this file with {provider}, so it cannot be "
            f"checked and is not kept: {error}. Take another dtype or opset, or a provider that "
            "has these operators"
        )

    def __call__(self, images: Tensor) -> list[Tensor]:
        """Run a batch (B, C, H, W)."""
        outputs: Sequence = self.session.run(None, {"images": images.numpy()})
        return [torch.from_numpy(output) for output in outputs]


def _runtime_errors() -> tuple[type[Exception], ...]:
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return (
        state.Fail,
        state.InvalidArgument,
        state.InvalidGraph,
        state.NotImplemented,
        state.RuntimeException,
    )
