"""Evaluation hooks in a run of the DINOv3 algorithm through ``tools/train.py``."""

import pytest
import torch

from dinov3_mm.engine.training_state import read_training_state
from dinov3_mm.evaluation.records import read_records
from tests.integration.toy_run import toy_config, train, write_images

SCENES = {"type": "SyntheticScenes", "length": 24, "image_size": 32}
PAIR = {"train_source": SCENES, "test_source": {**SCENES, "start": 1000}, "image_size": 32}
HOOKS = [
    {"type": "KNNEvalHook", "interval": 3, "k": (5,), **PAIR},
    {"type": "DenseProbeHook", "interval": 6, **PAIR},
    {"type": "RetrievalEvalHook", "interval": 6, "source": SCENES, "image_size": 32},
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Work directories of the same run without and with the hooks."""
    folder = tmp_path_factory.mktemp("runs")
    images = write_images(folder / "images")
    for name, hooks in (("alone", []), ("watched", HOOKS)):
        cfg = toy_config(images, folder / name, model__compute_dtype="bf16")
        cfg.custom_hooks = [*cfg.custom_hooks, *hooks]
        train(cfg, folder)
    return folder / "alone", folder / "watched"


def _last_state(work_dir) -> dict:
    return read_training_state(max((work_dir / "checkpoints").glob("iter_*.pth")))


def test_hooks_score_the_teacher(runs):
    records = read_records(runs[1] / "evaluations.jsonl")
    steps = [(record["name"], record["step"]) for record in records]
    assert [step for name, step in steps if name == "knn"] == [0, 3, 6, 9, 12]
    for name in ("dense", "retrieval"):
        assert [step for found, step in steps if found == name] == [0, 6, 12]
    ranks = [record["effective_rank"] for record in records if record["name"] == "knn"]
    assert len(set(ranks)) == len(ranks)  # the teacher moves between evaluations


def test_training_is_the_same_to_the_bit(runs):
    alone, watched = (_last_state(run) for run in runs)
    assert alone["state_dict"].keys() == watched["state_dict"].keys()
    for name, expected in alone["state_dict"].items():
        assert torch.equal(watched["state_dict"][name], expected), name
    assert watched["training_seconds"] > 0
