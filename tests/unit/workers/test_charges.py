"""What headers say about limits, in the names of the limiter."""

from providers.messages import RateLimitHint
from workers.charges import sightings
from workers.limiter import Sighting


def test_every_limit_per_minute_is_heeded() -> None:
    hint = RateLimitHint(50, 49, 1.0, 90_000, 80_000, 2.0, 30_000, 27_000, 4.0, 8_000, 0, 53.5)
    assert sightings(hint) == {
        "rpm": Sighting(50, 49, 1.0),
        "tpm": Sighting(90_000, 80_000, 2.0),
        "itpm": Sighting(30_000, 27_000, 4.0),
        "otpm": Sighting(8_000, 0, 53.5),
    }


def test_limits_of_a_day_and_limits_nobody_told_are_left_out() -> None:
    """What needs more than a minute to be full again is no limit per minute."""
    hint = RateLimitHint(14_400, 14_399, 86_000.0, output_tokens_limit=8_000)
    assert sightings(hint) == {"otpm": Sighting(8_000)}
