"""The packages that ONNX files need."""

import pytest


@pytest.fixture
def onnx():
    """The module ``onnx``; the test is skipped where the extra ``export`` is not installed."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    return pytest.importorskip("onnx")
