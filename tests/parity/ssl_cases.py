"""The training iteration of the reference vectors: model, batch, optimizer and expected values."""

import functools

import torch
from mmengine.optim import build_optim_wrapper

import dinov3_mm.engine.optim  # noqa: F401  (registers the optimizer wrapper)
from dinov3_mm.models.backbones import DINOv3ViT
from dinov3_mm.models.pretraining import DINOv3
from tests.golden import load_golden

LOSS_TOLERANCE = 1e-4
GRAD_TOLERANCE = 1e-4
STEP_TOLERANCE = 2e-5

DESCRIPTION, TENSORS = load_golden("ssl_full_step")
SCALARS = DESCRIPTION["scalars"]
OPTIMIZER = DESCRIPTION["optimizer"]
BATCH_KEYS = {
    "global_crops": "collated_global_crops",
    "local_crops": "collated_local_crops",
    "gram_crops": "collated_gram_teacher_crops",
    "mask_indices": "mask_indices_list",
    "masks_weight": "masks_weight",
}
LOG_KEYS = {
    "loss": "total_loss",
    "dino_local_loss": "dino_local_crops_loss",
    "dino_local_weight": "dino_local_loss_weight",
    "dino_global_loss": "dino_global_crops_loss",
    "koleo_loss": "koleo_loss",
    "ibot_loss": "ibot_loss",
    "gram_weight": "gram_loss_weight",
    "gram_loss": "gram_loss",
    "gram_loss_masked": "stats_only/masked_gram_loss",
    "gram_loss_unmasked": "stats_only/unmasked_gram_loss",
}


def state_of(prefix: str) -> dict[str, torch.Tensor]:
    prefix = f"w.{prefix}."
    return {key.removeprefix(prefix): t for key, t in TENSORS.items() if key.startswith(prefix)}


def build_model(*, gram: dict | None = None, rope_dtype: str = "fp32", **settings) -> DINOv3:
    backbone = DINOv3ViT(
        arch=dict(embed_dims=64, num_layers=2, num_heads=2),
        norm_layer="layernormbf16",
        untie_global_and_local_cls_norm=True,
        rope_dtype=rope_dtype,
    )

    def head(hidden, bottleneck, prototypes):
        return dict(
            type="DINOv3Head",
            hidden_dims=hidden,
            bottleneck_dims=bottleneck,
            num_prototypes=prototypes,
        )

    model = DINOv3(
        backbone,
        head(96, 32, 128),
        head(80, 24, 96),
        gram=dict(compute_stats=True, **(gram or {})),
        **settings,
    )
    for name in ("student", "teacher"):
        getattr(model, name).load_state_dict(state_of(name), strict=True)
    if model.gram["teacher"] == "frozen":
        model.load_gram_teacher(state_of("gram_teacher.backbone"))
    return model


@functools.cache
def whole_batch() -> dict[str, torch.Tensor]:
    batch = {ours: TENSORS[f"data.{theirs}"] for ours, theirs in BATCH_KEYS.items()}
    for key in ("global_crops", "local_crops", "gram_crops"):
        batch[key] = batch[key].float()
    batch["masks"] = TENSORS["data.collated_masks"].bool()
    return batch


def run_losses(model: DINOv3, expected: dict) -> dict[str, torch.Tensor]:
    """Losses of the golden batch with the schedule values of the golden iteration."""
    model.set_step(
        teacher_temp=DESCRIPTION["config"]["teacher_temp"],
        dino_local_weight=expected["dino_local_loss_weight"],
        gram_weight=expected["gram_loss_weight"],
    )
    device = next(model.parameters()).device
    batch = {key: tensor.to(device) for key, tensor in whole_batch().items()}
    if model.gram["teacher"] == "ema":
        del batch["gram_crops"]
    return model(batch, mode="loss")


VARIANTS = {
    "main": {},
    "variant_global_diagonal_kept": dict(dino=dict(global_ignore_diagonal=False)),
    "variant_gram_batch_level": dict(gram=dict(img_level=False)),
    "variant_gram_masked_tokens": dict(gram=dict(img_level=False, tokens_used="masked")),
    "variant_gram_unmasked_tokens": dict(gram=dict(img_level=False, tokens_used="unmasked")),
    "variant_gram_ema_teacher": dict(gram=dict(teacher="ema")),
    "variant_distillation_unmasked_student": dict(mask_student=False),
    "variant_gram_bilinear_antialias": dict(
        gram=dict(resize_method="bilinear", resize_antialias=True)
    ),
    "variant_rope_bf16": dict(rope_dtype="bf16"),
    "variant_iteration5": {},
}


def optimizer_wrapper(model: DINOv3):
    """The project's optimizer at the learning rates of the golden iteration."""
    wrapper = build_optim_wrapper(
        model,
        dict(
            type="PretrainOptimWrapper",
            constructor="PretrainOptimConstructor",
            optimizer=dict(type="AdamW", lr=OPTIMIZER["lr"], betas=(0.9, 0.999)),
            paramwise_cfg=dict(
                layerwise_decay=OPTIMIZER["layerwise_decay"],
                patch_embed_lr_mult=OPTIMIZER["patch_embed_lr_mult"],
            ),
            clip_grad=OPTIMIZER["clip_grad_per_submodule"],
        ),
    )
    for group in wrapper.optimizer.param_groups:
        lr = OPTIMIZER["last_layer_lr"] if group["is_last_layer"] else OPTIMIZER["lr"]
        group["lr"] = lr * group["lr_multiplier"]
        group["weight_decay"] = OPTIMIZER["weight_decay"] * group["wd_multiplier"]
    return wrapper
