import pytest

from common.units import duration, size_text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "1 s"),
        (89, "89 s"),
        (90, "2 min"),
        (1800, "30 min"),
        (3570, "1 h 0 min"),
        (5.2 * 3600, "5 h 12 min"),
        (23.999 * 3600, "1 d 0 h"),
        (76.4 * 3600, "3 d 4 h"),
    ],
)
def test_a_time_is_told_in_its_largest_units(seconds, text):
    assert duration(seconds) == text


def test_sizes():
    assert [size_text(n) for n in (1536, 2_500_000, 19_700_000_000)] == ["1.5 KiB", "2.4 MiB", "18.3 GiB"]
