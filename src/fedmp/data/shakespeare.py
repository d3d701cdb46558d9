"""Shakespeare's plays by speaking role: next-character prediction, one natural user per role."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from pydantic import Field

from fedmp.component import Component
from fedmp.data.dataset import Dataset, TrainTest
from fedmp.data.files import Array, data_folder, find, missing, read_text
from fedmp.errors import DataError

__all__ = ["Shakespeare"]

_VOCABULARY = ("<other>", "\n", *(chr(code) for code in range(32, 127)))
_TEXT_FOLDER = "by_play_and_character"


class Shakespeare(Component):
    """Shakespeare by role (McMahan et al. 2017, LEAF): predict the next character at every position.

    The vocabulary is fixed at 97 characters: 0 is any other character, 1 the newline, and 2 to 96 the
    printable ASCII characters in their order, from space to "~".

    Args:
        seq_len: characters a sample.
        stride: characters from the start of a sample to the start of the next; None means `seq_len`,
            so that samples do not overlap.
        test_fraction: share of each role's text, counted from its end, to hold out; more than 0, less
            than 1.
    """

    seq_len: int = Field(default=80, ge=1)
    stride: int | None = Field(default=None, ge=1)
    test_fraction: float = Field(default=0.2, gt=0, lt=1)

    def load(self) -> TrainTest:
        """Load both sets.

        Inputs are int64 [N, seq_len] and targets the characters that follow, of the same shape. Users
        number the roles from 0, in alphabetical order.

        Raises:
            DataError: the files are missing or malformed, or no role's text is long enough.
        """
        texts = _read_roles()
        heads, tails = [], []
        for role in sorted(texts):
            characters = _encode(texts[role])
            cut = len(characters) - round(self.test_fraction * len(characters))
            heads.append(characters[:cut])
            tails.append(characters[cut:])
        return TrainTest(train=self._sequences(heads), test=self._sequences(tails))

    def _sequences(self, parts: Sequence[Array]) -> Dataset:
        length, stride = self.seq_len + 1, self.stride or self.seq_len
        windows = [
            np.lib.stride_tricks.sliding_window_view(part, length)[::stride]
            if len(part) >= length
            else np.zeros((0, length), dtype=np.int64)
            for part in parts
        ]
        rows = torch.from_numpy(np.concatenate(windows))
        if len(rows) == 0:
            raise DataError(
                f"no role has {length} characters to train and to test on: the longest part has "
                f"{max(len(part) for part in parts)}; use a smaller seq_len (now {self.seq_len})"
            )
        counts = torch.tensor([len(window) for window in windows])
        return Dataset(
            inputs=rows[:, :-1].contiguous(),
            targets=rows[:, 1:].contiguous(),
            users=torch.repeat_interleave(torch.arange(len(windows)), counts),
            label_names=_VOCABULARY,
        )


def _read_roles() -> Mapping[str, str]:
    folder = data_folder()
    path = find(folder, ("shakespeare_by_role.json",))
    if path is not None:
        try:
            texts = json.loads(read_text(path))
        except json.JSONDecodeError as error:
            raise DataError(f"{path} is not JSON: {error}") from error
        if (
            not isinstance(texts, dict)
            or not texts
            or not all(isinstance(text, str) for text in texts.values())
        ):
            raise DataError(
                f'{path} must be one JSON object of texts by role, such as {{"hamlet/HAMLET": "To be"}}'
            )
        return texts
    files = sorted((folder / _TEXT_FOLDER).glob("*.txt"))
    if not files:
        raise missing(
            "Shakespeare by role",
            looked_for=f"shakespeare_by_role.json[.gz] or {_TEXT_FOLDER}/*.txt (one text a role)",
            source="https://www.gutenberg.org/ebooks/100, cut by role with https://github.com/TalwalkarLab/leaf",
        )
    return {file.stem: read_text(file) for file in files}


def _encode(text: str) -> Array:
    codes = np.frombuffer(text.encode("utf-32-le", errors="replace"), dtype="<u4").astype(np.int64)
    is_printable = (codes >= 32) & (codes < 127)
    return np.where(is_printable, codes - 30, (codes == ord("\n")).astype(np.int64))
