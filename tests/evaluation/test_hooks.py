"""Evaluation hooks in real runs of both MMEngine runners."""

import json
import logging

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from mmengine.runner import FlexibleRunner, Runner
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dinov3_mm.engine.hooks.evaluation import DenseProbeHook, KNNEvalHook, RetrievalEvalHook
from dinov3_mm.evaluation.records import read_records
from tests.evaluation.toys import MeanColour

TRAIN = {"type": "ColourSquares", "length": 40}
TEST = {"type": "ColourSquares", "length": 16, "seed": 1}


@MODELS.register_module()
class ToyPretraining(BaseModel):
    """A teacher to evaluate, and a student whose dropout shows any change of the random state."""

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Linear(6, 1)
        self.teacher = nn.ModuleDict({"backbone": MeanColour(draws=True)})
        self.drop = nn.Dropout(0.5)
        self.data_preprocessor.statistics = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]

    def forward(self, inputs, mode="loss"):
        return {"loss": self.student(self.drop(inputs)).square().mean()}


@pytest.fixture(autouse=True)
def close_log_files():
    yield
    logging.shutdown()


def _run(work_dir, hooks, *, iters=5, runner=Runner, extra=(), **options):
    torch.manual_seed(0)
    data = DataLoader(TensorDataset(torch.randn(64, 6)), batch_size=4)
    name = f"{work_dir.name}-{len(read_records(work_dir / 'evaluations.jsonl'))}-{runner.__name__}"
    built = runner(
        model=ToyPretraining(),
        work_dir=str(work_dir),
        train_dataloader=data,
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.05}},
        train_cfg={"by_epoch": False, "max_iters": iters},
        default_hooks={
            "logger": {"type": "LoggerHook", "interval": 1},
            "checkpoint": {"type": "CheckpointHook", "interval": 3, "by_epoch": False},
        },
        custom_hooks=[*hooks, *extra],
        experiment_name=name,
        default_scope="mmengine",
        randomness={"seed": 0},
        **{"log_level": "WARNING", **options},
    )
    built.train()
    return built


def _knn(**options):
    return {
        "type": "KNNEvalHook",
        "interval": 2,
        "train_source": TRAIN,
        "test_source": TEST,
        "image_size": 32,
        "k": (3, 5),
        **options,
    }


DENSE = {
    "type": "DenseProbeHook",
    "interval": 4,
    "train_source": TRAIN,
    "test_source": TEST,
    "image_size": 32,
}
RETRIEVAL = {
    "type": "RetrievalEvalHook",
    "interval": 5,
    "source": {"type": "UnlabelledSquares", "length": 12},
    "image_size": 32,
}


@pytest.mark.parametrize("kind", [Runner, FlexibleRunner])
def test_hooks_evaluate_at_start_interval_and_end(tmp_path, kind):
    runner = _run(tmp_path, [_knn(), DENSE, RETRIEVAL], runner=kind)
    records = {name: read_records(tmp_path / "evaluations.jsonl", name) for name in
               ("knn", "dense", "retrieval")}  # fmt: skip
    steps = {name: [record["step"] for record in of_name] for name, of_name in records.items()}
    assert steps == {"knn": [0, 2, 4, 5], "dense": [0, 4, 5], "retrieval": [0, 5]}
    knn = records["knn"]
    assert knn[0]["cls_top1_k3"] == 100.0 and knn[0]["chance"] == 25.0  # half of it is the colour
    assert {"cls_top1_k5", "patch_top1_k3", "patch_top1_k5", "effective_rank"} <= knn[0].keys()
    assert records["dense"][0]["patch_miou"] > records["dense"][0]["chance_miou"]
    assert records["retrieval"][0]["chance"] == pytest.approx(100 / 12)
    seconds = [record["seconds"] for record in knn]
    assert seconds == sorted(seconds) and seconds[0] == 0 < seconds[-1]
    history = runner.message_hub.get_scalar("eval/knn_cls_top1_k3")
    assert len(history.data[0]) == 4
    lines = [
        json.loads(line)
        for path in tmp_path.glob("*/vis_data/scalars.json")
        for line in path.read_text().splitlines()
    ]
    tagged = [line["step"] for line in lines if "eval/dense_patch_miou" in line]
    assert tagged == [0, 4, 5]


def test_training_is_not_disturbed(tmp_path):
    alone = _run(tmp_path / "alone", [])
    watched = _run(tmp_path / "watched", [_knn(), DENSE, RETRIEVAL])
    for expected, actual in zip(
        alone.model.student.parameters(), watched.model.student.parameters()
    ):
        assert torch.equal(expected, actual)
    assert watched.model.teacher.backbone.drop.training  # the mode that the loop set


def test_the_log_names_the_starting_point(tmp_path):
    _run(tmp_path, [_knn()], log_level="INFO")
    text = next(tmp_path.glob("*/*.log")).read_text()
    assert "starting point: k-NN top-1 CLS 100.0 % (k=3)" in text
    assert "chance 25.0 %" in text and "iteration 2 (0.0 min of training)" in text
    assert text.count("; starting point 100.0") == 3


class GuardedStop(Hook):
    """Ends the run after the third iteration, as a collapse guard does."""

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        runner.train_loop.stop_training = batch_idx == 2


def test_a_run_that_a_guard_ends_is_evaluated_at_its_end(tmp_path):
    _run(tmp_path, [_knn()], extra=[GuardedStop()])
    assert [record["step"] for record in read_records(tmp_path / "evaluations.jsonl")] == [0, 2, 3]


class StopAt(Hook):
    """Ends the process in the third iteration."""

    priority = "LOWEST"

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if batch_idx == 2:
            raise KeyboardInterrupt


def test_resume_continues_the_clock_and_has_no_second_start(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path, [_knn()], extra=[StopAt()])
    path = tmp_path / "evaluations.jsonl"
    first = read_records(path)
    assert [record["step"] for record in first] == [0, 2]
    checkpoint = torch.load(tmp_path / "iter_3.pth", weights_only=False)
    checkpoint["training_seconds"] += 1000
    torch.save(checkpoint, tmp_path / "iter_3.pth")
    _run(tmp_path, [_knn()], resume=True)
    records = read_records(path)
    assert [record["step"] for record in records] == [0, 2, 4, 5]
    assert path.read_text().count('"step": 0') == 1
    assert records[1]["seconds"] < 1000 < records[2]["seconds"]


def test_a_new_stage_starts_its_clock_at_zero(tmp_path):
    _run(tmp_path / "one", [_knn()])
    checkpoint = tmp_path / "one" / "iter_3.pth"
    content = torch.load(checkpoint, weights_only=False)
    content["training_seconds"] += 1000
    torch.save(content, checkpoint)
    _run(tmp_path / "two", [_knn()], load_from=str(checkpoint))
    records = read_records(tmp_path / "two" / "evaluations.jsonl")
    assert records[0]["step"] == 0 and records[-1]["seconds"] < 1000


def test_without_a_start(tmp_path):
    _run(tmp_path, [_knn(at_start=False, interval=100)])
    assert [record["step"] for record in read_records(tmp_path / "evaluations.jsonl")] == [5]


def test_statistics_are_the_preprocessors_unless_given(tmp_path):
    hooks = [_knn(), _knn(mean=(0, 0, 0), std=(1, 1, 1))]
    runner = _run(tmp_path, hooks, iters=1)
    found = [hook.statistics for hook in runner.hooks if isinstance(hook, KNNEvalHook)]
    assert found == [([0.4, 0.5, 0.6], [0.2, 0.3, 0.4]), ((0, 0, 0), (1, 1, 1))]
    with pytest.raises(ValueError, match="belong together"):
        KNNEvalHook(1, TRAIN, TEST, 32, mean=(0, 0, 0))
    del runner.model.data_preprocessor.statistics
    hook = KNNEvalHook(1, TRAIN, TEST, 32)
    with pytest.raises(ValueError, match="has no image statistics"):
        hook.before_train(runner)


def test_sources_are_read_once(tmp_path):
    runner = _run(tmp_path, [_knn()])
    hook = next(hook for hook in runner.hooks if isinstance(hook, KNNEvalHook))
    assert hook.train.source.loads == 40 and hook.test.source.loads == 16


def test_wrong_settings_are_refused_before_training(tmp_path):
    source = {"train_source": TRAIN, "test_source": TEST, "image_size": 32}
    with pytest.raises(ValueError, match="interval"):
        KNNEvalHook(0, **source)
    with pytest.raises(ValueError, match="'fp32' or 'bf16'"):
        DenseProbeHook(1, **source, dtype="fp16")
    with pytest.raises(ValueError, match="num_workers=0"):
        KNNEvalHook(1, **source, num_workers=2)
    with pytest.raises(ValueError, match="resize_size"):
        RetrievalEvalHook(1, TRAIN, 32, resize_size=40)
    with pytest.raises(TypeError, match="unknown"):
        KNNEvalHook(1, **source, unknown=1)
    with pytest.raises(ValueError, match="k=50 exceeds the 40"):
        _run(tmp_path / "k", [_knn(k=(50,))])
    with pytest.raises(TypeError, match="two-crop retrieval"):
        _run(tmp_path / "labels", [_knn(train_source={"type": "UnlabelledSquares", "length": 9})])
    with pytest.raises(AttributeError, match="ToyPretraining does not have"):
        _run(tmp_path / "path", [_knn(backbone="teacher.body")])
