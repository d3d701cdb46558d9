"""The weighted mean against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmp.aggregate import WeightedMean
from fedmp.aggregate.contract import StagedUpdate


@settings(max_examples=50, deadline=None)
@given(
    weights=st.lists(st.integers(1, 10_000), min_size=1, max_size=12),
    seed=st.integers(0, 2**32 - 1),
)
def test_it_is_numpys_weighted_average(weights: list[int], seed: int) -> None:
    drawn = np.random.default_rng(seed).normal(size=(len(weights), 5, 3))
    updates = [{"w": torch.from_numpy(values)} for values in drawn]
    mean = WeightedMean().combine(updates, [float(weight) for weight in weights])
    # float64, at most a dozen terms of order one
    np.testing.assert_allclose(
        mean["w"].numpy(), np.average(drawn, axis=0, weights=weights), rtol=1e-9, atol=1e-12
    )


def test_weights_matter_only_in_proportion() -> None:
    updates = [{"w": torch.tensor([1.0])}, {"w": torch.tensor([5.0])}]
    assert WeightedMean().combine(updates, [1.0, 3.0])["w"] == 4.0
    assert WeightedMean().combine(updates, [10.0, 30.0])["w"] == 4.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_floating_tensors_keep_their_dtype(dtype: torch.dtype) -> None:
    updates = [{"w": torch.tensor([0.0], dtype=dtype)}, {"w": torch.tensor([1.0], dtype=dtype)}]
    mean = WeightedMean().combine(updates, [1.0, 1.0])["w"]
    assert mean.dtype == dtype
    assert mean.item() == 0.5


def test_counters_are_rounded_to_whole_numbers() -> None:
    updates = [{"n": torch.tensor(value)} for value in (3, 4, 4)]
    mean = WeightedMean().combine(updates, [1.0, 1.0, 1.0])["n"]
    assert mean.dtype == torch.int64
    assert mean == 4


def test_flags_are_decided_by_the_majority_of_weight() -> None:
    updates = [{"flag": torch.tensor([True, False])}, {"flag": torch.tensor([False, False])}]
    assert WeightedMean().combine(updates, [3.0, 1.0])["flag"].tolist() == [True, False]


def test_large_half_precision_updates_do_not_overflow_on_the_way() -> None:
    updates = [{"w": torch.tensor([60000.0], dtype=torch.float16)} for _ in range(4)]
    assert WeightedMean().combine(updates, [1.0] * 4)["w"].item() == 60000.0


def test_the_updates_are_left_as_they_were() -> None:
    update = {"w": torch.ones(2)}
    WeightedMean().combine([update, {"w": torch.zeros(2)}], [1.0, 1.0])
    assert torch.equal(update["w"], torch.ones(2))


@pytest.mark.parametrize("weights", [[], [1.0], [1.0, 0.0], [1.0, -1.0], [1.0, 1.0, 1.0]])
def test_weights_must_be_positive_and_one_an_update(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="need as many positive weights"):
        WeightedMean().combine([{"w": torch.ones(1)}, {"w": torch.ones(1)}], weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool])
def test_blocks_and_threads_change_no_bit(dtype: torch.dtype) -> None:
    """The mean is one addition a client, in client order, whatever the tensor's size."""
    generator = torch.Generator().manual_seed(1)
    weights = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0]
    updates = [
        {"w": (4 * torch.randn(400_001, generator=generator, dtype=torch.float64)).to(dtype)} for _ in weights
    ]
    working = dtype if dtype in (torch.float32, torch.float64) else torch.float64
    expected = torch.zeros(400_001, dtype=working)
    for update, weight in zip(updates, weights, strict=True):
        expected.add_(update["w"].to(working), alpha=weight / sum(weights))
    if dtype == torch.bool:
        expected = expected > 0.5
    elif not dtype.is_floating_point:
        expected = expected.round()
    for read in (updates, [StagedUpdate(update, 1) for update in updates]):
        assert torch.equal(WeightedMean().combine(read, weights)["w"], expected.to(dtype))


def test_memory_formats_do_not_matter() -> None:
    generator = torch.Generator().manual_seed(2)
    plain = [{"w": torch.randn(4, 3, 5, 5, generator=generator)} for _ in range(3)]
    odd = [{"w": update["w"].to(memory_format=torch.channels_last)} for update in plain]
    weights = [1.0, 2.0, 3.0]
    assert torch.equal(WeightedMean().combine(odd, weights)["w"], WeightedMean().combine(plain, weights)["w"])
