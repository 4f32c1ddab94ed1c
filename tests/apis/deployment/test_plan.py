"""What is refused before anything is traced, and what an export is compared with."""

import math

import numpy as np
import pytest
import torch

from dinov3_mm.apis.deployment.check import (
    Bounds,
    CheckBatches,
    Difference,
    ExportMismatchError,
    compare,
    find_images,
    require_within,
)
from dinov3_mm.apis.deployment.graph import (
    InputShapes,
    OutputGraph,
    parse_size,
    with_constant_tables,
)
from dinov3_mm.apis.deployment.request import ExportPlan, check_target, staged
from dinov3_mm.checkpoints import Statistics
from tests.apis.deployment.toys import STATISTICS, narrow_convnext, narrow_vit
from tests.apis.toys import toy_pictures, write_pictures
from tests.checkpoints.toys import toy_backbone


def shapes_of(backbone, sizes, dynamic=False, batch=None) -> InputShapes:
    return InputShapes.resolve(backbone, sizes, dynamic=dynamic, batch=batch)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"outputs": ("clss",)}, "did you mean 'cls'"),
        ({"outputs": ()}, "expected one or more"),
        ({"outputs": ("cls", "cls")}, "expected one or more"),
        ({"layers": (0, 5)}, "layers out of 1"),
        ({"layers": ()}, "layers out of 1"),
        ({"image_sizes": [(230, 224)]}, "image side is 230.*224 or 240"),
        ({"image_sizes": [(0, 224)]}, "at least 16: 16 or 32"),
        ({"image_sizes": [(16, 32)], "dynamic": True}, "at least 32: 32 or 48"),
        ({"image_sizes": [(32, 32), (64, 64)]}, "--dynamic"),
        ({"batch": 0}, "batch is 0"),
        ({"dtype": "fp61"}, "did you mean 'fp16'"),
        ({"tolerance": 0.0}, "tolerance is 0"),
        ({"images": []}, "images is empty"),
        ({"statistics": Statistics((0.5,), (0.5,))}, "do not fit 3 image channels"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        ExportPlan.resolve(narrow_vit(), **{"statistics": STATISTICS, **arguments})


def test_backbones_that_cannot_be_exported():
    with pytest.raises(ValueError, match=r"backbone\.eval\(\)"):
        ExportPlan.resolve(narrow_vit().train(), statistics=STATISTICS)
    with pytest.raises(ValueError, match="bfloat16 on cpu"):
        ExportPlan.resolve(narrow_vit().bfloat16(), statistics=STATISTICS)
    with pytest.raises(ValueError, match="no registers"):
        OutputGraph(narrow_convnext(), ("cls", "registers"))
    grey = narrow_vit(in_channels=1)
    with pytest.raises(ValueError, match="give images"):
        ExportPlan.resolve(grey, statistics=Statistics((0.5,), (0.5,)))


def test_sizes_are_parsed():
    assert parse_size("224") == (224, 224)
    assert parse_size("224x336") == (224, 336)
    for text in ("a", "224x", "1x2x3", "-16", ""):
        with pytest.raises(ValueError, match="HEIGHTxWIDTH"):
            parse_size(text)


def test_a_convnext_takes_multiples_of_its_stem():
    assert shapes_of(narrow_convnext(), None, dynamic=True).sizes[2] == (336, 448)
    with pytest.raises(ValueError, match="multiple of 4"):
        shapes_of(narrow_convnext(), [(338, 448)])


@pytest.mark.parametrize("make", [narrow_vit, narrow_convnext])
def test_outputs_are_those_of_the_backbone(make):
    backbone, images = make(), torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        tokens, (featmap,) = backbone.forward_tokens(images), backbone(images)
        cls, patches, maps = OutputGraph(backbone, ("cls", "patches", "featmap"))(images)
    torch.testing.assert_close(cls, tokens.cls, rtol=0, atol=1e-5)
    torch.testing.assert_close(patches, tokens.patches, rtol=0, atol=1e-5)
    torch.testing.assert_close(maps, featmap, rtol=0, atol=1e-5)


def test_layers_and_registers():
    backbone, images = toy_backbone(), torch.randn(1, 3, 32, 48)
    graph = OutputGraph(backbone, ("registers", "patches"), layers=(0, -1))
    assert graph.output_names == ["registers_0", "patches_0", "registers_1", "patches_1"]
    with torch.no_grad():
        *first, registers, patches = graph(images)
        tokens = backbone.forward_tokens(images)
        expected = backbone.get_intermediate_layers(images, n=[0], return_extra_tokens=True)
    torch.testing.assert_close(first[1], expected[0][0], rtol=0, atol=1e-6)
    torch.testing.assert_close(first[0], expected[0][1], rtol=0, atol=1e-6)
    torch.testing.assert_close(registers, tokens.registers, rtol=0, atol=1e-6)
    torch.testing.assert_close(patches, tokens.patches, rtol=0, atol=1e-6)


def test_constant_tables_share_parameters_and_leave_the_backbone_alone():
    backbone, images = narrow_vit(), torch.randn(1, 3, 32, 64)
    fixed = with_constant_tables(backbone, (32, 64))
    assert fixed.blocks is backbone.blocks
    assert backbone.rope_embed is not fixed.rope_embed
    with torch.no_grad():
        expected = backbone.forward_tokens(images).patches
        assert torch.equal(fixed.forward_tokens(images).patches, expected)


def test_batches_are_the_normalised_images(tmp_path):
    pictures = toy_pictures(3, height=64, width=64)
    shapes = shapes_of(narrow_vit(), [(64, 64), (32, 48)], dynamic=True)
    batches = list(CheckBatches(shapes, STATISTICS, list(pictures)))
    assert [tuple(b.shape) for b in batches] == [(3, 3, 64, 64), (1, 3, 64, 64), (3, 3, 32, 48)]
    mean, std = np.array(STATISTICS.mean), np.array(STATISTICS.std)
    expected = ((pictures / 255 - mean) / std).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(batches[0].numpy(), expected, atol=1e-6)
    fixed = shapes_of(narrow_vit(), [(32, 32)], batch=4)
    assert [len(b) for b in CheckBatches(fixed, STATISTICS)] == [4]

    paths = write_pictures(tmp_path / "pictures", 5)
    assert find_images([paths[0]]) == [str(paths[0])]
    assert find_images([tmp_path]) == [str(paths[0]), str(paths[3])]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        find_images([tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no images"):
        find_images([tmp_path / "empty"])


def test_differences_and_verdict():
    batch, expected = torch.zeros(1, 3, 16, 16), torch.tensor([[3.0, 4.0]])
    (difference,) = compare(
        lambda _: [expected], lambda _: [torch.tensor([[3.0, -4.0]])], [batch], ["cls"]
    )
    assert difference == Difference("cls", (1, 3, 16, 16), 8.0, 4.0, pytest.approx(-7 / 25))
    require_within([difference], Bounds(8.0))
    require_within([difference], Bounds(2.0, relative=True, min_cosine=-0.3))
    for bounds in (Bounds(7.9), Bounds(1.9, relative=True), Bounds(8.0, min_cosine=0.0)):
        with pytest.raises(ExportMismatchError, match=r"cls for images \(1, 3, 16, 16\)"):
            require_within([difference], bounds)
    nan = Difference("cls", (1, 3, 16, 16), math.nan, 4.0, math.nan)
    assert not Bounds(8.0).admit(nan) and not Bounds(8.0, min_cosine=0.0).admit(nan)
    with pytest.raises(ExportMismatchError, match=r"shape \(1, 1\)"):
        compare(lambda _: [expected], lambda _: [torch.zeros(1, 1)], [batch], ["cls"])


def write_model(path, text: str, weights: str | None = None) -> None:
    with staged(path) as partial:
        partial.write_text(text)
        partial.with_name(partial.name + ".json").write_text("{}")
        if weights:
            partial.with_name(partial.name + ".data").write_text(weights)


def names_in(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_files_appear_together_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "m.onnx"
    write_model(path, "one", weights="weights of one")
    assert names_in(path.parent) == {"m.onnx", "m.onnx.data", "m.onnx.json"}
    with pytest.raises(RuntimeError, match="refused"), staged(path) as partial:
        partial.write_text("broken")
        raise RuntimeError("refused")
    assert path.read_text() == "one"
    assert path.with_name("m.onnx.data").read_text() == "weights of one"
    write_model(path, "two")
    assert path.read_text() == "two"
    assert names_in(path.parent) == {"m.onnx", "m.onnx.json"}


def test_targets(tmp_path):
    with pytest.raises(ValueError, match=r"end in \.onnx"):
        check_target(tmp_path / "model.pt2", ".onnx")
    with pytest.raises(IsADirectoryError):
        (tmp_path / "model.onnx").mkdir()
        check_target(tmp_path / "model.onnx", ".onnx")
