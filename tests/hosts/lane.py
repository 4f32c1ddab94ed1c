"""Whether the hosts (mmpretrain, mmseg, mmdet) are there, for the tests that stand on them."""

import os
from importlib.util import find_spec

import pytest

HOSTS = ("mmcv", "mmpretrain", "mmseg", "mmdet")


def require_hosts() -> None:
    """Skip the calling test module where the lane 'ops' is not installed; call it at the top.

    In a run of that lane (DINOV3_MM_LANE=ops, which tools/run_tests.sh sets) a missing host is an
    error.
    """
    missing = [host for host in HOSTS if find_spec(host) is None]
    if missing and os.environ.get("DINOV3_MM_LANE") == "ops":
        raise ImportError(f"the lane 'ops' is to be tested, but {', '.join(missing)} is missing")
    if missing:
        reason = f"{', '.join(missing)} not installed: bash tools/setup_env.sh ops"
        pytest.skip(reason, allow_module_level=True)
