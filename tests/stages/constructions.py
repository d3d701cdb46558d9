"""Kinds of construction that models are made of, each as a small module with inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from tests.stages.oracle import MakeInputs

WIDTH = 8


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def features(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (draw(batch, WIDTH),), {}


def sequences(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (draw(batch, 5, WIDTH),), {}


def pictures(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (draw(batch, 3, 8, 8),), {}


def words(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.randint(0, 20, (batch, 6), generator=torch.Generator().manual_seed(batch)),), {}


def linears(number: int = 4) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(number))


class Skips(nn.Module):
    """A residual connection over everything, and one over each layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = linears()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        start = x
        for layer in self.layers:
            x = x + layer(x).tanh()
        return x * start


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH * (i + 1), WIDTH) for i in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = [x]
        for layer in self.layers:
            seen.append(F.relu(layer(torch.cat(seen, -1))))
        return torch.cat(seen, -1)


class UShaped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)])
        self.bottom = nn.Conv2d(6, 6, 3, padding=1)
        self.up = nn.ModuleList(
            [nn.ConvTranspose2d(6, 6, 2, stride=2), nn.ConvTranspose2d(10, 4, 2, stride=2)]
        )
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = []
        for conv in self.down:
            x = F.relu(conv(x))
            kept.append(x)
            x = F.max_pool2d(x, 2)
        x = self.norm(self.bottom(x))
        x = torch.cat([self.up[0](x)[:, :4], kept[1]], 1)
        return torch.cat([self.up[1](x), kept[0]], 1)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = linears()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layers[0](x)
        x += 1
        y = self.layers[1](x)
        y.relu_()
        y = y * x
        y -= 0.5
        z = self.layers[2](y)
        z[:, 0] = y[:, 1]
        z[:, 2:4].add_(1)
        z.view(-1)[0] = 0.5
        out = torch.zeros_like(z)
        out.copy_(z)
        out[:, ::2] = self.layers[3](z)[:, ::2]
        return out.mul_(2)


class TiedHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, WIDTH)
        self.layers = linears(3)
        self.head = nn.Linear(WIDTH, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x).tanh()
        return self.head(x)


class UsedTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH))
        self.layers = linears(3)
        self.again = self.shared

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(self.shared(x)).tanh()
        return self.again(x)


class DirectParameters(nn.Module):
    """Parameters used in forward itself, unused ones, buffers of both kinds, tensor attributes, literals."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(draw(WIDTH, WIDTH))
        self.scales = nn.ParameterList([nn.Parameter(draw(WIDTH, seed=i)) for i in range(3)])
        self.table = nn.ParameterDict({"a": nn.Parameter(draw(WIDTH)), "b": nn.Parameter(draw(WIDTH))})
        self.unused = nn.Linear(3, 3)
        self.scalar = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
        self.register_buffer("offset", draw(WIDTH, seed=9))
        self.register_buffer("hidden", draw(WIDTH, seed=8), persistent=False)
        self.register_buffer("never", draw(2))
        self.register_buffer("count", torch.tensor(0))
        self.plain = draw(WIDTH, seed=7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x @ self.first
        for scale in self.scales:
            x = (x * scale).tanh() + self.hidden
        self.count += 1
        x = x * self.table["a"] + self.offset * self.plain
        return x * torch.tensor([2.0], dtype=torch.float64) * self.scalar


class ManyInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = linears()

    def forward(
        self,
        x: torch.Tensor,
        pair: tuple[torch.Tensor, dict[str, torch.Tensor]],
        nothing: None,
        times: int,
        *,
        mask: torch.Tensor | None = None,
        extra: torch.Tensor | None = None,
        name: str = "tanh",
    ) -> torch.Tensor:
        x = self.layers[0](x) + self.layers[1](pair[0])
        if mask is not None:
            x = x.masked_fill(mask, 0.0)
        for _ in range(times):
            x = getattr(torch, name)(self.layers[2](x))
        return self.layers[3](x) if extra is None else x * pair[1]["y"]


def many_inputs(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    pair = (draw(batch, WIDTH, seed=1), {"y": draw(batch, WIDTH, seed=2)})
    return (draw(batch, WIDTH), pair, None, 2), {"mask": draw(batch, WIDTH, seed=3) > 0, "name": "sigmoid"}


@dataclasses.dataclass
class Outcome:
    """A dataclass that pytree does not know."""

    logits: torch.Tensor
    cache: Any
    steps: int
    label: str = "none"


class Cache:
    """An ordinary class that holds tensors."""

    def __init__(self) -> None:
        self.keys: list[torch.Tensor] = []
        self.limit = 3

    def add(self, key: torch.Tensor) -> None:
        self.keys.append(key)


class TreeOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = linears()

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        cache = Cache()
        for layer in self.layers:
            x = layer(x).tanh()
            cache.add(x)
        outcome = Outcome(x.sum(-1), cache, len(self.layers))
        return {"outcome": outcome, "n": x.shape[0], "none": None, "pair": (x, [x.argmax(-1), 3.5])}


class Dropouts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = linears()
        self.norm = nn.BatchNorm1d(WIDTH)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = self.drop(F.relu(layer(x)))
        return F.dropout(self.norm(x), 0.2, training=self.training)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, WIDTH, num_layers=2, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(2 * WIDTH, WIDTH, batch_first=True)
        self.rnn = nn.RNN(WIDTH, WIDTH, batch_first=True)
        self.cell = nn.LSTMCell(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, Any]:
        x, state = self.lstm(x)
        x, _ = self.gru(x)
        x, _ = self.rnn(x)
        h = c = x.new_zeros(x.shape[0], WIDTH)
        for step in x.unbind(1):
            h, c = self.cell(step, (h, c))
        return h, state


class EncoderDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Transformer(
            WIDTH, nhead=2, num_encoder_layers=2, num_decoder_layers=2, dim_feedforward=12, batch_first=True
        )

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1], dtype=target.dtype)
        return self.body(source, target, tgt_mask=mask)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.MultiheadAttention(WIDTH, 2, batch_first=True, dropout=0.1) for _ in range(4)
        )

    def forward(self, x: torch.Tensor, padding: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for block in self.blocks:
            y, weights = block(x, x, x, key_padding_mask=padding)
            x = x + y
        return x, weights


class StateSpace(nn.Module):
    """A selective scan, step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(3))
        self.decay = nn.Parameter(draw(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.inner:
            gate, update, out = layer(x).chunk(3, -1)
            state = torch.zeros_like(x[:, 0])
            steps = []
            for i in range(x.shape[1]):
                state = torch.exp(-F.softplus(self.decay)) * state + gate[:, i].sigmoid() * update[:, i]
                steps.append(state * out[:, i])
            x = x + torch.stack(steps, 1)
        return x


class Experts(nn.Module):
    """Every expert sees every token; a router weights them."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 3)
        self.experts = linears(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores, chosen = self.router(x).softmax(-1).topk(2, -1)
        weights = torch.zeros_like(self.router(x)).scatter(-1, chosen, scores)
        results = torch.stack([expert(x) for expert in self.experts], -1)
        return (results * weights.unsqueeze(-2)).sum(-1)


class ShapeFlow(nn.Module):
    """Python control flow on shapes, sizes carried as numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = linears()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, steps, width = x.shape
        y = x.reshape(batch * steps, width)
        if width % 2 == 0:
            y = self.layers[0](y)
        for i in range(steps):
            y = y + i
        y = self.layers[1](y).view(batch, steps, width).transpose(1, 2)
        y = self.layers[2](y.transpose(1, 2)).permute(2, 0, 1)
        scaled = y / (batch * steps) + torch.arange(batch, dtype=y.dtype)[None, :, None]
        return self.layers[3](scaled.permute(1, 2, 0)).flatten(1)


class Contexts(nn.Module):
    """no_grad and autocast blocks, detached branches, a buffer updated under no_grad."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = linears()
        self.register_buffer("mean", torch.zeros(WIDTH, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layers[0](x)
        with torch.no_grad():
            target = self.layers[1](x)
            if self.training:
                self.mean.mul_(0.9).add_(0.1 * target.mean(0))
        x = self.layers[2](x) * target + self.mean
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
            x = self.layers[3](x)
        return x + x.detach().exp()


class Autocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = linears()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.layers[1](self.layers[0](x).relu())
        x = self.layers[2](x.float())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.layers[3](x)


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = linears()
        self.layers[0].requires_grad_(False)
        self.layers[2].weight.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).sin()
        return x


class KindsOfTensors(nn.Module):
    """Integers, booleans and complex numbers that cross cuts."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = linears()
        self.rotation = nn.Parameter(torch.complex(draw(WIDTH), draw(WIDTH, seed=1)))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        index = x.argsort(-1)
        positive = x > 0
        phase = torch.fft.fft(x) * self.rotation
        for layer in self.layers:
            x = layer(x)
        x = torch.where(positive, x.gather(-1, index), x)
        return x + torch.fft.ifft(phase).real, index, positive, phase


class Transposed(nn.Module):
    """Tensors that are stored in another order than their dims say, viewed after the cut."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(memory_format=torch.channels_last)
        for conv in self.convs:
            x = conv(x).contiguous(memory_format=torch.channels_last)
        return x.permute(0, 2, 3, 1).view(x.shape[0], -1)


class DoubledGradient(torch.autograd.Function):
    """A backward of its own, which autograd would not find out."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return x * 1

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient * ctx.factor, None


class OwnGradient(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = linears()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = DoubledGradient.apply(layer(x), 2.0)
        return x.tanh()


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = linears()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).tanh()
        return x


class LayerDrop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = linears()
        self.probability = 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            if self.training and torch.rand([]) < self.probability:
                continue
            x = layer(x).tanh()
        return x


class ReturnsState(nn.Module):
    """Results that are inputs or parameters, and a result for one mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = linears()

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        y = x
        for layer in self.layers:
            y = layer(y).tanh()
        result = {"y": y, "x": x, "bias": self.layers[0].bias, "same": y}
        if not self.training:
            result["scores"] = y.softmax(-1)
        return result


class SpectralNorms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        wrap = nn.utils.parametrizations.weight_norm
        self.layers = nn.ModuleList(wrap(layer) for layer in linears())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return x


def two_sequences(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (draw(batch, 5, WIDTH), draw(batch, 4, WIDTH, seed=1)), {}


def padded(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    mask = torch.zeros(batch, 5, dtype=torch.bool)
    mask[0, 3:] = True
    return (draw(batch, 5, WIDTH), mask), {}


def single(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (draw(batch, WIDTH).float(),), {}


CONSTRUCTIONS: dict[str, tuple[Callable[[], nn.Module], MakeInputs]] = {
    "skips": (Skips, features),
    "dense": (Dense, features),
    "u_shaped": (UShaped, pictures),
    "in_place": (InPlace, features),
    "tied_head": (TiedHead, words),
    "used_twice": (UsedTwice, features),
    "direct_parameters": (DirectParameters, features),
    "many_inputs": (ManyInputs, many_inputs),
    "tree_output": (TreeOutput, features),
    "dropouts": (Dropouts, features),
    "recurrent": (Recurrent, sequences),
    "encoder_decoder": (EncoderDecoder, two_sequences),
    "attention": (Attention, padded),
    "state_space": (StateSpace, sequences),
    "experts": (Experts, sequences),
    "shape_flow": (ShapeFlow, sequences),
    "contexts": (Contexts, features),
    "frozen": (Frozen, features),
    "kinds_of_tensors": (KindsOfTensors, features),
    "transposed": (Transposed, pictures),
    "own_gradient": (OwnGradient, features),
    "checkpointed": (Checkpointed, features),
    "layer_drop": (LayerDrop, features),
    "returns_state": (ReturnsState, features),
    "weight_norm": (SpectralNorms, features),
}


def construct(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """One of the models, always with the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return (
            CONSTRUCTIONS[name][0]().to(dtype)
            if dtype != torch.float64
            else CONSTRUCTIONS[name][0]().double()
        )
