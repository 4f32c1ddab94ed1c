"""ONNX files under ONNX Runtime, held against the backbone in PyTorch."""

import json

import torch

from dinov3_mm.apis.deployment import export_onnx
from dinov3_mm.apis.deployment.onnx_file import OnnxModel
from tests.apis.deployment.toys import STATISTICS, dimensions, narrow_convnext, narrow_vit

ALL = ("cls", "registers", "patches", "featmap")


def run(path, images):
    return OnnxModel(path)(images)


def expected_outputs(backbone, images, outputs=ALL):
    """By the methods of the backbone that the export does not use."""
    with torch.no_grad():
        tokens = backbone.forward_tokens(images)
        named = {**tokens._asdict(), "featmap": backbone(images)[0]}
    return [named[name] for name in outputs]


def test_one_file_for_all_sizes(tmp_path, onnx):
    backbone, path = narrow_vit(), tmp_path / "vit.onnx"
    sizes = [(64, 64), (32, 96)]
    report = export_onnx(
        backbone,
        path,
        statistics=STATISTICS,
        dynamic=True,
        image_sizes=sizes,
        outputs=ALL,
        source="a.safetensors",
    )
    assert {d.images for d in report.differences} == {
        (2, 3, 64, 64),
        (1, 3, 64, 64),
        (2, 3, 32, 96),
    }
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert [value.name for value in model.graph.input] == ["images"]
    assert dimensions(model.graph.input[0]) == ["batch", 3, "height", "width"]
    assert {value.name: dimensions(value) for value in model.graph.output} == {
        "cls": ["batch", 16],
        "registers": ["batch", 2, 16],
        "patches": ["batch", "num_patches", 16],
        "featmap": ["batch", 16, "rows", "columns"],
    }
    # Shapes that neither the trace nor the comparison saw.
    for shape in ((3, 3, 48, 80), (1, 3, 160, 32)):
        images = torch.randn(shape)
        for actual, expected in zip(run(path, images), expected_outputs(backbone, images)):
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    metadata = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert metadata == json.loads((tmp_path / "vit.onnx.json").read_text())
    assert metadata["mean"] == list(STATISTICS.mean) and metadata["source"] == "a.safetensors"
    assert len(metadata["differences"]) == 12 and metadata["tolerance"] == 1e-4


def test_a_fixed_size_has_constant_tables(tmp_path, onnx):
    backbone, path = narrow_vit(ffn_layer="swiglu"), tmp_path / "vit.onnx"
    export_onnx(backbone, path, statistics=STATISTICS, image_sizes=[(32, 48)], opset=23)
    model = onnx.load(path)
    assert not {node.op_type for node in model.graph.node} & {"Sin", "Cos", "Range"}
    assert {"LayerNormalization", "Attention"} <= {node.op_type for node in model.graph.node}
    assert dimensions(model.graph.input[0]) == ["batch", 3, 32, 48]
    images = torch.randn(5, 3, 32, 48)
    outputs = expected_outputs(backbone, images, ("cls", "patches"))
    for actual, expected in zip(run(path, images), outputs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_convnext_of_any_size(tmp_path, onnx):
    backbone, path = narrow_convnext(), tmp_path / "convnext.onnx"
    options = dict(statistics=STATISTICS, dynamic=True, image_sizes=[(64, 96)])
    export_onnx(backbone, path, outputs=("cls", "patches", "featmap"), **options)
    images = torch.randn(2, 3, 112, 76)  # no multiple of the stride of 32
    outputs = expected_outputs(backbone, images, ("cls", "patches", "featmap"))
    for actual, expected in zip(run(path, images), outputs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
