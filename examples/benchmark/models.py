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


class LSTM(nn.Module):
    """Byte-level LSTM language model."""

    def __init__(self, width: int = 48, layers: int = 1) -> None:
        super().__init__()
        self.token = nn.Embedding(128, width)
        self.rnn = nn.LSTM(width, width, layers, batch_first=True)
        self.head = nn.Linear(width, 128)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.rnn(self.token(ids))[0])


class CausalConv(nn.Module):
    """Byte-level language model of dilated causal convolutions with residual connections."""

    def __init__(self, width: int = 48, layers: int = 4) -> None:
        super().__init__()
        self.token = nn.Embedding(128, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
        self.convolutions = nn.ModuleList(nn.Conv1d(width, width, 2, dilation=2**i) for i in range(layers))
        self.head = nn.Linear(width, 128)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids)
        for norm, convolution in zip(self.norms, self.convolutions, strict=True):
            past = F.pad(norm(x).transpose(1, 2), (convolution.dilation[0], 0))
            x = x + F.gelu(convolution(past)).transpose(1, 2)
        return self.head(x)


class Counter(nn.Module):
    """(batch, time, features) -> (batch, 1): a GRU whose last state is read."""

    def __init__(self, features: int = 2, width: int = 32) -> None:
        super().__init__()
        self.rnn = nn.GRU(features, width, batch_first=True)
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class Rearranger(nn.Module):
    """(batch, time) symbols -> (batch, time, symbols) logits: a transformer that sees the whole sequence."""

    def __init__(self, symbols: int = 16, length: int = 10, width: int = 32, layers: int = 2) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(symbols, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, 4, causal=False) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, symbols)

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1], device=ids.device)
        return self.head(self.norm(self.blocks(self.token(ids) + self.position(places))))


class Mixer(nn.Module):
    """8x8 image -> class logits: its sixteen patches of four pixels are mixed along places and features in turn."""

    def __init__(self, width: int = 24, layers: int = 2, classes: int = 10) -> None:
        super().__init__()
        self.embed = nn.Linear(4, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * layers))
        sizes = [16, width] * layers
        self.mixers = nn.ModuleList(
            nn.Sequential(nn.Linear(size, 2 * size), nn.GELU(), nn.Linear(2 * size, size)) for size in sizes
        )
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        patches = x.view(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, 16, 4)
        x = self.embed(patches)
        for i, (norm, mixer) in enumerate(zip(self.norms, self.mixers, strict=True)):
            mixed = norm(x)
            x = x + (mixer(mixed) if i % 2 else mixer(mixed.transpose(1, 2)).transpose(1, 2))
        return self.head(x.mean(1))


class PlainConv2d(nn.Module):
    """8x8 image -> class logits: convolutions without normalisation, dropout before the head."""

    def __init__(self, width: int = 12, layers: int = 3, dropout: float = 0.2, classes: int = 10) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        for i in range(layers):
            parts += [nn.Conv2d(width if i else 1, width, 3, padding=1, stride=2 if i == 1 else 1), nn.ReLU()]
        self.body = nn.Sequential(*parts)
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(dropout), nn.Linear(16 * width, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x.view(-1, 1, 8, 8)))


class Denoiser(nn.Module):
    """8x8 image -> 8x8 image: convolutions down and up again with a skip connection."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.last = nn.Conv2d(2 * width, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        fine = F.relu(self.first(x.view(-1, 1, 8, 8)))
        coarse = F.relu(self.up(F.relu(self.down(fine))))
        return self.last(torch.cat([fine, coarse], 1)).flatten(1)


class VAE(nn.Module):
    """Image -> logits of its pixels, means and log variances of its ``latent`` code, side by side."""

    def __init__(self, inputs: int = 64, width: int = 64, latent: int = 6) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, 2 * latent))
        self.decode = nn.Sequential(nn.Linear(latent, width), nn.ReLU(), nn.Linear(width, inputs))

    def forward(self, x: Tensor) -> Tensor:
        mean, log_variance = self.encode(x).chunk(2, 1)
        noise = torch.randn_like(mean) if self.training else torch.zeros_like(mean)
        return torch.cat([self.decode(mean + noise * (log_variance / 2).exp()), mean, log_variance], 1)


class GroupNormConv(nn.Module):
    """(batch, length) signal -> class logits: residual convolutions with GroupNorm."""

    def __init__(self, width: int = 16, blocks: int = 2, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv1d(1, width, 5, stride=2, padding=2)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.GroupNorm(4, width), nn.SiLU(), nn.Conv1d(width, width, 3, padding=1))
            for _ in range(2 * blocks)
        )
        self.norm, self.head = nn.GroupNorm(4, width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x[:, None])
        for block in self.blocks:
            x = x + block(x)
        return self.head(F.silu(self.norm(x)).mean(2))


class Bag(nn.Module):
    """(batch, length) ids of n-grams -> class logits: the mean of their embeddings, and a hidden layer."""

    def __init__(self, grams: int = 4096, width: int = 32, classes: int = 8) -> None:
        super().__init__()
        self.grams = nn.EmbeddingBag(grams, width)
        self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes))

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.grams(ids))


class Dropped(nn.Module):
    """Perceptron with dropout."""

    def __init__(self, inputs: int, outputs: int, width: int = 64, depth: int = 2, dropout: float = 0.3) -> None:
        super().__init__()
        sizes = [inputs] + [width] * depth
        parts: list[nn.Module] = []
        for a, b in itertools.pairwise(sizes):
            parts += [nn.Linear(a, b), nn.ReLU(), nn.Dropout(dropout)]
        self.body = nn.Sequential(*parts, nn.Linear(sizes[-1], outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


NETWORKS = {
    network.__name__: network
    for network in (
        *(GPT, Recurrent, PatchTransformer, Conv, ResConv, MLP, AutoEncoder, Factors),
        *(LSTM, CausalConv, Counter, Rearranger, Mixer, PlainConv2d, Denoiser, VAE, GroupNormConv, Bag, Dropped),
    )
}
