"""Settings that every test shares: few threads, fixed seeds, a compile cache of this run."""

import logging
import os
import shutil
import signal
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.registry import DefaultScope

torch.set_num_threads(1)


def pytest_configure(config):
    """Compile into a folder of this run, which the processes of xdist and of tests inherit.

    Kernels in the user's own cache may be of another processor setting.

    A suite in the background of a script is deaf to Ctrl-C, and so would be the trainings that it
    starts: what is ignored stays ignored.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if not hasattr(config, "workerinput"):  # a process of xdist has its parent's folder
        config.compile_cache = tempfile.mkdtemp(prefix="dinov3_mm_compiled_")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = config.compile_cache
        os.environ["TRITON_CACHE_DIR"] = os.path.join(config.compile_cache, "triton")


def pytest_unconfigure(config):
    """Remove what this run compiled."""
    if hasattr(config, "compile_cache"):
        shutil.rmtree(config.compile_cache, ignore_errors=True)


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
