"""Times of the database as JSON has them: ISO 8601 in UTC, with milliseconds and a `Z`."""

from datetime import UTC, datetime


def iso(moment: datetime | None) -> str | None:
    """A timestamp of the database as ISO 8601 in UTC; SQLite returns it without a zone, and it is UTC there too."""
    if moment is None:
        return None
    aware = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    return aware.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def iso_epoch(seconds: float | None) -> str | None:
    """Seconds since the epoch as ISO 8601 in UTC."""
    return None if seconds is None else iso(datetime.fromtimestamp(seconds, UTC))
