"""ONNX files that are 16-bit or large, and what is refused."""

import sys

import pytest
import torch

from dinov3_mm.apis.deployment import (
    ExportMismatchError,
    export_onnx,
    onnx_file,
)
from dinov3_mm.apis.deployment import (
    onnx_file as onnx_graph,
)
from dinov3_mm.apis.deployment.graph import ConstantTables
from dinov3_mm.apis.deployment.onnx_file import OnnxModel, RuntimeRefusalError, require_onnx
from tests.apis.deployment.toys import STATISTICS, dimensions, narrow_vit

# With a fixed batch every shape is a constant, which is traced in half the time.
STATIC = dict(statistics=STATISTICS, batch=1)


def test_sixteen_bits(tmp_path, onnx):
    backbone, path = narrow_vit(), tmp_path / "half.onnx"
    options = STATIC | dict(image_sizes=[(32, 48)])
    report = export_onnx(backbone, path, dtype="fp16", **options)
    assert all(d.min_cosine > 0.9999 for d in report.differences)
    model = onnx.load(path)
    dtypes = {init.name: init.data_type for init in model.graph.initializer}
    half, full = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    assert dtypes["backbone.blocks.0.attn.proj.weight_fp16"] == half
    assert dtypes["backbone.blocks.0.norm1.weight"] == full
    assert dimensions(model.graph.input[0])[0] == 1
    elements = {v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)}
    assert elements == {full}
    with pytest.raises(RuntimeRefusalError, match="cannot run this file with CPUExecutionProvider"):
        export_onnx(backbone, tmp_path / "b.onnx", dtype="bf16", **options)
    with torch.no_grad():
        backbone.blocks[0].attn.proj.weight[0, 0] = 1e5
    with pytest.raises(ValueError, match="beyond the range of fp16"):
        export_onnx(backbone, tmp_path / "b.onnx", dtype="fp16", **options)
    assert not list(tmp_path.glob("*b.onnx*"))


def test_a_wrong_file_is_not_kept(tmp_path, onnx, monkeypatch):
    path, options = tmp_path / "vit.onnx", STATIC | dict(image_sizes=[(32, 64)])
    path.write_text("what was there before")
    with pytest.raises(ExportMismatchError, match="difference up to 1e-12"):
        export_onnx(narrow_vit(), path, tolerance=1e-12, **options)

    swapped = narrow_vit()
    swapped.rope_embed = ConstantTables(*swapped.rope_embed(4, 2))
    monkeypatch.setattr(onnx_graph, "with_constant_tables", lambda backbone, size: swapped)
    with pytest.raises(ExportMismatchError, match="patches for images"):
        export_onnx(narrow_vit(), path, **options)
    assert [p.name for p in tmp_path.iterdir()] == ["vit.onnx"]
    assert path.read_text() == "what was there before"


def test_large_weights_lie_beside_the_file(tmp_path, onnx, monkeypatch):
    monkeypatch.setattr(onnx_file, "_MAX_INLINE_BYTES", 1000)
    backbone, path = narrow_vit(), tmp_path / "large.onnx"
    export_onnx(backbone, path, image_sizes=[(32, 32)], **STATIC)
    assert {p.name for p in tmp_path.iterdir()} == {
        "large.onnx",
        "large.onnx.data",
        "large.onnx.json",
    }
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = backbone.forward_tokens(images).cls
    torch.testing.assert_close(OnnxModel(path)(images)[0], expected, rtol=0, atol=1e-5)


def test_opset_and_provider(tmp_path, onnx):
    with pytest.raises(ValueError, match="expected 18 to 23"):
        export_onnx(narrow_vit(), tmp_path / "a.onnx", opset=9, **STATIC)
    with pytest.raises(ValueError, match="did you mean 'CPUExecutionProvider'"):
        export_onnx(narrow_vit(), tmp_path / "a.onnx", provider="CPUExecutionProvide", **STATIC)


@pytest.mark.parametrize("name", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_extra_is_named(name, monkeypatch):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        fake = type(sys)(package)
        fake.__version__ = "1"
        monkeypatch.setitem(sys.modules, package, None if package == name else fake)
    with pytest.raises(ImportError, match=rf"{name} cannot be.*pip install 'dinov3_mm\[export\]'"):
        require_onnx()
