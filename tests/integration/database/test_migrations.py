"""Revisions lead to the schema that the program is written against, from wherever a database stands."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect, text

from orchestrator.database import Database, SchemaOutdated, budgets, migrate, revisions
from orchestrator.database.tables import metadata

UPGRADE = "import sys; from orchestrator.database import Database; Database(sys.argv[1]).migrate()"


def _where(index: Any) -> list[str]:
    return [str(value) for name, value in index.get("dialect_options", {}).items() if name.endswith("_where")]


def schema(connection: Connection) -> dict[str, Any]:
    """Everything about the tables that the two ways of making them could disagree on."""
    looked = inspect(connection)
    return {
        table: {
            "columns": {
                one["name"]: (str(one["type"]), one["nullable"], one["default"], one.get("comment"))
                for one in looked.get_columns(table)
            },
            "key": looked.get_pk_constraint(table)["constrained_columns"],
            "foreign": sorted(
                (one["constrained_columns"][0], one["referred_table"], one["options"].get("ondelete"))
                for one in looked.get_foreign_keys(table)
            ),
            "unique": sorted(one["column_names"] for one in looked.get_unique_constraints(table)),
            "checks": sorted((one["name"], one["sqltext"]) for one in looked.get_check_constraints(table)),
            "indexes": sorted((one["name"], one["column_names"], _where(one)) for one in looked.get_indexes(table)),
        }
        for table in metadata.tables
    }


def test_nothing_is_left_to_migrate(database: Database):
    with database.snapshot() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []


def test_a_migrated_schema_equals_one_made_from_the_tables(database: Database, empty_url: str):
    fresh = Database(empty_url)
    with fresh.transaction() as connection:
        metadata.create_all(connection)
    with fresh.snapshot() as one, database.snapshot() as other:
        assert schema(one) == schema(other)
    fresh.close()


def test_upgrading_again_changes_nothing(database: Database):
    with database.snapshot() as connection:
        before = schema(connection)
    database.migrate()
    database.check()
    with database.snapshot() as connection:
        assert schema(connection) == before


def test_two_processes_upgrade_at_once(empty_url: str):
    children = [
        subprocess.Popen([sys.executable, "-c", UPGRADE, empty_url], stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    told = [child.communicate(timeout=60)[1] for child in children]
    assert [child.returncode for child in children] == [0, 0], told
    database = Database(empty_url)
    database.check()
    database.close()


def test_an_upgrade_that_breaks_off_leaves_nothing_behind(empty_url: str, monkeypatch: pytest.MonkeyPatch):
    database = Database(empty_url)
    whole = migrate.command.upgrade

    def cut(*arguments: Any) -> None:
        whole(*arguments)
        raise RuntimeError("power cut")

    with monkeypatch.context() as patched:
        patched.setattr(migrate.command, "upgrade", cut)
        with pytest.raises(RuntimeError):
            database.migrate()
    assert revisions.current_revision(database.engine) is None
    with database.snapshot() as connection:
        assert inspect(connection).get_table_names() == []
    database.migrate()
    database.check()
    database.close()


def test_revisions_are_known_without_alembic(database: Database):
    scripts = ScriptDirectory.from_config(migrate._scripts(database.engine))
    assert list(revisions.known_revisions()) == [one.revision for one in scripts.walk_revisions()][::-1]
    assert revisions.head_revision() == scripts.get_current_head()
    with database.snapshot() as connection:
        told = MigrationContext.configure(connection).get_current_revision()
    assert revisions.current_revision(database.engine) == told


def test_asking_for_the_revision_does_not_load_alembic(database: Database):
    code = (
        "import sys; from orchestrator.database import Database; "
        "Database(sys.argv[1]).check(); assert 'alembic' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, database.engine.url.render_as_string(hide_password=False)], check=True)


def test_an_empty_database_is_outdated(empty_url: str):
    database = Database(empty_url)
    with pytest.raises(SchemaOutdated) as caught:
        database.check()
    assert caught.value.found is None
    assert caught.value.wanted == revisions.head_revision()
    assert not database.is_prepared()
    database.close()


def test_a_database_of_a_newer_release_is_left_alone(empty_url: str):
    database = Database(empty_url)
    database.migrate()
    with database.transaction() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = 'from-the-future'"))
    assert not database.is_prepared()
    for attempt in (database.check, database.migrate):
        with pytest.raises(SchemaOutdated) as caught:
            attempt()
        assert caught.value.found == "from-the-future"
    database.close()


def test_asking_whether_a_database_is_prepared_creates_no_file(tmp_path: Path):
    path = tmp_path / "none" / "runs.db"
    database = Database(f"sqlite:///{path}")
    assert not database.is_prepared()
    database.close()
    assert not path.parent.exists()


def test_budgets_of_the_first_schema_are_kept(empty_url: str):
    database = Database(empty_url)
    config = Config()
    config.set_main_option("script_location", "orchestrator.database:migrations")
    with database.transaction() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        connection.execute(text("INSERT INTO budgets (scope, limit_nusd, spent_nusd) VALUES ('global', 100, 60)"))
    database.migrate()
    with database.transaction() as connection:
        lowered = budgets.set_limit(connection, budgets.GLOBAL_SCOPE, 40)
    assert (lowered.limit_nusd, lowered.spent_nusd, lowered.free_nusd()) == (40, 60, 0)
    database.close()
