"""A module run once on stacked tensors is every client's module run alone: outputs and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedmp.cohort import CannotStackError, batched_rule
from fedmp.cohort.stacked import Stacked, leaf_of, stack, unstack

CLIENTS, BATCH = 3, 4


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.norm = nn.GroupNorm(2, 4)
        self.scale = nn.Parameter(torch.rand(4, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.conv(x))
        y += x * self.scale
        return F.adaptive_avg_pool2d(F.leaky_relu(y, inplace=True), 2).flatten(1)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8, padding_idx=0)
        self.places = nn.Parameter(torch.randn(5, 8))
        self.norm = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        n, t = tokens.shape
        x = self.norm(self.embed(tokens) + self.places[:t])
        q, k, v = self.qkv(x).view(n, t, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        mask = torch.ones(t, t, dtype=torch.bool).tril()
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return y.transpose(1, 2).reshape(n, t, -1).mean(1)


class Manual(nn.Module):
    """What people write by hand: slices, products, softmax, reductions over all dims."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 6))
        self.b = nn.Parameter(torch.randn(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x @ self.w + self.b
        h = torch.cat([h[:, :3], torch.tanh(h[:, 3:])], dim=-1)
        weights = torch.softmax(h, dim=1)
        mixed = torch.einsum("bi,ij->bj", weights, self.w.t())
        return torch.stack([mixed, 2 - h], dim=1).sum(dim=(-1,)) * self.w.norm() / self.b.abs().max()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.sigmoid(self.embed(x)).mean(1))  # type: ignore[no-any-return]


def images(*shape: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.randn(CLIENTS, BATCH, *shape)


def tokens(high: int, length: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.randint(0, high, (CLIENTS, BATCH, length))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], torch.Tensor]]] = {
    "mlp": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 3)), images(3, 4)),
    "conv": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 4, 3, stride=2, bias=False),
            nn.GELU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
        ),
        images(1, 14, 14),
    ),
    "shortcut": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 1, stride=2, bias=False), nn.Conv2d(6, 5, 1, stride=(1, 2))),
        images(4, 7, 8),
    ),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(2, 3, 3), nn.SiLU(), nn.MaxPool1d(2)), images(2, 9)),
    "transposed": (lambda: nn.ConvTranspose2d(2, 3, 2, stride=2), images(2, 3, 3)),
    "residual": (Residual, images(4, 6, 6)),
    "attention": (Attention, tokens(11, 5)),
    "torch's attention": (lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), images(5, 8)),
    "norms": (lambda: nn.Sequential(nn.LayerNorm(4), nn.RMSNorm(4), nn.Linear(4, 2)), images(4)),
    "manual": (Manual, images(6)),
    "tied": (Tied, tokens(7, 3)),
}


def each_alone(
    model: nn.Module, parameters: dict[str, torch.Tensor], x: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    outputs = [
        torch.func.functional_call(model, {n: p[client] for n, p in parameters.items()}, (x[client],))
        for client in range(CLIENTS)
    ]
    joined = torch.stack(outputs)
    gradients = torch.autograd.grad(joined.square().sum(), list(parameters.values()))
    return joined, list(gradients)


@pytest.mark.parametrize("name", MODELS)
def test_a_module_on_stacked_tensors_is_each_clients_module_alone(name: str) -> None:
    make, draw = MODELS[name]
    torch.manual_seed(0)
    model, x = make().double(), draw()
    x = x.double() if x.is_floating_point() else x
    parameters = {
        n: torch.randn(CLIENTS, *p.shape, dtype=torch.float64).requires_grad_()
        for n, p in model.named_parameters()
    }
    expected, gradients = each_alone(model, parameters, x)

    leaves = {n: leaf_of(p.detach().clone()) for n, p in parameters.items()}
    owners = {id(p): n for n, p in model.named_parameters()}
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[attribute] = leaves[owners[id(parameter)]]  # type: ignore[assignment]
    output = model(stack(x))
    assert output.shape == expected.shape[1:]
    torch.testing.assert_close(unstack(output), expected)
    unstack(output).square().sum().backward()
    for (owner, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        with torch._C.DisableTorchFunctionSubclass():
            actual = leaf.grad
        assert actual is not None, owner
        torch.testing.assert_close(actual, gradient, msg=lambda text, owner=owner: f"{owner}: {text}")


def test_a_branch_on_values_cannot_be_stacked() -> None:
    x = stack(torch.randn(CLIENTS, BATCH))
    with pytest.raises(CannotStackError, match="values"):
        bool(x.sum() > 0)


def test_a_shared_tensor_cannot_be_changed_by_one_client() -> None:
    with pytest.raises(CannotStackError, match="share"):
        torch.zeros(BATCH).add_(stack(torch.randn(CLIENTS, BATCH)))


def test_a_stacked_tensor_shows_one_clients_shape() -> None:
    x = stack(torch.zeros(CLIENTS, BATCH, 2))
    assert (tuple(x.shape), x.dim(), len(x), x.numel(), x.size(-1)) == ((BATCH, 2), 2, BATCH, 2 * BATCH, 2)


def test_a_user_may_say_how_a_function_runs_for_many_clients() -> None:
    calls = []

    def double(x: torch.Tensor) -> torch.Tensor:
        if torch.overrides.has_torch_function_unary(x):
            return torch.overrides.handle_torch_function(double, (x,), x)  # type: ignore[no-any-return]
        return 2 * x

    @batched_rule(double)
    def rule(x: torch.Tensor) -> torch.Tensor:
        calls.append(tuple(x.shape))
        return 2 * x

    result = double(stack(torch.ones(CLIENTS, BATCH)))
    assert isinstance(result, Stacked)
    assert calls == [(CLIENTS, BATCH)]
