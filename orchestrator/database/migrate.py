"""Brings a database to the schema of this release.

The schema has one source, `tables`; Alembic's revisions lead there step by step, and a test holds the two equal.
"""

from alembic import command
from alembic.config import Config
from sqlalchemy import Engine, text

from orchestrator.database.engine import writing

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
