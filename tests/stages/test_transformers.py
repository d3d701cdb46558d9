"""Architectures of Hugging Face transformers, cut into 2, 3 and 4 stages, against the unsplit models."""

from __future__ import annotations

import warnings

import pytest

from tests.stages.families import FAMILIES, FAST, build_family
from tests.stages.oracle import Report, check_split

pytest.importorskip("transformers", reason="pip install 'fedmp[test]' brings transformers, for these tests")

# float64; sums run in another order where a tensor's uses are in several stages
_TOLERANCE = 1e-6


def _check(name: str) -> Report:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own
        model, make_inputs = build_family(name)
        return check_split(model, make_inputs, batches=(3, 2), tolerance=_TOLERANCE)


@pytest.mark.parametrize("name", FAST)
def test_stages_equal_the_family(name: str) -> None:
    assert _check(name).stages[0] == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in FAST])
def test_stages_equal_the_family_slow(name: str) -> None:
    assert _check(name).stages[0] == 2
