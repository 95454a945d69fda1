"""The slow twin: per-example gradients by a loop over examples, straight from the definition."""

import torch
from torch import Tensor, nn


def per_example_gradients(model, loss_fn, x, y, parameters) -> Tensor:
    """Gradients of every example's own loss, shape (N, P), in double."""
    rows = []
    for i in range(len(x)):
        loss = loss_fn(model(x[i : i + 1]), y[i : i + 1]).mean()
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        flat = [
            torch.zeros(p.numel()) if g is None else g.to_dense().reshape(-1)
            for g, p in zip(grads, parameters, strict=True)
        ]
        rows.append(torch.cat([piece.double() for piece in flat]))
    return torch.stack(rows)


def variance(rows: Tensor) -> float:
    """Unbiased trace of the covariance of the rows."""
    return float((rows - rows.mean(0)).square().sum() / (len(rows) - 1))


def chunked_variance(rows: Tensor, sizes: list[int]) -> float:
    """``sum_m b_m |g_m - g|^2 / (M - 1)`` from the definition."""
    mean = rows.mean(0)
    total, start = 0.0, 0
    for size in sizes:
        total += size * float((rows[start : start + size].mean(0) - mean).square().sum())
        start += size
    return total / (len(sizes) - 1)


class Transpose(nn.Module):
    def forward(self, x):
        return x.flatten(2).transpose(1, 2)


class Mean(nn.Module):
    def forward(self, x):
        return x.flatten(2).mean(2) if x.ndim > 2 else x


class Pool(nn.Module):
    """Mean over positions: (N, T, d) -> (N, d)."""

    def forward(self, x):
        return x.mean(1)


class Tied(nn.Module):
    """Input table and output weight are one parameter, used by two layers."""

    def __init__(self, vocabulary=7, width=5):
        super().__init__()
        self.table = nn.Embedding(vocabulary, width)
        self.middle = nn.Linear(width, width)
        self.head = nn.Linear(width, vocabulary)
        self.head.weight = self.table.weight

    def forward(self, x):
        return self.head(torch.tanh(self.middle(self.table(x)))).mean(1)


class Twice(nn.Module):
    """One layer used twice."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.layer(torch.tanh(self.layer(x)))))


class ByHand(nn.Module):
    """A parameter no layer owns, and one that is used by its layer and by hand."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))
        self.layer = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.tanh(nn.functional.linear(self.layer(x * self.scale), self.layer.weight)))


class Attention(nn.Module):
    """Attention to itself, or to another sequence; with masks; in either order of axes."""

    def __init__(self, batch_first=True, cross=False, masked=False, **options):
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first, **options)
        self.head = nn.Linear(8, 3)
        self.cross, self.masked = cross, masked

    def forward(self, x):
        h = self.embed(x)
        other = h
        if self.cross:
            other = torch.tanh(h[:, :3])[..., : self.attention.kdim]
        options = {}
        if self.masked:
            options["attn_mask"] = nn.Transformer.generate_square_subsequent_mask(h.shape[1])
            # The last position of some examples is padding.
            hidden = torch.zeros(len(x), h.shape[1])
            hidden[:, -1] = torch.where(x[:, -1, 0] > 0, -torch.inf, 0.0)
            options["key_padding_mask"] = hidden
        if not self.attention.batch_first:
            h, other = h.transpose(0, 1), other.transpose(0, 1)
        out = self.attention(h, other, value=other, need_weights=False, **options)[0]
        return self.head(out.mean(1 if self.attention.batch_first else 0))
