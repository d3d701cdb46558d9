"""Who has which rows of a data set, for any number of clients: what a split returns, and every engine reads."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import torch

from fedmp.errors import DataError

__all__ = ["RowNumbers", "Rows"]

RowNumbers = torch.Tensor | npt.NDArray[np.integer[Any]] | Sequence[int]


class Rows(Sequence[torch.Tensor]):
    """Each client's row numbers, as slices of one tensor: 100,000 clients are no 100,000 tensors.

    Args:
        flat: [M] int64, the first client's, then the second's, and so on.
        sizes: of each client.

    Attributes:
        flat: the same tensor.

    Example:
        >>> rows = Rows(torch.tensor([3, 5, 4]), [2, 1])
        >>> rows[0].tolist(), rows.size(1)
        ([3, 5], 1)
    """

    def __init__(self, flat: torch.Tensor, sizes: Iterable[int]) -> None:
        self.flat = flat
        self._ends = array("q", [0])
        for size in sizes:
            self._ends.append(self._ends[-1] + size)

    @classmethod
    def of_owners(cls, owners: npt.NDArray[np.integer[Any]], num_clients: int) -> Rows:
        """Each client's rows in ascending order, of the client that each row belongs to."""
        flat = np.argsort(owners, kind="stable").astype(np.int64, copy=False)
        return cls(torch.from_numpy(flat), np.bincount(owners, minlength=num_clients).tolist())

    @classmethod
    def checked(cls, parts: Sequence[RowNumbers], names: Sequence[str], *, num_rows: int) -> Rows:
        """What a split returned, once it is found to be right.

        Args:
            parts: of each client: whole numbers, as a tensor, an array or a sequence; clients may share rows.
            names: of the clients.
            num_rows: of the data set.

        Raises:
            DataError: a client has no rows, or what it has are not row numbers of the data set.
        """
        if not hasattr(parts, "__len__"):
            raise DataError(f"the split gives {parts!r:.80} instead of each client's rows")
        if len(parts) != len(names):
            raise DataError(f"the split gives rows to {len(parts)} clients, but there are {len(names)}")
        if isinstance(parts, Rows):
            rows = parts
        else:
            tensors = [_as_rows(part, names[place]) for place, part in enumerate(parts)]
            rows = cls(torch.cat(tensors), map(len, tensors))
        for place in range(len(rows)):
            if rows.size(place) == 0:
                raise DataError(
                    f"client {names[place]} has no training samples; use another split or fewer clients"
                )
        if rows.flat.min() < 0 or rows.flat.max() >= num_rows:
            place, wrong = rows._first_outside(num_rows)
            raise DataError(
                f"the split gives client {names[place]} row {wrong}, but the {num_rows} rows are numbered "
                f"from 0 to {num_rows - 1}"
            )
        return rows

    def size(self, place: int) -> int:
        """Number of rows of a client."""
        return self._ends[place + 1] - self._ends[place]

    def spans(self, places: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """[K] where the rows of the clients at these places begin in `flat`, and how many there are."""
        ends = np.frombuffer(self._ends, dtype=np.int64)
        starts = ends[places]
        return starts, ends[places + 1] - starts

    def __len__(self) -> int:
        """Number of clients."""
        return len(self._ends) - 1

    @overload
    def __getitem__(self, place: int) -> torch.Tensor: ...

    @overload
    def __getitem__(self, place: slice) -> list[torch.Tensor]: ...

    def __getitem__(self, place: int | slice) -> torch.Tensor | list[torch.Tensor]:
        if isinstance(place, slice):
            return [self[each] for each in range(*place.indices(len(self)))]
        if not -len(self) <= place < len(self):
            raise IndexError(f"there is no client {place}; there are {len(self)}")
        place %= len(self)
        return self.flat[self._ends[place] : self._ends[place + 1]]

    def _first_outside(self, num_rows: int) -> tuple[int, int]:
        """The first row that the data set does not have, and the place of the client that it was given."""
        outside = int(((self.flat < 0) | (self.flat >= num_rows)).nonzero()[0])
        place = next(place for place in range(len(self)) if outside < self._ends[place + 1])
        return place, int(self.flat[outside])


def _as_rows(part: RowNumbers, name: str) -> torch.Tensor:
    """A client's row numbers, [n] int64."""
    try:
        rows = part if isinstance(part, torch.Tensor) else torch.as_tensor(np.asarray(part))
    except (TypeError, ValueError) as error:
        raise DataError(f"the split gives client {name} no row numbers, but {part!r:.80}") from error
    if rows.shape == (0,):  # of any type: that of an empty list is float64
        return torch.zeros(0, dtype=torch.int64)
    if rows.dim() != 1 or rows.dtype == torch.bool or rows.is_floating_point() or rows.is_complex():
        raise DataError(
            f"the split gives client {name} {list(rows.shape)} {rows.dtype}; it must be row numbers, one-dimensional "
            f"and whole"
        )
    return rows.to(torch.int64)
