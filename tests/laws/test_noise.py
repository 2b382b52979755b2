"""R4: noise is a function of (seed, image, draw) alone, and that function is Philox, written out here once more."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kstest, norm

from inkdrop.core.noise import Draw, Keyed, generator, normal
from inkdrop.errors import BadArgument, BadShape
from specimens import schedule_of

WORD = 2**64
keys = st.integers(min_value=0, max_value=WORD - 1)


def philox(seed: int, image: int, draw: int) -> Iterator[int]:
    """Philox-4×64-10 in plain integers (Salmon et al. 2011, section 3.3): the 64-bit words of a stream.

    Like NumPy's, the counter is raised by one before each block of four words.
    """
    counter = [0, 0, 0, draw]
    while True:
        for place in range(4):  # raise a 256-bit number whose first word is the lowest
            counter[place] = (counter[place] + 1) % WORD
            if counter[place]:
                break
        c, k = list(counter), [seed, image]
        for _ in range(10):
            a, b = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
            c = [(b >> 64) ^ c[1] ^ k[0], b % WORD, (a >> 64) ^ c[3] ^ k[1], a % WORD]
            k = [(k[0] + 0x9E3779B97F4A7C15) % WORD, (k[1] + 0xBB67AE8584CAA73B) % WORD]
        yield from c


@given(keys, keys, keys)
def test_the_stream_is_philox_with_key_seed_image_and_counter_draw(seed: int, image: int, draw: int) -> None:
    words = philox(seed, image, draw)
    expected = [next(words) for _ in range(12)]
    assert generator(seed, image, draw).bit_generator.random_raw(12).tolist() == expected


def test_uniform_numbers_are_the_top_53_bits() -> None:
    words = philox(2**63 + 5, 3 * 4 + 0, 7)  # training's key: the top bit, then place·4 + stream, then the update
    want = [(next(words) >> 11) * 2.0**-53 for _ in range(5)]
    assert Draw(5, 7, [3]).uniform("time", 5)[0].tolist() == want


GOLDEN = {
    (0, 0, 0): [0.15929546600623282, -1.7741885208017214, 1.3265118818830892],
    (0, 1, 0): [-0.7440191742693708, -0.01442460974068005, 0.5053939916649247],
    (1, 0, 0): [1.02028797736073, 0.7597131895605167, -0.24583790273512823],
    (0, 0, 1): [1.536428684192734, 0.5515010164765811, -0.8395909692107641],
    (2**64 - 1, 12345, 50): [-2.148553271920955, 0.2592674703961871, -1.5103279377333947],
}


@pytest.mark.parametrize("key", GOLDEN)
def test_the_first_numbers_are_those_of_the_day_they_were_committed(key: tuple[int, int, int]) -> None:
    """NumPy promises its bit streams, not its normal numbers: if this fails, old seeds give other images. Say so."""
    seed, image, draw = key
    assert normal((1, 3), seed, [image], draw)[0].tolist() == GOLDEN[key]


def test_an_image_has_the_same_noise_in_any_batch() -> None:
    """Images 0..63 of a seed: drawn one by one, eight at a time, all at once, and in another order."""
    shape, level = (3, 4, 4), schedule_of("linear")(1.0)

    def run(images: list[int]) -> torch.Tensor:
        noise = Keyed(11, images)
        x = noise.start((len(images), *shape))
        return torch.stack([x, noise(x, level, level), noise(x, level, level)], dim=1)

    whole = run(list(range(64)))
    for size in (1, 8):
        parts = [run(list(range(i, i + size))) for i in range(0, 64, size)]
        assert torch.equal(torch.cat(parts), whole)
    order = torch.randperm(64).tolist()
    assert torch.equal(run(order), whole[order])
    assert len({tuple(row.flatten().tolist()) for row in whole.flatten(0, 1)}) == 3 * 64  # and no two are the same


def test_float32_noise_is_float64_noise_rounded() -> None:
    level = schedule_of("linear")(1.0)
    single, double = Keyed(3, [4, 5]), Keyed(3, [4, 5])
    x = torch.zeros(2, 6)
    assert torch.equal(single.start(x.shape), double.start(x.shape, torch.float64).float())
    assert torch.equal(single(x, level, level), double(x.double(), level, level).float())
    assert single(x, level, level).dtype == torch.float32


@given(keys, keys, keys, st.integers(0, 2), st.integers(1, WORD - 1))
def test_a_change_of_any_key_changes_every_number(seed: int, image: int, draw: int, which: int, by: int) -> None:
    key = [seed, image, draw]
    other = list(key)
    other[which] = (other[which] + by) % WORD
    a, b = (normal((1, 8), k[0], [k[1]], k[2]) for k in (key, other))
    assert not bool((a == b).any())


def test_noise_is_standard_normal_and_independent_across_keys() -> None:
    """4,096 images × 16 numbers × 2 draws of one seed: Kolmogorov–Smirnov, and correlations within 4/√n."""
    first, second = normal((4096, 16), 0, range(4096), 0), normal((4096, 16), 0, range(4096), 1)
    other = normal((4096, 16), 1, range(4096), 0)
    assert kstest(first.flatten().numpy(), norm.cdf).pvalue > 0.01
    n = first.numel()
    for a, b in ((first, second), (first, other), (first[1:], first[:-1]), (first[:, 1:], first[:, :-1])):
        assert abs(float((a * b).mean())) < 4 / n**0.5
    assert abs(float(first.mean())) < 4 / n**0.5
    assert abs(float(first.var()) - 1) < 4 * (2 / n) ** 0.5


# ---- training's draws ----------------------------------------------------------------------------------------


def test_a_draw_does_not_depend_on_how_the_batch_is_split() -> None:
    """Rows 0..3 on one rank and 4..7 on another get what rows 0..7 on one rank get; asked in another order too."""
    whole = Draw(1, 9, range(8))
    halves = [Draw(1, 9, range(4)), Draw(1, 9, range(4, 8))]
    noise = torch.cat([d.normal((4, 2, 3)) for d in halves])
    assert torch.equal(torch.cat([d.uniform("time") for d in halves]), whole.uniform("time"))
    assert torch.equal(torch.cat([d.uniform("dropout") for d in halves]), whole.uniform("dropout"))
    assert torch.equal(torch.cat([d.uniform("augment", 3) for d in halves]), whole.uniform("augment", 3))
    assert torch.equal(noise, whole.normal((8, 2, 3)))


def test_streams_updates_and_seeds_are_distinct() -> None:
    seen = [
        Draw(seed, update, [place]).uniform(stream, 4)[0]
        for seed in (0, 1)
        for update in (0, 1)
        for place in (0, 1, 2)
        for stream in ("time", "dropout", "augment")
    ]
    sampling = torch.from_numpy(generator(0, 0, 0).random(4))
    numbers = torch.stack([*seen, sampling]).flatten()
    assert len(numbers.unique()) == len(numbers)


def test_training_never_shares_a_stream_with_sampling() -> None:
    """Sampling with seed s and training with seed s: the first numbers differ for every stream and place."""
    train = {generator(2**63 + 0, word, update).random() for word in range(40) for update in range(5)}
    sample = {generator(0, image, draw).random() for image in range(40) for draw in range(5)}
    assert not train & sample
    assert Draw(0, 0, [0]).uniform("time")[0].item() == generator(2**63, 0, 0).random()


def test_times_of_a_batch_are_uniform() -> None:
    u = Draw(3, 0, range(20_000)).uniform("time").numpy()
    assert kstest(u, "uniform").pvalue > 0.01
    assert u.min() >= 0
    assert u.max() < 1


def test_keys_and_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(BadArgument, match=r"seed: got -1, need an integer in \[0, 2\^64\)"):
        normal((1, 2), -1, [0], 0)
    with pytest.raises(BadArgument, match="image: got 18446744073709551616"):
        normal((1, 2), 0, [WORD], 0)
    with pytest.raises(BadShape, match="noise: got 2 images for 3 rows"):
        normal((3, 2), 0, [0, 1], 0)
    with pytest.raises(BadShape, match="noise: got 2 places for 3 rows"):
        Draw(0, 0, [0, 1]).normal((3, 2))
    for seed in (-1, 2**63):
        with pytest.raises(BadArgument, match=rf"seed: got {seed}, need an integer in \[0, 2\^63\)"):
            Draw(seed, 0, [0])


def test_no_rows_are_no_noise() -> None:
    assert normal((0, 3), 0, [], 0).shape == (0, 3)
    assert normal((2, 0), 0, [0, 1], 0).shape == (2, 0)
