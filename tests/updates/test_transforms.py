"""What each transform promises beyond the contract: its bound, its size, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedmp.errors import ConfigError, TrainingError
from fedmp.updates import (
    EF21,
    BFloat16,
    Chain,
    Clip,
    Float16,
    Int4,
    Int8,
    LowRank,
    Part,
    PayloadError,
    RandomK,
    Sign,
    TopK,
    UpdateTransform,
    Zstd,
)
from fedmp.updates.indices import decode_indices, encode_indices, indices_part
from fedmp.updates.top_k import largest
from fedmp.updates.transform import is_finite
from fedmp.updates.zstd import decompress

SIZES = st.integers(1, 700)
SEEDS = st.integers(0, 2**62)


def numbers(max_size: int = 600) -> st.SearchStrategy[torch.Tensor]:
    """Vectors of float32 of any magnitude, zeros and repeats among them."""
    elements = st.floats(-(2.0**99), 2.0**99, width=32, allow_nan=False)
    return hnp.arrays("float32", st.integers(1, max_size), elements=elements).map(torch.from_numpy)


def there_and_back(transform: UpdateTransform, tensor: torch.Tensor, seed: int = 0) -> torch.Tensor:
    parts = transform.encode(tensor, state={}, seed=seed).parts
    return transform.decode(parts, Part(tuple(tensor.shape), tensor.dtype), seed=seed)


@given(numbers(), SEEDS, st.sampled_from([(Int8, 127), (Int4, 7)]), st.sampled_from([8, 64, 256]))
@example(torch.tensor([1.7407e-37, -3e-38, 0.0]), 0, (Int8, 127), 8)  # their scale is a subnormal
@settings(max_examples=60, deadline=None)
def test_a_quantized_number_is_less_than_a_level_off(
    tensor: torch.Tensor, seed: int, kind: tuple[type[Int8] | type[Int4], int], block: int
) -> None:
    decoded = there_and_back(kind[0](block=block), tensor, seed)
    for start in range(0, len(tensor), block):
        exact, got = tensor[start : start + block].double(), decoded[start : start + block].double()
        level = float(exact.abs().max()) / kind[1]
        # float32's own rounding of scales and products, and of those that are subnormal
        assert float((got - exact).abs().max()) <= level * (1 + 1e-5) + 1.2e-38


@given(numbers(), st.sampled_from([(BFloat16(), 2.0**-8, 1e-38), (Float16(), 2.0**-11, 2.0**-25)]))
@settings(max_examples=40, deadline=None)
def test_a_rounded_number_is_within_its_bound(
    tensor: torch.Tensor, kind: tuple[BFloat16 | Float16, float, float]
) -> None:
    transform, relative, absolute = kind
    tensor = tensor.clamp(-6e4, 6e4)
    off = (there_and_back(transform, tensor) - tensor).double().abs()
    assert bool((off <= torch.clamp(tensor.double().abs() * relative, min=absolute)).all())


def test_float16_refuses_what_it_cannot_hold() -> None:
    with pytest.raises(TrainingError, match=r"a number of 7e\+04 does not fit float16.*use bf16, or clip"):
        Float16().encode(torch.full((64,), 7e4), state={}, seed=0)


@given(numbers(), st.floats(0.001, 1.0))
@settings(max_examples=60, deadline=None)
def test_top_k_sends_the_largest_numbers_and_nothing_else(tensor: torch.Tensor, fraction: float) -> None:
    count = max(1, math.ceil(fraction * len(tensor) - 1e-9))
    decoded = there_and_back(TopK(fraction=fraction), tensor)
    is_sent = decoded != 0
    assert torch.equal(decoded[is_sent], tensor[is_sent])
    best = tensor.abs().double().sort(descending=True).values[:count]
    torch.testing.assert_close(decoded.abs().double().sort(descending=True).values[:count], best)


@pytest.mark.parametrize("share", [0.001, 0.01, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("kind", ["normal", "constant", "periodic", "sparse", "sorted"])
def test_the_largest_of_a_long_tensor_are_found_exactly(kind: str, share: float) -> None:
    """Whatever the sample says: the numbers that it looks at may be unlike the rest."""
    size = 100_003
    drawn = torch.randn(size, generator=torch.Generator().manual_seed(0))
    tensor = {
        "normal": drawn,
        "constant": torch.ones(size),
        "periodic": (torch.arange(size) % (size >> 13) == 0).float(),
        "sparse": drawn * (torch.arange(size) % 97 == 3),
        "sorted": drawn.sort().values,
    }[kind]
    indices = largest(tensor, count := math.ceil(share * size))
    assert len(indices) == count
    assert bool((indices.diff() > 0).all())
    expected = tensor.abs().sort(descending=True).values[:count]
    assert torch.equal(tensor[indices].abs().sort(descending=True).values, expected)


@given(st.data(), st.integers(1, 5000), st.floats(0.0001, 1.0))
@settings(max_examples=80, deadline=None)
def test_indices_survive_their_code_within_its_length(data: st.DataObject, size: int, share: float) -> None:
    count = max(1, round(share * size))
    start = data.draw(st.integers(0, size - count))
    spread = torch.randperm(size, generator=torch.Generator().manual_seed(start))[:count].sort().values
    indices = data.draw(
        st.sampled_from([spread, torch.arange(count) + start, torch.arange(count) * (size // count)])
    )
    coded = encode_indices(indices, size)
    assert not indices_part(count, size).explain(coded)
    assert torch.equal(decode_indices(coded, count, size), indices)


@pytest.mark.parametrize(
    ("coded", "count", "size", "message"),
    [
        ([200, 200], 2, 300, "an index is 401, beyond the end of a tensor of 300 numbers"),
        ([1, 255], 2, 300, "the last index breaks off"),
        ([1], 2, 300, "there are 1 indices; there must be 2"),
        ([1, 2, 3], 2, 300, "there are 3 indices; there must be 2"),
        ([1, 2, 3], 2, 3000, "indices of 2 bytes each do not take 3 bytes"),
        ([255, 1], 2, 16, "there are 9 indices; there must be 2"),
        ([0, 255], 5, 10, "there are 8 indices; there must be 5"),
        ([0b00000111, 0b11000000], 5, 15, None),
        ([0b00000111, 0b00100001], 5, 15, "an index is 15, beyond the end of a tensor of 15"),
    ],
)
def test_indices_that_make_no_sense_are_refused(
    coded: list[int], count: int, size: int, message: str | None
) -> None:
    coded_tensor = torch.tensor(coded, dtype=torch.uint8)
    if message is None:
        assert decode_indices(coded_tensor, count, size).tolist() == [5, 6, 7, 8, 9]
        return
    with pytest.raises(PayloadError, match=message):
        decode_indices(coded_tensor, count, size)


@given(SIZES, SEEDS, st.floats(0.01, 1.0))
@settings(max_examples=40, deadline=None)
def test_random_k_draws_one_number_of_each_run(size: int, seed: int, fraction: float) -> None:
    tensor = torch.arange(1, size + 1, dtype=torch.float64)
    decoded = there_and_back(RandomK(fraction=fraction), tensor, seed)
    count = max(1, math.ceil(fraction * size - 1e-9))
    places = torch.nonzero(decoded).view(-1)
    assert len(places) == count
    assert torch.equal(decoded[places], tensor[places])
    assert bool((places // 1 >= torch.arange(count) * size // count).all())
    assert bool((places < torch.arange(1, count + 1) * size // count).all())


def test_low_rank_is_exact_for_a_matrix_of_that_rank() -> None:
    random = torch.Generator().manual_seed(0)
    matrix = torch.randn(40, 2, generator=random, dtype=torch.float64) @ torch.randn(
        2, 30, generator=random, dtype=torch.float64
    )
    torch.testing.assert_close(there_and_back(LowRank(rank=2), matrix), matrix, rtol=1e-10, atol=1e-10)


def test_low_rank_begun_from_the_last_round_finds_the_best_approximation() -> None:
    """Subspace iteration converges to the leading singular vectors; ten rounds of the same matrix do."""
    random = torch.Generator().manual_seed(0)
    left, right = (
        torch.linalg.qr(torch.randn(60, 8, generator=random, dtype=torch.float64)).Q for _ in range(2)
    )
    matrix = left @ torch.diag(2.0 ** -torch.arange(8, dtype=torch.float64)) @ right.T
    transform, state = LowRank(rank=3, error_feedback=False), {}
    for _ in range(10):
        encoded = transform.encode(matrix, state=state, seed=1)
        state = encoded.state
    spec = Part((60, 60), torch.float64)
    off = torch.linalg.norm(transform.decode(encoded.parts, spec, seed=1) - matrix)
    best = math.sqrt(sum(4.0**-i for i in range(3, 8)))
    assert float(off) == pytest.approx(best, rel=1e-4)


@given(numbers(), st.sampled_from([8, 64, 4096]))
@settings(max_examples=40, deadline=None)
def test_signs_arrive_with_the_mean_magnitude_of_their_block(tensor: torch.Tensor, block: int) -> None:
    decoded = there_and_back(Sign(block=block), tensor)
    for start in range(0, len(tensor), block):
        exact, got = tensor[start : start + block].double(), decoded[start : start + block].double()
        mean = exact.abs().mean()
        expected = torch.where(exact >= 0, mean, -mean)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-37)


@pytest.mark.parametrize(
    ("transform", "part", "value", "message"),
    [
        (Int8(), "levels", -128, "a level is -128; they go from -127 to 127"),
        (Int8(), "scales", -1.0, "a scale is -1; scales are not negative"),
        (Int8(), "scales", 3e38, "too large to be finite"),
        (Int4(), "levels", 0x88, "a level is -8; they go from -7 to 7"),
        (Sign(), "scales", -0.5, "a scale is -0.5"),
        (TopK(fraction=0.5), "places", 0xFF, "there are 104 indices; there must be 51"),
        (LowRank(rank=1), "left", 3e38, "too large to be finite"),
    ],
    ids=repr,
)
def test_parts_that_make_no_sense_are_refused(
    transform: UpdateTransform, part: str, value: float, message: str
) -> None:
    spec = Part((101, 1) if not isinstance(transform, LowRank) else (101, 7), torch.float32)
    tensor = torch.full(spec.shape, 2.0)
    chain = Chain([transform])
    parts = dict(chain.encode(tensor, state={}, seed=0).parts)
    parts[part] = torch.full_like(parts[part], value)
    with pytest.raises(PayloadError, match=message):
        chain.decode(parts, spec, seed=0)


def test_an_odd_number_of_half_bytes_ends_with_an_empty_one() -> None:
    spec = Part((101,), torch.float32)
    parts = dict(Int4().encode(torch.ones(101), state={}, seed=0).parts)
    parts["levels"] = parts["levels"].clone()
    parts["levels"][-1] |= 0x10
    with pytest.raises(PayloadError, match="a level after the last of 101 numbers"):
        Int4().decode(parts, spec, seed=0)


# chains


@given(
    st.lists(
        st.sampled_from([BFloat16(), Int8(block=64), Int4(block=64), TopK(fraction=0.3), Sign(), LowRank()]),
        max_size=4,
    ),
    st.sampled_from([(300,), (20, 30), (65,), (5, 5)]),
    st.sampled_from([torch.float32, torch.float64, torch.float16]),
)
@settings(max_examples=60, deadline=None)
def test_any_chain_makes_what_its_layout_says_and_keeps_what_it_loses(
    transforms: list[UpdateTransform], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    chain, spec = Chain(transforms), Part(shape, dtype)
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    encoded = chain.encode(tensor, state={}, seed=5)
    assert encoded.parts.keys() == chain.layout(spec).keys()
    assert not any(part.explain(encoded.parts[name]) for name, part in chain.layout(spec).items())
    decoded = chain.decode(encoded.parts, spec, seed=5)
    assert decoded.shape == tensor.shape
    if "residual" in encoded.state:
        lost = encoded.state["residual"].double() - (tensor.double() - decoded.double())
        assert float(lost.abs().max()) <= 1e-6
    elif chain.layout(spec) == {"": spec}:
        assert torch.equal(decoded, tensor)


def test_error_feedback_takes_in_what_later_transforms_lose() -> None:
    tensor = torch.randn(2000, generator=torch.Generator().manual_seed(0))
    chain = Chain([TopK(fraction=0.1), Int4()])
    encoded = chain.encode(tensor, state={}, seed=0)
    decoded = chain.decode(encoded.parts, Part((2000,), torch.float32), seed=0)
    torch.testing.assert_close(encoded.state["residual"], tensor - decoded)
    assert not torch.equal(decoded[decoded != 0], tensor[decoded != 0])


@pytest.mark.parametrize(
    ("transforms", "message"),
    [
        ([TopK(), Clip()], "Clip comes first of all, not between TopK, Clip"),
        ([Zstd(), Int8()], "Zstd comes last of all"),
        ([Clip(), Clip()], "Clip comes first of all"),
        ([TopK(), EF21(), Int8()], "EF21 comes first, after Clip alone, not between TopK, EF21, Int8"),
        ([Clip(), EF21(), Zstd()], r"EF21 compresses nothing itself; say with what, such as \[ef21,topk\]"),
        ([EF21(), RandomK(fraction=0.1, error_feedback=False)], "multiplies numbers by 1 / fraction = 10"),
        ([Int8(), "int4"], "str is no transform: it needs error_feedback, layout, encode and decode"),
    ],
)
def test_a_chain_out_of_order_is_refused(transforms: list[object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Chain(transforms)


# bodies


def test_a_body_that_does_not_get_shorter_is_left_as_it_is() -> None:
    noise = bytes(torch.randint(256, (5000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)))
    assert Zstd().compress(noise) is None
    compressed = Zstd().compress(b"ab" * 5000)
    assert compressed is not None
    assert b"".join(decompress([compressed], max_bytes=10_000)) == b"ab" * 5000


@given(st.binary(min_size=600, max_size=3000), st.integers(1, 700))
@settings(max_examples=30, deadline=None)
def test_a_compressed_body_comes_back_whatever_the_pieces(body: bytes, size: int) -> None:
    body = body * 3
    compressed = Zstd().compress(body)
    assert compressed is not None
    pieces = [compressed[start : start + size] for start in range(0, len(compressed), size)]
    assert b"".join(decompress(pieces, max_bytes=len(body))) == body


def _bomb(num_bytes: int, *, announces: bool) -> bytes:
    import zstandard

    if announces:
        return zstandard.ZstdCompressor(level=1).compress(bytes(num_bytes))
    compressor = zstandard.ZstdCompressor(level=1, write_content_size=False).compressobj()
    return compressor.compress(bytes(num_bytes)) + compressor.flush()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (_bomb(50_000_000, announces=True), "decompresses to 50000000 bytes, at most 1000000 are allowed"),
        (_bomb(50_000_000, announces=False), "does not announce the length of its content"),
        (_bomb(1000, announces=True)[:-2], "breaks off"),
        (_bomb(1000, announces=True) + b"more", "has bytes after it"),
        (_bomb(1000, announces=True) * 600, "has bytes after it|bytes after the end"),
        (b"\x28\xb5\x2f\xfd" + b"\xff" * 40, "not compressed by zstd|announce"),
        (b"not compressed at all, of course", "the body is not compressed by zstd"),
        (b"", "breaks off after 0 bytes"),
    ],
)
def test_a_body_that_would_fill_the_disk_or_is_malformed_is_refused(body: bytes, message: str) -> None:
    taken = 0
    with pytest.raises(PayloadError, match=message):
        for piece in decompress([body], max_bytes=1_000_000):
            taken += len(piece)
    assert taken <= 1_000_000


def test_a_frame_that_lies_about_its_length_is_refused() -> None:
    honest = _bomb(50_000_000, announces=True)
    forged = bytearray(honest)
    size = 50_000_000
    at = bytes(honest).index(size.to_bytes(4, "little"))
    forged[at : at + 4] = (1000).to_bytes(4, "little")
    with pytest.raises(PayloadError):
        list(decompress([bytes(forged)], max_bytes=1_000_000))


def test_a_clip_bounds_the_norm_and_leaves_shorter_updates() -> None:
    clip = Clip(max_norm=2.0)
    assert clip.factor(8.0) == 0.25
    assert clip.factor(1.0) == 1.0
    assert clip.factor(0.0) == 1.0


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2], ids=str
)
@pytest.mark.parametrize("size", [1, 7, 1000, 40_000])
def test_one_number_that_is_not_finite_is_found_wherever_it_is(dtype: torch.dtype, size: int) -> None:
    assert is_finite(torch.empty(0, 3, dtype=dtype))
    largest_numbers = torch.full((size,), torch.finfo(dtype).max, dtype=dtype)
    assert is_finite(largest_numbers), "their sum is not, but they are"
    for bad in (math.nan, math.inf, -math.inf):
        for place in {0, size // 2, size - 1}:
            spoiled = torch.linspace(-1, 1, size).to(dtype)
            spoiled[place] = bad
            assert not is_finite(spoiled), (bad, place)
