"""The algorithm as MMEngine drives it: training step, precision, weights, refusals."""

import copy

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

import dinov3_mm.engine.optim  # noqa: F401  (registers the optimizer wrapper)
from dinov3_mm.checkpoints import export_backbone
from dinov3_mm.engine.training_state import write_training_state
from dinov3_mm.models.backbones import DINOv3ViT
from dinov3_mm.models.pretraining import DINOv3, DINOv3Head
from tests.golden import assert_parity

from .toy import BACKBONE, HEAD, build_toy, prepared, toy_batch

LOGS = {
    "loss",
    "dino_local_loss",
    "dino_global_loss",
    "koleo_loss",
    "ibot_loss",
    "dino_local_weight",
}
DIAGNOSTICS = {
    "diag/teacher_entropy",
    "diag/teacher_entropy_max",
    "diag/prototype_usage",
    "diag/feature_rank",
    "diag/cls_spread",
    "diag/patch_cls_cosine",
}


def optimizer_for(model):
    return build_optim_wrapper(
        model,
        dict(
            type="PretrainOptimWrapper",
            constructor="PretrainOptimConstructor",
            optimizer=dict(type="AdamW", lr=2e-3),
            clip_grad=3.0,
        ),
    )


def same_tensors(left: nn.Module, right: nn.Module) -> bool:
    right_state = right.state_dict()
    return all(torch.equal(value, right_state[key]) for key, value in left.state_dict().items())


def test_training_step_learns_and_reports_detached_scalars():
    model = build_toy()
    model.set_step(teacher_temp=0.005)
    wrapper = optimizer_for(model)
    batch = toy_batch()
    losses = []
    for _ in range(20):
        logs = model.train_step(batch, wrapper)
        losses.append(logs["ibot_loss"].item())
    assert logs.keys() == LOGS
    for value in logs.values():
        assert value.shape == () and value.dtype == torch.float32 and not value.requires_grad
    assert losses[-1] < 0.9 * losses[0]  # the teacher stands still: its targets can be learnt
    assert batch["global_crops"].dtype == torch.uint8


def test_teacher_starts_as_the_student_and_follows_parameters_only():
    model = build_toy()
    assert same_tensors(model.teacher, model.student)
    before = copy.deepcopy(model.teacher)
    with torch.no_grad():
        for tensor in (*model.student.parameters(), *model.student.buffers()):
            tensor.add_(1)
    model.update_teacher(0.75)
    old = dict(before.named_parameters())
    for name, param in model.teacher.named_parameters():
        assert_parity(param, old[name] + 0.25)
    buffers = dict(before.named_buffers())
    assert buffers and all(torch.equal(t, buffers[n]) for n, t in model.teacher.named_buffers())
    exact = copy.deepcopy(model.teacher)
    model.update_teacher(torch.tensor(1.0))
    assert same_tensors(model.teacher, exact)


@pytest.mark.parametrize("momentum", [0.994, 0.25])
def test_teacher_follows_in_place_by_a_momentum_on_the_device(momentum, monkeypatch):
    """Within two roundings of float64; matrices without a temporary of their size."""
    monkeypatch.setattr("dinov3_mm.models.pretraining.student._OWN_KERNEL", 1024)
    torch.manual_seed(3)
    model = build_toy()
    with torch.no_grad():
        for param in (*model.student.parameters(), *model.teacher.parameters()):
            param.normal_()
    old = [param.clone() for param in model.teacher.parameters()]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as run:
        model.update_teacher(torch.tensor(momentum))
    largest = max(
        event.nbytes()
        for event in run.profiler.kineto_results.events()
        if event.name() == "[memory]"
    )
    sizes = [4 * param.numel() for param in model.teacher.parameters()]
    assert max(sizes) >= 4 * 1024 > largest
    pairs = zip(old, model.student.parameters(), model.teacher.parameters(), strict=True)
    for before, student, teacher in pairs:
        exact = momentum * before.double() + (1 - momentum) * student.double()
        assert (teacher - exact).abs().max() <= 2**-22 * max(before.abs().max(), 1)


def test_only_the_student_trains():
    model = build_toy(gram=dict(weight=1.0), backbone=dict(drop_path_rate=0.3))
    model.train()
    assert model.student.training and not model.teacher.training
    assert not any(module.training for module in model.gram_teacher.modules())
    assert not any(p.requires_grad for p in model.teacher.parameters())
    model.copy_teacher_to_gram()
    model.set_step(teacher_temp=0.05)
    model(prepared(model, toy_batch(gram=True)), mode="loss")["loss"].backward()
    assert all(p.grad is not None for p in model.student.parameters())
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {"student"}


def test_diagnostics_on_request():
    model = build_toy()
    model.set_step(teacher_temp=0.05)
    model.collect_diagnostics = True
    logs = model(prepared(model, toy_batch()), mode="loss")
    assert logs.keys() == LOGS | DIAGNOSTICS
    assert logs["diag/teacher_entropy"] <= logs["diag/teacher_entropy_max"]
    assert 1 <= logs["diag/feature_rank"] <= 6


def test_bfloat16_compute_keeps_float32_weights_gradients_and_losses():
    results = {}
    for dtype in ("fp32", "bf16"):
        torch.manual_seed(1)
        model = build_toy(compute_dtype=dtype, gram=dict(teacher="ema"))
        with torch.no_grad():
            for head in (model.student.dino_head, model.student.ibot_head):
                head.last_layer.weight.mul_(5)
        model.set_step(teacher_temp=0.1)
        losses = model(prepared(model, toy_batch()), mode="loss")
        losses["loss"].backward()
        assert all(value.dtype == torch.float32 for value in losses.values())
        assert all(p.grad.dtype == torch.float32 for p in model.student.parameters())
        results[dtype] = losses
    for name, value in results["fp32"].items():
        assert results["bf16"][name].item() == pytest.approx(value.item(), rel=0.02, abs=1e-4)
    assert results["bf16"]["loss"].item() != results["fp32"]["loss"].item()


def test_batch_without_masked_patches():
    model = build_toy()
    model.set_step(teacher_temp=0.05)
    losses = model(prepared(model, toy_batch(masked=0)), mode="loss")
    losses["loss"].backward()
    assert losses["ibot_loss"].item() == 0
    assert all(p.grad.isfinite().all() for p in model.student.parameters())


def test_one_image_per_rank_needs_koleo_off():
    model = build_toy(koleo=dict(weight=0))
    model.set_step(teacher_temp=0.05)
    assert model(prepared(model, toy_batch(1, masked=1)), mode="loss")["koleo_loss"].item() == 0
    model = build_toy()
    model.set_step(teacher_temp=0.05)
    with pytest.raises(ValueError, match="KoLeo weight to 0"):
        model(prepared(model, toy_batch(1, masked=1)), mode="loss")


@pytest.mark.parametrize("tokens", ["all", "masked", "unmasked"])
def test_step_reads_nothing_from_the_device(tokens):
    """Fake tensors have no values: reading one, or a shape that depends on one, raises."""
    gram = dict(tokens_used=tokens, img_level=False, compute_stats=True)
    model = build_toy(gram=gram, backbone=dict(rope_rescale_coords=2.0))
    model.copy_teacher_to_gram()
    model.set_step(teacher_temp=0.05)
    inputs = prepared(model, toy_batch(gram=True))
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake = {key: mode.from_tensor(value) for key, value in inputs.items()}
    with mode:
        model(fake, mode="loss")["loss"].backward()
        model.update_teacher(mode.from_tensor(torch.tensor(0.9)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_step_on_cuda_never_waits(dtype):
    model = build_toy(compute_dtype=dtype, gram=dict(compute_stats=True)).cuda()
    model.copy_teacher_to_gram()
    model.set_step(teacher_temp=0.05)
    inputs = prepared(model, toy_batch(gram=True))
    model(inputs, mode="loss")["loss"].backward()  # lazy initialisations may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = model(inputs, mode="loss")
        losses["loss"].backward()
        model.update_teacher(torch.full((), 0.9, device="cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    reference = copy.deepcopy(model).cpu()
    expected = reference({key: value.cpu() for key, value in inputs.items()}, mode="loss")
    for name in LOGS:
        assert losses[name].item() == pytest.approx(expected[name].item(), rel=0.05)


def test_features_are_the_teachers():
    model = build_toy()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for param in model.student.parameters():
            param.add_(1)
        expected = model.teacher_backbone(images)[0]
        assert torch.equal(model(images, mode="tensor")[0], expected)
        assert torch.equal(model.extract_feat(images)[0], expected)
        batch = prepared(model, toy_batch())
        assert model(batch, mode="tensor")[0].shape == (6, 32, 4, 4)
    with pytest.raises(ValueError, match="mode must be 'loss' or 'tensor', got 'predict'"):
        model(images, mode="predict")


def test_initial_weights_from_the_backbones_init_cfg(tmp_path):
    torch.manual_seed(3)
    source = build_toy().student.backbone
    path = tmp_path / "backbone.safetensors"
    statistics = dict(mean=[0.5] * 3, std=[0.2] * 3)
    export_backbone(source, path, dict(statistics=statistics, provenance={}))
    torch.manual_seed(4)
    init = dict(type="DINOv3Pretrained", checkpoint=str(path))
    model = build_toy(backbone=dict(init_cfg=init))
    assert_same_weights(model.student.backbone, source)
    assert same_tensors(model.teacher, model.student)


def assert_same_weights(backbone: nn.Module, source: nn.Module) -> None:
    expected = dict(source.named_parameters())
    for name, param in backbone.named_parameters():
        if not name.startswith("local_cls_norm"):  # training only: an export may leave it out
            assert torch.equal(param, expected[name]), name


def test_start_from_a_training_state(tmp_path):
    """The next stage's student and teacher are the former teacher, heads included."""
    former = build_toy()
    with torch.no_grad():
        for param in former.teacher.parameters():
            param.add_(0.5)
    path = tmp_path / "iter_00000001.pth"
    state = dict(meta={}, state_dict=former.state_dict(), optimizer={})
    write_training_state(path, state)
    model = build_toy(start_from=path)
    assert same_tensors(model.student, former.teacher)
    assert same_tensors(model.teacher, former.teacher)
    other = {**HEAD, "num_prototypes": 25}
    with pytest.raises(ValueError, match=r"the ibot_head of .* does not fit"):
        DINOv3(BACKBONE, HEAD, other, start_from=path).init_weights()


def test_state_dict_has_the_names_of_training_checkpoints():
    keys = build_toy(gram=dict()).state_dict().keys()
    backbone = set(DINOv3ViT(**{k: v for k, v in BACKBONE.items() if k != "type"}).state_dict())
    head = set(DINOv3Head(4, 4).state_dict())
    assert head == {f"mlp.{i}.{p}" for i in (0, 2, 4) for p in ("weight", "bias")} | {
        "last_layer.weight"
    }
    expected = {f"gram_teacher.backbone.{key}" for key in backbone} | {"gram_teacher.ready"}
    for branch in ("student", "teacher"):
        expected |= {f"{branch}.backbone.{key}" for key in backbone}
        expected |= {
            f"{branch}.{name}.{key}" for name in ("dino_head", "ibot_head") for key in head
        }
    assert keys == expected


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(compute_dtype="fp16"), "float16 is not supported"),
        (dict(student_temp=0.0), "student_temp must be positive"),
        (dict(dino=dict(weigth=1)), "dino has no setting 'weigth'; did you mean 'weight'"),
        (dict(ibot=1.0), "ibot must be a dict"),
        (dict(koleo=dict(weight=-1)), "koleo: weight must not be negative"),
        (dict(koleo=dict(topk=2)), "need distributed=True"),
        (dict(koleo=dict(topk=0)), "topk must be at least 1"),
        (dict(gram=dict(teacher="live")), r"teacher must be one of \('frozen', 'ema'\)"),
        (dict(gram=dict(tokens_used="masked")), "needs img_level=False"),
        (dict(gram=dict(remove_neg=True, remove_only_teacher_neg=True)), "not both"),
        (dict(gram=dict(resize_method="nearest")), "resize_method must be one of"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises((ValueError, TypeError), match=message):
        build_toy(**settings)


def test_heads_must_fit_and_batch_norm_is_refused():
    with pytest.raises(ValueError, match="in_dims is 64, but the backbone's features have 32"):
        DINOv3(BACKBONE, {**HEAD, "in_dims": 64}, HEAD)
    DINOv3(BACKBONE, {**HEAD, "in_dims": 32}, HEAD)
    with pytest.raises(TypeError, match="ibot_head must be a config dict"):
        DINOv3(BACKBONE, HEAD, DINOv3Head(32, 24))
    with pytest.raises(ValueError, match="DINOv3Head: num_layers must be at least 1"):
        DINOv3(BACKBONE, {**HEAD, "num_layers": 0}, HEAD)
    backbone = DINOv3ViT(**{k: v for k, v in BACKBONE.items() if k != "type"})
    backbone.extra = nn.BatchNorm2d(3)
    with pytest.raises(ValueError, match=r"backbone\.extra is a BatchNorm2d"):
        DINOv3(backbone, HEAD, HEAD)


def test_training_without_its_hooks():
    model = build_toy()
    inputs = prepared(model, toy_batch())
    with pytest.raises(RuntimeError, match="TeacherEMAHook"):
        model(inputs, mode="loss")
    with pytest.raises(ValueError, match=r"no value 'teacher_tmp'; did you mean 'teacher_temp'"):
        model.set_step(teacher_tmp=0.1)


def test_batches_that_do_not_fit():
    model = build_toy()
    model.set_step(teacher_temp=0.05)
    inputs = prepared(model, toy_batch())
    for key, value in (
        ("local_crops", inputs["local_crops"][:5]),
        ("local_crops", inputs["local_crops"][:0]),
        ("global_crops", inputs["global_crops"][:5]),
        ("masks", inputs["masks"][:4]),
    ):
        with pytest.raises(ValueError, match="2B global crops and masks"):
            model({**inputs, key: value}, mode="loss")
