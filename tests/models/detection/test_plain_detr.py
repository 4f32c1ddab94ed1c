"""DINOv3PlainDETR as a detector of mmdet: losses, predictions, sizes, empty and crowded images."""

import copy

import pytest
import torch
from mmengine.structures import InstanceData

import dinov3_mm.hosts  # noqa: F401
from tests.checkpoints.toys import redraw
from tests.golden import assert_parity
from tests.hosts.lane import require_hosts
from tests.models.detection import toys
from tests.models.detection.toys import batch, images, sample

require_hosts()

SIZE = (96, 112)
BOXES = [[10.0, 12.0, 50.0, 60.0], [40.0, 8.0, 90.0, 88.0]]


@pytest.fixture(scope="module")
def model():
    return redraw(toys.detector())


def predict(model, inputs, samples, **kwargs):
    with torch.no_grad():
        return [s.pred_instances for s in model.predict(inputs, copy.deepcopy(samples), **kwargs)]


def test_losses_train_the_head_and_not_the_backbone():
    model = redraw(toys.detector()).train()
    inputs = batch(*images(SIZE, (80, 96)))
    losses = model.loss(inputs, [sample(SIZE, BOXES, [0, 4]), sample((80, 96), BOXES[:1], [2])])
    terms = ("loss_cls", "loss_bbox", "loss_iou")
    prefixes = ("", "d0.", "enc_", "o2m_", "d0.o2m_")
    assert set(losses) == {prefix + term for prefix in prefixes for term in terms}
    sum(losses.values()).backward()
    for name, parameter in model.bbox_head.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert all(p.grad is None for p in model.backbone.parameters())
    blocks = model.backbone.backbone.blocks
    assert not any(m.training for block in blocks for m in block.modules())


def test_recomputation_gives_the_same_gradients():
    grads = []
    for with_cp in (False, True):
        model = redraw(toys.detector({"with_cp": with_cp, "encoder_dropout": 0.0})).train()
        losses = model.loss(batch(*images(SIZE)), [sample(SIZE, BOXES, [0, 4])])
        sum(losses.values()).backward()
        grads.append([p.grad for p in model.bbox_head.parameters()])
    for plain, recomputed in zip(*grads):
        assert_parity(recomputed, plain)


def test_images_in_a_padded_batch_are_as_alone(model):
    """Without windows the views of an image do not depend on the size of the batch."""
    head = model.bbox_head
    features = torch.randn(1, 256, 5, 6, generator=torch.Generator().manual_seed(2))
    padded = torch.nn.functional.pad(features, (0, 2, 0, 1))
    shapes = [sample((80, 96)), sample((96, 128))]
    with torch.no_grad():
        source = head.input_proj[0](features)
        alone, inside = [
            head.transformer.encode(s, m, head.positional_encoding(m, s))
            for s, m in (
                (source, torch.zeros(1, 5, 6, dtype=torch.bool)),
                (
                    torch.nn.functional.pad(source, (0, 2, 0, 1)).repeat(2, 1, 1, 1),
                    mask_of(shapes, padded.shape[-2:]),
                ),
            )
        ]
    inner = inside.tokens[0].unflatten(0, (6, 8))[:5, :6].flatten(0, 1)
    assert_parity(inner, alone.tokens[0])


def mask_of(samples, grid):
    from dinov3_mm.models.detection.plain_detr import padding_mask

    return padding_mask([s.img_shape for s in samples], grid, 16, "cpu")


@pytest.mark.parametrize("size", [(90, 101), (64, 64), (17, 130)])
def test_any_size(model, size):
    (found,) = predict(model, batch(*images(size)), [sample(size)])
    assert found.bboxes.shape == (30, 4) and found.scores.isfinite().all()
    limits = found.bboxes.new_tensor([size[1], size[0]] * 2)
    assert (found.bboxes >= 0).all() and (found.bboxes <= limits).all()
    assert (found.scores.diff() <= 0).all()


def test_boxes_are_rescaled_to_the_original_image(model):
    inputs = batch(*images(SIZE))
    (here,) = predict(model, inputs, [sample(SIZE, scale_factor=(2.0, 0.5))], rescale=False)
    (there,) = predict(model, inputs, [sample(SIZE, scale_factor=(2.0, 0.5))])
    assert_parity(there.bboxes * there.bboxes.new_tensor([2.0, 0.5] * 2), here.bboxes)


def test_fewer_proposals_than_queries():
    model = redraw(toys.detector({"num_queries": 40, "num_one2many_queries": 30}))
    inputs, samples = batch(*images((48, 48))), [sample((48, 48), [[2, 2, 30, 40]], [1])]
    # 36 + 9 + 1 + 0 positions of the four levels
    logits, boxes = model._forward(inputs, samples)
    assert logits.shape == (1, 40, 5) and boxes.shape == (1, 40, 4)
    losses = model.train().loss(inputs, samples)
    assert all(value.isfinite() for value in losses.values())
    small = batch(*images((32, 32)))
    logits, _ = model.eval()._forward(small, [sample((32, 32))])
    assert logits.shape == (1, 16 + 4 + 1, 5)
    losses = model.train().loss(small, [sample((32, 32), [[2, 2, 30, 20]], [1])])
    assert losses["o2m_loss_cls"] == 0 and losses["loss_cls"] > 0


def test_images_without_objects_still_reach_every_parameter():
    model = redraw(toys.detector()).train()
    losses = model.loss(batch(*images(SIZE, SIZE)), [sample(SIZE), sample(SIZE)])
    assert all(losses[name] == 0 for name in losses if not name.endswith("cls"))
    sum(losses.values()).backward()
    for name, parameter in model.bbox_head.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_crowds_and_boxes_without_area_are_no_objects(model):
    """mmdet keeps crowd regions in ``ignored_instances``."""
    plain = sample(SIZE, BOXES, [0, 4])
    crowded = sample(SIZE, [*BOXES, [5, 5, 5, 60]], [0, 4, 1])
    crowded.ignored_instances = InstanceData(
        bboxes=torch.tensor([[0.0, 0.0, 90.0, 90.0]]), labels=torch.tensor([3])
    )
    inputs = batch(*images(SIZE))
    with torch.no_grad():
        expected, actual = model.loss(inputs, [plain]), model.loss(inputs, [crowded])
    assert expected == actual


def test_released_category_ids():
    """91 outputs by COCO's ids; mmdet counts its 80 labels without gaps."""
    from dinov3_mm.models.detection import COCO_CATEGORY_IDS

    model = redraw(toys.detector({"num_classes": 80, "category_ids": "coco"}))
    head = model.bbox_head
    assert len(COCO_CATEGORY_IDS) == 80 and COCO_CATEGORY_IDS[11:13] == (11 + 2, 11 + 3)
    assert head.num_classes == 80 and head.class_embed[0].out_features == 91
    layers, _ = head(model.extract_feat(batch(*images(SIZE))), [sample(SIZE)])
    (found,) = predict(model, batch(*images(SIZE)), [sample(SIZE)])
    scores = layers[-1].logits[0].sigmoid()[:, list(COCO_CATEGORY_IDS)]
    assert found.labels[0] == scores.max(0).values.argmax() and int(found.labels.max()) < 80
    target = head._target(sample(SIZE, BOXES, [0, 79]))
    assert target.labels.tolist() == [1, 90]


def test_mixed_precision_keeps_boxes_and_their_distances_in_float32(model):
    """In bfloat16 a distance of 1000 px would be off by up to 4."""
    attention = model.bbox_head.transformer.decoder.layers[0].cross_attn
    boxes = torch.tensor([[[1001.0, 503.0, 30.0, 40.0]]])
    inputs = (
        torch.randn(1, 1, 32),
        boxes,
        torch.randn(1, 80 * 40, 32),
        torch.randn(1, 80 * 40, 32),
    )
    biases = []
    attention._bias, plain = lambda *a: biases.append(plain(*a)) or biases[-1], attention._bias
    with torch.no_grad():
        attention(*inputs, (40, 80))
        with torch.autocast("cpu", torch.bfloat16):
            attention(*inputs, (40, 80))
            logits, found = model._forward(batch(*images(SIZE)))
    del attention._bias
    assert torch.equal(*biases[:2])
    assert logits.dtype == found.dtype == torch.float32 and found.isfinite().all()


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ({"in_channels": 128}, "256 channels and stride 16, the head expects in_channels=128"),
        ({"stride": 8, "proposal_strides": (4, 8)}, "stride 16, .* stride=8"),
        ({"embed_dims": 48}, "multiple of 32"),
        ({"category_ids": "coco"}, "80 numbers for 5 classes"),
        ({"category_ids": "cocoa"}, "did you mean 'coco'"),
        ({"rpe_type": "log"}, "abs_log8"),
        ({"proposal_strides": (2, 16)}, "no level of stride 2 from a map of 16"),
    ],
)
def test_what_does_not_fit_is_refused(head, message):
    with pytest.raises(ValueError, match=message):
        toys.detector(head)


def test_labels_beyond_the_classes_are_refused(model):
    with pytest.raises(ValueError, match="labels from 0 to 5 for num_classes=5"):
        model.loss(batch(*images(SIZE)), [sample(SIZE, BOXES, [0, 5])])


def test_maps_of_another_width_are_refused(model):
    with pytest.raises(ValueError, match="the map has 8 channels, in_channels of the head is 256"):
        model.bbox_head((torch.zeros(1, 8, 4, 4),))
