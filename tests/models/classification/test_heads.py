"""Linear and attention heads in mmpretrain: released vectors, closed forms, errors.

The golden files are trimmed: for the features of the tiny backbone, which other tests hold against
the release, they hold the features themselves instead of its weights and the images.
"""

import math

import pytest
import torch
from torch import nn

from tests.checkpoints.toys import redraw
from tests.golden import assert_parity, load_golden
from tests.hosts import toys
from tests.hosts.lane import require_hosts

require_hosts()

from dinov3_mm.models.classification import (  # noqa: E402
    DINOv3AttentionHead,
    DINOv3ClsPatchNeck,
    DINOv3LinearClsHead,
)

WIDTH, CLASSES = 32, 5


def features(batch: int = 3, size: tuple[int, int] = (3, 4)):
    generator = torch.Generator().manual_seed(0)
    featmap = torch.randn(batch, WIDTH, *size, generator=generator)
    return featmap, torch.randn(batch, WIDTH, generator=generator)


@pytest.mark.parametrize("layers", [1, 2, 4])
@pytest.mark.parametrize("patch_mean", [False, True])
def test_neck_gives_the_input_of_the_linear_probe(layers, patch_mean):
    _, golden = load_golden("heads_linear_probe_input")
    feats = [
        (golden[f"features.{i}.map"], golden[f"features.{i}.cls"]) for i in range(4 - layers, 4)
    ]
    (given,) = DINOv3ClsPatchNeck(patch_mean=patch_mean)(feats)
    assert_parity(given, golden[f"out.n{layers}_avg{int(patch_mean)}"])


def test_released_linear_classifier():
    _, golden = load_golden("heads_linear_classifier")
    head = DINOv3LinearClsHead(num_classes=7, in_channels=64)
    with torch.no_grad():
        head.fc.weight.copy_(golden["sd.linear_head.weight"])
        head.fc.bias.copy_(golden["sd.linear_head.bias"])
        feats = DINOv3ClsPatchNeck()([(golden["features.3.map"], golden["features.3.cls"])])
        assert_parity(head(feats), golden["out.logits"])
    assert_parity(feats[0], torch.cat((golden["out.cls"], golden["out.patch_mean"]), 1))


def test_neck_takes_the_mean_of_16_bit_patches_in_fp32():
    featmap, cls = features()
    (given,) = DINOv3ClsPatchNeck()([(featmap.bfloat16(), cls.bfloat16())])
    assert given.dtype == torch.float32
    assert_parity(given[:, WIDTH:], featmap.bfloat16().float().mean((2, 3)))


def test_neck_refuses_maps_without_cls():
    with pytest.raises(TypeError, match="out_type='featmap\\+cls'"):
        DINOv3ClsPatchNeck()([features()[0]])


@pytest.mark.parametrize("with_cls", [False, True])
def test_attention_head_is_softmax_pooling_with_residuals(with_cls):
    head = redraw(DINOv3AttentionHead(CLASSES, WIDTH, num_heads=4), 1)
    featmap, cls = features()
    tokens = featmap.flatten(2).mT
    if with_cls:
        tokens = torch.cat((tokens, cls[:, None]), 1)  # the order of a set does not matter
    pool = head.pool
    query = pool.query.expand(len(tokens), 1, WIDTH)
    normed = nn.functional.layer_norm(
        tokens, (WIDTH,), pool.token_norm.weight, pool.token_norm.bias
    )
    weights = pool.attention.in_proj_weight.chunk(3)
    biases = pool.attention.in_proj_bias.chunk(3)
    q, k, v = (
        (x @ w.T + b).unflatten(2, (4, -1)).transpose(1, 2)
        for x, w, b in zip((query, normed, normed), weights, biases)
    )
    attended = ((q @ k.mT / math.sqrt(WIDTH // 4)).softmax(-1) @ v).transpose(1, 2).flatten(2)
    query = query + pool.attention.out_proj(attended)
    query = query + pool.ffn(pool.query_norm(query))
    with torch.no_grad():
        given = head([(featmap, cls)] if with_cls else [featmap])
        assert_parity(given, head.fc(query[:, 0]))


def test_layers_before_the_last_mix_the_tokens():
    head = redraw(DINOv3AttentionHead(CLASSES, WIDTH, num_heads=4, num_layers=4), 2)
    assert len(head.pool.layers) == 3
    featmap, _ = features()
    tokens = featmap.flatten(2).mT
    with torch.no_grad():
        for layer in head.pool.layers:
            normed = layer.norm1(tokens)
            tokens = tokens + layer.self_attn(normed, normed, normed)[0]
            hidden = layer.linear1(layer.norm2(tokens))
            tokens = tokens + layer.linear2(0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2))))
        del head.pool.layers[:]
        expected = head([tokens.mT.unflatten(2, (3, 4))])
        head = redraw(DINOv3AttentionHead(CLASSES, WIDTH, num_heads=4, num_layers=4), 2)
        assert_parity(head([featmap]), expected)


def test_attention_head_starts_from_a_small_classifier():
    head = DINOv3AttentionHead(CLASSES, WIDTH * 8, num_layers=2)
    head.init_weights()
    assert head.pool.attention.num_heads == 4
    assert 0.008 < head.fc.weight.std() < 0.012
    assert head.fc.bias.eq(0).all()
    assert head.pool.ffn[0].weight.std() > 0.02


def classifier(folder, head, *, neck=None, **backbone):
    model = {
        "type": "ImageClassifier",
        "data_preprocessor": {"num_classes": CLASSES, "to_rgb": True, **toys.STATISTICS},
        "backbone": toys.backbone_config(folder, **backbone),
        "neck": neck,
        "head": {"num_classes": CLASSES, **head},
    }
    return toys.build_model("mmpretrain", model, folder)


def samples(*labels):
    from mmpretrain.structures import DataSample

    return [DataSample().set_gt_label(label) for label in labels]


HEADS = {
    "linear": dict(
        head={"type": "DINOv3LinearClsHead", "in_channels": 64},
        neck={"type": "DINOv3ClsPatchNeck"},
        out_type="featmap+cls",
    ),
    "attention": dict(
        head={"type": "DINOv3AttentionHead", "in_channels": 32, "num_heads": 2, "num_layers": 2}
    ),
}


@pytest.mark.parametrize("kind", HEADS)
def test_training_leaves_the_frozen_backbone_alone(tmp_path, kind):
    model = classifier(tmp_path, **HEADS[kind])
    outcome = toys.run(model, samples(1, 4))
    assert abs(outcome.total - math.log(CLASSES)) < 1
    toys.assert_trains(model.head)
    assert all(p.grad is None for p in model.backbone.parameters())
    assert [p.pred_score.shape for p in outcome.predictions] == [(CLASSES,), (CLASSES,)]


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_of_another_width_says_which_one_fits(tmp_path, kind):
    parts = {**HEADS[kind], "head": {**HEADS[kind]["head"], "in_channels": 48, "num_heads": 2}}
    if kind == "linear":
        parts["head"].pop("num_heads")
    model = classifier(tmp_path, **parts)
    right = HEADS[kind]["head"]["in_channels"]
    with pytest.raises(ValueError, match=rf"set model\.head\.in_channels={right}"):
        toys.run(model, samples(1, 4))


def test_heads_say_what_is_missing_before_them():
    featmap, cls = features()
    with pytest.raises(ValueError, match="put a DINOv3ClsPatchNeck before it"):
        DINOv3LinearClsHead(CLASSES, WIDTH)([(featmap, cls)])
    with pytest.raises(ValueError, match="out_type='featmap'"):
        DINOv3AttentionHead(CLASSES, WIDTH)([cls])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 5}, "5 heads do not divide a width of 32"),
        ({"num_layers": 0}, "expected 1 or more"),
        ({"num_classes": 0}, "num_classes is 0"),
    ],
)
def test_impossible_attention_heads(arguments, message):
    with pytest.raises(ValueError, match=message):
        DINOv3AttentionHead(**{"num_classes": CLASSES, "in_channels": WIDTH, **arguments})


def test_image_sides_that_are_no_multiple_of_the_patch(tmp_path):
    model = classifier(tmp_path, **HEADS["linear"]).eval()
    image = torch.randn(1, 3, 61, 45)
    with torch.no_grad():
        assert torch.equal(model(image), model(image[..., :56, :40]))
