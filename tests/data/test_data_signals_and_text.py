"""HAPT, Elec2 and Shakespeare in their publishers' formats: what is read, held out and refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedmp.data import HAPT, Elec2, Shakespeare
from fedmp.errors import DataError


def write_hapt(
    place: Path, recordings: dict[tuple[int, int], int], labels: str
) -> dict[tuple[int, int], Any]:
    place.mkdir(parents=True)
    (place / "labels.txt").write_text(labels)
    signals = {}
    for (experiment, user), length in recordings.items():
        signal = np.random.default_rng(user).normal(size=(length, 6)).round(6)
        for sensor, columns in (("acc", signal[:, :3]), ("gyro", signal[:, 3:])):
            np.savetxt(place / f"{sensor}_exp{experiment:02d}_user{user:02d}.txt", columns, fmt="%.6f")
        signals[experiment, user] = signal
    return signals


@pytest.mark.parametrize("place", ["RawData", "HAPT Data Set/RawData"])
def test_hapt_recordings_are_cut_into_windows_within_one_activity(folder: Path, place: str) -> None:
    labels = "2 1 5 1 320\n2 1 7 321 400\n2 1 1 401 704\n1 2 12 130 400\n"
    signals = write_hapt(folder / place, {(2, 1): 704, (1, 2): 400}, labels)
    # readings count from 1; the grid of windows starts every 64 readings
    expected = [(2, 1, 0), (2, 1, 64), (2, 1, 128), (2, 1, 192), (2, 1, 448), (2, 1, 512), (2, 1, 576)]
    expected += [(1, 2, 192), (1, 2, 256)]
    activities = [4] * 4 + [0] * 3 + [11] * 2
    data = HAPT(test_fraction=0.5).load()
    found = []
    for part in (data.train, data.test):
        assert part.inputs is not None
        assert part.users is not None
        found += list(
            zip(
                part.inputs.numpy(),
                part.target_batch(range(len(part))).tolist(),
                part.users.tolist(),
                strict=True,
            )
        )
    assert len(found) == len(expected)
    for (experiment, user, start), activity in zip(expected, activities, strict=True):
        window = signals[experiment, user][start : start + 128].T.astype(np.float16)
        assert any(
            np.array_equal(inputs, window) and (activity, user) == (label, owner)
            for inputs, label, owner in found
        )


def test_damaged_hapt_files_are_named(folder: Path) -> None:
    write_hapt(folder / "RawData", {(1, 1): 300}, "1 1 5 1 300\n")
    (folder / "RawData" / "gyro_exp01_user01.txt").write_text("1 2 3\n4 x 6\n")
    with pytest.raises(DataError, match=r"gyro_exp01_user01\.txt holds something that is not a number"):
        HAPT().load()
    (folder / "RawData" / "gyro_exp01_user01.txt").unlink()
    with pytest.raises(DataError, match=r"gyro_exp01_user01\.txt cannot be read"):
        HAPT().load()


ARFF = """% a comment
@relation electricity
@attribute date numeric
@attribute day {1,2,3,4,5,6,7}
@attribute period numeric
@attribute nswprice numeric
@attribute nswdemand numeric
@attribute vicprice numeric
@attribute vicdemand numeric
@attribute transfer numeric
@attribute class {UP,DOWN}

@data
0,2,0,0.056443,0.439155,0.003467,0.422915,0.414912,UP
0,2,0.021277,0.051699,0.415055,0.003468,0.422916,0.414913,UP
0,2,0.042553,0.051489,0.385004,0.003469,0.422917,0.414914,DOWN
"""


def test_elec2_reads_arff(folder: Path) -> None:
    (folder / "electricity-normalized.arff").write_text(ARFF)
    data = Elec2(test_fraction=0.4).load()
    assert (len(data.train), len(data.test)) == (2, 1)
    assert data.train.inputs is not None
    expected = torch.tensor([0.021277, 0.051699, 0.415055, 0.003468, 0.422916, 0.414913])
    assert torch.equal(data.train.inputs[1], expected)
    assert data.train.target_batch([0, 1]).tolist() == [1, 1]
    assert data.test.target_batch([0]).tolist() == [0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("@attribute transfer numeric\n", ""), "lacks transfer"),
        ((",DOWN", ""), "row 3 of the data has 8 values; 9 are needed"),
        ((",DOWN", ",SIDEWAYS"), "not a number, UP or DOWN"),
        (("0.415055", "?"), "not a number, UP or DOWN"),
        (("@data", "@nothing"), "lacks data"),
    ],
)
def test_a_damaged_arff_file_is_named(folder: Path, change: tuple[str, str], message: str) -> None:
    (folder / "electricity.arff").write_text(ARFF.replace(*change))
    with pytest.raises(DataError, match=message) as caught:
        Elec2().load()
    assert "electricity.arff" in str(caught.value)


def write_shakespeare(folder: Path, texts: object) -> None:
    (folder / "shakespeare_by_role.json.gz").write_bytes(gzip.compress(json.dumps(texts).encode()))


def test_shakespeare_sequences_predict_the_next_character(folder: Path) -> None:
    write_shakespeare(folder, {"b/B": "To be, or not\nto be~é" * 5, "a/A": "0123456789" * 10})
    data = Shakespeare(seq_len=7, stride=3, test_fraction=0.25).load()
    names = data.train.label_names
    assert len(names) == data.train.num_classes == 97
    x, y = data.train.batch(range(len(data.train)))
    assert x.dtype == y.dtype == torch.int64
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert data.train.users is not None
    first_of_each = [int((data.train.users == user).nonzero()[0]) for user in (0, 1)]
    assert ["".join(names[code] for code in x[row]) for row in first_of_each] == ["0123456", "To be, "]
    assert "".join(names[code] for code in x[1]) == "3456789"  # a stride later
    assert y[0].tolist() == [names.index(character) for character in "1234567"]
    assert {0, 1, names.index("~")} <= set(x.flatten().tolist())  # é is "any other character"


def test_shakespeare_trains_on_the_head_of_a_role_and_tests_on_its_tail(folder: Path) -> None:
    write_shakespeare(folder, {"r": "a" * 80 + "b" * 20})
    data = Shakespeare(seq_len=4).load()
    a, b = (data.train.label_names.index(letter) for letter in "ab")
    assert set(torch.cat(data.train.batch(range(len(data.train)))).flatten().tolist()) == {a}
    assert set(torch.cat(data.test.batch(range(len(data.test)))).flatten().tolist()) == {b}
    assert (len(data.train), len(data.test)) == (19, 4)  # (80 - 1) // 4 and (20 - 1) // 4


def test_shakespeare_reads_one_text_file_a_role(folder: Path) -> None:
    (folder / "by_play_and_character").mkdir()
    for name in ("HAMLET", "OPHELIA"):
        (folder / "by_play_and_character" / f"{name}.txt").write_text(name * 20)
    data = Shakespeare(seq_len=5).load()
    assert data.train.users is not None
    assert set(data.train.users.tolist()) == {0, 1}


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a"], "must be one JSON object of texts by role"),
        ({"r": 3}, "must be one JSON object of texts by role"),
        ({}, "must be one JSON object of texts by role"),
        ({"r": "short"}, "no role has 81 characters .* smaller seq_len"),
    ],
)
def test_unusable_texts_are_refused(folder: Path, texts: object, message: str) -> None:
    write_shakespeare(folder, texts)
    with pytest.raises(DataError, match=message):
        Shakespeare().load()


def test_text_that_is_not_json_or_not_utf8_is_named(folder: Path) -> None:
    path = folder / "shakespeare_by_role.json"
    path.write_text("{")
    with pytest.raises(DataError, match=r"shakespeare_by_role\.json is not JSON"):
        Shakespeare().load()
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"shakespeare_by_role\.json is not text in UTF-8"):
        Shakespeare().load()
