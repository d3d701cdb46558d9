"""A tape does again what was recorded, on new values, in memory of its own; or it is refused."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from fedmp.cohort.recording import record
from fedmp.cohort.tape import CannotReplayError, Tape

Made = tuple[torch.Tensor, ...]


def taped(run: Callable[[], Made], known: list[torch.Tensor]) -> Tape:
    results, recording = record(run)
    return Tape(recording, known=known, results=results)


def image_net(x: torch.Tensor, w: torch.Tensor) -> Made:
    y = F.relu(F.conv2d(x, w.view(4, 3, 2, 2), padding=1))
    z = F.max_pool2d(y, 2).flatten(1)
    return F.log_softmax(z, 1), y.mean((2, 3)), z.argmax(1)


def in_place(x: torch.Tensor, w: torch.Tensor) -> Made:
    y = x * 2
    y[:, 1:].add_(w.sum())
    y.clamp_(min=0)
    halves = y.chunk(2, dim=2)
    joined = torch.cat([halves[1], halves[0].exp()], dim=2)
    return joined, torch.where(joined > 1, joined, y), joined.transpose(1, 2)


def constants(x: torch.Tensor, w: torch.Tensor) -> Made:
    mask = torch.ones(5, 5).tril()
    places = torch.arange(5) * 2
    scale = torch.tensor([0.5, 2.0])
    moved = torch.zeros(2, 3, 5, 5)
    moved[:, :, 1:] = x[:, :, :-1]
    return (x * mask + moved) * scale.view(2, 1, 1, 1), F.embedding(places, w.view(24, 2)), mask


def indexed(x: torch.Tensor, w: torch.Tensor) -> Made:
    order = torch.tensor([2, 0, 1])
    y = x[:, order]
    y[torch.tensor([1]), :, 2] = w[:5].view(1, 1, 5)
    return y, x.gather(2, torch.zeros(2, 3, 1, 5, dtype=torch.int64)), y.sort(3).values, torch.stack([y, x])


def cut(x: torch.Tensor, w: torch.Tensor) -> Made:
    first, rest = torch.split(w, [8, 40])
    a, b = torch.aminmax(rest)
    return (*torch.unbind(first.view(2, 4)), torch.lerp(a, b, 0.25), F.gelu(x), F.pad(x, (1, 1), value=2.0))


def shapes_in_place(x: torch.Tensor, w: torch.Tensor) -> Made:
    y = (x + 1).unsqueeze_(0)
    z = w.clone().view(6, 8).t_()
    return y.squeeze_(0) * 2, z + 0, x.max(), x.min()


def whole_losses(x: torch.Tensor, w: torch.Tensor) -> Made:
    p = torch.sigmoid(x)
    return F.binary_cross_entropy(p, p.detach().round()), F.mse_loss(x, p), x.sum(dim=[1, 2])


def turned(x: torch.Tensor, w: torch.Tensor) -> Made:
    return F.batch_norm(
        x.flatten(2).transpose(1, 2).contiguous().transpose(1, 2), None, None, training=True
    ), w


def statistics(x: torch.Tensor, w: torch.Tensor) -> Made:
    mean, var = torch.zeros(3), torch.ones(3)
    y = F.batch_norm(x, mean, var, training=True)
    return y, mean, var, F.layer_norm(y, (5,), w[:5])


@pytest.mark.parametrize(
    "function",
    [image_net, in_place, constants, indexed, cut, shapes_in_place, whole_losses, turned, statistics],
)
def test_a_replay_gives_what_the_function_gives(function: Callable[..., Made]) -> None:
    x, w = torch.randn(2, 3, 5, 5), torch.randn(48)
    tape = taped(lambda: function(x, w), [x, w])
    for _ in range(3):
        x.normal_()
        w.normal_()
        expected = function(x.clone(), w.clone())
        tape.replay()
        for found, wanted in zip(tape.results, expected, strict=True):
            assert torch.equal(found, wanted)


def test_a_backward_is_replayed() -> None:
    x, w = torch.randn(7, 5), torch.randn(5, 3, requires_grad=True)
    y = torch.tensor([0, 1, 2, 0, 1, 2, 0])

    def gradient() -> Made:
        loss = F.cross_entropy(torch.tanh(x) @ w, y)
        (found,) = torch.autograd.grad(loss, [w])
        return loss.detach(), found

    tape = taped(gradient, [x, w, y])
    x.normal_()
    y.copy_(torch.tensor([2, 2, 1, 1, 0, 0, 0]))
    tape.replay()
    assert all(map(torch.equal, tape.results, gradient()))


def test_known_tensors_are_changed_and_told() -> None:
    x, total = torch.ones(4), torch.zeros(2, 4)

    def add() -> Made:
        total[1].add_(x)
        return (total.sum(),)

    tape = taped(add, [x, total])
    tape.replay()
    tape.replay()
    assert torch.equal(total[1], torch.full((4,), 3.0))
    assert tape.results[0] == 12
    (written,) = tape.written
    assert written.data_ptr() == total.data_ptr()


def test_memory_is_used_again() -> None:
    x = torch.randn(1000)

    def deep() -> Made:
        y = x
        for _ in range(50):
            y = torch.tanh(y) + 1
        return (y,)

    tape = taped(deep, [x])
    assert tape.num_bytes <= 2 * 4096  # of 100 tensors of 4,000 bytes
    x.normal_()
    tape.replay()
    assert torch.equal(tape.results[0], deep()[0])


@pytest.mark.parametrize("seed", range(30))
def test_random_programs(seed: int) -> None:
    """Views, changes in place, and tensors that live long and short, in an order that nobody thought of."""
    x = torch.randn(6, 6, generator=torch.Generator().manual_seed(seed))

    def run() -> Made:
        choice = random.Random(seed)
        made = [x + 0.0, x.t() * 1.5]
        for _ in range(40):
            a, b = choice.choice(made), choice.choice(made)
            match choice.randrange(9):
                case 0:
                    made.append(a + b)
                case 1:
                    made.append(torch.tanh(a))
                case 2:
                    made.append((a @ b) / 6)
                case 3:
                    made.append(a.t())
                case 4:
                    a[choice.randrange(6)].mul_(0.5)
                case 5:
                    a[:, 1:3].copy_(torch.sigmoid(b[:, 2:4]))
                case 6:
                    made.append(F.relu(a))
                case 7:
                    made.append(torch.softmax(a, choice.randrange(2)))
                case 8:
                    made.append(torch.cat([a[3:], b[:3].clone()]))
            if len(made) > 5:
                del made[choice.randrange(len(made))]
        return tuple(made)

    tape = taped(run, [x])
    for factor in (0.5, -1.0):
        x.mul_(factor)
        expected = run()
        tape.replay()
        for found, wanted in zip(tape.results, expected, strict=True):
            assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: (x * float(x.sum()),), "lets values decide"),
        (lambda x: (x[x > 0],), "lets values decide"),
        (lambda x: (F.dropout(x),), "draws random numbers"),
        (lambda x: (torch.ones(3).add_(torch.tensor(1.0)), torch.tensor([1.0]).mul_(2)), "is not known"),
        (lambda x: (torch.fft.fft(x).real,), "not plain"),
    ],
)
def test_what_cannot_be_replayed_is_refused(function: Callable[[torch.Tensor], Made], reason: str) -> None:
    x = torch.randn(5000, 2)
    results, recording = record(lambda: function(x))
    with pytest.raises(CannotReplayError, match=reason):
        Tape(recording, known=[x], results=results)


def test_two_recordings_are_told_apart() -> None:
    x, w = torch.randn(4), torch.randn(4)

    def scaled(factor: float, shift: float) -> Tape:
        return taped(lambda: (x * factor + torch.full((4,), shift),), [x])

    assert scaled(2.0, 1.0).is_same(scaled(2.0, 1.0))
    assert not scaled(2.0, 1.0).is_same(scaled(3.0, 1.0))
    assert not scaled(2.0, 1.0).is_same(scaled(2.0, 1.5))
    assert not scaled(2.0, 1.0).is_same(taped(lambda: (x * 2.0,), [x]))
    assert taped(lambda: (x + w,), [x]).is_same(taped(lambda: (x + w,), [x]))
    assert not taped(lambda: (x + w,), [x]).is_same(taped(lambda: (x + w.clone(),), [x]))
    first = taped(lambda: (x + torch.arange(4),), [x])
    assert first.is_same(taped(lambda: (x + torch.arange(4),), [x]))
    assert not first.is_same(taped(lambda: (x + torch.arange(1, 5),), [x]))


@pytest.mark.parametrize(
    "outside",
    [
        lambda x: torch.tensor([float(len(x))]),
        lambda x: torch.tensor(x.tolist()),
        lambda x: torch.from_numpy(x.numpy() * 1),
    ],
    ids=["literal", "list", "numpy"],
)
def test_a_tensor_that_comes_from_nowhere_is_never_the_same(
    outside: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    x = torch.ones(4)
    first = taped(lambda: (x * outside(x),), [x])
    assert not first.is_same(taped(lambda: (x * outside(x),), [x]))


def test_changes_without_a_result_are_replayed() -> None:
    x = torch.zeros(3)

    def add() -> Made:
        made = [x + 1, x + 2]
        torch._foreach_add_(made, 0.5)
        return tuple(made)

    tape = taped(add, [x])
    x.fill_(4.0)
    tape.replay()
    assert [float(t[0]) for t in tape.results] == [5.5, 6.5]
