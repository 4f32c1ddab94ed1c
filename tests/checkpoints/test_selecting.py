"""The right sub-model is chosen among several, under any wrapper's names."""

import pytest

from dinov3_mm.checkpoints.load import select_backbone

BACKBONE = ("cls_token", "rope_embed.periods", "blocks.0.norm1.weight")


def names(*prefixes):
    return [prefix + name for prefix in prefixes for name in BACKBONE]


@pytest.mark.parametrize(
    ("prefixes", "chosen"),
    [
        ([""], ""),
        (["backbone."], "backbone."),
        (["student.backbone.", "teacher.backbone."], "teacher.backbone."),
        (["teacher.backbone.", "model_ema.backbone."], "model_ema.backbone."),
        (
            ["model.student.backbone.", "model.teacher.backbone.", "model.model_ema.backbone."],
            "model.model_ema.backbone.",
        ),
        (["student.backbone.", "gram_teacher.backbone."], "student.backbone."),
        (["encoder.vision."], "encoder.vision."),
    ],
)
def test_preference(prefixes, chosen):
    selection = select_backbone(names(*prefixes), "file")
    assert selection.prefix == chosen
    assert selection.backbone == {name: chosen + name for name in BACKBONE}


@pytest.mark.parametrize("part", ["module.", "_orig_mod.", "module._orig_mod."])
def test_parts_that_wrappers_leave_in_names_are_removed(part):
    stored = [
        f"{part}backbone.cls_token",
        f"{part}backbone.rope_embed.periods",
        "module.backbone.blocks.0._checkpoint_wrapped_module.norm1._orig_mod.weight",
        f"{part}dino_head.mlp.0.weight",
    ]
    selection = select_backbone(stored, "file")
    assert list(selection.backbone) == list(BACKBONE)
    assert list(selection.backbone.values()) == stored[:3]
    assert selection.heads == {"dino_head": {"mlp.0.weight": stored[3]}}


def test_heads_of_other_branches_are_left_alone():
    stored = [
        *names("student.backbone.", "teacher.backbone."),
        "student.dino_head.last_layer.weight",
        "teacher.dino_head.last_layer.weight",
        "teacher.ibot_head.mlp.2.bias",
        "decode_head.conv.weight",
    ]
    selection = select_backbone(stored, "file")
    assert selection.heads == {
        "dino_head": {"last_layer.weight": "teacher.dino_head.last_layer.weight"},
        "ibot_head": {"mlp.2.bias": "teacher.ibot_head.mlp.2.bias"},
    }
    assert selection.ignored == ("student", "decode_head")


def test_several_backbones_of_unknown_role_are_an_error():
    with pytest.raises(ValueError, match=r"several backbones, under \['left\.', 'right\.'\]"):
        select_backbone(names("left.", "right."), "pair.pth")


def test_a_name_that_appears_twice_after_unwrapping_is_an_error():
    with pytest.raises(ValueError, match=r"'cls_token' twice"):
        select_backbone([*BACKBONE, "module.cls_token"], "file")


def test_no_backbone_is_an_error_that_lists_the_layouts():
    with pytest.raises(ValueError, match=r"r50\.pth .*Hugging Face.*timm.*conv1\.weight"):
        select_backbone(["conv1.weight", "layer1.0.bn1.bias"], "r50.pth")
