"""Inference speed of DINOv3ConvNeXt against the same model in transformers and timm.

    python benchmarks/convnext_forward.py [--cells tiny-224-1 tiny-224-8 tiny-512-1 ...]
        [--dtypes fp32 bf16] [--pairs 15] [--threads N] [--device cpu] [--out results.json]

Every cell (architecture, side in pixels, batch) runs the three models in turn, on the same images
and with the same weights: eval mode, inference mode, no compilation. For bf16 each model is cast as
a whole. timm gives the last map without norm; its final norm, applied to CLS and the map, counts as
its own time. Printed are the median times, the largest difference of the normed tokens, and the
median over the rounds of (time of the better peer) / (our time); at the end the geometric mean of
the cells.
"""

import timm
import torch
from forward_cells import Forward, argument_parser, run_benchmark
from torch import Tensor, nn
from transformers import DINOv3ConvNextConfig, DINOv3ConvNextModel

from dinov3_mm.checkpoints import to_hf, to_timm
from dinov3_mm.models.backbones import DINOv3ConvNeXt

CELLS = (
    "tiny-224-1",
    "tiny-224-8",
    "tiny-512-1",
    "small-224-1",
    "small-224-8",
    "base-224-1",
    "base-224-8",
)


def build_ours(arch: str) -> DINOv3ConvNeXt:
    """Our model with the weights of an initialisation, and gamma and biases made visible."""
    model = DINOv3ConvNeXt(arch=arch).eval()
    model.init_weights()
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            nn.init.uniform_(parameter, 0.5, 1.5)
        elif name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model


def build_transformers(ours: DINOv3ConvNeXt) -> nn.Module:
    """transformers' model with our weights."""
    settings = ours.arch_settings
    config = DINOv3ConvNextConfig(hidden_sizes=settings["dims"], depths=settings["depths"])
    state = to_hf(ours.state_dict())
    return DINOv3ConvNextModel.from_pretrained(None, config=config, state_dict=state).eval()


def build_timm(ours: DINOv3ConvNeXt, arch: str) -> nn.Module:
    """timm's model with our weights."""
    peer = timm.create_model(f"convnext_{arch}.dinov3_lvd1689m", pretrained=False, num_classes=0)
    peer.load_state_dict(to_timm(ours.state_dict()))
    return peer.eval()


def build_models(arch: str, dtype: torch.dtype, device: str) -> dict[str, Forward]:
    """A function for each implementation that returns all normed tokens (B, 1 + N, D)."""
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
        "timm": lambda x: timm_tokens(models["timm"], x),
    }


def all_tokens(model: DINOv3ConvNeXt, images: Tensor) -> Tensor:
    """CLS and patch tokens in one tensor."""
    output = model.forward_tokens(images)
    return torch.cat((output.cls[:, None], output.patches), dim=1)


def timm_tokens(model: nn.Module, images: Tensor) -> Tensor:
    """The same of timm's model."""
    tokens = model.forward_features(images).flatten(2).mT
    tokens = torch.cat((tokens.mean(1, keepdim=True), tokens), dim=1)
    norm = model.head.norm
    return nn.functional.layer_norm(tokens, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def parse_cell(text: str) -> tuple[str, int, int]:
    """Architecture, side and batch of e.g. 'tiny-224-8'."""
    arch, size, batch = text.split("-")
    return arch, int(size), int(batch)


def main() -> None:
    """Run the benchmark."""
    parser = argument_parser(__doc__.splitlines()[0])
    parser.add_argument("--cells", nargs="+", type=parse_cell, default=list(map(parse_cell, CELLS)))
    args = parser.parse_args()
    run_benchmark(args, "ConvNeXt", args.cells, build_models)


if __name__ == "__main__":
    main()
