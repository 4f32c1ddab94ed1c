"""A distillation step against the reference vectors: all targets come from the frozen teacher."""

import pytest
import torch

from dinov3_mm.models.backbones import DINOv3ViT
from dinov3_mm.models.pretraining import DINOv3

from ..golden import assert_parity
from .ssl_cases import DESCRIPTION, LOG_KEYS, SCALARS, state_of, whole_batch

EXPECTED = SCALARS["variant_distillation_unmasked_student"]
TERMS = ("dino_local_loss", "dino_global_loss", "koleo_loss", "ibot_loss")


def head(hidden: int, bottleneck: int, **prototypes: int) -> dict:
    return dict(type="DINOv3Head", hidden_dims=hidden, bottleneck_dims=bottleneck, **prototypes)


def backbone() -> DINOv3ViT:
    return DINOv3ViT(
        arch=dict(embed_dims=64, num_layers=2, num_heads=2),
        norm_layer="layernormbf16",
        untie_global_and_local_cls_norm=True,
    )


def build(prototype_chunk_size: int | None) -> DINOv3:
    """The golden student under the golden EMA teacher as distillation teacher.

    The EMA teacher is noise: a term that listened to it would be wrong.
    """
    torch.manual_seed(0)
    model = DINOv3(
        backbone(),
        head(96, 32),
        head(80, 24),
        distillation=dict(
            backbone=backbone(),
            dino_head=head(96, 32, num_prototypes=128),
            ibot_head=head(80, 24, num_prototypes=96),
        ),
        prototype_chunk_size=prototype_chunk_size,
    )
    model.student.load_state_dict(state_of("student"))
    for name, module in model.distillation_teacher.items():
        prefix = f"{name}."
        state = {
            k.removeprefix(prefix): t
            for k, t in state_of("teacher").items()
            if k.startswith(prefix)
        }
        module.load_state_dict(state)
    model.distillation_teacher.is_ready = True
    for param in model.teacher.parameters():
        param.normal_()
    return model


@pytest.mark.parametrize("prototype_chunk_size", [None, 7])
def test_losses(prototype_chunk_size):
    model = build(prototype_chunk_size)
    assert not model.mask_student
    model.set_step(
        teacher_temp=DESCRIPTION["config"]["teacher_temp"],
        dino_local_weight=EXPECTED["dino_local_loss_weight"],
    )
    losses = model(whole_batch(), mode="loss")
    for name in TERMS:
        assert_parity(losses[name], torch.tensor(EXPECTED[LOG_KEYS[name]]), 1e-4)
    # The golden total holds the Gram term, which a distillation does not have.
    total = EXPECTED["total_loss"] - EXPECTED["gram_loss_weight"] * EXPECTED["gram_loss"]
    assert_parity(losses["loss"], torch.tensor(total), 1e-4)
    losses["loss"].backward()
    assert all(param.grad is None for param in model.distillation_teacher.parameters())
    assert all(param.grad is not None for param in model.student.backbone.blocks.parameters())
