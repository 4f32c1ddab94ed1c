"""The table of backbones for people."""

import pytest

from dinov3_mm import list_backbones
from dinov3_mm.models.backbones import ZOO
from tools.list_backbones import main


def test_weights_only_leaves_out_what_was_not_released():
    every, released = list_backbones(), list_backbones(weights_only=True)
    assert set(every) == set(ZOO) and set(released) < set(every)
    left_out = set(every) - set(released)
    assert {"dinov3_vitt16", "dinov3_vitl16plus_lvd1689m"} <= left_out
    assert list_backbones("*sat*", weights_only=True) == list_backbones("*sat*")


@pytest.mark.parametrize("width", [100, 200])
def test_the_table_shows_everything(width, capsys):
    main(["dinov3_vitl16_sat493m", "--width", str(width)])
    printed = capsys.readouterr().out
    row = ZOO["dinov3_vitl16_sat493m"]
    for text in ("303.2", "62.8", "SAT-493M", "0.430 0.411 0.296", "0.213 0.156 0.143"):
        assert text in printed
    if width == 200:
        for text in ("DINOv3 License", row.file, row.hf_id, row.timm_name):
            assert text in printed
