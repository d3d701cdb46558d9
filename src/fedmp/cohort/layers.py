"""Batched rules of layers: products as one batched product, convolutions as one grouped convolution.

Images keep the clients beside the channels, last in memory, from one layer to the next: on a CPU the
grouped convolution and the pooling of such tensors are several times faster than those of any other order.

Shape letters: K clients, B batch, C and O channels in and out, H height, W width, N rows, V words.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from fedmp.cohort.convolution import Sizes, grouped_convolution
from fedmp.cohort.linear import batched_linear
from fedmp.cohort.registry import CannotStackError, batched_rule
from fedmp.cohort.stacked import Stacked, _by_vmap

__all__ = ["register"]


def register() -> None:
    """Register the rules of this module."""
    batched_rule(F.linear)(_linear)
    for func, dims in ((torch.conv1d, 1), (torch.conv2d, 2), (torch.conv3d, 3)):
        batched_rule(func)(_convolution(func, dims))
    for name, dims in _IMAGE_FUNCTIONS.items():
        func = getattr(F, name)
        batched_rule(func)(_by_image(func, dims))
    # with indices or not, F.max_pool2d and its like are dispatched on by a flag
    for dims in (1, 2, 3):
        batched_rule(getattr(torch, f"max_pool{dims}d"))(_by_image(getattr(torch, f"max_pool{dims}d"), dims))
    batched_rule(F.batch_norm)(_batch_norm)
    batched_rule(F.layer_norm)(_layer_norm)
    batched_rule(F.rms_norm)(_rms_norm)
    batched_rule(F.group_norm)(_group_norm)
    batched_rule(F.embedding)(_embedding)
    batched_rule(F.scaled_dot_product_attention)(_attention)
    batched_rule(F.pad)(_pad)


_IMAGE_FUNCTIONS = {
    "avg_pool1d": 1,
    "avg_pool2d": 2,
    "avg_pool3d": 3,
    "max_pool1d": 1,
    "max_pool2d": 2,
    "max_pool3d": 3,
    "adaptive_avg_pool1d": 1,
    "adaptive_avg_pool2d": 2,
    "adaptive_avg_pool3d": 3,
    "adaptive_max_pool2d": 2,
    "lp_pool2d": 2,
    "interpolate": 2,
    "pixel_shuffle": 2,
    "pixel_unshuffle": 2,
}


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    if not isinstance(weight, Stacked):  # a frozen layer, the same for all clients
        out = F.linear(x, weight)
        if bias is None:
            return out
        return out + (_between(bias, out.dim()) if isinstance(bias, Stacked) else bias)
    if not isinstance(x, Stacked):
        x = x.unsqueeze(0).expand(weight.shape[0], *x.shape)
    if bias is not None and not isinstance(bias, Stacked):
        return _linear(x, weight) + bias
    rows = x.reshape(x.shape[0], -1, x.shape[-1]) if x.dim() != 3 else x
    return batched_linear(rows, weight, bias).view(*x.shape[:-1], weight.shape[1])


def _convolution(func: Callable[..., Any], dims: int) -> Callable[..., Any]:
    def rule(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> torch.Tensor:
        if not isinstance(weight, Stacked) and not isinstance(bias, Stacked) and x.dim() == dims + 3:
            return _unfolded(func(_folded(x), weight, bias, stride, padding, dilation, groups), x.shape[0])
        is_plain = isinstance(weight, Stacked) and isinstance(bias, Stacked | None)
        if not is_plain or x.dim() != dims + 2 + isinstance(x, Stacked):
            given = (x, weight, bias, stride, padding, dilation, groups)
            return _by_vmap(func, given, {})  # type: ignore[no-any-return]
        clients = weight.shape[0]
        if not isinstance(x, Stacked):
            x = x.unsqueeze(0).expand(clients, *x.shape)
        wide = _beside_channels(x)
        if dims == 2 and weight.shape[-2:] == (1, 1) and _pair(padding) == (0, 0):
            # oneDNN's strided 1x1 kernel for AVX2 writes past its memory when it goes back through channels last
            down, along = _pair(stride)
            wide, stride = wide[:, :, ::down, ::along], 1
        if dims == 2:
            wide = wide.contiguous(memory_format=torch.channels_last)
            if not isinstance(padding, str):
                sizes = Sizes(_pair(stride), _pair(padding), _pair(dilation), clients * groups)
                return _from_channels(grouped_convolution(wide, weight, bias, sizes), clients)
        flat_bias = None if bias is None else bias.reshape(-1)
        kernels = weight.reshape(-1, *weight.shape[2:])
        out = func(wide, kernels, flat_bias, stride, padding, dilation, clients * groups)
        return _from_channels(out, clients)

    return rule


def _pair(size: Any) -> Any:
    """Of both dims of an image; a word that stands for a size stays as it is."""
    if isinstance(size, int):
        return size, size
    return tuple(size) * (2 // len(size)) if isinstance(size, tuple | list) else size


def _by_image(func: Callable[..., Any], dims: int) -> Callable[..., Any]:
    """A function that treats each image, or each channel, alike: clients are more channels or more images."""

    def rule(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if x.dim() != dims + 3 or func in (F.pixel_shuffle, F.pixel_unshuffle):
            clients = x.shape[0]
            return _map(lambda t: _unfolded(t, clients), func(_folded(x), *args, **kwargs))
        clients = x.shape[0]
        if dims == 2 and x.permute(1, 3, 4, 0, 2).is_contiguous():
            return _map(lambda t: _from_channels(t, clients), func(_beside_channels(x), *args, **kwargs))
        folded = _folded(x)
        if dims == 2 and x.shape[2] >= 8:  # pooling of channels-last images is many times faster
            folded = folded.contiguous(memory_format=torch.channels_last)
        return _map(lambda t: _unfolded(t, clients), func(folded, *args, **kwargs))

    return rule


def _map(function: Callable[[torch.Tensor], torch.Tensor], result: Any) -> Any:
    return tuple(map(function, result)) if isinstance(result, tuple) else function(result)


def _folded(x: torch.Tensor) -> torch.Tensor:
    """[K, B, ...] to [K B, ...]."""
    return x.flatten(0, 1)


def _unfolded(x: torch.Tensor, clients: int) -> torch.Tensor:
    return x.unflatten(0, (clients, -1))  # type: ignore[no-any-return]


def _beside_channels(x: torch.Tensor) -> torch.Tensor:
    """[K, B, C, ...] to [B, K C, ...]."""
    return x.transpose(0, 1).flatten(1, 2)


def _from_channels(x: torch.Tensor, clients: int) -> torch.Tensor:
    """[B, K C, ...] to [K, B, C, ...], a view; images' gradient comes back with the channels last, too."""
    if x.requires_grad and x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        x.register_hook(_channels_last)
    return x.unflatten(1, (clients, -1)).transpose(0, 1)  # type: ignore[no-any-return]


def _channels_last(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.contiguous(memory_format=torch.channels_last)


def _between(vector: torch.Tensor, dims: int, place: int = -1) -> torch.Tensor:
    """[K, C] with dims of size 1 such that C stands at `place` of a physical tensor of so many dims."""
    shape = [1] * dims
    shape[0], shape[place] = vector.shape
    return vector.reshape(shape)


def _batch_norm(
    x: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> torch.Tensor:
    """Clients are more channels, so each has statistics of its own."""
    if not isinstance(x, Stacked):
        raise CannotStackError("batch norm of a shared tensor")
    clients, channels = x.shape[0], x.shape[2]

    def flat(vector: torch.Tensor | None, *, is_statistic: bool = False) -> torch.Tensor | None:
        if vector is None:
            return None
        if not isinstance(vector, Stacked):
            if is_statistic and training:
                raise CannotStackError("batch-norm statistics that all clients share")
            vector = vector.unsqueeze(0).expand(clients, channels)
        return vector.view(-1) if is_statistic and training else vector.reshape(-1)

    wide = _beside_channels(x)
    if len(wide) == 1:  # where strides can be read in both ways, torch 2.13's backward goes astray
        wide = wide.clone(memory_format=torch.contiguous_format)
    out = F.batch_norm(
        wide,
        flat(running_mean, is_statistic=True),
        flat(running_var, is_statistic=True),
        flat(weight),
        flat(bias),
        training,
        momentum,
        eps,
    )
    return _from_channels(out, clients)


def _scaled(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
    """An affine map along the last dims, by weights of each client or of all."""
    for vector, apply in ((weight, torch.mul), (bias, torch.add)):
        if vector is not None:
            if isinstance(vector, Stacked):
                missing = x.dim() - vector.dim()
                vector = vector.reshape(vector.shape[0], *[1] * missing, *vector.shape[1:])
            x = apply(x, vector)
    return x


def _layer_norm(
    x: torch.Tensor, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> torch.Tensor:
    return _scaled(F.layer_norm(x, normalized_shape, None, None, eps), weight, bias)


def _rms_norm(
    x: torch.Tensor, normalized_shape: Any, weight: Any = None, eps: float | None = None
) -> torch.Tensor:
    return _scaled(F.rms_norm(x, normalized_shape, None, eps), weight, None)


def _group_norm(
    x: torch.Tensor, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> torch.Tensor:
    out = _unfolded(F.group_norm(_folded(x), num_groups, None, None, eps), x.shape[0])
    for vector, apply in ((weight, torch.mul), (bias, torch.add)):
        if vector is not None:
            own = vector if isinstance(vector, Stacked) else vector.unsqueeze(0)
            out = apply(out, _between(own, out.dim(), 2))
    return out


def _embedding(
    indices: torch.Tensor,
    weight: torch.Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> torch.Tensor:
    """One table of all clients' rows; a client's indices point at its own."""
    if max_norm is not None or scale_grad_by_freq or sparse:
        raise CannotStackError("an embedding with max_norm, scale_grad_by_freq or sparse gradients")
    if not isinstance(weight, Stacked):
        return F.embedding(indices, weight, padding_idx)
    clients, words, width = weight.shape
    if not isinstance(indices, Stacked):
        indices = indices.unsqueeze(0).expand(clients, *indices.shape)
    first_row = torch.arange(clients, device=indices.device) * words
    own = indices + first_row.view(-1, *[1] * (indices.dim() - 1))
    out = F.embedding(own, weight.reshape(clients * words, width))
    if padding_idx is None:
        return out
    is_padding = (indices == padding_idx % words).unsqueeze(-1)
    return torch.where(is_padding, out.detach(), out)


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **kwargs: Any,
) -> torch.Tensor:
    """[K, ..., L, E]: clients are more samples."""
    if not all(isinstance(tensor, Stacked) and tensor.dim() >= 4 for tensor in (query, key, value)):
        given = (query, key, value, attn_mask, dropout_p, is_causal)
        return _by_vmap(F.scaled_dot_product_attention, given, kwargs)  # type: ignore[no-any-return]
    clients = query.shape[0]
    if isinstance(attn_mask, Stacked):
        missing = query.dim() - attn_mask.dim()
        mask = attn_mask.reshape(clients, *[1] * missing, *attn_mask.shape[1:])
        attn_mask = _folded(mask.expand(*query.shape[:2], *mask.shape[2:]))
    elif attn_mask is not None and attn_mask.dim() == query.dim() - 1 and attn_mask.shape[0] != 1:
        attn_mask = attn_mask.repeat(clients, *[1] * (attn_mask.dim() - 1))
    q, k, v = _folded(query), _folded(key), _folded(value)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, **kwargs)
    return _unfolded(out, clients)


def _pad(x: torch.Tensor, pad: Any, mode: str = "constant", value: float | None = None) -> torch.Tensor:
    if mode == "constant":
        return F.pad(x, pad, mode, value)
    return _unfolded(F.pad(_folded(x), pad, mode, value), x.shape[0])
