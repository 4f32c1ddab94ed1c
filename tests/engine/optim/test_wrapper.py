"""One step of the wrapper against hand-made clipping and torch's plain AdamW."""

import copy

import pytest
import torch

from dinov3_mm.engine.optim import PretrainOptimWrapper
from tests.engine.optim.models import ToyModel
from tests.engine.optim.test_constructor import build


def batches(count):
    return [torch.randn(4, 8, generator=torch.Generator().manual_seed(i)) for i in range(count)]


def student_state(model):
    return {name: p.detach().clone() for name, p in model.student.named_parameters()}


def assert_same(actual, expected):
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=0, msg=name)


def test_clips_each_sub_module_by_its_own_norm():
    model = ToyModel()
    reference = copy.deepcopy(model)
    clip = 0.05
    wrapper = build(model, optimizer={"type": "SGD", "lr": 1.0}, clip_grad=clip)
    x = batches(1)[0]
    before = student_state(reference)
    reference(x).backward()
    wrapper.update_params(model(x))
    after = student_state(model)
    for part in ("backbone", "dino_head", "ibot_head"):
        grads = dict(reference.student[part].named_parameters())
        norm = sum((p.grad**2).sum() for p in grads.values()).sqrt()
        factor = min(1.0, clip / (norm.item() + 1e-6))
        assert factor < 1
        torch.testing.assert_close(wrapper.step_metrics[f"grad_norm/{part}"], norm)
        for name, p in grads.items():
            expected = before[f"{part}.{name}"] - factor * p.grad
            torch.testing.assert_close(after[f"{part}.{name}"], expected, rtol=1e-5, atol=1e-7)


def test_small_gradients_are_not_scaled_up():
    model = ToyModel()
    reference = copy.deepcopy(model)
    clipped = build(model, optimizer={"type": "SGD", "lr": 0.1}, clip_grad=1e6)
    free = build(reference, optimizer={"type": "SGD", "lr": 0.1}, clip_grad=None)
    for x in batches(3):
        clipped.update_params(model(x))
        free.update_params(reference(x))
    assert_same(student_state(model), student_state(reference))
    assert clipped.step_metrics.keys() == free.step_metrics.keys()


def test_steps_like_plain_adamw():
    model = ToyModel()
    reference = copy.deepcopy(model)
    wrapper = build(model, optimizer={"type": "AdamW", "lr": 1e-2, "weight_decay": 0.1})
    plain = torch.optim.AdamW(reference.student.parameters(), lr=1e-2, weight_decay=0.1)
    for x in batches(5):
        wrapper.update_params(model(x))
        plain.zero_grad()
        reference(x).backward()
        plain.step()
    for name, value in student_state(reference).items():
        torch.testing.assert_close(student_state(model)[name], value, rtol=1e-5, atol=1e-6)
    assert not wrapper.step_skipped
    assert all(p.grad is None for p in model.student.parameters())


def test_accumulated_micro_batches_equal_their_mean():
    model = ToyModel()
    reference = copy.deepcopy(model)
    split = build(model, optimizer={"type": "SGD", "lr": 0.1}, accumulative_counts=2)
    whole = build(reference, optimizer={"type": "SGD", "lr": 0.1})
    first, second = batches(2)
    split.update_params(model(first))
    assert split.step_skipped is None
    split.update_params(model(second))
    whole.update_params((reference(first) + reference(second)) / 2)
    for name, value in student_state(reference).items():
        torch.testing.assert_close(student_state(model)[name], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_step_leaves_parameters_and_optimizer_as_they_were(optimizer, bad):
    model = ToyModel()
    reference = copy.deepcopy(model)
    cfg = {"type": optimizer, "lr": 0.01, "weight_decay": 0.1}
    wrapper, untouched = build(model, optimizer=cfg), build(reference, optimizer=cfg)
    first, second, third = batches(3)
    poisoned = second.clone()
    poisoned[0, 0] = bad
    skipped = []
    for x in (first, poisoned, third):
        wrapper.update_params(model(x))
        skipped.append(wrapper.step_skipped.item())
    for x in (first, third):
        untouched.update_params(reference(x))
    assert skipped == [False, True, False]
    assert_same(student_state(model), student_state(reference))
    assert wrapper.step_metrics["step_skipped"] == 0


def test_non_finite_loss_with_finite_gradients_is_skipped():
    model = ToyModel()
    before = student_state(model)
    wrapper = build(model, optimizer={"type": "SGD", "lr": 0.1})
    # A detached infinite term: its gradient is zero, so the norms alone would not tell.
    wrapper.update_params(model(batches(1)[0]) + torch.tensor(float("inf")))
    assert wrapper.step_skipped
    assert_same(student_state(model), before)


def test_bad_micro_batch_spoils_the_whole_step():
    model = ToyModel()
    before = student_state(model)
    wrapper = build(model, optimizer={"type": "SGD", "lr": 0.1}, accumulative_counts=2)
    first, second = batches(2)
    wrapper.update_params(model(first) * float("nan"))
    wrapper.update_params(model(second))
    assert wrapper.step_skipped
    assert_same(student_state(model), before)


def test_finite_norms_despite_one_exploding_sub_module():
    model = ToyModel()
    with torch.no_grad():
        model.student["ibot_head"].last_layer.weight.fill_(1e30)
    before = student_state(model)
    wrapper = build(model, optimizer={"type": "SGD", "lr": 0.1}, clip_grad=1.0)
    wrapper.update_params(model(batches(1)[0]))
    assert wrapper.step_skipped
    assert_same(student_state(model), before)


@pytest.mark.parametrize(
    ("clip", "error"), [(0, ValueError), (-1.0, ValueError), ({"max_norm": 3}, TypeError)]
)
def test_bad_clip_is_refused(clip, error):
    optimizer = torch.optim.AdamW(ToyModel().student.parameters(), fused=True)
    with pytest.raises(error, match="clip_grad"):
        PretrainOptimWrapper(optimizer, clip_grad=clip)


def test_state_is_restored_by_name_under_other_groups_and_settings():
    model = ToyModel()
    wrapper = build(model, {"layerwise_decay": 0.5}, optimizer={"type": "AdamW", "lr": 1e-2})
    for x in batches(3):
        wrapper.update_params(model(x))
    saved = copy.deepcopy(wrapper.state_dict())
    other = copy.deepcopy(model)
    cfg = {"type": "AdamW", "lr": 1e-2, "betas": (0.8, 0.9)}
    regrouped = build(other, {"layerwise_decay": 1.0}, optimizer=cfg)
    assert len(regrouped.optimizer.param_groups) < len(wrapper.optimizer.param_groups)
    regrouped.load_state_dict(saved)
    assert all(group["betas"] == (0.8, 0.9) for group in regrouped.optimizer.param_groups)
    others = dict(other.student.named_parameters())
    for name, param in model.student.named_parameters():
        for key, value in wrapper.optimizer.state[param].items():
            torch.testing.assert_close(
                regrouped.optimizer.state[others[name]][key], value, rtol=0, atol=0
            )


def test_resumed_steps_equal_uninterrupted_ones():
    model = ToyModel()
    wrapper = build(model)
    first, *rest = batches(4)
    wrapper.update_params(model(first))
    other = copy.deepcopy(model)
    resumed = build(other)
    resumed.load_state_dict(copy.deepcopy(wrapper.state_dict()))
    for x in rest:
        wrapper.update_params(model(x))
        resumed.update_params(other(x))
    assert_same(student_state(other), student_state(model))


def test_state_of_other_parameters_is_refused():
    model = ToyModel()
    wrapper = build(model)
    model.student["ibot_head"].requires_grad_(False)
    with pytest.raises(ValueError, match=r"missing \[\], unexpected \['ibot_head\."):
        build(model).load_state_dict(wrapper.state_dict())
    plain = torch.optim.AdamW(model.student.parameters())
    with pytest.raises(ValueError, match="no param_names"):
        wrapper.load_state_dict(plain.state_dict())
