"""Settings that every test shares: few threads, fixed seeds."""

import logging
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.registry import DefaultScope

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seed():
    """Start each test from the same random state."""
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(autouse=True)
def no_logger_of_an_ended_run():
    """Forget the log files that runs of earlier tests closed; MMEngine would write to them."""
    yield
    for logger in MMLogger._instance_dict.values():
        for handler in list(logger.handlers):
            if isinstance(handler, logging.FileHandler):
                logger.removeHandler(handler)


@pytest.fixture(autouse=True)
def no_scope_of_an_ended_run():
    """Forget the default scopes that runs of earlier tests left behind."""
    yield
    DefaultScope._instance_dict.clear()
