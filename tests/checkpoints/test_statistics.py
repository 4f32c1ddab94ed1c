"""Which normalisation belongs to a file: stated, told by its name, or configured beside it."""

import json

import pytest
import torch

from dinov3_mm.checkpoints import export_backbone, read_statistics
from dinov3_mm.models.backbones import ZOO
from tests.checkpoints.toys import toy_backbone

SATELLITE = ((0.430, 0.411, 0.296), (0.213, 0.156, 0.143))


@pytest.mark.parametrize("name", sorted(name for name in ZOO if ZOO[name].data))
def test_released_names_tell(name, tmp_path):
    row = ZOO[name]
    names = [row.file, f"{row.timm_name}.bin", f"models--{row.hf_id}".replace("/", "--")]
    for each in names if row.released else names[:1]:
        (tmp_path / each).touch()
        statistics = read_statistics(tmp_path / each)
        assert (statistics.mean, statistics.std) == (row.mean, row.std)
        assert statistics.name == row.data


def test_a_hub_cache_folder_tells(tmp_path):
    folder = tmp_path / "models--facebook--dinov3-vitl16-pretrain-sat493m" / "snapshots" / "0a1b"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").touch()
    # The processor of this repository may carry ImageNet values; the weights are satellite ones.
    config = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    assert read_statistics(folder)[:2] == SATELLITE


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("preprocessor_config.json", {"image_mean": SATELLITE[0], "image_std": SATELLITE[1]}),
        ("config.json", {"pretrained_cfg": {"mean": SATELLITE[0], "std": SATELLITE[1]}}),
    ],
)
def test_a_configuration_beside_the_weights_tells(file, content, tmp_path):
    (tmp_path / file).write_text(json.dumps(content))
    (tmp_path / "model.pth").touch()
    for path in (tmp_path, tmp_path / "model.pth"):
        assert read_statistics(path) == (*SATELLITE, "SAT-493M")


def test_an_export_tells_whatever_its_name(tmp_path):
    custom = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    path = tmp_path / "continued_from_lvd1689m.safetensors"
    export_backbone(toy_backbone(), path, {"statistics": custom})
    assert read_statistics(path) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "custom")


def test_silence_is_an_error(tmp_path):
    torch.save(toy_backbone().state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="does not state its input normalisation"):
        read_statistics(tmp_path / "weights.pth")
    with pytest.raises(FileNotFoundError):
        read_statistics(tmp_path / "absent.pth")
