"""Inference speed of DINOv3ViT against the same model in transformers and timm.

    python benchmarks/backbone_forward.py [--archs small base] [--sizes 224 512] [--batches 1 8]
        [--dtypes fp32 bf16] [--pairs 15] [--threads N] [--device cpu] [--out results.json]

Every cell runs the three models in turn, on the same images and with the same weights: eval mode,
inference mode, no compilation, the peers with torch's fused attention. For bf16 each model is cast
as a whole. Printed are the median times, the largest difference of the normed tokens, and the
median over the rounds of (time of the better peer) / (our time); at the end the geometric mean of
the cells.
"""

from itertools import product

import torch
from forward_cells import Forward, argument_parser, run_benchmark
from torch import Tensor, nn

from dinov3_mm.checkpoints import to_hf, to_timm
from dinov3_mm.models.backbones import DINOv3ViT


def build_ours(arch: str) -> DINOv3ViT:
    """Our model with the weights of an initialisation, and LayerScale and biases made visible."""
    model = DINOv3ViT(arch=arch).eval()
    model.init_weights()
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            nn.init.uniform_(parameter, 0.5, 1.5)
        elif name.endswith("bias") and "qkv" not in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def build_transformers(ours: DINOv3ViT) -> nn.Module:
    """transformers' model with our weights and its fused attention."""
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    ffn = ours.blocks[0].mlp
    gated = hasattr(ffn, "w1")
    config = DINOv3ViTConfig(
        hidden_size=ours.embed_dims,
        num_hidden_layers=ours.num_layers,
        num_attention_heads=ours.num_heads,
        intermediate_size=(ffn.w1 if gated else ffn.fc1).out_features,
        use_gated_mlp=gated,
        hidden_act="silu" if gated else "gelu",
        num_register_tokens=ours.num_registers,
        attn_implementation="sdpa",
    )
    state = to_hf(ours.state_dict())
    return DINOv3ViTModel.from_pretrained(None, config=config, state_dict=state).eval()


def build_timm(ours: DINOv3ViT, arch: str) -> nn.Module:
    """timm's model with our weights; without the qkv bias, as timm publishes it."""
    import timm

    peer = timm.create_model(f"vit_{arch}_patch16_dinov3")
    peer.load_state_dict(to_timm(ours.state_dict(), qkv_bias=False))
    return peer.eval()


def build_models(arch: str, dtype: torch.dtype, device: str) -> dict[str, Forward]:
    """A function for each implementation that returns all normed tokens (B, 1 + R + N, D)."""
    ours = build_ours(arch)
    models = {
        "ours": ours,
        "transformers": build_transformers(ours),
        "timm": build_timm(ours, arch),
    }
    for model in models.values():
        model.to(device, dtype)
    return {
        "ours": lambda x: all_tokens(models["ours"], x),
        "transformers": lambda x: models["transformers"](x).last_hidden_state,
        "timm": models["timm"].forward_features,
    }


def all_tokens(model: DINOv3ViT, images: Tensor) -> Tensor:
    """CLS, register and patch tokens in one tensor."""
    output = model.forward_tokens(images)
    return torch.cat((output.cls[:, None], output.registers, output.patches), dim=1)


def main() -> None:
    """Run the benchmark."""
    parser = argument_parser(__doc__.splitlines()[0])
    parser.add_argument("--archs", nargs="+", default=["small", "base"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[224, 512])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    args = parser.parse_args()
    run_benchmark(args, "ViT", product(args.archs, args.sizes, args.batches), build_models)


if __name__ == "__main__":
    main()
