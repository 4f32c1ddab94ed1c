"""``tools/train.py --resume`` of runs on MMEngine's plain Runner."""

import json
import os
import pickle
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.logging import MessageHub
from mmengine.registry import HOOKS

from dinov3_mm.engine import ConfigError
from dinov3_mm.engine.hooks import downstream_checkpoint as host_checkpoint
from dinov3_mm.engine.hooks.resume import _keep_files_here
from tests.integration.downstream_run import (
    downstream_config,
    log_of,
    rates_of,
    state_of,
    train,
)


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """Work folder of four of eight iterations; the schedule is that of eight."""
    folder = tmp_path_factory.mktemp("half")
    train(eight(folder / "run"), folder, "--cfg-options", "train_cfg.max_iters=4")
    return folder / "run"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Work folder of eight iterations."""
    folder = tmp_path_factory.mktemp("whole")
    train(eight(folder / "run"), folder)
    return folder / "run"


def eight(work_dir, **changes):
    """The run with a schedule that does not depend on ``max_iters``."""
    cfg = downstream_config(work_dir, **changes)
    cfg.param_scheduler[1].update(end=8, T_max=6)
    return cfg


def copied(half, folder):
    """A copy whose ``last_checkpoint`` names the file of the original."""
    shutil.copytree(half, folder / "run_b")
    assert str(half) in (folder / "run_b/last_checkpoint").read_text()
    return folder / "run_b"


def resume(work_dir, folder, cfg=None, *arguments):
    """Go on in a folder and return what was logged."""
    for old in work_dir.glob("*/*.log"):
        old.unlink()
    train(cfg or eight(work_dir), folder, "--resume", *arguments)
    return log_of(work_dir)


def weights_of(work_dir, iteration=8):
    return state_of(work_dir / f"iter_{iteration}.pth")["state_dict"]


def test_a_copied_folder_goes_on_from_its_own_checkpoint(half, whole, tmp_path):
    work_dir, original = copied(half, tmp_path), tmp_path / "original"
    shutil.copytree(half, original)
    for folder in (work_dir, original):
        (folder / "last_checkpoint").write_text(str(original / "iter_4.pth"))
    # The original has gone on: following its path would start from other weights.
    state = torch.load(original / "iter_4.pth", weights_only=False)
    state["state_dict"]["linear.weight"] += 1
    torch.save(state, original / "iter_4.pth")
    log = resume(work_dir, tmp_path)
    assert f"Load checkpoint from {work_dir}/iter_4.pth" in log
    for name, tensor in weights_of(whole).items():
        assert torch.equal(tensor, weights_of(work_dir)[name]), name


def test_a_moved_folder_goes_on(half, whole, tmp_path):
    work_dir = copied(half, tmp_path)
    (work_dir / "last_checkpoint").write_text(str(tmp_path / "gone/iter_4.pth"))
    log = resume(work_dir, tmp_path)
    assert "config, seed and data are the same" in log
    assert rates_of(work_dir) == rates_of(whole)
    stored = [state_of(path / "iter_8.pth") for path in (work_dir, whole)]
    assert stored[0]["optimizer"]["param_groups"] == stored[1]["optimizer"]["param_groups"]
    for name, tensor in weights_of(whole).items():
        assert torch.equal(tensor, weights_of(work_dir)[name]), name


def test_a_half_written_file_is_not_the_newest(half, tmp_path):
    work_dir = copied(half, tmp_path)
    content = (work_dir / "iter_4.pth").read_bytes()
    (work_dir / "iter_6.pth").write_bytes(content[: len(content) // 2])
    log = resume(work_dir, tmp_path)
    assert "4 of 8 iterations are done" in log
    assert "iter_6.pth passed over" in log


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_offered(half, tmp_path):
    work_dir = copied(half, tmp_path)
    newest, before = work_dir / "iter_4.pth", work_dir / "iter_2.pth"
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.raises(ConfigError, match=f"--resume {before}") as caught:
        resume(work_dir, tmp_path)
    assert str(newest) in str(caught.value)
    assert "2 of 8 iterations" in resume(work_dir, tmp_path, None, str(before))


def test_a_folder_without_its_pointer_goes_on(half, tmp_path):
    work_dir = copied(half, tmp_path)
    (work_dir / "last_checkpoint").unlink()
    assert "4 of 8 iterations" in resume(work_dir, tmp_path)


class _Trap:
    """An object that leaves a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_a_foreign_file_is_not_unpickled(half, tmp_path):
    work_dir = copied(half, tmp_path)
    trap = tmp_path / "sprung"
    torch.save({"meta": {"iter": 4}, "state_dict": _Trap(trap)}, work_dir / "iter_4.pth")
    with pytest.raises(ConfigError, match=r"iter_4\.pth"):
        resume(work_dir, tmp_path)
    (work_dir / "iter_4.pth").write_bytes(pickle.dumps(_Trap(trap)))
    with pytest.raises(ConfigError, match=r"iter_4\.pth"):
        resume(work_dir, tmp_path)
    assert not trap.exists()


def test_a_config_inside_a_checkpoint_is_not_run(half, tmp_path):
    work_dir = copied(half, tmp_path)
    state = torch.load(work_dir / "iter_4.pth", weights_only=False)
    state["meta"]["config"] = f"import os\nos.mkdir({str(tmp_path / 'sprung')!r})\n"
    torch.save(state, work_dir / "iter_4.pth")
    resume(work_dir, tmp_path)
    assert not (tmp_path / "sprung").exists()


def test_a_kill_while_saving_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    cfg = eight(tmp_path / "run", default_hooks__checkpoint__max_keep_ckpts=1)

    def killed(*paths):
        raise KeyboardInterrupt

    train(cfg, tmp_path, "--cfg-options", "train_cfg.max_iters=2")
    with monkeypatch.context() as patch:
        patch.setattr(host_checkpoint.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            resume(tmp_path / "run", tmp_path, cfg)
    assert [path.name for path in (tmp_path / "run").glob("*.pth")] == ["iter_2.pth"]
    log = resume(tmp_path / "run", tmp_path, cfg)
    assert "2 of 8 iterations" in log and "left half-written" in log
    # and afterwards the newest one is all that is kept
    assert [path.name for path in (tmp_path / "run").glob("*.pth")] == ["iter_8.pth"]


def test_stored_paths_mean_the_files_of_this_folder(tmp_path):
    hub = MessageHub.get_instance("paths")
    hub.update_info("best_ckpt", "/elsewhere/best_mIoU_iter_4.pth")
    hub.update_info("best_score", 0.5)
    runner = SimpleNamespace(message_hub=hub, work_dir=str(tmp_path), cfg=Config({}))
    _keep_files_here(runner)
    assert hub.get_info("best_ckpt") == str(tmp_path / "best_mIoU_iter_4.pth")
    assert hub.get_info("best_score") == 0.5


def test_a_longer_run_has_the_schedule_of_its_length(tmp_path):
    cfg = downstream_config(tmp_path / "run")
    train(cfg, tmp_path, "--cfg-options", "train_cfg.max_iters=4")
    log = resume(tmp_path / "run", tmp_path, cfg)
    assert "train_cfg.max_iters: 4 -> 8" in log
    assert "learning rate jumps at iteration 4 from 0.05 to 0.075" in log
    straight = tmp_path / "straight"
    straight.mkdir()
    train(downstream_config(straight / "run"), straight)
    expected, found = rates_of(straight / "run"), rates_of(tmp_path / "run")
    assert [found[step] for step in (5, 6, 7, 8)] == [expected[step] for step in (5, 6, 7, 8)]


def test_the_rate_of_the_config_counts(half, whole, tmp_path):
    work_dir = copied(half, tmp_path)
    log = resume(work_dir, tmp_path, eight(work_dir, optim_wrapper__optimizer__lr=0.01))
    assert "optim_wrapper.optimizer.lr: 0.1 -> 0.01" in log
    assert rates_of(work_dir)[6] == pytest.approx(rates_of(whole)[6] / 10)
    moments = state_of(work_dir / "iter_8.pth")["optimizer"]["state"]
    assert {int(each["step"]) for each in moments.values()} == {8}


def test_epochs_count_where_the_batch_is_another(tmp_path):
    cfg = downstream_config(tmp_path / "run", by_epoch=True)
    train(cfg, tmp_path)
    shutil.rmtree(next((tmp_path / "run").glob("2*")))
    (tmp_path / "run/last_checkpoint").write_text("epoch_2.pth")
    other = downstream_config(tmp_path / "run", by_epoch=True, train_dataloader__batch_size=4)
    log = resume(tmp_path / "run", tmp_path, other)
    assert "2 of 4 epochs are done" in log and "2 epochs count as 8 iterations" in log
    straight = tmp_path / "straight"
    straight.mkdir()
    other.work_dir = str(straight / "run")
    train(other, straight)
    expected, found = rates_of(straight / "run"), rates_of(tmp_path / "run")
    assert found == {step: rate for step, rate in expected.items() if step > 8}
    assert max(found) == 16


def test_epochs_of_another_length_under_a_schedule_of_the_same(tmp_path):
    # Two epochs of eight steps and four of four: both schedules have 16 steps.
    cfg = downstream_config(tmp_path / "run", by_epoch=True, train_cfg__max_epochs=2)
    train(cfg, tmp_path)
    other = downstream_config(tmp_path / "run", by_epoch=True, train_dataloader__batch_size=4)
    assert "learning rate jumps at iteration 8" in resume(tmp_path / "run", tmp_path, other)
    assert rates_of(tmp_path / "run")[9] == pytest.approx(0.05)


def test_differences_are_named(half, tmp_path):
    work_dir = copied(half, tmp_path)
    cfg = eight(work_dir, model__loss_weight=0.5, train_dataloader__dataset__length=20)
    log = resume(work_dir, tmp_path, cfg)
    assert "model.loss_weight: not set -> 0.5, the config counts" in log
    assert "images: 16 -> 20" in log
    assert "because of: model.loss_weight, train_dataloader.dataset.length, images" in log


def test_another_order_of_the_same_samples_is_named(half, tmp_path):
    work_dir = copied(half, tmp_path)
    cfg = eight(work_dir)
    cfg.train_dataloader.dataset.reverse = True
    assert "16 as before, but with other names" in resume(work_dir, tmp_path, cfg)


def test_a_checkpoint_of_an_older_version_cannot_be_compared(half, tmp_path):
    work_dir = copied(half, tmp_path)
    state = torch.load(work_dir / "iter_4.pth", weights_only=False)
    del state["meta"]["run"]
    torch.save(state, work_dir / "iter_4.pth")
    assert "cannot be told" in resume(work_dir, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_cfg__max_iters": 3}, "has done 4 iterations, and train_cfg.max_iters is 3"),
        ({"randomness__seed": 3}, "resume with --seed 0"),
        ({"optim_wrapper__optimizer": {"type": "SGD", "lr": 0.1}}, "moments of AdamW"),
        ({"model__num_classes": 3}, r"of another shape: linear.* load_from="),
    ],
)
def test_what_makes_no_sense_is_refused(half, tmp_path, changes, message):
    work_dir = copied(half, tmp_path)
    with pytest.raises(ConfigError, match=message):
        resume(work_dir, tmp_path, eight(work_dir, **changes))


def test_iterations_do_not_go_on_as_epochs(half, tmp_path):
    work_dir = copied(half, tmp_path)
    with pytest.raises(ConfigError, match="counts iterations, this config counts epochs"):
        resume(work_dir, tmp_path, downstream_config(work_dir, by_epoch=True))


def test_a_complete_run_says_so(half, tmp_path):
    work_dir = copied(half, tmp_path)
    before = (work_dir / "iter_4.pth").read_bytes()
    log = resume(work_dir, tmp_path, eight(work_dir, train_cfg__max_iters=4))
    assert "complete, 4 of 4 iterations" in log
    assert (work_dir / "iter_4.pth").read_bytes() == before


def test_a_run_without_a_checkpoint_starts(tmp_path):
    assert "starts from the beginning" in resume(tmp_path / "run", tmp_path)
    assert (tmp_path / "run/iter_8.pth").exists()


@HOOKS.register_module()
class SignalOnceHook(Hook):
    """Sends this process a signal in an iteration, the first time that it gets there."""

    def __init__(self, iteration: int, number: int) -> None:
        self.iteration, self.number = iteration, number

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        flag = Path(runner.work_dir) / "sent"
        if runner.iter + 1 == self.iteration and not flag.exists():
            flag.touch()
            os.kill(os.getpid(), self.number)


@HOOKS.register_module()
class BatchesHook(Hook):
    """Writes what each iteration of a run sees."""

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        seen = [round(float(x.sum()), 4) for x in data_batch["inputs"]]
        with open(Path(runner.work_dir) / "batches.jsonl", "a") as file:
            file.write(json.dumps({"iter": runner.iter + 1, "seen": seen}) + "\n")


def batches_of(work_dir):
    lines = (Path(work_dir) / "batches.jsonl").read_text().splitlines()
    return [tuple(json.loads(line).values()) for line in lines]


@pytest.mark.parametrize("by_epoch", [False, True])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_run_goes_on_where_it_was(tmp_path, by_epoch, number):
    hooks = [{"type": "BatchesHook"}, {"type": "SignalOnceHook", "iteration": 5, "number": number}]
    runs = {}
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
        cfg = downstream_config(tmp_path / name, by_epoch=by_epoch, custom_hooks=hooks[:1])
        if name == "stopped":
            before = signal.getsignal(number)
            cfg.custom_hooks = hooks
            status = train(cfg, tmp_path)
            assert status == (130 if number == signal.SIGINT else 0)
            assert signal.getsignal(number) is before
            assert (tmp_path / name / "last_checkpoint").read_text().endswith("iter_5.pth")
            assert state_of(tmp_path / name / "iter_5.pth")["meta"]["iter"] == 5
            train(cfg, tmp_path, "--resume")
        else:
            train(cfg, tmp_path)
        last = tmp_path / name / ("epoch_4.pth" if by_epoch else "iter_8.pth")
        runs[name] = batches_of(tmp_path / name), state_of(last)
    words = "Ctrl-C" if number == signal.SIGINT else "a signal"
    assert f"stopped by {words} after iteration 5; go on with --resume" in log_of(cfg.work_dir)
    assert runs["stopped"][0] == runs["whole"][0]
    assert len(runs["whole"][0]) == (32 if by_epoch else 8)
    for key, tensor in runs["whole"][1]["state_dict"].items():
        assert torch.equal(tensor, runs["stopped"][1]["state_dict"][key]), key
    # the checkpoint in between is gone once there is a regular one
    assert not (tmp_path / "stopped" / "iter_5.pth").exists()
