"""The detector against the vectors of the reference release.

``heads_detr`` is a trimmed copy, see its JSON: the windows are held against one layer of one image,
and everything from the memory on against the whole. The encoder is held against torch's own layer.
"""

import pytest
import torch
from mmengine.structures import InstanceData
from torch import nn

import dinov3_mm.hosts  # noqa: F401
from tests.golden import assert_parity, load_golden
from tests.hosts.lane import require_hosts
from tests.models.detection import toys

require_hosts()

from mmdet.models.layers import SinePositionalEncoding  # noqa: E402
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy  # noqa: E402

from dinov3_mm.models.detection.criterion import PlainDETRCriterion, mean_count  # noqa: E402
from dinov3_mm.models.detection.decoder import (  # noqa: E402  # noqa: E402
    BoxPredictions,
    Memory,
    box_deltas,
    embed_boxes,
    refine_boxes,
)
from dinov3_mm.models.detection.plain_detr import (  # noqa: E402
    best_boxes,
    padding_mask,
)
from dinov3_mm.models.detection.rpe_attention import BoxRPECrossAttention  # noqa: E402
from dinov3_mm.models.detection.transformer import build_encoder  # noqa: E402

BAR = 1e-4
SIZES = [(112, 144), (96, 128)]


def states(tensors, prefix="sd."):
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


@pytest.fixture(scope="module")
def golden():
    return load_golden("heads_detr")


@pytest.fixture(scope="module")
def head(golden):
    """The golden head; what the trimmed copy lacks stays random and is not run."""
    head = toys.detector().bbox_head
    state = {n: t for n, t in states(golden[1]).items() if not n.startswith("backbone.")}
    missing, unexpected = head.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(n.startswith(("transformer.encoder.layers.", "input_proj.")) for n in missing)
    return head.eval()


def decoded(head, golden, count):
    mask = padding_mask(SIZES, (7, 9), 16, "cpu")
    assert torch.equal(mask, golden["out.feat_mask"].bool())
    position = head.positional_encoding(mask).flatten(2).transpose(1, 2)
    position = position + head.transformer.level_embed[0]
    memory = Memory(golden["out.memory"], position, mask.flatten(1), (7, 9))
    with torch.no_grad():
        return head.transformer(
            memory,
            head.query_embed.weight[:count],
            num_one2one=20,
            bbox_embed=head.bbox_embed,
            class_embed=head.class_embed,
        )


def test_windows(golden):
    description, tensors = golden
    backbone = toys.detector().backbone
    missing, _ = backbone.backbone.load_state_dict(
        states(tensors, "sd." + description["prefix_backbone"]), strict=False
    )
    assert missing and all(
        name.startswith(("blocks.1", "blocks.2", "blocks.3")) for name in missing
    )
    image = torch.zeros(1, 3, *SIZES[0])
    image[0, :, : SIZES[1][0], : SIZES[1][1]] = tensors["in.im1"]
    with torch.no_grad():
        (features,) = backbone(image)
    layer = torch.cat((features[:, :32], features[:, 128:160]), 1)
    assert_parity(layer, tensors["out.feat"])


def test_decoder_of_training(head, golden):
    layers, first = decoded(head, golden[1], 30)
    expected = states(golden[1], "out.")
    one2one, one2many = layers[-1].select(slice(20)), layers[-1].select(slice(20, None))
    pairs = {
        "train.pred_logits": one2one.logits,
        "train.pred_boxes": one2one.boxes,
        "train.pred_boxes_old": one2one.references,
        "train.pred_deltas": one2one.deltas,
        "train.pred_logits_one2many": one2many.logits,
        "train.pred_boxes_one2many": one2many.boxes,
        "train.aux0_logits": layers[0].logits[:, :20],
        "train.aux0_boxes": layers[0].boxes[:, :20],
        "enc.pred_logits": first.logits[1:],
        "enc.pred_boxes": first.boxes[1:],
    }
    for name, actual in pairs.items():
        assert_parity(actual, expected[name], BAR)


def test_inference_and_postprocessing(head, golden):
    layers, _ = decoded(head, golden[1], 20)
    expected = golden[1]
    assert_parity(layers[-1].logits, expected["out.infer.pred_logits"], BAR)
    assert_parity(layers[-1].boxes, expected["out.infer.pred_boxes"], BAR)
    for index, size in enumerate(SIZES):
        found = best_boxes(layers[-1].logits[index], layers[-1].boxes[index], 30, size)
        assert torch.equal(found.labels, expected[f"out.post{index}.labels"])
        assert_parity(found.scores, expected[f"out.post{index}.scores"], BAR)
        assert_parity(found.bboxes, expected[f"out.post{index}.boxes"], BAR)


@pytest.mark.parametrize(
    ("rpe_type", "scale", "output"),
    [("linear", None, "out.y"), ("abs_log8", 80, "out.y_abs_log8_norm")],
)
def test_cross_attention(rpe_type, scale, output):
    _, tensors = load_golden("heads_detr_xattn")
    attention = BoxRPECrossAttention(
        16, 4, hidden_dims=8, stride=16, rpe_type=rpe_type, normalized_boxes=scale is not None
    )
    attention.load_state_dict(states(tensors))
    boxes = tensors["in.ref_boxes"][:, :, 0] / (scale or 1)
    inputs = (tensors["in.q"], boxes, tensors["in.k"], tensors["in.v"])
    actual = attention(*inputs, (3, 4), tensors["in.pad_mask"].bool())
    assert_parity(actual, tensors[output])


def test_box_operations():
    _, tensors = load_golden("heads_detr_boxops")
    proposals, deltas, truth = (tensors[f"in.{name}"] for name in ("proposals", "deltas", "gt"))
    limits = torch.cat((tensors["in.max_w"], tensors["in.max_h"]), dim=1)
    clipped = bbox_cxcywh_to_xyxy(refine_boxes(proposals, deltas, limits))
    assert_parity(clipped[None], tensors["out.boxes"])
    assert_parity(bbox_cxcywh_to_xyxy(refine_boxes(proposals, deltas)), tensors["out.boxes_noclip"])
    assert_parity(box_deltas(proposals[:, None], truth[None]), tensors["out.deltas_pair"])
    assert_parity(box_deltas(proposals[:2], truth), tensors["out.deltas_same"])
    assert_parity(embed_boxes(proposals, 16)[None], tensors["out.prop_embed"])
    encoding = SinePositionalEncoding(16, normalize=True, offset=-0.5, eps=1e-6)
    assert_parity(encoding(tensors["in.mask"].bool()), tensors["out.pos_sine"])


def predictions(tensors, prefix, names=("logits", "boxes", "boxes_old", "deltas")):
    return BoxPredictions(*(tensors[f"in.{prefix}{name}"] for name in names))


def test_losses_and_matches():
    description, tensors = load_golden("heads_detr_loss")
    objects = [
        InstanceData(
            labels=tensors[f"in.t{i}.labels"], bboxes=bbox_cxcywh_to_xyxy(tensors[f"in.t{i}.boxes"])
        )
        for i in (0, 1)
    ]
    repeated = [InstanceData.cat([image] * 2) for image in objects]
    binary = [InstanceData(labels=t.labels * 0, bboxes=t.bboxes) for t in objects]
    last = predictions(tensors, "pred_", ("logits", "boxes", "boxes_old", "deltas"))
    branches = [
        ("one2one", "", last, objects),
        ("one2one", "_0", predictions(tensors, "aux0."), objects),
        ("one2one", "_enc", predictions(tensors, "enc."), binary),
        ("one2many", "", predictions(tensors, "o2m."), repeated),
        ("one2many", "_0", predictions(tensors, "aux0_o2m."), repeated),
    ]
    criterion, total = PlainDETRCriterion(), 0
    released = {"loss_cls": "loss_ce", "loss_bbox": "loss_bbox", "loss_iou": "loss_giou"}
    for branch, suffix, predicted, targets in branches:
        losses = criterion(predicted, targets, mean_count(targets, "cpu"))
        for name, theirs in released.items():
            weighted = (
                description["loss_weights"][theirs] * tensors[f"out.{branch}.{theirs}{suffix}"]
            )
            assert_parity(losses[name], weighted)
        total = total + sum(losses.values())
    assert_parity(total, tensors["out.total"])
    for prefix, predicted, targets in (("", last, objects), ("_o2m", branches[3][2], repeated)):
        for index in (0, 1):
            queries, found = criterion.match(predicted, index, targets[index])
            assert torch.equal(queries, tensors[f"out.match{prefix}{index}.pred"])
            assert torch.equal(found, tensors[f"out.match{prefix}{index}.tgt"])


def test_encoder_is_torchs_post_norm_layer():
    from dinov3_mm.checkpoints.head_names import detector_to_ours

    torch.manual_seed(0)
    theirs = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True), 2
    ).eval()
    prefix = "transformer.encoder."
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    state = {prefix + name: t for name, t in theirs.state_dict().items()}
    ours = build_encoder(32, 4, 64, 2, 0.1).eval()
    ours.load_state_dict(states(detector_to_ours(state), prefix))
    x, mask = torch.randn(2, 12, 32), torch.zeros(2, 12, dtype=torch.bool)
    mask[1, 8:] = True
    with torch.no_grad():
        expected = theirs(x, src_key_padding_mask=mask)
        actual = ours(query=x, query_pos=torch.zeros_like(x), key_padding_mask=mask)
    assert_parity(actual[~mask], expected[~mask])
