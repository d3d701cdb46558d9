"""Updates as the journal has them on disk: their tensors, read when asked for, and what their reports may say."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from safetensors import safe_open

from fedmp.errors import RefusedError
from fedmp.records import DeviceReport

__all__ = ["UpdateFiles", "check_report"]

_MAX_EXAMPLES = 2**53


class UpdateFiles(Mapping[str, torch.Tensor]):
    """The tensors of a client's open files.

    Args:
        bodies: of its devices.
    """

    def __init__(self, bodies: Sequence[safe_open]) -> None:
        self._home = {name: body for body in bodies for name in body.keys()}  # noqa: SIM118

    @property
    def gives_views(self) -> bool:
        """The files are mapped."""
        return True

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._home[name].get_tensor(name)  # type: ignore[no-any-return]

    def __iter__(self) -> Iterator[str]:
        return iter(self._home)

    def __len__(self) -> int:
        return len(self._home)


def check_report(report: DeviceReport) -> None:
    """See that a report would not spoil the round's weights or sums.

    Raises:
        RefusedError: it would.
    """
    if not 0 < report.num_examples <= _MAX_EXAMPLES:
        raise RefusedError(
            f"the update's report says {report.num_examples} examples; there must be at least 1",
            status=422,
            reason="malformed",
        )
    sums = (
        *(report.loss_sum, report.weight, report.num_correct, report.train_s, report.rate_sum),
        *(report.evaluation_loss_sum, report.evaluation_weight, report.evaluation_correct),
        *(time_s for row in report.timeline for time_s in row[4:]),
    )
    if not all(map(math.isfinite, sums)):
        raise RefusedError("the update's report holds NaN or infinity", status=422, reason="not-finite")
