"""Every config of configs/segmentation: builds, trains a step and predicts, small."""

import pytest

from tests.downstream import batches
from tests.downstream.steps import check_config, configs_of
from tests.hosts.lane import require_hosts

require_hosts()


@pytest.mark.parametrize("path", configs_of("segmentation"))
def test_config(path):
    check_config(path, "segmentation", batches.segmentation)
