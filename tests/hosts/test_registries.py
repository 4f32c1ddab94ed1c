"""No name of ours may exist in a host: there the host's own would be built instead, silently."""

from importlib import import_module

import pytest
from mmengine.registry import Registry, root

import dinov3_mm.hosts  # noqa: F401
from tests.hosts.lane import require_hosts

require_hosts()
ROOTS = [value for value in vars(root).values() if isinstance(value, Registry)]
OURS = {
    (registry.name, name): registry
    for registry in ROOTS
    for name, value in registry.module_dict.items()
    if value.__module__.partition(".")[0] == "dinov3_mm"
}


def test_ours_are_found():
    registered = {name for _, name in OURS}
    assert {"DINOv3ViT", "DINOv3", "SimpleFeaturePyramid", "DINOv3Pretrained"} <= registered
    assert len(OURS) > 20


@pytest.mark.parametrize("scope", ["mmpretrain", "mmseg", "mmdet"])
def test_no_host_has_a_name_of_ours(scope):
    import_module(f"{scope}.registry")
    names = {}
    for registry in ROOTS:
        if scope in registry.children:
            child = registry.children[scope]
            child.import_from_location()
            names.update(
                {(registry.name, name): value for name, value in child.module_dict.items()}
            )
    assert len(names) > 100
    clashes = sorted(set(OURS) & set(names))
    assert not clashes, f"{scope} has {clashes} too"


@pytest.mark.parametrize("package", ["mmcv.cnn", "mmcv.ops", "mmcv.transforms"])
def test_mmcv_registers_its_own_beside_ours(package):
    import_module(package)  # into the root registries, where a second name is a KeyError
