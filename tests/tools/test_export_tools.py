"""tools/export_onnx.py and tools/export_torch.py, run as a user runs them."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from dinov3_mm.checkpoints import export_backbone
from tests.apis.deployment.toys import STATISTICS, narrow_vit
from tests.apis.toys import write_pictures

TOOLS = Path(__file__).parents[2] / "tools"


def run(monkeypatch, tool: str, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [tool, *map(str, arguments)])
    runpy.run_path(str(TOOLS / f"{tool}.py"), run_name="__main__")


def weights(folder: Path, **metadata) -> Path:
    return export_backbone(narrow_vit(), folder / "toy.safetensors", metadata)


def test_onnx_from_a_file(tmp_path, monkeypatch, capsys):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    source = weights(tmp_path, statistics=STATISTICS._asdict())
    write_pictures(tmp_path / "pictures", 3)
    options = ("--image-size", "32x48", "--batch", 2, "--images", tmp_path / "pictures")
    run(monkeypatch, "export_onnx", source, tmp_path / "toy.onnx", *options)
    printed = capsys.readouterr().out
    assert "patches" in printed and "2x3x32x48" in printed and "toy.onnx" in printed
    metadata = json.loads((tmp_path / "toy.onnx.json").read_text())
    assert metadata["mean"] == list(STATISTICS.mean) and metadata["source"] == str(source)
    with pytest.raises(SystemExit, match="the exported file is not the model") as exit_info:
        extra = ("--tolerance", "1e-12")
        run(monkeypatch, "export_onnx", source, tmp_path / "b.onnx", *options, *extra)
    assert exit_info.value.code  # a text: Python prints it and exits with 1
    assert not list(tmp_path.glob("*b.onnx*"))


def test_torch_from_a_file_that_states_no_statistics(tmp_path, monkeypatch):
    source, path = weights(tmp_path), tmp_path / "toy.pt2"
    options = ("--image-size", 32, "--batch", 1)
    with pytest.raises(SystemExit, match="Pass mean and std"):
        run(monkeypatch, "export_torch", source, path, *options)
    statistics = ("--mean", 0.4, 0.5, 0.6, "--std", 0.2, 0.25, 0.3)
    run(monkeypatch, "export_torch", source, path, *options, *statistics)
    assert json.loads((tmp_path / "toy.pt2.json").read_text())["std"] == [0.2, 0.25, 0.3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("dinov3_vits16", "a.pt2"), "--weights FILE"),
        (("dinov3_vits16", "a.onnx"), r"must end in \.pt2"),
        (("nowhere.safetensors", "a.pt2"), "nowhere.safetensors"),
        (("nowhere.safetensors", "a.pt2", "--random-weights"), "name of a backbone"),
        (("dinov3_vits16", "a.pt2", "--outputs", "patch"), "did you mean 'patches'"),
        (("dinov3_vits16", "a.pt2", "--image-size", "big"), "HEIGHTxWIDTH"),
        (("dinov3_vits16", "a.pt2", "--images", "nowhere"), "no image or folder"),
        (("dinov3_vits16", "a.pt2", "--random-weights", "--mean", "0.5"), "belong together"),
    ],
)
def test_wrong_arguments(arguments, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, "export_torch", *arguments)
    assert not list(tmp_path.iterdir())
