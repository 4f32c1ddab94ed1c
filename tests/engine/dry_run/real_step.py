"""The same step on real tensors in this process, with torch's own account of its memory."""

import bisect
import gc
import math
from collections import Counter

from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

from dinov3_mm.engine.dry_run.batches import crop_sets, make_batch
from dinov3_mm.engine.dry_run.config import settle_config
from dinov3_mm.engine.dry_run.model import students_of

MEASURED = "measured step"
OPERATOR = "one operator"


class _MarkOperators(TorchDispatchMode):
    """Shows the profiler where each operator that autograd calls begins and ends."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        with record_function(OPERATOR):
            return func(*args, **(kwargs or {}))


def measured_peak(cfg: Config) -> int:
    """Bytes of tensors that torch's CPU allocator has given out at the fullest moment of a step.

    The profiler records every allocation. Left out is what an operator allocates and frees within
    itself: scratch memory, whose size is a matter of the processor (oneDNN packs the operands of a
    bf16 product for AMX, and not for AVX2). Model, optimizer and batch are built within the
    recording, so the sum starts at zero.
    """
    settle_config(cfg, 1, num_images=100_000)
    (crops,) = crop_sets(cfg, 1)
    gc.collect()
    settings = dict(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True)
    with profile(**settings) as recorded:
        model = MODELS.build(cfg.model)
        model.init_weights()
        model.train()
        if hasattr(model, "distillation_teacher"):
            model.distillation_teacher.is_ready = True
        wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
        batch = make_batch(cfg, crops, channels=3)
        for name in ("first step", MEASURED):
            with record_function(name), _MarkOperators():
                for student in students_of(model).values():
                    student.set_step(teacher_temp=0.07)
                model.train_step(batch, wrapper)
                for student in students_of(model).values():
                    student.update_teacher(0.99)
    return _peak(recorded)


def _peak(recorded: profile) -> int:
    events = recorded.profiler.kineto_results.events()
    step = next(event for event in events if event.name() == MEASURED)
    operators = sorted(
        (event.start_ns(), event.end_ns()) for event in events if event.name() == OPERATOR
    )
    changes = Counter()
    for event in events:
        if event.name() == "[memory]":
            time = event.start_ns()
            _, end = operators[bisect.bisect_right(operators, (time, math.inf)) - 1]
            changes[max(time, end) if time >= operators[0][0] else time] += event.nbytes()
    total = peak = 0
    for time in sorted(changes):
        total += changes[time]
        if step.start_ns() <= time <= step.end_ns():
            peak = max(peak, total)
    return peak
