"""A frozen sub-module: untouched to the bit, fresh at the thaw, in one process and in two."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from mmengine.model import MMDistributedDataParallel

from dinov3_mm.engine.training_state import load_sharded_state, save_sharded_state
from tests.engine.optim.models import ToyModel
from tests.engine.optim.test_constructor import build, by_name

FROZEN, STEPS = 3, 6
OPTIONS = dict(clip_grad=1.0, optimizer={"type": "AdamW", "lr": 1e-2, "weight_decay": 0.1})


def batch(step: int) -> torch.Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(step))


def train(model, rows: slice) -> tuple[list[dict], object]:
    """States after each step of a run whose backbone is frozen at first."""
    wrapper = build(model, **OPTIONS)
    student = getattr(model, "module", model).student
    states = []
    for step in range(STEPS):
        wrapper.frozen = frozenset(("backbone",)) if step < FROZEN else frozenset()
        wrapper.update_params(model(batch(step)[rows]))
        states.append({name: tensor.clone() for name, tensor in student.state_dict().items()})
    return states, wrapper


def backbone_of(state: dict) -> dict:
    return {name: tensor for name, tensor in state.items() if name.startswith("backbone.")}


def test_frozen_parameters_keep_every_bit_while_heads_learn():
    torch.manual_seed(0)
    model = ToyModel()
    start = copy.deepcopy(model.student.state_dict())
    states, _ = train(model, slice(None))
    for state in states[:FROZEN]:
        assert all(torch.equal(t, start[name]) for name, t in backbone_of(state).items())
        assert not torch.equal(state["dino_head.mlp.weight"], start["dino_head.mlp.weight"])
    moved = [name for name, t in backbone_of(states[-1]).items() if not torch.equal(t, start[name])]
    assert moved == list(backbone_of(start))


def test_moments_of_the_thaw_are_those_of_a_run_that_begins_there():
    torch.manual_seed(0)
    model = ToyModel()
    states, wrapper = train(model, slice(None))
    fresh = ToyModel()
    fresh.student.load_state_dict(states[FROZEN - 1])
    other = build(fresh, **OPTIONS)
    # the heads of the first run have history, so only the first thawed step is comparable
    other.update_params(fresh(batch(FROZEN)))
    for name, tensor in backbone_of(states[FROZEN]).items():
        assert torch.equal(tensor, fresh.student.state_dict()[name]), name
    for name, group in by_name(wrapper).items():
        param = group["params"][group["param_names"].index(name)]
        expected = STEPS - FROZEN if name.startswith("backbone.") else STEPS
        assert wrapper.optimizer.state[param]["step"].item() == expected


def test_the_gradient_norm_is_reported_and_a_bad_gradient_still_skips():
    model = ToyModel()
    wrapper = build(model, **OPTIONS)
    wrapper.frozen = frozenset(("backbone",))
    before = copy.deepcopy(model.student.state_dict())
    wrapper.update_params(model(batch(0)) * float("nan"))
    assert wrapper.step_skipped
    assert all(torch.equal(t, before[name]) for name, t in model.student.state_dict().items())
    wrapper.update_params(model(batch(1)))
    assert wrapper.step_metrics["grad_norm/backbone"] > 0 and not wrapper.step_skipped


def test_a_state_saved_in_the_freeze_is_resumed():
    torch.manual_seed(0)
    model = ToyModel()
    wrapper = build(model, **OPTIONS)
    wrapper.frozen = frozenset(("backbone",))
    wrapper.update_params(model(batch(0)))
    saved = copy.deepcopy(wrapper.state_dict()), copy.deepcopy(model.state_dict())
    results = []
    for resume in (False, True):
        if resume:
            model = ToyModel()
            wrapper = build(model, **OPTIONS)
            model.load_state_dict(saved[1])
            wrapper.load_state_dict(saved[0])
        wrapper.frozen = frozenset()
        wrapper.update_params(model(batch(1)))
        results.append(copy.deepcopy(model.state_dict()))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_shards_saved_in_the_freeze_are_resumed(tmp_path):
    model = ToyModel()
    wrapper = build(model, **OPTIONS)
    wrapper.frozen = frozenset(("backbone",))
    wrapper.update_params(model(batch(0)))
    save_sharded_state(tmp_path / "state", model, wrapper.optimizer, {"meta": {}})
    resumed = ToyModel()
    other = build(resumed, **OPTIONS)
    load_sharded_state(tmp_path / "state", resumed, other.optimizer)
    for each, network in ((wrapper, model), (other, resumed)):
        each.frozen = frozenset()
        each.update_params(network(batch(1)))
    expected = model.state_dict()
    assert all(torch.equal(t, expected[name]) for name, t in resumed.state_dict().items())
    # a single parameter without moments is no freeze
    lost = wrapper.optimizer.param_groups[0]["params"][0]
    del wrapper.optimizer.state[lost]
    save_sharded_state(tmp_path / "damaged", model, wrapper.optimizer, {"meta": {}})
    with pytest.raises(ValueError, match="1 missing in the checkpoint"):
        load_sharded_state(tmp_path / "damaged", ToyModel(), build(ToyModel(), **OPTIONS).optimizer)


def train_rank(rank: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    torch.manual_seed(0)
    model = MMDistributedDataParallel(ToyModel(), gradient_as_bucket_view=True)
    states, _ = train(model, slice(2 * rank, 2 * rank + 2))
    torch.save(states, f"{out}/rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_ranks_freeze_and_thaw_as_one_process(tmp_path):
    mp.spawn(train_rank, args=(str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    torch.manual_seed(0)
    start = copy.deepcopy(ToyModel().student.state_dict())
    torch.manual_seed(0)
    expected, _ = train(ToyModel(), slice(None))
    for step in range(STEPS):
        for name, tensor in ranks[0][step].items():
            assert torch.equal(tensor, ranks[1][step][name])
            torch.testing.assert_close(tensor, expected[step][name], rtol=1e-5, atol=1e-5)
        if step < FROZEN:
            frozen = backbone_of(ranks[0][step])
            assert all(torch.equal(t, start[name]) for name, t in frozen.items())


def test_head_multiplier_reaches_the_heads_only():
    groups = by_name(build(ToyModel(), {"head_lr_mult": 10.0, "layerwise_decay": 0.5}))
    assert groups["dino_head.mlp.weight"]["lr_multiplier"] == 10
    assert groups["ibot_head.last_layer.weight"]["lr_multiplier"] == 10
    assert groups["backbone.norm.weight"]["lr_multiplier"] == 1
    assert groups["backbone.blocks.1.mlp.weight"]["lr_multiplier"] == pytest.approx(0.5)
