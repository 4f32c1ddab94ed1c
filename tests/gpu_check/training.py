"""Training on the device: a step against the CPU, and runs of FSDP2 that are killed and resumed."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch import Tensor

from benchmarks.train_step import Trainer
from dinov3_mm.engine.config import fill_defaults
from dinov3_mm.engine.run_files import checkpoint_path, list_checkpoints
from tests.gpu_check.check import ROOT, Check, exact_products, relative_error
from tests.integration.traces import read_shards, read_trace

TEMPERATURE = 0.07
# Losses of a step in fp32 on two devices, or compiled and not: sums in another order. TF32, a wrong
# mask or a lost cast gives 1e-3 and more.
LOSS_BAR = 1e-4
GRADIENT_BAR = 1e-3
# Two runs of the same steps on a GPU, whose kernels add in an order of their own choice.
RESUME_BAR = 1e-3


def quickstart_config(**changes: object) -> Config:
    """The quickstart's first stage without random numbers that a device draws itself.

    ``changes`` are dotted paths with ``__`` for the dot.
    """
    cfg = Config.fromfile(ROOT / "configs/quickstart/scenes_pretrain.py")
    cfg.train_cfg.global_batch_size = 8
    cfg.train_dataloader.source.length = 256
    cfg.model.backbone.rope_rescale_coords = None
    cfg.merge_from_dict({key.replace("__", "."): value for key, value in changes.items()})
    return cfg


def make_trainer(cfg: Config, dtype: str, check: Check) -> Trainer:
    """Model and optimizer on the device of the check, from seed 0."""
    cfg = Config(cfg.to_dict())
    fill_defaults(cfg)
    return Trainer(cfg, dtype, str(check.device))


def losses_and_gradients(
    trainer: Trainer, batch: dict
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Losses of a batch and the student's gradients, on the CPU; no parameter moves."""
    model = trainer.model
    torch.manual_seed(0)
    model.set_step(teacher_temp=TEMPERATURE)
    total, logs = model.parse_losses(
        model(**model.data_preprocessor(dict(batch), True), mode="loss")
    )
    total.backward()
    grads = {
        name: p.grad.detach().float().cpu()
        for name, p in model.student.named_parameters()
        if p.grad is not None
    }
    model.zero_grad(set_to_none=True)
    return {name: float(value) for name, value in logs.items()}, grads


def losses_of_steps(trainer: Trainer, batches: Iterable[dict]) -> list[float]:
    """The loss of every step of a short training."""
    losses = []
    for index, batch in enumerate(batches):
        torch.manual_seed(index)
        trainer.model.set_step(teacher_temp=TEMPERATURE)
        logs = trainer.model.train_step(dict(batch), trainer.optim_wrapper)
        trainer.model.update_teacher(0.99)
        losses.append(float(logs["loss"]))
    return losses


def worst_loss(actual: Iterable[float], expected: Iterable[float]) -> float:
    """Largest difference over the expected value."""
    return max(abs(a - e) / max(abs(e), 1e-6) for a, e in zip(actual, expected, strict=True))


def worst_gradient(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Relative error of all gradients together."""
    assert actual.keys() == expected.keys()
    return relative_error(
        *(torch.cat([part[name].flatten() for name in expected]) for part in (actual, expected))
    )


def train_step(check: Check) -> None:
    """A few steps of the quickstart's model in fp32: the losses of the CPU."""
    exact_products()
    cfg = quickstart_config()
    cells = {}
    for device in ("cpu", check.device):
        trainer = make_trainer(cfg, "fp32", _on(check, device))
        batches = list(trainer.batches(4, num_workers=0))
        first = losses_and_gradients(trainer, batches[0])
        cells[str(device)] = (*first, losses_of_steps(trainer, batches))
    expected, actual = cells["cpu"], cells[str(check.device)]
    worst = worst_loss(actual[0].values(), expected[0].values())
    check.at_most(f"{len(actual[0])} values of the first step against the CPU", worst, LOSS_BAR)
    worst = worst_gradient(actual[1], expected[1])
    check.at_most("gradients of the first step against the CPU", worst, GRADIENT_BAR)
    worst = worst_loss(actual[2], expected[2])
    check.at_most(f"losses of {len(batches)} steps against the CPU", worst, LOSS_BAR)


def _on(check: Check, device: str | torch.device) -> Check:
    return Check(str(device), check.out)


@HOOKS.register_module()
class KillAfterStepHook(Hook):
    """SIGKILL of its own process after a step, once for each work folder."""

    priority = "LOWEST"

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Die."""
        flag = Path(runner.work_dir) / f"killed_after_{self.iteration}"
        if runner.iter + 1 == self.iteration and not flag.exists():
            flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)


@HOOKS.register_module()
class SameOrderHook(Hook):
    """Asks torch for kernels that add in a fixed order, where it has them."""

    def before_run(self, runner) -> None:
        """Set the process-wide switch."""
        torch.use_deterministic_algorithms(True, warn_only=True)


def fsdp2_resume(check: Check) -> None:
    """FSDP2 (world 1): a first stage and a Gram stage from it, killed, resumed, left alone."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stages = {"pretrain": (12, 6), "gram": (8, 6)}
        for stage, (iters, kill) in stages.items():
            earlier = (
                [] if stage == "pretrain" else ["--from-stage", str(folder / "straight_pretrain")]
            )
            runs = {}
            for run in ("straight", "killed"):
                work_dir = folder / f"{run}_{stage}"
                cfg = _fsdp2_config(stage, work_dir, iters, on_gpu=check.on_gpu)
                if run == "killed":
                    cfg.custom_hooks.append(dict(type="KillAfterStepHook", iteration=kill))
                path = folder / f"{run}_{stage}.py"
                cfg.dump(path)
                runs[run] = _start(path, check, *earlier)
            _wait(runs["straight"], 0)
            _wait(runs["killed"], -signal.SIGKILL)
            newest = max(list_checkpoints(folder / f"killed_{stage}"))
            check.holds(
                f"{stage}: checkpoint that the killed run left", newest, "== 4", newest == 4
            )
            resume = [*earlier, "--resume"]
            _wait(_start(folder / f"killed_{stage}.py", check, *resume), 0)
            _compare_runs(check, folder, stage, iters)


def _fsdp2_config(stage: str, work_dir: Path, iters: int, *, on_gpu: bool) -> Config:
    cfg = Config.fromfile(ROOT / f"configs/quickstart/scenes_{stage}.py")
    cfg.work_dir = str(work_dir)
    cfg.strategy = dict(type="FSDP2Strategy")
    cfg.train_cfg.update(max_iters=iters, global_batch_size=16 if on_gpu else 4)
    cfg.train_dataloader.source.length = 256
    cfg.custom_imports = dict(imports=["dinov3_mm", "tests.gpu_check.training"])
    evaluating = ("KNNEvalHook", "DenseProbeHook")
    hooks = [hook for hook in cfg.custom_hooks if hook["type"] not in evaluating]
    for hook in hooks:
        if hook["type"] == "OptimScheduleHook":
            hook["lr"]["warmup_iters"] = 2
        if hook["type"] == "TeacherEMAHook" and isinstance(hook["teacher_temp"], dict):
            hook["teacher_temp"]["total_iters"] = iters
    cfg.custom_hooks = [*hooks, dict(type="SameOrderHook")]
    cfg.default_hooks.logger = dict(type="ProgressHook", interval=1, bar=False)
    cfg.default_hooks.checkpoint = dict(type="PretrainCheckpointHook", interval=4)
    return cfg


def _start(config: Path, check: Check, *arguments: str) -> subprocess.Popen:
    environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    if not check.on_gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, str(ROOT / "tools/train.py"), str(config), *arguments]
    log = open(config.with_suffix(f".{len(arguments)}.log"), "w+")  # noqa: SIM115  (the child's)
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, text=True)
    process.log = log
    return process


def _wait(process: subprocess.Popen, expected: int) -> None:
    code = process.wait()
    process.log.seek(0)
    lines = [line for line in process.log.read().splitlines() if line.strip()]
    process.log.close()
    if code != expected:
        print("\n".join(lines[-40:]), flush=True)
        raise RuntimeError(f"tools/train.py ended with {code}, expected {expected}: {lines[-1:]}")


def _compare_runs(check: Check, folder: Path, stage: str, iters: int) -> None:
    straight, killed = (folder / f"{run}_{stage}" for run in ("straight", "killed"))
    expected, actual = read_trace(straight), read_trace(killed)
    check.holds(
        f"{stage}: iterations logged",
        sorted(actual)[-1],
        f"== {iters}",
        actual.keys() == expected.keys(),
    )
    worst = max(
        abs(actual[step][name] - value) / max(abs(value), 1e-6)
        for step, record in expected.items()
        for name, value in record.items()
        if name.endswith("loss")
    )
    # The CPU adds in the same order every time; on a GPU some kernels do not.
    check.at_most(f"{stage}: losses against the run left alone", worst, RESUME_BAR * check.on_gpu)
    tensors = [read_shards(checkpoint_path(run, iters, sharded=True)) for run in (straight, killed)]
    unequal = [name for name in tensors[0] if not torch.equal(tensors[0][name], tensors[1][name])]
    name = f"{stage}: tensors of the last checkpoint that differ in a bit, of {len(tensors[0])}"
    if check.on_gpu:
        check.note(name, len(unequal))
    else:
        check.at_most(name, len(unequal), 0)
