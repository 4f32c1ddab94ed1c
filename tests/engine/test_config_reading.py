"""Config files: marks of this package's scope, and hosts that are not installed."""

import sys

import pytest

from dinov3_mm.engine import ConfigError, read_config


def test_a_missing_host_is_named(tmp_path):
    (tmp_path / "broken_host_package.py").write_text(
        "raise ImportError('mmcv is not installed; run setup')\n"
    )
    path = tmp_path / "config.py"
    path.write_text("custom_imports = dict(imports=['broken_host_package'])\n")
    sys.path.insert(0, str(tmp_path))
    try:
        with pytest.raises(ConfigError, match=r"^mmcv is not installed; run setup$"):
            read_config(path)
    finally:
        sys.path.remove(str(tmp_path))


def test_marks_of_the_own_scope_go_and_others_stay(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(
        "a = dict(type='X', _scope_='dinov3_mm', b=[dict(type='Y', _scope_='dinov3_mm')])\n"
        "c = dict(type='Z', _scope_='mmdet')\n"
    )
    cfg = read_config(path)
    assert cfg.a == dict(type="X", b=[dict(type="Y")]) and cfg.c._scope_ == "mmdet"
