"""The data sets themselves: the shipped excerpt always, the published ones where their files exist."""

from __future__ import annotations

import importlib.util
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import fedmp.data
from fedmp.data import (
    CIFAR10,
    HAPT,
    MNIST,
    ByUser,
    DataSource,
    Elec2,
    FashionMNIST,
    FashionMNISTExcerpt,
    Shakespeare,
)

REPOSITORY = Path(__file__).resolve().parents[2]
SHIPPED = Path(fedmp.data.__file__).parent / "excerpt"


def test_the_excerpt_needs_no_files_and_is_balanced_and_shuffled(folder: Path) -> None:
    data = FashionMNISTExcerpt().load()
    for part, per_class in ((data.train, 600), (data.test, 100)):
        assert part.targets is not None
        assert torch.bincount(part.targets).tolist() == [per_class] * 10
        assert set(part.targets[:100].tolist()) == set(range(10))
    assert len(data.train.label_names) == 10
    assert not list(folder.iterdir())


def test_a_batch_of_the_excerpt_is_about_standard_normal() -> None:
    x, y = FashionMNISTExcerpt().load().train.batch(range(6000))
    assert (x.shape, x.dtype, y.dtype) == ((6000, 1, 28, 28), torch.float32, torch.int64)
    # mean and std are those of all 60,000 images; a tenth of them differs in the second digit
    assert x.mean().item() == pytest.approx(0.0, abs=0.02)
    assert x.std().item() == pytest.approx(1.0, abs=0.02)


def test_the_excerpt_ships_with_its_licence() -> None:
    notice = (SHIPPED / "NOTICE").read_text(encoding="utf-8")
    assert "The MIT License (MIT) Copyright © 2017 Zalando SE, https://tech.zalando.com" in notice
    assert "600 training images and 100 test images" in notice


def test_the_excerpt_can_be_made_again_from_the_whole(data_dir: Path) -> None:
    script = REPOSITORY / "benchmarks" / "make_excerpt.py"
    spec = importlib.util.spec_from_file_location("make_excerpt", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    arrays = module.excerpt()
    with np.load(SHIPPED / "fashion_mnist_excerpt.npz", allow_pickle=False) as shipped:
        assert sorted(shipped.files) == sorted(arrays)
        assert all(np.array_equal(shipped[key], arrays[key]) for key in arrays)


@pytest.mark.parametrize(
    ("source", "sizes", "sample"),
    [
        (MNIST(), (60_000, 10_000), (1, 28, 28)),
        (FashionMNIST(), (60_000, 10_000), (1, 28, 28)),
        (CIFAR10(), (10_000, 2_000), (3, 32, 32)),
    ],
)
def test_published_images_have_their_published_statistics(
    data_dir: Path, source: DataSource, sizes: tuple[int, int], sample: tuple[int, ...]
) -> None:
    data = source.load()
    if isinstance(source, CIFAR10) and len(data.train) == 50_000:
        sizes = (50_000, 10_000)
    assert (len(data.train), len(data.test)) == sizes
    x, _ = data.train.batch(range(0, sizes[0], 10))
    assert x.shape[1:] == sample
    # one image in ten: within a few hundredths of what the whole is normalised to
    assert x.mean().item() == pytest.approx(0.0, abs=0.03)
    assert x.std().item() == pytest.approx(1.0, abs=0.03)
    assert data.train.num_classes == 10


def test_hapt_holds_out_the_asked_share_of_every_activity(data_dir: Path) -> None:
    data = HAPT().load()
    assert data.train.targets is not None
    assert data.test.targets is not None
    train, test = (torch.bincount(part, minlength=12) for part in (data.train.targets, data.test.targets))
    assert int(train.sum() + test.sum()) == 10_361
    share = test / (train + test)
    assert test.sum() / 10_361 == pytest.approx(0.2, abs=0.02)
    assert share[:6].sub(0.2).abs().max() < 0.05  # over a thousand windows each
    assert share.min() > 0.05  # the rarest has twelve windows
    x = data.train.input_batch(range(len(data.train)))
    assert x.shape[1:] == (6, 128)
    assert x.dtype == torch.float32
    torch.testing.assert_close(
        x.mean(dim=(0, 2)), torch.zeros(6), atol=1e-4, rtol=0
    )  # float32 sums of a million
    torch.testing.assert_close(x.std(dim=(0, 2)), torch.ones(6), atol=1e-4, rtol=0)


def test_hapt_test_windows_share_no_readings_with_training_windows(data_dir: Path) -> None:
    data = HAPT().load()
    assert data.train.inputs is not None
    assert data.test.inputs is not None
    halves = [
        {half.tobytes() for window in part.numpy() for half in (window[:, :64], window[:, 64:])}
        for part in (data.train.inputs, data.test.inputs)
    ]
    assert not halves[0] & halves[1]


def test_hapt_is_the_same_by_seed_and_has_users_to_split_by(data_dir: Path) -> None:
    first, again, other = HAPT().load().test, HAPT().load().test, HAPT(seed=1).load().test
    assert first.inputs is not None
    assert again.inputs is not None
    assert other.inputs is not None
    assert torch.equal(first.inputs, again.inputs)
    assert not torch.equal(first.inputs[:50], other.inputs[:50])
    train = HAPT().load().train
    rows = ByUser().assign(train, 30, 0)
    assert train.users is not None
    assert all(len(set(train.users[part].tolist())) == 1 for part in rows)


def test_shakespeare_has_over_six_hundred_roles_in_both_sets(data_dir: Path) -> None:
    data = Shakespeare().load()
    assert data.train.users is not None
    assert data.test.users is not None
    assert set(data.train.users.tolist()) == set(data.test.users.tolist()) == set(range(625))
    x, y = data.train.batch(range(len(data.train)))
    assert x.shape == y.shape == (len(data.train), 80)
    assert x.min() > 0  # the vocabulary covers the plays
    sizes = [len(rows) for rows in ByUser().assign(data.train, 20, 0)]
    assert max(sizes) < 1.01 * min(sizes)


def test_elec2_keeps_time_order_and_tests_on_the_future(data_dir: Path) -> None:
    data = Elec2().load()
    assert (len(data.train), len(data.test)) == (36_250, 9_062)
    assert data.train.inputs is not None
    # the period of the day climbs from 0 to 1 in 48 steps, day after day
    assert torch.equal(data.train.inputs[:48, 0], data.train.inputs[48:96, 0])
    assert bool((data.train.inputs[1:48, 0] > data.train.inputs[:47, 0]).all())
    x = data.train.input_batch(range(len(data.train)))
    torch.testing.assert_close(x.mean(dim=0), torch.zeros(6), atol=1e-4, rtol=0)
    assert data.train.num_classes == 2


def test_loaded_parts_do_not_drag_the_whole_archive_along(data_dir: Path) -> None:
    test = Elec2().load().test
    assert len(pickle.dumps(test)) < len(test) * (6 * 4 + 8) + 4000


@pytest.mark.parametrize("group", ["data", "split"])
def test_every_config_names_a_component_and_repeats_no_default(group: str) -> None:
    configs = sorted((REPOSITORY / "configs" / group).glob("*.yaml"))
    assert configs
    for path in configs:
        comment, target = path.read_text().splitlines()
        assert comment.startswith("# ")
        name = re.fullmatch(r"_target_: fedmp\.data\.(\w+)", target)
        assert name is not None, path
        getattr(fedmp.data, name[1])()


def test_the_public_names_are_these() -> None:
    sets = "CIFAR10 Elec2 FashionMNIST FashionMNISTExcerpt HAPT MNIST NoData Shakespeare Synthetic ArrayData"
    splits = "ByUser Dirichlet IID Own PowerLaw Shards describe"
    shared = "DataSource Dataset RowNumbers Rows Split TrainTest"
    assert sorted(fedmp.data.__all__) == sorted(f"{sets} {splits} {shared}".split())


def test_the_code_blocks_of_the_guide_run(capsys: pytest.CaptureFixture[str]) -> None:
    guide = (REPOSITORY / "docs" / "data.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", guide, flags=re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        exec(compile(block, "docs/data.md", "exec"), {"__name__": "guide"})
    assert "c0" in capsys.readouterr().out
