"""Limits of providers that somebody changed while runs are going: they win over the configuration of every machine.

All functions work inside the caller's transaction.
"""

from dataclasses import asdict, dataclass

from sqlalchemy import Connection, delete, insert, select

from orchestrator.database.tables import limit_overrides


@dataclass(frozen=True, slots=True)
class Override:
    """Limits of one provider: None leaves one to the configuration, 0 is paused.

    Attributes:
        rpm: requests per minute.
        tpm: tokens per minute.
        concurrency: calls in flight over all workers.
    """

    rpm: int | None = None
    tpm: int | None = None
    concurrency: int | None = None

    def is_paused(self) -> bool:
        """Whether nothing may be sent."""
        return 0 in (self.rpm, self.tpm, self.concurrency)

    def as_dict(self) -> dict[str, int]:
        """The limits that are set, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def overrides(connection: Connection) -> dict[str, Override]:
    """All changed limits, by provider."""
    rows = connection.execute(select(limit_overrides))
    return {row.provider: Override(row.rpm, row.tpm, row.concurrency) for row in rows}


def set_override(connection: Connection, provider: str, wanted: Override) -> None:
    """Replaces the changed limits of a provider; one without any leaves everything to the configuration again."""
    connection.execute(delete(limit_overrides).where(limit_overrides.c.provider == provider))
    if wanted.as_dict():
        connection.execute(insert(limit_overrides).values(provider=provider, **asdict(wanted)))
