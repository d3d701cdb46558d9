"""The robust rules against numpy, brute force and numbers worked out by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from fedmp import FedmpError
from fedmp.aggregate import (
    Aggregator,
    Bulyan,
    CenteredClipping,
    CoordinateMedian,
    GeometricMedian,
    Krum,
    MultiKrum,
    NormClipping,
    TrimmedMean,
)
from fedmp.aggregate.contract import StagedUpdate

Update = dict[str, torch.Tensor]


def drawn(num_clients: int, seed: int = 0, size: int = 40) -> tuple[list[Update], np.ndarray]:
    """Updates of two tensors, and the same as rows of a matrix."""
    matrix = np.random.default_rng(seed).normal(size=(num_clients, size))
    tensors = torch.from_numpy(matrix)
    return [{"a": row[: size // 3], "b": row[size // 3 :].reshape(-1, 1)} for row in tensors], matrix


def flat(update: Update) -> np.ndarray:
    return torch.cat([update["a"].flatten(), update["b"].flatten()]).numpy()


def combined(aggregator: Aggregator, updates: list[Update]) -> np.ndarray:
    return flat(aggregator.combine(updates, [1.0] * len(updates)))


@pytest.mark.parametrize("num_clients", [1, 2, 3, 10, 11, 50])
def test_the_median_is_numpys(num_clients: int) -> None:
    updates, matrix = drawn(num_clients)
    np.testing.assert_array_equal(combined(CoordinateMedian(), updates), np.median(matrix, axis=0))


@pytest.mark.parametrize(("num_clients", "trim", "cut"), [(10, 0.2, 2), (11, 0.2, 3), (5, 0.4, 2), (7, 0, 0)])
def test_the_trimmed_mean_leaves_so_many_out_at_each_end(num_clients: int, trim: float, cut: int) -> None:
    updates, matrix = drawn(num_clients)
    expected = np.sort(matrix, axis=0)[cut : num_clients - cut].mean(axis=0)
    np.testing.assert_allclose(combined(TrimmedMean(trim=trim), updates), expected, rtol=1e-12, atol=1e-14)


def krum_by_definition(matrix: np.ndarray, num_byzantine: int) -> list[float]:
    num = len(matrix)
    return [
        sum(
            sorted(((matrix[i] - matrix[j]) ** 2).sum() for j in range(num) if j != i)[
                : num - num_byzantine - 2
            ]
        )
        for i in range(num)
    ]


@pytest.mark.parametrize(("num_clients", "num_byzantine"), [(7, 2), (11, 4), (11, 1), (3, 0)])
def test_krum_is_the_update_with_the_least_score(num_clients: int, num_byzantine: int) -> None:
    updates, matrix = drawn(num_clients, seed=num_clients)
    best = int(np.argmin(krum_by_definition(matrix, num_byzantine)))
    np.testing.assert_array_equal(combined(Krum(num_byzantine=num_byzantine), updates), matrix[best])


def test_multi_krum_is_the_mean_of_those_with_the_least_scores() -> None:
    updates, matrix = drawn(11, seed=4)
    best = np.argsort(krum_by_definition(matrix, 3))
    for num_selected in (1, 4, 8):
        np.testing.assert_allclose(
            combined(MultiKrum(num_byzantine=3, num_selected=num_selected), updates),
            matrix[best[:num_selected]].mean(axis=0),
            rtol=1e-12,
        )
    np.testing.assert_allclose(
        combined(MultiKrum(num_byzantine=3), updates), matrix[best[:8]].mean(axis=0), rtol=1e-12
    )


def bulyan_by_definition(matrix: np.ndarray, num_byzantine: int) -> np.ndarray:
    left, chosen = list(range(len(matrix))), []
    while len(chosen) < len(matrix) - 2 * num_byzantine:
        scores = []
        for i in left:
            near = sorted(((matrix[i] - matrix[j]) ** 2).sum() for j in left if j != i)
            scores.append(sum(near[: max(1, len(left) - num_byzantine - 2)]))
        chosen.append(left.pop(int(np.argmin(scores))))
    kept = matrix[chosen]
    nearest = np.abs(kept - np.median(kept, axis=0)).argsort(axis=0, kind="stable")
    rest = nearest[: len(kept) - 2 * num_byzantine]
    return np.take_along_axis(kept, rest, axis=0).mean(axis=0)


@pytest.mark.parametrize(("num_clients", "num_byzantine"), [(7, 1), (11, 2), (16, 3), (5, 0)])
def test_bulyan_is_its_definition(num_clients: int, num_byzantine: int) -> None:
    updates, matrix = drawn(num_clients, seed=1)
    np.testing.assert_allclose(
        combined(Bulyan(num_byzantine=num_byzantine), updates),
        bulyan_by_definition(matrix, num_byzantine),
        rtol=1e-12,
        atol=1e-14,
    )


@pytest.mark.parametrize("weights", [[1.0] * 7, [5.0, 1.0, 1.0, 2.0, 1.0, 3.0, 1.0]])
def test_no_step_leads_from_the_geometric_median_to_less_distance(weights: list[float]) -> None:
    updates, matrix = drawn(7, seed=2)
    median = flat(GeometricMedian(weighted=True).combine(updates, weights))

    def total(point: np.ndarray) -> float:
        return float((np.array(weights) * np.linalg.norm(matrix - point, axis=1)).sum())

    # the objective is convex, so a stationary point is its minimum
    pulls = np.array(weights)[:, None] * (matrix - median) / np.linalg.norm(matrix - median, axis=1)[:, None]
    assert np.linalg.norm(pulls.sum(axis=0)) < 1e-6
    for step in np.random.default_rng(3).normal(size=(50, len(median))):
        assert total(median + 1e-3 * step) > total(median)


def test_the_geometric_median_on_a_line_is_the_median() -> None:
    updates = [{"x": torch.tensor([value], dtype=torch.float64)} for value in (0.0, 1.0, 2.0, 50.0, 1e9)]
    found = GeometricMedian().combine(updates, [1.0] * 5)["x"]
    assert abs(found.item() - 2.0) < 1e-3


def test_the_geometric_median_of_a_majority_that_agrees_is_theirs() -> None:
    updates = [{"x": torch.tensor([1.0, 2.0])}] * 3 + [{"x": torch.tensor([1e6, -1e6])}] * 2
    found = GeometricMedian().combine(updates, [1.0] * 5)["x"]
    # coefficients are found to 1e-9, and the others are 1e6 away
    torch.testing.assert_close(found, torch.tensor([1.0, 2.0]), rtol=0, atol=1e-2)


def test_norms_are_clipped_to_a_bound_over_the_whole_client() -> None:
    updates = [
        {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])},
        {"a": torch.tensor([0.3]), "b": torch.tensor([0.4])},
    ]
    # of norm 5 and 0.5: the first is cut to 1, the second stays
    found = NormClipping(bound=1.0).combine(updates, [1.0, 1.0])
    torch.testing.assert_close(found["a"], torch.tensor([0.5 * (0.6 + 0.3)]))
    torch.testing.assert_close(found["b"], torch.tensor([0.5 * (0.8 + 0.4)]))


def test_the_bound_is_the_median_norm_by_default() -> None:
    updates = [{"x": torch.tensor([value, 0.0])} for value in (1.0, 2.0, 2000.0)]
    assert NormClipping().combine(updates, [1.0] * 3)["x"][0].item() == pytest.approx((1 + 2 + 2) / 3)


def test_weighted_clipping_counts_samples() -> None:
    updates = [{"x": torch.tensor([1.0])}, {"x": torch.tensor([-100.0])}]
    found = NormClipping(bound=1.0, weighted=True).combine(updates, [3.0, 1.0])
    assert found["x"].item() == pytest.approx(0.75 - 0.25)


def test_centered_clipping_iterates_its_equation() -> None:
    updates, matrix = drawn(6, seed=5)
    median_distances = [np.median(np.linalg.norm(matrix - row, axis=1)) for row in matrix]
    v = matrix[int(np.argmin(median_distances))]
    for _ in range(4):
        steps = matrix - v
        norms = np.linalg.norm(steps, axis=1)
        v = v + (steps * np.minimum(1, 3.0 / np.maximum(norms, 1e-300))[:, None]).mean(axis=0)
    np.testing.assert_allclose(
        combined(CenteredClipping(radius=3.0, num_iterations=4), updates), v, rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize(
    "aggregator",
    [
        Krum(),
        MultiKrum(),
        GeometricMedian(),
        Bulyan(),
        NormClipping(),
        CenteredClipping(),
        CoordinateMedian(),
    ],
    ids=repr,
)
def test_a_counter_is_voted_on_whoever_is_chosen(aggregator: Aggregator) -> None:
    """A client that trains honestly may still lie about a counter."""
    updates = [
        {"w": torch.full((3,), 1.0 + 0.01 * index), "n": torch.tensor(5), "on": torch.tensor(True)}
        for index in range(7)
    ]
    liar = {**updates[3], "n": torch.tensor(2**62), "on": torch.tensor(False)}
    found = aggregator.combine([*updates[:3], liar, *updates[4:]], [1.0] * 7)
    assert found["n"].item() == 5
    assert found["on"].item() is True


def test_counters_are_halved_without_overflow() -> None:
    updates = [{"n": torch.tensor([-(2**63), 3, 2**63 - 1])}, {"n": torch.tensor([2**63 - 1, 4, 2**63 - 1])}]
    assert CoordinateMedian().combine(updates, [1.0, 1.0])["n"].tolist() == [-1, 3, 2**63 - 1]


@pytest.mark.parametrize(
    ("aggregator", "num_clients", "message"),
    [
        (Krum(num_byzantine=3), 8, r"2 x 3 \+ 3 = 9 clients a round, not 8; .* at most 2"),
        (Krum(), 2, "needs at least .* = 3 clients a round, not 2; .* another aggregator"),
        (MultiKrum(num_byzantine=2, num_selected=6), 7, "can select at most 5, not num_selected=6"),
        (Bulyan(num_byzantine=2), 10, r"4 x 2 \+ 3 = 11 clients a round, not 10; .* at most 1"),
        (TrimmedMean(trim=0.4), 3, "drops 2 of 3 clients at each end, which leaves none; .* at most 0.333"),
    ],
    ids=repr,
)
def test_impossible_settings_are_refused_with_numbers(
    aggregator: Aggregator, num_clients: int, message: str
) -> None:
    updates, _ = drawn(num_clients)
    with pytest.raises(FedmpError, match=message):
        aggregator.combine(updates, [1.0] * num_clients)


def test_updates_of_unlike_shapes_are_named() -> None:
    updates = [{"w": torch.ones(2)}, {"w": torch.ones(3)}, {"w": torch.ones(2)}]
    for aggregator in (CoordinateMedian(), Krum(), NormClipping()):
        with pytest.raises(
            ValueError, match=r"w is torch.float32 \(2,\) in update 0 but .*\(3,\) in update 1"
        ):
            aggregator.combine(updates, [1.0] * 3)


def test_what_is_not_finite_is_named() -> None:
    updates = [{"w": torch.ones(2)}, {"w": torch.tensor([1.0, float("nan")])}, {"w": torch.ones(2)}]
    for aggregator in (CoordinateMedian(), Krum(), NormClipping(), TrimmedMean()):
        with pytest.raises(ValueError, match="w holds NaN or infinity in update 1"):
            aggregator.combine(updates, [1.0] * 3)


@pytest.mark.parametrize("aggregator", [CoordinateMedian(), TrimmedMean(), MultiKrum(), Bulyan()], ids=repr)
def test_large_tensors_are_combined_in_blocks_as_small_ones_are(aggregator: Aggregator) -> None:
    """Blocks, threads and views are invisible: the parts of a tensor come out as the tensor's parts."""
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(140_011, generator=generator) for _ in range(11)]
    views = aggregator.combine([{"w": tensor} for tensor in whole], [1.0] * 11)["w"]
    lazy = aggregator.combine([StagedUpdate({"w": tensor}, 1) for tensor in whole], [1.0] * 11)["w"]
    assert torch.equal(views, lazy)
    pieces = [0, 17, 90_000, 140_011]
    cut = [{str(i): tensor[a:b] for i, (a, b) in enumerate(itertools.pairwise(pieces))} for tensor in whole]
    parts = aggregator.combine(cut, [1.0] * 11)
    assert torch.equal(torch.cat([parts[str(i)] for i in range(3)]), views)
