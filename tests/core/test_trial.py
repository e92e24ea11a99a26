"""Whether compressing gradients is kept: what steps with and without it took says so."""

import pytest

from clapping_ds.gradients.trial import NUM_TRIED, Trial


def tried(raw_s, coded_s, step_s=1.0, min_gain=0.05):
    trial = Trial(min_gain)
    for kind, exchange_s in ((False, raw_s), (True, coded_s)):
        for number in range(NUM_TRIED):
            assert not trial.is_over and trial.compresses == kind
            trial.end_step(exchange_s + (100.0 if number == 0 else 0.0), step_s)
    assert trial.is_over
    return trial


@pytest.mark.parametrize(
    ("raw_s", "coded_s", "is_used"),
    [(0.5, 0.1, True), (0.5, 0.46, False), (0.5, 0.44, True), (0.1, 0.3, False)],
)
def test_it_is_kept_where_it_saves_the_part_of_a_step_that_is_asked_for(raw_s, coded_s, is_used):
    trial = tried(raw_s, coded_s)
    found, table = trial.decide([trial.summarize()])
    assert found == is_used
    assert ("compressed" if is_used else "none") in table.splitlines()[-1]


def test_the_slowest_rank_counts():
    fast, slow = tried(0.1, 0.01).summarize(), tried(0.1, 0.2).summarize()
    assert Trial(0.05).decide([fast, fast])[0]
    assert not Trial(0.05).decide([fast, slow])[0]
