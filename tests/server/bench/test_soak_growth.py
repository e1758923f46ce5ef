"""Whether growth is noticed, and only growth: synthetic servers whose memory is known."""

import numpy as np
import pytest

from server.bench.soak.growth import STRETCHES, growth

LIMIT = 0.02
TIMES = np.arange(0, 1440, 4.0)  # half an hour but for its warm-up, a sample every 4 s
LEVEL_MB = 590.0


def busy(seed, deviation_mb=3.0, memory=0.8):
    """Ups and downs, each of which lasts for several samples."""
    rng = np.random.default_rng(seed)
    noise = np.zeros(len(TIMES))
    for index in range(1, len(noise)):
        noise[index] = memory * noise[index - 1] + rng.normal(0, deviation_mb * np.sqrt(1 - memory**2))
    return LEVEL_MB + noise


def keeping(bytes_per_request, requests_per_s=40):
    """What a server adds up that forgets to let go of something of each request."""
    return TIMES * requests_per_s * bytes_per_request / 1e6


def test_a_straight_line_is_measured_exactly():
    grown = growth(TIMES, 100 + TIMES / 100)

    assert (grown.level, grown.share) == (pytest.approx(100), pytest.approx(TIMES[-1] / 1e4))
    assert grown.low == pytest.approx(grown.high)


def test_ups_and_downs_are_no_growth():
    found = [growth(TIMES, busy(seed)) for seed in range(200)]

    assert sum(grown.below(LIMIT) for grown in found) >= 195
    covering = sum(grown.low < 0 < grown.high for grown in found)
    assert 180 <= covering <= 200, "the interval means what it says, though neighbouring samples are alike"


@pytest.mark.parametrize("bytes_per_request", [300, 1000], ids=lambda size: f"{size} bytes")
def test_a_server_that_keeps_something_of_every_request_is_noticed(bytes_per_request):
    noticed = [not growth(TIMES, busy(seed) + keeping(bytes_per_request)).below(LIMIT) for seed in range(100)]

    assert sum(noticed) >= 98


def test_a_minute_notices_a_server_that_keeps_every_body():
    """The short soak's limit is loose, but its bodies are some 5 kB and its clients many."""
    times = np.arange(12, 60, 0.2)
    leak = times * 200 * 10_000 / 1e6

    for seed in range(20):
        memory = busy(seed)[: len(times)]
        assert growth(times, memory).below(0.1)
        assert not growth(times, memory + leak).below(0.1)


def test_one_more_of_what_comes_whole_is_allowed_and_two_are_not():
    threads = np.where(TIMES < 700, 10, 11)

    assert growth(TIMES, np.full(len(TIMES), 10)).below(LIMIT, unit=1)
    assert not growth(TIMES, threads).below(LIMIT)
    assert not growth(TIMES, threads + (TIMES > 1000)).below(LIMIT, unit=1)


def test_a_spike_counts_for_nothing():
    spiked = np.full(len(TIMES), 14.0)
    spiked[::20] = 140

    assert growth(TIMES, spiked).share == 0


def test_too_few_samples_say_nothing():
    with pytest.raises(ValueError, match="a trend takes at least 24"):
        growth(range(2 * STRETCHES - 1), range(2 * STRETCHES - 1))
