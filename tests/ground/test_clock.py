"""Ids sort by the time they were made."""

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

from bursar import clock


def test_now_is_aware_and_utc() -> None:
    assert clock.now().utcoffset() == timedelta(0)


def test_ids_rise_strictly_also_over_threads() -> None:
    with ThreadPoolExecutor(4) as threads:
        runs = list(threads.map(lambda _: [clock.uuid7() for _ in range(5000)], range(4)))
    assert all(run == sorted(run) for run in runs)
    assert len({each for run in runs for each in run}) == 20_000


def test_an_id_is_a_version_7_uuid_of_its_instant() -> None:
    made = clock.uuid7()
    assert (made.version, made.variant) == (7, "specified in RFC 4122")
    assert abs(clock.instant_of(made) - clock.now()) < timedelta(seconds=5)


def test_an_id_of_the_past_carries_the_past() -> None:
    past = datetime(2026, 3, 29, 1, 59, 59, 987_654, tzinfo=UTC)
    made = clock.uuid7_at(past)
    assert made.version == 7
    assert clock.instant_of(made) == past.replace(microsecond=987_000)
    assert clock.uuid7_at(past + timedelta(microseconds=1000)) > made
