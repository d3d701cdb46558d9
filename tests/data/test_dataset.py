"""`Dataset`: batches are ready for a model, slices own only their rows, broken sets are refused."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch

from fedmp.data import Dataset
from fedmp.errors import DataError


def images(num_samples: int = 6, *, channels: int | None = None) -> torch.Tensor:
    shape = (num_samples, 5, 4) if channels is None else (num_samples, 5, 4, channels)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_grey_images_become_scaled_and_normalised_floats_with_one_channel() -> None:
    raw = images()
    data = Dataset(raw, torch.arange(6), mean=(0.5,), std=(0.25,))
    x, y = data.batch([4, 1])
    expected = (raw[[4, 1]].numpy()[:, None].astype(np.float64) / 255 - 0.5) / 0.25
    assert x.dtype == torch.float32
    np.testing.assert_allclose(x.numpy(), expected, rtol=0, atol=1e-6)  # float32 rounding of values up to 2
    assert y.tolist() == [4, 1]


def test_colour_images_become_channels_first_and_contiguous() -> None:
    raw = images(channels=3)
    mean, std = (0.1, 0.2, 0.3), (0.5, 1.0, 2.0)
    x = Dataset(raw, None, mean=mean, std=std).input_batch(range(6))
    expected = (raw.numpy().astype(np.float64) / 255 - mean) / std
    assert x.is_contiguous()
    np.testing.assert_allclose(x.numpy(), expected.transpose(0, 3, 1, 2), rtol=0, atol=1e-6)


def test_signals_are_normalised_along_dim_1_and_half_precision_is_widened() -> None:
    signals = torch.arange(24.0).reshape(2, 3, 4).half()
    x = Dataset(signals, None, mean=(0.0, 4.0, 8.0), std=(1.0, 2.0, 4.0)).input_batch([1])
    assert x.dtype == torch.float32
    assert x[0, 1].tolist() == [(16 - 4) / 2, (17 - 4) / 2, (18 - 4) / 2, (19 - 4) / 2]


@pytest.mark.parametrize(
    ("held", "ready"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.int16, torch.int64),
        (torch.int64, torch.int64),
    ],
)
def test_batch_widens_only_what_models_do_not_take(held: torch.dtype, ready: torch.dtype) -> None:
    data = Dataset(torch.ones(3, 2).to(held), torch.ones(3).to(held))
    x, y = data.batch([0])
    assert (x.dtype, y.dtype) == (ready, ready)


def test_a_batch_never_changes_the_data_set() -> None:
    features = torch.ones(4, 2)
    data = Dataset(features, torch.zeros(4), mean=(1.0, 1.0), std=(2.0, 2.0))
    data.input_batch([0, 1]).fill_(9.0)
    data.target_batch([0, 1]).fill_(9.0)
    assert torch.equal(features, torch.ones(4, 2))
    assert torch.equal(data.target_batch(range(4)), torch.zeros(4))


def test_select_keeps_order_repeats_users_and_names() -> None:
    data = Dataset(
        torch.arange(5.0)[:, None], torch.arange(5), torch.arange(5) * 10, label_names=tuple("abcde")
    )
    chosen = data.select(torch.tensor([3, 0, 3]))
    assert chosen.inputs is not None
    assert chosen.targets is not None
    assert chosen.users is not None
    assert chosen.inputs[:, 0].tolist() == [3.0, 0.0, 3.0]
    assert chosen.targets.tolist() == [3, 0, 3]
    assert chosen.users.tolist() == [30, 0, 30]
    assert (len(chosen), chosen.num_classes) == (3, 5)


def test_a_slice_pickles_small_and_comes_back_the_same() -> None:
    data = Dataset(torch.zeros(1000, 28, 28, dtype=torch.uint8), torch.arange(1000), mean=(0.1,), std=(0.2,))
    chosen = data.select([5, 6])
    content = pickle.dumps(chosen)
    assert len(content) < 2 * 28 * 28 + 4000  # the rows, and what pickle says about the tensors
    copy = pickle.loads(content)
    assert torch.equal(copy.input_batch([0, 1]), data.input_batch([5, 6]))
    assert copy.mean == (0.1,)


def test_select_of_nothing_is_empty() -> None:
    data = Dataset(torch.ones(3, 2), torch.arange(3)).select([])
    assert len(data) == 0
    assert data.batch([])[0].shape == (0, 2)


def test_select_rejects_rows_that_are_not_there_and_masks() -> None:
    data = Dataset(torch.ones(3, 2), torch.arange(3))
    with pytest.raises(IndexError):
        data.select([3])
    with pytest.raises(ValueError, match=r"row numbers must be whole numbers, got torch\.bool"):
        data.select(torch.tensor([True, False, True]))


def test_a_device_may_hold_only_inputs_or_only_targets() -> None:
    data = Dataset(torch.ones(3, 2), torch.arange(3), label_names=tuple("abcd"))
    first, last = data.without_targets(), data.without_inputs()
    assert (len(first), len(last)) == (3, 3)
    assert last.select([2]).target_batch([0]).tolist() == [2]
    assert first.num_classes == 4
    with pytest.raises(DataError, match="holds no targets"):
        first.batch([0])
    with pytest.raises(DataError, match="holds no inputs"):
        last.batch([0])
    with pytest.raises(DataError, match="needs inputs or targets"):
        first.without_inputs()


def test_num_classes_comes_from_names_then_from_the_largest_target() -> None:
    assert Dataset(None, torch.tensor([0, 6])).num_classes == 7
    assert Dataset(None, torch.tensor([0.5, 6.0])).num_classes == 0
    assert Dataset(None, torch.tensor([0, 6]), label_names=("x",) * 9).num_classes == 9
    with pytest.raises(DataError, match="number of classes is unknown"):
        _ = Dataset(torch.ones(2, 1), None).num_classes


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"targets": torch.arange(5)}, "6 inputs, 5 targets"),
        ({"users": torch.arange(7)}, "6 inputs, 6 targets, 7 users"),
        ({"mean": (0.1, 0.2), "std": (1.0, 1.0)}, "have 2 channels"),
        ({"mean": (0.1,)}, "mean has 1 channels but std has 0"),
        ({"mean": (0.1,), "std": (0.0,)}, "std is"),
        ({"mean": (float("nan"),), "std": (1.0,)}, "mean is"),
        (
            {"inputs": torch.zeros(6, 3, 32, 32, dtype=torch.uint8)},
            r"\[6, 3, 32, 32\]; move the channels last",
        ),
        ({"inputs": torch.zeros(6, 3, dtype=torch.uint8)}, "uint8 inputs are taken for images"),
        (
            {"inputs": torch.zeros(6, 3, dtype=torch.int64), "mean": (0.0,), "std": (1.0,)},
            "can be normalised",
        ),
    ],
)
def test_a_broken_data_set_is_refused_with_its_values(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Dataset(**{"inputs": images(), "targets": torch.arange(6), **fields})
