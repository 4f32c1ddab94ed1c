"""The schedule of the official segmentation and depth heads, on recorded values."""

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from mmengine.registry import PARAM_SCHEDULERS
from mmengine.runner import Runner
from torch.utils.data import DataLoader

import dinov3_mm  # noqa: F401 - registers the schedulers
from tests.golden import load_golden

GOLDEN, _ = load_golden("heads_schedules")


def optimizer(lr, kind=torch.optim.AdamW):
    return kind([torch.nn.Parameter(torch.zeros(1))], lr=lr)


def build(name, target, **arguments):
    return PARAM_SCHEDULERS.build({"type": name, "optimizer": target, **arguments})


def course(target, schedulers, wanted):
    """Rate and first beta at each wanted iteration, before its optimizer step."""
    seen, group = {}, target.param_groups[0]
    for iteration in range(max(wanted) + 1):
        if iteration in wanted:
            seen[iteration] = (group["lr"], group["betas"][0])
        target._global_step += 1
        for scheduler in schedulers:
            scheduler.step()
    return seen


def compare(name, target, schedulers):
    expected = {int(i): values for i, values in GOLDEN[name]["lr_beta1"].items()}
    seen = course(target, schedulers, set(expected))
    differences = []
    for iteration, (lr, beta) in expected.items():
        assert seen[iteration][0] == pytest.approx(lr, rel=1e-6, abs=1e-18), iteration
        assert seen[iteration][1] == pytest.approx(beta, abs=1e-12), iteration
        differences.append(abs(seen[iteration][0] / lr - 1))
    print(f"{name}: largest relative difference {max(differences):.1e}")


def test_segmentation():
    kwargs = GOLDEN["seg_linear"]["kwargs"]
    target = optimizer(kwargs["lr"])
    rate = build(
        "WarmupOneCycleLR",
        target,
        total_iters=kwargs["total"],
        warmup_iters=kwargs["warmup_iters"],
        warmup_ratio=kwargs["warmup_ratio"],
        delay=1,
    )
    compare("seg_linear", target, [rate])


def test_depth():
    kwargs = GOLDEN["depth_linear"]["kwargs"]
    target = optimizer(kwargs["lr"])
    common = {"total_iters": kwargs["total"], "warmup_iters": kwargs["warmup_iters"]}
    schedulers = [
        build(
            "WarmupOneCycleLR",
            target,
            final_div_factor=kwargs["final_div_factor"],
            **common,
        ),
        build(
            "WarmupOneCycleMomentum",
            target,
            base_momentum=kwargs["base_momentum"],
            max_momentum=kwargs["max_momentum"],
            **common,
        ),
    ]
    compare("depth_linear", target, schedulers)


@pytest.mark.parametrize("stated", [{}, {"by_epoch": False}])
def test_in_a_runner(stated, tmp_path):
    """MMEngine's runner, which gives every scheduler an end of its own."""
    seen = []

    class Watch(Hook):
        def before_train_iter(self, runner, batch_idx, data_batch=None):
            group = runner.optim_wrapper.optimizer.param_groups[0]
            seen.append((group["lr"], group["betas"][0]))

    class Model(BaseModel):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, x, mode):
            return {"loss": self.weight.sum()}

    arguments = {"total_iters": 8, "warmup_iters": 2, **stated}
    runner = Runner(
        Model(),
        str(tmp_path),
        train_dataloader=DataLoader([{"x": 0}] * 4, batch_size=1),
        train_cfg={"type": "IterBasedTrainLoop", "max_iters": 8},
        optim_wrapper={"optimizer": {"type": "AdamW", "lr": 1.0}},
        param_scheduler=[
            {"type": "WarmupOneCycleLR", **arguments},
            {"type": "WarmupOneCycleMomentum", **arguments},
        ],
        custom_hooks=[Watch()],
        default_hooks={"checkpoint": None, "logger": None},
        experiment_name=tmp_path.name,
    )
    runner.train()
    target = optimizer(1.0)
    schedulers = [
        build(name, target, **arguments) for name in ("WarmupOneCycleLR", "WarmupOneCycleMomentum")
    ]
    assert seen == list(course(target, schedulers, set(range(8))).values())
    assert len(set(seen)) == 8


def test_it_resumes_exactly():
    arguments = {"total_iters": 40, "warmup_iters": 10, "warmup_ratio": 0.1, "delay": 1}

    def rates(stop):
        target = optimizer(1.0)
        scheduler = build("WarmupOneCycleLR", target, **arguments)
        values = []
        for iteration in range(40):
            if iteration == stop:
                state, saved = scheduler.state_dict(), target.state_dict()
                target = optimizer(1.0)
                scheduler = build("WarmupOneCycleLR", target, **arguments)
                target.load_state_dict(saved)
                scheduler.load_state_dict(state)
            values.append(target.param_groups[0]["lr"])
            target._global_step += 1
            scheduler.step()
        return values

    assert rates(17) == rates(None)


def test_each_group_has_its_own_peak_and_a_wrapper_is_as_good_as_an_optimizer():
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [{"params": [parameters[0]], "lr": 1.0}, {"params": [parameters[1]], "lr": 0.1}]
    wrapper = OptimWrapper(torch.optim.SGD(groups, lr=1.0, momentum=0.9))
    build("WarmupOneCycleLR", wrapper, total_iters=10, warmup_iters=0)
    build("WarmupOneCycleMomentum", wrapper, total_iters=10, warmup_iters=0)
    first, second = wrapper.optimizer.param_groups
    assert second["lr"] == pytest.approx(0.1 * first["lr"]) and 0.9 < first["lr"] < 1.0
    assert first["momentum"] == 0.85


def test_nothing_rises_after_the_end():
    target = optimizer(1.0)
    scheduler = build("WarmupOneCycleLR", target, total_iters=10, warmup_iters=2)
    for _ in range(15):
        target._global_step += 1
        scheduler.step()
    assert target.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("WarmupOneCycleLR", {"warmup_iters": 10}, "expected 0 <= warmup_iters < total_iters"),
        ("WarmupOneCycleLR", {"warmup_ratio": 2}, "warmup_ratio is 2; expected 0 to 1"),
        ("WarmupOneCycleLR", {"final_div_factor": 0}, "positive numbers"),
        ("WarmupOneCycleLR", {"delay": -1}, "delay is -1"),
        ("WarmupOneCycleLR", {"by_epoch": True}, "counts iterations; set by_epoch=False"),
        ("WarmupOneCycleMomentum", {"max_momentum": 1.0}, "a momentum of 1.0"),
    ],
)
def test_refusals(name, wrong, message):
    with pytest.raises(ValueError, match=message):
        build(name, optimizer(1.0), **{"total_iters": 10, "warmup_iters": 2, **wrong})
