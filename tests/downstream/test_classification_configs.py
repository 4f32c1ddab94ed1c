"""Every config of configs/classification: builds, trains a step and predicts, small."""

import pytest

from tests.downstream import batches
from tests.downstream.steps import check_config, configs_of
from tests.hosts.lane import require_hosts

require_hosts()


@pytest.mark.parametrize("path", configs_of("classification"))
def test_config(path):
    check_config(path, "classification", batches.classification)
