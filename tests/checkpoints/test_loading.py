"""Every tensor arrives, or the backbone stays as it was and the error says why."""

import json

import pytest
import torch
from safetensors.torch import save_file

from dinov3_mm.checkpoints import build_backbone, load_backbone_weights, load_weights, to_hf
from tests.checkpoints.test_opening import RunsCode
from tests.checkpoints.toys import assert_same_tensors, tensors_of, toy_backbone, toy_images
from tests.golden import assert_parity, load_golden


@pytest.fixture
def state():
    return tensors_of(toy_backbone(1))


@pytest.fixture
def loads(monkeypatch):
    """Lines that were logged."""
    lines = []
    monkeypatch.setattr(
        "dinov3_mm.checkpoints.install.print_log", lambda line, logger: lines.append(line)
    )
    return lines


def load_into(tmp_path, state, backbone=None, **options):
    """Load a state dict through a torch file; return the backbone and the report's line."""
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    backbone = backbone or toy_backbone(2)
    return backbone, str(load_backbone_weights(backbone, path, **options))


def assert_refused(tmp_path, state, message, backbone=None, **options):
    backbone = backbone or toy_backbone(2)
    before = tensors_of(backbone)
    with pytest.raises(ValueError, match=message):
        load_into(tmp_path, state, backbone, **options)
    assert_same_tensors(backbone.state_dict(), before)


def test_the_report_counts_and_names_the_source(tmp_path, state, loads):
    backbone, line = load_into(tmp_path, state)
    assert loads == [line]
    assert_same_tensors(backbone.state_dict(), state)
    assert line == (
        f"loaded {len(state)}/{len(state)} backbone tensors from official .pth "
        f"{tmp_path / 'weights.pth'}, statistics unknown, heads: none; periods as stored"
    )


def test_features_follow_the_loaded_weights_after_a_forward(tmp_path):
    source = toy_backbone(1, rope_base=50.0)
    backbone = toy_backbone(2)
    images = toy_images()
    with torch.no_grad():
        backbone(images)
        load_into(tmp_path, source.state_dict(), backbone)
        assert torch.equal(backbone(images)[0], source(images)[0])


@pytest.mark.parametrize(
    "name", ["cls_token", "rope_embed.periods", "blocks.1.mlp.fc2.bias", "norm.bias", "mask_token"]
)
def test_a_missing_tensor_is_named(name, tmp_path, state):
    del state[name]
    assert_refused(tmp_path, state, rf"missing \(1\): {name}")


def test_an_extra_tensor_is_named(tmp_path, state):
    state["pos_embed"] = torch.zeros(1, 17, 32)
    assert_refused(tmp_path, state, r"unexpected \(1\): pos_embed")


def test_a_wrong_shape_is_named(tmp_path, state):
    state["blocks.0.attn.proj.weight"] = torch.zeros(32, 16)
    message = r"wrong shape \(1\): blocks\.0\.attn\.proj\.weight \(32, 16\) instead of \(32, 32\)"
    assert_refused(tmp_path, state, message)


def test_the_architectures_are_compared(tmp_path):
    other = toy_backbone(1, num_registers=4, ffn_layer="swiglu", patch_size=16)
    message = (
        r"(?s)missing \(.*unexpected \(.*wrong shape \(.*architecture: patch_size 16 in the file "
        r"but 8 asked for, num_registers 4 .* 2 asked for, ffn swiglu .* mlp asked for"
    )
    assert_refused(tmp_path, other.state_dict(), message)
    message = "architecture: mask_k_bias True in the file but False asked for"
    assert_refused(tmp_path, tensors_of(toy_backbone(1)), message, toy_backbone(mask_k_bias=False))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name", ["blocks.0.attn.qkv.bias_mask", "rope_embed.periods", "mask_token", "norm.weight"]
)
def test_values_that_are_not_finite_are_refused(name, value, tmp_path, state):
    state[name].view(-1)[-1] = value
    assert_refused(tmp_path, state, f"NaN or infinite values in 1 of .*{name}")


def test_a_file_that_would_run_code_leaves_the_backbone_alone(tmp_path, state):
    witness = tmp_path / "executed"
    state["extra"] = RunsCode(witness)
    assert_refused(tmp_path, state, "could run code")
    assert not witness.exists()


def test_a_truncated_file_leaves_the_backbone_alone(tmp_path, state):
    path = tmp_path / "weights.safetensors"
    save_file(state, path)
    path.write_bytes(path.read_bytes()[:-1])
    backbone = toy_backbone(2)
    before = tensors_of(backbone)
    with pytest.raises(ValueError, match="damaged"):
        load_backbone_weights(backbone, path)
    assert_same_tensors(backbone.state_dict(), before)


def test_tampered_hugging_face_files_are_refused(tmp_path, state):
    config = json.dumps({"num_attention_heads": 2, "rope_theta": 100.0})
    (tmp_path / "config.json").write_text(config)
    good = to_hf(state)

    def assert_hf_refused(tensors, message):
        save_file(tensors, tmp_path / "model.safetensors")
        backbone = toy_backbone(2)
        before = tensors_of(backbone)
        with pytest.raises(ValueError, match=message):
            load_backbone_weights(backbone, tmp_path)
        assert_same_tensors(backbone.state_dict(), before)

    name = "layer.1.attention.k_proj.weight"
    assert_hf_refused(
        {key: tensor for key, tensor in good.items() if key != name},
        r"(?s)missing \(.*blocks\.1\.attn\.qkv\.weight.*unexpected \(.*layer\.1\.attention\.q_proj",
    )
    assert_hf_refused({**good, name: torch.zeros(16, 32)}, "different shapes")
    assert_hf_refused({**good, "pooler.weight": torch.zeros(1)}, r"unexpected \(1\): pooler")
    without_mask = {k: t for k, t in good.items() if k != "embeddings.mask_token"}
    assert_hf_refused(without_mask, r"missing \(1\): mask_token")


def test_local_cls_norm_is_dropped_or_made_up(tmp_path, state):
    satellite = tensors_of(toy_backbone(3, untie_global_and_local_cls_norm=True))
    backbone, line = load_into(tmp_path, satellite)
    assert "local_cls_norm dropped" in line and f"loaded {len(state)}/{len(state)}" in line
    assert backbone.local_cls_norm is None

    backbone, line = load_into(tmp_path, state, toy_backbone(untie_global_and_local_cls_norm=True))
    assert "local_cls_norm made up (copy of norm)" in line
    assert torch.equal(backbone.local_cls_norm.weight, state["norm.weight"])
    assert torch.equal(backbone.local_cls_norm.bias, state["norm.bias"])


def test_reset_bias_mask_lets_the_biases_train_without_changing_the_features(tmp_path):
    _, tensors = load_golden("backbones_vit_swiglu8_officiallike")
    official = {k.removeprefix("sd."): t for k, t in tensors.items() if k.startswith("sd.")}
    # This file is like the released ones, but its masked biases are not zero.
    assert official["blocks.0.attn.qkv.bias"].any()
    assert not official["blocks.0.attn.qkv.bias_mask"].any()
    torch.save(official, tmp_path / "weights.pth")
    images = tensors["in.x"]
    kept = build_backbone(tmp_path / "weights.pth")
    reset = build_backbone(tmp_path / "weights.pth", reset_bias_mask=True)
    with torch.no_grad():
        assert_parity(reset.forward_tokens(images).prenorm, kept.forward_tokens(images).prenorm)
    for backbone, trains in ((kept, False), (reset, True)):
        backbone.forward_tokens(images).cls.square().sum().backward()
        gradient = backbone.blocks[0].attn.qkv.bias.grad.view(3, -1)
        assert [bool(part.any()) for part in gradient] == [trains, False, trains]


def test_nothing_to_reset_is_an_error(tmp_path):
    state = tensors_of(toy_backbone(1, qkv_bias=False))
    message = "no qkv bias mask to reset"
    assert_refused(tmp_path, state, message, toy_backbone(qkv_bias=False), reset_bias_mask=True)


def test_exact_periods_replace_rounded_ones_only(tmp_path, state):
    exact = state["rope_embed.periods"].clone()
    state["rope_embed.periods"] = exact.bfloat16()
    backbone, line = load_into(tmp_path, state)
    assert torch.equal(backbone.rope_embed.periods, exact.bfloat16().float())
    backbone, line = load_into(tmp_path, state, periods="exact")
    assert torch.equal(backbone.rope_embed.periods, exact)
    assert "periods recomputed (exact)" in line
    state["rope_embed.periods"] = exact * 1.5
    assert_refused(tmp_path, state, "periods='exact' does not fit", periods="exact")
    assert_refused(tmp_path, state, "expected one of", periods="bf16")


def test_precision_lost_to_the_backbone_is_reported(tmp_path, state):
    backbone, line = load_into(tmp_path, state, toy_backbone(2, rope_dtype="bf16"))
    assert line.endswith("rounded to bfloat16: rope_embed.periods")
    assert backbone.rope_embed.periods.dtype == torch.bfloat16
    half = {name: tensor.bfloat16() for name, tensor in state.items()}
    backbone, line = load_into(tmp_path, half)
    assert "rounded" not in line
    assert backbone.norm.weight.dtype == torch.float32


def test_a_meta_backbone_is_an_error(tmp_path, state):
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="meta device"):
        load_backbone_weights(toy_backbone(2).to("meta"), tmp_path / "weights.pth")


def test_heads_of_a_teacher_export_are_returned_on_request(tmp_path, state):
    heads = {
        "dino_head.mlp.0.weight": torch.randn(8, 32),
        "dino_head.last_layer.weight": torch.randn(5, 8),
        "ibot_head.mlp.0.weight": torch.randn(8, 32),
    }
    teacher = {**{f"backbone.{name}": tensor for name, tensor in state.items()}, **heads}
    torch.save({"teacher": teacher}, tmp_path / "teacher_checkpoint.pth")
    checkpoint = load_weights(tmp_path / "teacher_checkpoint.pth", heads=True)
    assert_same_tensors(checkpoint.state_dict, state)
    assert set(checkpoint.heads) == {"dino_head", "ibot_head"}
    for name, tensor in heads.items():
        head, _, key = name.partition(".")
        assert torch.equal(checkpoint.heads[head][key], tensor)
    plain = load_weights(tmp_path / "teacher_checkpoint.pth")
    assert plain.heads == {} and "heads: dino_head, ibot_head" in str(plain.report)

    heads["ibot_head.mlp.0.weight"][0, 0] = float("nan")
    torch.save({"teacher": {**teacher, **heads}}, tmp_path / "broken.pth")
    with pytest.raises(ValueError, match="NaN"):
        load_weights(tmp_path / "broken.pth", heads=True)


def test_a_training_state_gives_its_teacher(tmp_path, state):
    student = {name: tensor + 1 for name, tensor in state.items()}
    head = torch.randn(8, 32)
    training_state = {
        "format_version": 1,
        "meta": {"iter": 7, "cfg": "..."},
        "state_dict": {
            **{f"student.backbone.{name}": tensor for name, tensor in student.items()},
            "student.dino_head.mlp.0.weight": head + 1,
            **{f"teacher.backbone.{name}": tensor for name, tensor in state.items()},
            "teacher.dino_head.mlp.0.weight": head,
            **{f"gram_teacher.backbone.{name}": tensor for name, tensor in student.items()},
            "data_preprocessor.mean": torch.zeros(3),
        },
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-3}]},
    }
    torch.save(training_state, tmp_path / "iter_00000007.pth")
    checkpoint = load_weights(tmp_path / "iter_00000007.pth", heads=True)
    assert_same_tensors(checkpoint.state_dict, state)
    assert torch.equal(checkpoint.heads["dino_head"]["mlp.0.weight"], head)
    assert "ignored: student, gram_teacher, data_preprocessor" in str(checkpoint.report)


def test_heads_that_are_not_there_are_an_error(tmp_path, state):
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="a backbone only"):
        load_weights(tmp_path / "weights.pth", heads=True)


def training_checkpoint(path, rope_dtype="bf16"):
    """A teacher checkpoint as the reference's trainer writes it, and its backbone."""
    source = toy_backbone(1, rope_dtype=rope_dtype)
    heads = {
        f"{head}.{name}": torch.ones(4, 4)
        for head in ("dino_head", "ibot_head")
        for name in ("mlp.0.weight", "last_layer.weight")
    }
    backbone = {f"backbone.{name}": tensor for name, tensor in source.state_dict().items()}
    torch.save({"teacher": {**backbone, **heads}}, path)
    return source


def test_training_checkpoints_compute_rope_as_their_trainer_did(tmp_path, loads):
    source = training_checkpoint(tmp_path / "teacher_checkpoint.pth")
    images = toy_images()
    with torch.no_grad():
        expected = source(images)[0]
    backbone = build_backbone(tmp_path / "teacher_checkpoint.pth").requires_grad_(False)
    assert torch.allclose(backbone(images)[0], expected, atol=1e-6)
    assert loads[-1].endswith(
        "; RoPE computed in bf16 as in the training of these weights (rope_dtype)"
    )
    exact = build_backbone(tmp_path / "teacher_checkpoint.pth", rope_dtype="fp32")
    assert (exact(images)[0] - expected).abs().max() > 1e-4
    assert loads[-1].endswith(
        "; RoPE computed in fp32, but in bf16 in the training of these weights, which changes "
        "features by a few 1e-3: rope_dtype='bf16' on the backbone computes it as there"
    )


def test_bf16_periods_without_heads_may_be_of_a_released_file(tmp_path, loads):
    source = training_checkpoint(tmp_path / "teacher_checkpoint.pth")
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    backbone = build_backbone(tmp_path / "weights.pth")
    assert backbone.rope_embed.dtype == torch.float32
    assert loads[-1].endswith("; RoPE computed in fp32, as in the released models (rope_dtype)")
    build_backbone(tmp_path / "weights.pth", rope_dtype="bf16")
    assert loads[-1].endswith(
        "; RoPE computed in bf16, not in fp32 as in the released models (rope_dtype)"
    )


def test_the_line_of_periods_in_fp32_says_nothing_of_precision(tmp_path, loads):
    training_checkpoint(tmp_path / "teacher_checkpoint.pth", rope_dtype="fp32")
    assert build_backbone(tmp_path / "teacher_checkpoint.pth").rope_embed.dtype == torch.float32
    assert "RoPE" not in loads[-1]
