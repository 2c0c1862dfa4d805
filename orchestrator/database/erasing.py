"""Removes what was said about items and leaves what was counted: costs, tokens, statuses and hashes stay.

Erased are the fields and keys of items, rendered prompts, answers, replies, error texts, and the answers in the cache;
a mark or a hash stands in their place, and a ranking keeps its places. On SQLite the pages that held them are
overwritten, and `scrub` rewrites the file and empties the write-ahead log, so that not even their bytes remain.

All functions but `scrub` work inside the caller's transaction, and doing them twice changes nothing more.
"""

import json
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from hashlib import sha256

from sqlalchemy import ColumnElement, Connection, Engine, and_, bindparam, case, delete, func, select, text, update
from sqlalchemy.exc import OperationalError

from orchestrator.database.engine import NOW, AnyRow
from orchestrator.database.runs import OPEN_RUN
from orchestrator.database.tables import (
    budgets,
    items,
    llm_usage,
    prompt_executions,
    result_cache,
    verdicts,
    workflow_executions,
)

MARK = '{"erased":true}'
"""What stands in place of the fields of an item, or of an answer."""
ERASED = "[erased]"
_PREFIX = "erased-"
_BATCH = 500
_calls = prompt_executions.c
_items = items.c
_runs = workflow_executions.c


def hashed_key(run_id: str, key: str) -> str:
    """What stands in place of an item's key: whoever knows the key can find the item again, others learn nothing."""
    return key if key.startswith(_PREFIX) else _PREFIX + sha256(f"{run_id}:{key}".encode()).hexdigest()[:32]


def runs_with(connection: Connection, key: str) -> list[AnyRow]:
    """The runs that hold an item of that key: columns id, run_id, status."""
    query = select(_runs.id, _runs.run_id, _runs.status).join(items, _items.workflow_execution_id == _runs.id)
    return list(connection.execute(query.where(_items.item_key == key).order_by(_runs.id)))


def runs_by_number(connection: Connection, run: tuple[int, str] | None) -> list[AnyRow]:
    """The run of that number, with the same columns."""
    number = None if run is None else run[0]
    return list(connection.execute(select(_runs.id, _runs.run_id, _runs.status).where(_runs.id == number)))


def ended_before(connection: Connection, age_s: float, *, erased: bool) -> list[AnyRow]:
    """Runs that ended so many seconds ago or earlier: columns id, run_id, status, items_total, completed_at.

    Args:
        connection: the caller's transaction.
        age_s: seconds.
        erased: also those whose texts are gone already.
    """
    columns = (_runs.id, _runs.run_id, _runs.status, _runs.items_total, _runs.completed_at)
    if connection.dialect.name == "sqlite":
        ended_at = (func.julianday(_runs.completed_at) - 2440587.5) * 86400.0
    else:
        ended_at = func.extract("epoch", _runs.completed_at)
    query = select(*columns).where(_runs.status.not_in(OPEN_RUN), ended_at <= NOW - age_s).order_by(_runs.id)
    if not erased:
        query = query.where(_runs.erased_at.is_(None))
    return list(connection.execute(query))


def prepare(connection: Connection) -> None:
    """Makes SQLite overwrite what this transaction deletes or replaces; does nothing elsewhere."""
    if connection.dialect.name == "sqlite":
        connection.execute(text("PRAGMA secure_delete = ON"))


def erase_run(connection: Connection, run: int) -> int:
    """Erases the texts of all items of a run; returns how many items it has."""
    row = connection.execute(select(_runs.run_id, _runs.items_total).where(_runs.id == run).with_for_update()).one()
    _erase_calls(connection, _calls.workflow_execution_id == run, answers=True)
    _hash_keys(connection, run, row.run_id)
    connection.execute(update(workflow_executions).where(_runs.id == run).values(erased_at=NOW, error_message=None))
    return row.items_total


def erase_item(connection: Connection, run: int, key: str) -> bool:
    """Erases the texts of one item of a run; False if it has no such item.

    If a ranking put it where steps that look at all items could see it, their prompts and answers go too, and the
    prompts, but not the answers, of what other items were asked after that.
    """
    row = connection.execute(select(_runs.run_id, _runs.spec).where(_runs.id == run).with_for_update()).one()
    own = _items.workflow_execution_id == run
    ordinal = connection.execute(select(_items.ordinal).where(own, _items.item_key == key)).scalar_one_or_none()
    if ordinal is None:
        return False
    of_run = _calls.workflow_execution_id == run
    _erase_calls(connection, and_(of_run, _calls.item_ordinal == ordinal), answers=True)
    steps = json.loads(row.spec).get("steps", [])
    if _was_shown(connection, run, ordinal, max((step["top"] or 0 for step in steps), default=0)):
        later = [step["name"] for step in steps if step["kind"] == "item" and step["segment"] > 0]
        _erase_calls(connection, and_(of_run, _calls.item_ordinal == -1), answers=True)
        _erase_calls(connection, and_(of_run, _calls.prompt_name.in_(later)), answers=False)
    values = {"item_key": hashed_key(row.run_id, key), "content": MARK}
    connection.execute(update(items).where(own, _items.ordinal == ordinal).values(**values))
    return True


def delete_run(connection: Connection, run: int) -> None:
    """Removes a run with everything that belongs to it. What it cost stays in the budgets it shared."""
    keys = select(_calls.prompt_hash).where(_calls.workflow_execution_id == run, _calls.prompt_hash.is_not(None))
    connection.execute(delete(result_cache).where(result_cache.c.cache_key.in_(keys)))
    connection.execute(delete(budgets).where(budgets.c.scope == f"run:{run}"))
    connection.execute(delete(workflow_executions).where(_runs.id == run))


def scrub(engine: Engine) -> None:
    """Removes the bytes of what was erased from the files of the database, as far as the database lets us.

    SQLite: the write-ahead log is emptied and the file rewritten. Postgres: dead rows are vacuumed; their bytes may
    live on in free pages, write-ahead logs and backups, which are its operator's.

    Raises:
        DatabaseUnavailable: SQLite is busy; safe to repeat.
    """
    if engine.dialect.name == "postgresql":
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            for table in (items, prompt_executions, llm_usage, result_cache):
                connection.execute(text(f"VACUUM {table.name}"))
        return
    with closing(engine.raw_connection()) as raw:
        cursor = raw.cursor()
        try:
            # Without a transaction around them, which our own connections begin at once.
            for statement in ("PRAGMA wal_checkpoint(TRUNCATE)", "VACUUM", "PRAGMA wal_checkpoint(TRUNCATE)"):
                cursor.execute(statement)
                told = cursor.fetchall()
            if told[0][0]:
                raise sqlite3.OperationalError("somebody reads the database, so its log cannot be emptied; repeat this")
        except sqlite3.OperationalError as error:
            raise OperationalError("VACUUM", None, error) from error


def _was_shown(connection: Connection, run: int, ordinal: int, top: int) -> bool:
    places = select(verdicts.c.position).where(
        verdicts.c.workflow_execution_id == run, verdicts.c.item_ordinal == ordinal, verdicts.c.position < top
    )
    return connection.execute(places.limit(1)).first() is not None


def _erase_calls(connection: Connection, condition: ColumnElement[bool], *, answers: bool) -> None:
    ids = select(_calls.id).where(condition)
    replies = update(llm_usage).where(llm_usage.c.prompt_execution_id.in_(ids))
    connection.execute(replies.values(response=None, error_message=None))
    has_prompt = _calls.rendered_prompt != ""
    prompts = update(prompt_executions).where(condition)
    values = {"rendered_prompt": case((has_prompt, ERASED), else_="")}
    if answers:
        keys = select(_calls.prompt_hash).where(condition, _calls.prompt_hash.is_not(None))
        connection.execute(delete(result_cache).where(result_cache.c.cache_key.in_(keys)))
        values["result"] = case((_calls.result.is_not(None), MARK), else_=None)
        values["error_message"] = case((_calls.error_message.is_not(None), ERASED), else_=None)
    connection.execute(prompts.values(**values))


def _hash_keys(connection: Connection, run: int, run_id: str) -> None:
    statement = (
        update(items)
        .where(_items.workflow_execution_id == run, _items.ordinal == bindparam("place"))
        .values(item_key=bindparam("hashed"), content=MARK)
    )
    last = -1
    while page := _page(connection, run, last):
        rows = [{"place": row.ordinal, "hashed": hashed_key(run_id, row.item_key)} for row in page]
        connection.execute(statement, rows)
        last = page[-1].ordinal


def _page(connection: Connection, run: int, last: int) -> Sequence[AnyRow]:
    query = select(_items.ordinal, _items.item_key).where(_items.workflow_execution_id == run, _items.ordinal > last)
    return connection.execute(query.order_by(_items.ordinal).limit(_BATCH)).all()
