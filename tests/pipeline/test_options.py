"""What a trainer builds on exact gradients: accumulation, clipping, dropout, checkpoints, precision, bytes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedmp.graph import trace
from fedmp.pipeline import RunnerOptions
from fedmp.schedule import GPipe, Interleaved, OneFOneB, Schedule, ZeroBubble
from fedmp.tasks import CrossEntropy
from tests.pipeline.harness import assert_same_gradients, cut, make_runners, own_stages, traced, train
from tests.support.memory_transport import run_ranks
from tests.support.models import CASES


def full_batch(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    """The gradient of the batch's mean loss, in one go."""
    F.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten()).backward()


def joined(batches: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])


def test_accumulating_two_batches_gives_the_gradient_of_both_with_tied_weights() -> None:
    model, graph = traced("gpt")
    assert any(stage.blueprint.shared for stage in own_stages(model, graph, 3))
    stages = own_stages(model, graph, 3)
    runners = make_runners(stages)
    batches = [CASES["gpt"][1](5, 1), CASES["gpt"][1](3, 2)]
    total = float(sum(targets.numel() for _, targets in batches))

    def work(rank: int) -> None:
        for step, batch in enumerate(batches):
            parts = cut(batch, 3)
            runners[rank].train_batch(parts, OneFOneB(), round=1, step=step, total_weight=total)
        runners[rank].finish_gradients(round=1, step=1)

    run_ranks(work, 3)
    full_batch(model, joined(batches))
    assert_same_gradients(stages, model)


@pytest.mark.parametrize("max_norm", [1e-3, 1e6])
def test_clipping_uses_the_norm_of_the_whole_model(max_norm: float) -> None:
    model, graph = traced("gpt")
    stages = own_stages(model, graph, 3)
    runners = make_runners(stages)
    batch = CASES["gpt"][1](5, 1)
    norms = run_ranks(
        lambda rank: (
            runners[rank].train_batch(cut(batch, 2), OneFOneB(), round=1, step=0),
            runners[rank].finish_gradients(round=1, step=0, max_norm=max_norm),
        )[1],
        3,
    )
    full_batch(model, batch)
    expected = float(nn.utils.clip_grad_norm_(model.parameters(), max_norm))
    assert len(set(norms)) == 1
    assert norms[0] == pytest.approx(expected, rel=1e-12)
    assert_same_gradients(stages, model)


def test_token_weights_make_uneven_microbatches_exact() -> None:
    model, graph = traced("gpt")
    inputs, targets = CASES["gpt"][1](6, 1)
    targets = targets.clone()
    targets[:4, 2:] = -100  # the first micro-batch has few tokens that count
    targets[5] = -100  # the last sample has none
    stages = own_stages(model, graph, 2)
    train(make_runners(stages), cut((inputs, targets), 6), OneFOneB())
    full_batch(model, (inputs, targets))
    assert_same_gradients(stages, model)


@pytest.mark.parametrize("frozen", ["first", "middle", "all but the head"])
def test_frozen_parameters_get_no_gradient_and_the_others_an_exact_one(frozen: str) -> None:
    model = copy.deepcopy(traced("mlp")[0])
    parameters = list(model.parameters())
    chosen = {"first": parameters[:2], "middle": parameters[2:4], "all but the head": parameters[:-2]}[frozen]
    for parameter in chosen:
        parameter.requires_grad_(False)
    batch = CASES["mlp"][1](6, 1)
    graph = trace(model, (batch[0],))
    for schedule in (OneFOneB(), ZeroBubble()):
        stages = own_stages(model, graph, 3)
        train(make_runners(stages), cut(batch, 4), schedule)
        model.zero_grad()
        full_batch(model, batch)
        assert_same_gradients(stages, model)


class Noisy(nn.Module):
    """Dropout between layers and inside attention."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.drop = nn.Dropout(0.4)
        self.second = nn.Linear(16, 16)
        self.last = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.drop(torch.relu(self.first(x)))
        q = self.second(x)[:, None]
        x = x + F.scaled_dot_product_attention(q, q, q, dropout_p=0.3 if self.training else 0.0)[:, 0]
        return self.last(self.drop(x))


def noisy_batch(num: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(num, 8, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(0, 5, (num,), generator=generator)


def test_dropout_is_the_same_whatever_the_stages_and_the_schedule() -> None:
    model = Noisy().double()
    batch = noisy_batch(12)
    graph = trace(model, (batch[0],))

    def gradients(
        num_stages: int, schedule: Schedule, seed: int, step: int = 0, **options: bool
    ) -> torch.Tensor:
        stages = own_stages(model, graph, num_stages)
        train(
            make_runners(stages, seed=seed, options=RunnerOptions(**options)),
            cut(batch, 4),
            schedule,
            step=step,
        )
        found = {key: p.grad for stage in stages for key, p in stage.named_parameters()}
        return torch.cat([found[key].flatten() for key in sorted(found)])

    expected = gradients(1, GPipe(), seed=3)
    for num_stages in (1, 2, 4):
        for schedule in (GPipe(), OneFOneB(), ZeroBubble()):
            torch.testing.assert_close(gradients(num_stages, schedule, seed=3), expected)
    torch.testing.assert_close(gradients(3, OneFOneB(), seed=3, checkpoint=True), expected)
    assert not torch.allclose(gradients(1, GPipe(), seed=4), expected)
    assert not torch.allclose(gradients(1, GPipe(), seed=3, step=1), expected)


@pytest.mark.parametrize("name", ["cnn", "gpt"])
@pytest.mark.parametrize("schedule", [OneFOneB(), ZeroBubble()], ids=lambda schedule: schedule.name)
def test_checkpointing_changes_neither_gradients_nor_statistics(name: str, schedule: Schedule) -> None:
    model, graph = traced(name)
    batches = cut(CASES[name][1](7, 1), 3)
    found = []
    for checkpoint in (False, True):
        stages = own_stages(model, graph, 3)
        train(make_runners(stages, options=RunnerOptions(checkpoint=checkpoint)), batches, schedule)
        found.append(stages)
    for plain, again in zip(*found, strict=True):
        for (key, mine), other in zip(again.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-12, atol=1e-14, msg=key)
        for (key, mine), other in zip(again.named_buffers(), plain.buffers(), strict=True):
            assert torch.equal(mine, other), key


def test_autocast_in_bfloat16_stays_near_the_exact_gradient() -> None:
    model, _ = traced("mlp")
    model = model.float()
    inputs, targets = CASES["mlp"][1](8, 1)
    graph = trace(model, (inputs.float(),))
    batch = (inputs.float(), targets)
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(batch[0]).float(), batch[1])
    loss.backward()
    for schedule in (OneFOneB(), ZeroBubble()):
        stages = own_stages(model, graph, 3)
        options = RunnerOptions(autocast=torch.bfloat16)
        train(make_runners(stages, options=options), cut(batch, 4), schedule)
        # bfloat16 has 8 bits: gradients of 4 micro-batches differ from those of one by some of them
        assert_same_gradients(stages, model, rtol=0.1, atol=2e-2)


@pytest.mark.parametrize(("compression", "share", "tolerance"), [("bf16", 0.55, 0.02), ("int8", 0.45, 0.05)])
def test_compression_saves_bytes_and_keeps_the_direction(
    compression: str, share: float, tolerance: float
) -> None:
    model, _ = traced("cnn")
    model = model.float()
    inputs, targets = CASES["cnn"][1](16, 1)
    batch = (inputs.float(), targets)
    graph = trace(model, (batch[0],))
    sent, gradients = [], []
    for kind in ("none", compression):
        options = RunnerOptions(compress_activations=kind, compress_gradients=kind)  # type: ignore[arg-type]
        stages = own_stages(model, graph, 2)
        runners = make_runners(stages, options=options)
        train(runners, cut(batch, 2), OneFOneB())
        sent.append(sum(runner.bytes_sent for runner in runners))
        gradients.append(torch.cat([p.grad.flatten() for s in stages for p in s.parameters()]))
    assert sent[1] < share * sent[0]
    assert float(F.cosine_similarity(*gradients, dim=0)) > 1 - tolerance


class Awkward(nn.Module):
    """Integers, bools and a skip across everything; writes into what it received; returns a None."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 6)
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(6, 4)

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, None]:
        mask = ids > 4
        skip = self.embed(ids)
        x = self.act(self.first(skip))
        x = self.act(self.second(x))
        x = torch.where(mask[..., None], x + skip, x) + (ids % 3)[..., None].to(x.dtype)
        return self.head(x).mean(1), None


class FirstOutput(CrossEntropy):
    """Cross entropy of the first of several outputs."""

    def loss_sum(self, output: tuple[torch.Tensor, None], targets: torch.Tensor) -> torch.Tensor:
        """Of `output[0]`."""
        assert output[1] is None
        return super().loss_sum(output[0], targets)

    def num_correct(self, output: tuple[torch.Tensor, None], targets: torch.Tensor) -> float:
        """Of `output[0]`."""
        return super().num_correct(output[0], targets)


def test_integers_bools_skips_and_none_cross_every_cut() -> None:
    model = Awkward().double()
    ids = torch.randint(0, 10, (7, 5), generator=torch.Generator().manual_seed(0))
    targets = ids[:, 0] % 4
    graph = trace(model, (ids,))
    F.cross_entropy(model(ids)[0], targets).backward()
    for count in range(1, len(graph.layers) + 1):
        stages = own_stages(model, graph, count)
        train(make_runners(stages, task=FirstOutput()), cut((ids, targets), 3), OneFOneB())
        assert_same_gradients(stages, model)
    placement = Interleaved().placement(2)
    stages = own_stages(model, graph, 4)
    train(
        make_runners(stages, task=FirstOutput(), placement=placement), cut((ids, targets), 3), Interleaved()
    )
    assert_same_gradients(stages, model)


def test_a_seed_leaves_the_global_generator_alone() -> None:
    model = Noisy().double()
    batch = noisy_batch(4)
    stages = own_stages(model, trace(model, (batch[0],)), 1)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    train(make_runners(stages, seed=1), cut(batch, 2), GPipe())
    assert torch.equal(before, torch.get_rng_state())
