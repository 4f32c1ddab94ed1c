"""The DINOv3 ViTs of transformers and timm with the weights of one of our models."""

from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from dinov3_mm.models.backbones import DINOv3ViT


@torch.no_grad()
def redraw(model: DINOv3ViT) -> DINOv3ViT:
    """Draw every parameter so that each one is visible in the output; returns the model in eval."""
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            parameter.uniform_(0.5, 1.5)
        elif name.endswith("bias"):
            parameter.normal_(0, 0.5)
        elif "norm" in name:
            parameter.normal_(1, 0.2)
        elif parameter.dim() == 2 and "mask_token" not in name:
            parameter.normal_(0, parameter.shape[1] ** -0.5)
        else:
            parameter.normal_()
    return model.eval()


def assert_each_epsilon_matters(model: nn.Module, compare: Callable[[], None]) -> None:
    """Assert that ``compare`` passes, and fails when a single norm has 1e-5 for 1e-6 or the other
    way round.

    Such a norm moves tokens of size one by 1e-9 to 1e-5, which the bar of fp32 lets pass: the
    comparison must be one in double precision.
    """
    compare()
    norms = [module for module in model.modules() if hasattr(module, "eps")]
    assert norms
    for norm in norms:
        right = norm.eps
        norm.eps = {1e-5: 1e-6, 1e-6: 1e-5}[right]
        with pytest.raises(AssertionError, match="differs by"):
            compare()
        norm.eps = right


def _linear(layer: nn.Module) -> dict[str, Tensor]:
    return {key: parameter.data for key, parameter in layer.named_parameters()}


def _load(peer: nn.Module, state: dict[str, Tensor | None]) -> nn.Module:
    """Copy the values for which the peer has a place; every place must get one."""
    state = {key: value for key, value in state.items() if value is not None}
    missing = set(peer.state_dict()) - set(state)
    assert not missing, f"the peer has {sorted(missing)}"
    own = {key: value for key, value in state.items() if key in peer.state_dict()}
    peer.load_state_dict({k: v.reshape(peer.state_dict()[k].shape) for k, v in own.items()})
    return peer.eval()


def _split_qkv(model: DINOv3ViT, index: int) -> tuple[list[Tensor], list[Tensor | None]]:
    qkv = model.blocks[index].attn.qkv
    if qkv.bias is None:
        return list(qkv.weight.data.chunk(3)), [None] * 3
    return list(qkv.weight.data.chunk(3)), list((qkv.bias.data * _mask(qkv)).chunk(3))


def _mask(qkv: nn.Linear) -> Tensor:
    return getattr(qkv, "bias_mask", torch.ones_like(qkv.bias))


def _ffn_names(model: DINOv3ViT, gated: tuple[str, ...], plain: tuple[str, ...]) -> dict[str, str]:
    if hasattr(model.blocks[0].mlp, "w1"):
        return dict(zip(("w1", "w2", "w3"), gated))
    return dict(zip(("fc1", "fc2"), plain))


def to_transformers(model: DINOv3ViT, **config) -> DINOv3ViTModel:
    """``DINOv3ViTModel`` with the weights and periods of ``model``."""
    settings, ffn = model.arch_settings, model.blocks[0].mlp
    gated = hasattr(ffn, "w1")
    kwargs = {
        "hidden_size": model.embed_dims,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "intermediate_size": (ffn.w1 if gated else ffn.fc1).out_features,
        "num_register_tokens": model.num_registers,
        "patch_size": model.patch_size,
        "use_gated_mlp": gated,
        "hidden_act": "silu" if gated else "gelu",
        "query_bias": settings["qkv_bias"],
        "key_bias": settings["qkv_bias"] and not settings["mask_k_bias"],
        "value_bias": settings["qkv_bias"],
        "mlp_bias": settings["ffn_bias"],
        "proj_bias": settings["proj_bias"],
        "rope_theta": settings["rope_base"],
        "layer_norm_eps": model.norm.eps,
        "attn_implementation": "sdpa",
        **config,
    }
    peer = DINOv3ViTModel(DINOv3ViTConfig(**kwargs))
    state = {
        "embeddings.cls_token": model.cls_token.data,
        "embeddings.mask_token": model.mask_token.data,
        "embeddings.register_tokens": getattr(
            model, "storage_tokens", torch.empty(1, 0, model.embed_dims)
        ),
        "embeddings.patch_embeddings.weight": model.patch_embed.proj.weight.data,
        "embeddings.patch_embeddings.bias": model.patch_embed.proj.bias.data,
        "norm.weight": model.norm.weight.data,
        "norm.bias": model.norm.bias.data,
    }
    names = _ffn_names(model, ("gate_proj", "up_proj", "down_proj"), ("up_proj", "down_proj"))
    for index, block in enumerate(model.blocks):
        prefix = f"model.layer.{index}."
        parts = {f"mlp.{peer}": _linear(getattr(block.mlp, own)) for own, peer in names.items()}
        for letter, weight, bias in zip("qkv", *_split_qkv(model, index)):
            parts[f"attention.{letter}_proj"] = {"weight": weight, "bias": bias}
        parts["attention.o_proj"] = _linear(block.attn.proj)
        parts["norm1"], parts["norm2"] = _linear(block.norm1), _linear(block.norm2)
        parts["layer_scale1"] = {"lambda1": block.ls1.gamma.data}
        parts["layer_scale2"] = {"lambda1": block.ls2.gamma.data}
        for part, values in parts.items():
            state.update({f"{prefix}{part}.{key}": value for key, value in values.items()})
    _load(peer, state)
    peer.rope_embeddings.inv_freq.copy_(1 / model.rope_embed.periods)
    return peer


def to_timm(model: DINOv3ViT, name: str, **kwargs) -> nn.Module:
    """The timm model ``name`` with the weights and periods of ``model``."""
    peer = timm.create_model(
        name,
        embed_dim=model.embed_dims,
        depth=model.num_layers,
        num_heads=model.num_heads,
        **kwargs,
    )
    state = {
        "cls_token": model.cls_token.data,
        "reg_token": model.storage_tokens.data,
        "patch_embed.proj.weight": model.patch_embed.proj.weight.data,
        "patch_embed.proj.bias": model.patch_embed.proj.bias.data,
        "norm.weight": model.norm.weight.data,
        "norm.bias": model.norm.bias.data,
    }
    names = _ffn_names(model, ("fc1_g", "fc1_x", "fc2"), ("fc1", "fc2"))
    for index, block in enumerate(model.blocks):
        prefix = f"blocks.{index}."
        _, (q_bias, _, v_bias) = _split_qkv(model, index)
        state[f"{prefix}attn.q_bias"], state[f"{prefix}attn.v_bias"] = q_bias, v_bias
        state[f"{prefix}gamma_1"], state[f"{prefix}gamma_2"] = block.ls1.gamma, block.ls2.gamma
        parts = {f"mlp.{peer}": _linear(getattr(block.mlp, own)) for own, peer in names.items()}
        parts["attn.qkv"] = {"weight": block.attn.qkv.weight.data}
        parts["attn.proj"] = _linear(block.attn.proj)
        parts["norm1"], parts["norm2"] = _linear(block.norm1), _linear(block.norm2)
        for part, values in parts.items():
            state.update({f"{prefix}{part}.{key}": value for key, value in values.items()})
    _load(peer, state)
    peer.rope.periods.copy_(model.rope_embed.periods)
    return peer
