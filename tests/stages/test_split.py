"""run_stages(split(model)) == model, bitwise, for kinds of models and of construction."""

from __future__ import annotations

import pytest

from tests.stages.constructions import CONSTRUCTIONS, construct
from tests.stages.oracle import check_split
from tests.support.models import CASES, build

# draws of batch size 1 that the model itself refuses (batch norm of one value)
_NEEDS_TWO = {"dropouts"}
# a tensor that several stages use, or a kernel that a mask's values choose: sums in another order
_SUMMED_OTHERWISE = {"used_twice", "state_space", "experts", "encoder_decoder", "direct_parameters", "dense"}


@pytest.mark.parametrize("name", CASES)
def test_stages_equal_the_reference_models_for_every_batch_size_and_mode(name: str) -> None:
    batches = CASES[name][1]
    report = check_split(build(name), lambda size: ((batches(size, 0)[0],), {}), batches=(1, 2, 5, 8))
    assert report.stages == [2, 3, 4]


@pytest.mark.parametrize("name", CONSTRUCTIONS)
def test_stages_equal_a_model_of_every_construction(name: str) -> None:
    batches = (3, 2, 5, 8) if name in _NEEDS_TWO else (3, 1, 5)
    tolerance = 1e-13 if name in _SUMMED_OTHERWISE else 0.0
    report = check_split(construct(name), CONSTRUCTIONS[name][1], batches=batches, tolerance=tolerance)
    assert report.stages[0] == 2
