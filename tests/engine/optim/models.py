"""A student of three sub-modules, small enough to train in a test."""

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, dims: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dims)
        self.mlp = nn.Linear(dims, dims)

    def forward(self, x):
        return x + self.mlp(self.norm1(x))


class Backbone(nn.Module):
    def __init__(self, dims: int = 8, depth: int = 2):
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, dims))
        self.patch_embed = nn.Sequential(nn.Linear(dims, dims))
        self.blocks = nn.ModuleList(Block(dims) for _ in range(depth))
        self.norm = nn.LayerNorm(dims)

    def forward(self, x):
        x = self.patch_embed(x) + self.cls_token
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Head(nn.Module):
    def __init__(self, dims: int = 8, num_prototypes: int = 5):
        super().__init__()
        self.mlp = nn.Linear(dims, dims)
        self.last_layer = nn.Linear(dims, num_prototypes, bias=False)

    def forward(self, x):
        return self.last_layer(self.mlp(x))


class ToyModel(nn.Module):
    """``student.{backbone,dino_head,ibot_head}`` with a squared-error loss; a frozen teacher."""

    def __init__(self):
        super().__init__()
        self.student = nn.ModuleDict(
            {"backbone": Backbone(), "dino_head": Head(), "ibot_head": Head()}
        )
        self.teacher = nn.Linear(3, 3).requires_grad_(False)

    def forward(self, x):
        features = self.student["backbone"](x)
        dino, ibot = self.student["dino_head"](features), self.student["ibot_head"](features)
        return ((dino - 1) ** 2).mean() + 10 * ((ibot + 1) ** 2).mean()
