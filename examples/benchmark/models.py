"""Small networks of the kinds people train, each built from keywords so that a workload is plain data."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU, "sigmoid": nn.Sigmoid}


class Block(nn.Module):
    """Pre-norm transformer block with causal attention."""

    def __init__(self, width: int, heads: int, causal: bool = True) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(mixed.transpose(1, 2).reshape(b, t, d))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Byte-level language model: (batch, time) ids -> (batch, time, 128) logits."""

    def __init__(self, width: int = 64, layers: int = 2, heads: int = 4, context: int = 64) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(128, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 128, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1], device=ids.device)
        return self.head(self.norm(self.blocks(self.token(ids) + self.position(places))))


class Recurrent(nn.Module):
    """Byte-level GRU language model."""

    def __init__(self, width: int = 64, layers: int = 1) -> None:
        super().__init__()
        self.token = nn.Embedding(128, width)
        self.rnn = nn.GRU(width, width, layers, batch_first=True)
        self.head = nn.Linear(width, 128)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.rnn(self.token(ids))[0])


class PatchTransformer(nn.Module):
    """(batch, length) signal -> class logits: patches of ``patch`` samples, mean over time."""

    def __init__(self, length: int = 40, patch: int = 4, width: int = 32, layers: int = 2, classes: int = 10) -> None:
        super().__init__()
        self.patch = patch
        self.embed, self.position = nn.Linear(patch, width), nn.Parameter(torch.zeros(length // patch, width))
        self.blocks = nn.Sequential(*(Block(width, 4, causal=False) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        patches = x.unflatten(1, (-1, self.patch))
        return self.head(self.norm(self.blocks(self.embed(patches) + self.position)).mean(1))


class Conv(nn.Module):
    """(batch, length) signal -> class logits: strided convolutions with BatchNorm."""

    def __init__(self, width: int = 24, layers: int = 3, classes: int = 10) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        for i in range(layers):
            parts += [nn.Conv1d(width if i else 1, width, 5, stride=2, padding=2), nn.BatchNorm1d(width), nn.ReLU()]
        self.body = nn.Sequential(*parts)
        self.head = nn.LazyLinear(classes)
        self.head(self.body(torch.zeros(2, 1, 40)).flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x[:, None]).flatten(1))


class ResConv(nn.Module):
    """(batch, length) signal -> class logits: residual blocks with BatchNorm, mean over time."""

    def __init__(self, width: int = 24, blocks: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv1d(1, width, 5, stride=2, padding=2)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm1d(width),
                nn.ReLU(),
                nn.Conv1d(width, width, 3, padding=1, bias=False),
                nn.BatchNorm1d(width),
                nn.ReLU(),
                nn.Conv1d(width, width, 3, padding=1, bias=False),
            )
            for _ in range(blocks)
        )
        self.norm, self.head = nn.BatchNorm1d(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x[:, None])
        for block in self.blocks:
            x = x + block(x)
        return self.head(F.relu(self.norm(x)).mean(2))


class MLP(nn.Module):
    """Plain perceptron; ``norm`` puts BatchNorm before each activation, ``fourier`` widens coordinates first."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        width: int = 64,
        depth: int = 2,
        activation: str = "relu",
        norm: bool = False,
        fourier: int = 0,
    ) -> None:
        super().__init__()
        self.fourier = fourier
        sizes = [inputs * (1 + 2 * fourier)] + [width] * depth
        parts: list[nn.Module] = []
        for a, b in itertools.pairwise(sizes):
            parts += [nn.Linear(a, b), *([nn.BatchNorm1d(b)] if norm else []), ACTIVATIONS[activation]()]
        self.body = nn.Sequential(*parts, nn.Linear(sizes[-1], outputs))

    def forward(self, x: Tensor) -> Tensor:
        waves = [f(2**i * x) for i in range(self.fourier) for f in (torch.sin, torch.cos)]
        return self.body(torch.cat([x, *waves], 1) if waves else x)


class AutoEncoder(nn.Module):
    """Image -> itself through ``bottleneck`` numbers."""

    def __init__(self, inputs: int = 64, width: int = 64, bottleneck: int = 8) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, bottleneck))
        self.decode = nn.Sequential(nn.Linear(bottleneck, width), nn.ReLU(), nn.Linear(width, inputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))


class Factors(nn.Module):
    """(batch, 2) row and column -> (batch, 1) scalar product of their factors, which begin near zero: at a saddle."""

    def __init__(self, rows: int = 300, columns: int = 200, width: int = 16, scale: float = 0.1) -> None:
        super().__init__()
        self.rows, self.columns = nn.Embedding(rows, width), nn.Embedding(columns, width)
        for factor in (self.rows, self.columns):
            nn.init.normal_(factor.weight, 0.0, scale)

    def forward(self, x: Tensor) -> Tensor:
        return (self.rows(x[:, 0]) * self.columns(x[:, 1])).sum(-1, keepdim=True)


NETWORKS = {c.__name__: c for c in (GPT, Recurrent, PatchTransformer, Conv, ResConv, MLP, AutoEncoder, Factors)}
