"""Brings a database to the schema of this release, and says how far it is from it.

The schema has one source, `tables`; Alembic's revisions lead there step by step, and a test holds the two equal.
"""

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, text

from orchestrator.database.engine import reading, writing

# Any number will do as long as everybody uses the same: two upgrades at once wait for each other on Postgres.
UPGRADE_LOCK = 5_381_771


def _scripts(engine: Engine) -> Config:
    config = Config()
    config.set_main_option("script_location", "orchestrator.database:migrations")
    config.attributes["engine"] = engine
    return config


def upgrade(engine: Engine) -> None:
    """Runs the missing revisions in one transaction. Safe to repeat, and safe when two processes do it at once."""
    config = _scripts(engine)
    with writing(engine) as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": UPGRADE_LOCK})
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def current_revision(engine: Engine) -> str | None:
    """The revision that the database is at; None for an empty database."""
    with reading(engine) as connection:
        return MigrationContext.configure(connection).get_current_revision()


def is_known(engine: Engine, revision: str) -> bool:
    """Whether this release knows a revision; it does not know those of newer ones."""
    return revision in {script.revision for script in ScriptDirectory.from_config(_scripts(engine)).walk_revisions()}


def head_revision(engine: Engine) -> str:
    """The revision that this release needs."""
    head = ScriptDirectory.from_config(_scripts(engine)).get_current_head()
    if head is None:
        raise LookupError("this installation holds no database revisions; install the package again")
    return head
