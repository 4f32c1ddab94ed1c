"""The ledger's peak of a fake step against torch's own account of the real one."""

import pytest
import torch

from dinov3_mm.engine.dry_run import dry_run
from dinov3_mm.engine.dry_run.memory import ACTIVATIONS, MemoryLedger
from tests.engine.dry_run.real_step import measured_peak
from tests.engine.dry_run.toys import toy_config

CASES = {
    "fp32": dict(),
    "bf16": dict(model__compute_dtype="bf16"),
    "everything recomputed": dict(model__backbone__with_cp=True),
    "selective": dict(model__backbone__with_cp="selective"),
    "chunks": dict(model__prototype_chunk_size=7),
    "stochastic depth": dict(model__backbone__drop_path_rate=0.3),
    "SwiGLU": dict(model__backbone__ffn_layer="swiglu", model__backbone__ffn_ratio=6.0),
    "Gram term": dict(model__gram=dict(teacher="ema", img_level=True)),
}


@pytest.mark.parametrize("case", CASES)
def test_peak_is_that_of_the_profiler(case):
    cfg = toy_config(global_batch_size=64, **CASES[case])
    peak = dry_run(cfg, 1, on_gpu=False).steps[0].peak
    measured = measured_peak(toy_config(global_batch_size=64, **CASES[case]))
    assert 0.99 * measured <= peak.total <= 1.0005 * measured


def test_ledger_books_views_once_and_forgets_what_is_freed():
    ledger = MemoryLedger()
    ledger.phase = "forward pass"
    with ledger, ledger.watching_resizes():
        x = torch.zeros(1000)
        y = x.view(10, 100)[3:]
        z = x + 1
        assert ledger.by_kind() == {ACTIVATIONS: 8000}
        del x
        assert ledger.current == 8000
        del y, z
        assert ledger.current == 0
        storage = torch.empty(100).untyped_storage()
        storage.resize_(0)
        assert ledger.current == 0
    peak = ledger.peak()
    assert (peak.total, peak.phase) == (8000, "forward pass")


def test_ledger_learns_kinds_later():
    ledger = MemoryLedger()
    with ledger:
        kept, scratch = torch.zeros(10), torch.zeros(5)
        del scratch
        ledger.tell("state", [kept])
    assert ledger.by_kind() == {"state": 40}
    assert ledger.peak().by_kind["state"] == 40
