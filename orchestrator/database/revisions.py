"""Which revisions of the schema this release knows, and at which one a database stands.

Every command asks this, and few of them migrate: so it is found out without Alembic, which takes 0.07 s and 11 MB to
load. A file of a revision begins with its number.
"""

from pathlib import Path

from sqlalchemy import Engine, inspect, text

from orchestrator.database.engine import reading

FOLDER = Path(__file__).parent / "migrations" / "versions"


def known_revisions() -> tuple[str, ...]:
    """All revisions, oldest first; the last one is what this release needs.

    Raises:
        LookupError: there are none.
    """
    found = sorted(file.name.partition("_")[0] for file in FOLDER.glob("[0-9]*.py"))
    if not found:
        raise LookupError("this installation holds no database revisions; install the package again")
    return tuple(found)


def head_revision() -> str:
    """The revision that this release needs."""
    return known_revisions()[-1]


def current_revision(engine: Engine) -> str | None:
    """The revision that the database is at; None for an empty database."""
    with reading(engine) as connection:
        if not inspect(connection).has_table("alembic_version"):
            return None
        return connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one_or_none()


def is_known(revision: str) -> bool:
    """Whether this release knows a revision; it does not know those of newer ones."""
    return revision in known_revisions()
