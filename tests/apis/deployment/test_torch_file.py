"""torch.export files, reloaded and held against the backbone."""

import json
import subprocess
import sys

import pytest
import torch

from dinov3_mm.apis.deployment import ExportMismatchError, export_torch
from tests.apis.deployment.toys import STATISTICS, narrow_convnext, narrow_vit

# The file runs where this package is not installed.
ALONE = """
import json, sys, torch
files = {"dinov3_mm.json": ""}
module = torch.export.load(sys.argv[1], extra_files=files).module()
outputs = module(torch.load(sys.argv[2]))
assert not [name for name in sys.modules if name.startswith("dinov3_mm")]
assert list(json.loads(files["dinov3_mm.json"])["outputs"]) == ["cls", "patches"]
torch.save(outputs, sys.argv[2])
"""


def test_one_file_for_all_sizes(tmp_path):
    backbone, path = narrow_vit(rope_normalize_coords="max"), tmp_path / "vit.pt2"
    options = dict(statistics=STATISTICS, dynamic=True, image_sizes=[(64, 64), (32, 96)])
    report = export_torch(backbone, path, **options)
    assert max(d.max_abs for d in report.differences) < 1e-5
    images, exchange = torch.randn(1, 3, 160, 48), tmp_path / "images.pt"
    torch.save(images, exchange)
    subprocess.run([sys.executable, "-c", ALONE, path, exchange], check=True)
    with torch.no_grad():
        tokens = backbone.forward_tokens(images)
    cls, patches = torch.load(exchange)
    torch.testing.assert_close(cls, tokens.cls, rtol=0, atol=1e-5)
    torch.testing.assert_close(patches, tokens.patches, rtol=0, atol=1e-5)
    metadata = json.loads((tmp_path / "vit.pt2.json").read_text())
    assert metadata["dynamic"] and len(metadata["differences"]) == 6


@pytest.mark.parametrize("make", [narrow_vit, narrow_convnext])
def test_one_size(make, tmp_path):
    backbone, path = make(), tmp_path / "fixed.pt2"
    export_torch(backbone, path, statistics=STATISTICS, image_sizes=[(64, 96)])
    module = torch.export.load(path).module()
    images = torch.randn(3, 3, 64, 96)
    with torch.no_grad():
        tokens = backbone.forward_tokens(images)
        torch.testing.assert_close(module(images)[1], tokens.patches, rtol=0, atol=1e-5)
    with pytest.raises(AssertionError, match="== 64"):
        module(torch.randn(3, 3, 96, 64))


def test_sixteen_bits_keep_the_rope_periods(tmp_path):
    backbone, path = narrow_vit(), tmp_path / "bf16.pt2"
    options = dict(statistics=STATISTICS, image_sizes=[(32, 64)])
    report = export_torch(backbone, path, dtype="bf16", dynamic=True, **options)
    program = torch.export.load(path)
    dtypes = {name: tensor.dtype for name, tensor in program.state_dict.items()}
    assert dtypes.pop("backbone.rope_embed.periods") == torch.float32
    assert set(dtypes.values()) == {torch.bfloat16}
    assert {output.dtype for output in program.module()(torch.randn(1, 3, 64, 64))} == {
        torch.float32
    }
    assert all(d.min_cosine > 0.999 for d in report.differences)
    assert backbone.norm.weight.dtype == torch.float32


def test_a_wrong_file_is_not_kept(tmp_path):
    options = dict(statistics=STATISTICS, image_sizes=[(32, 64)], tolerance=1e-12)
    with pytest.raises(ExportMismatchError, match="Nothing was kept"):
        export_torch(narrow_vit(), tmp_path / "vit.pt2", **options)
    assert not list(tmp_path.iterdir())
