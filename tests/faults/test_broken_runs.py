"""A run that a bug of ours, or another release, keeps from going on says so, and the others go on."""

import json

from sqlalchemy import text

from tests.engine import launch_engine
from tests.packs import ONE


def test_a_run_that_cannot_be_understood_is_paused_and_the_next_one_goes_on() -> None:
    with launch_engine(providers={"main": {"concurrency": 10}}, workers=0) as engine:
        broken = engine.start_run(10, ONE)
        with engine.manager.database.transaction() as connection:
            (spec,) = connection.execute(
                text("SELECT spec FROM workflow_executions WHERE id = :run"), {"run": broken.run}
            ).one()
            strange = json.dumps(json.loads(spec) | {"spec_version": 999})
            connection.execute(
                text("UPDATE workflow_executions SET spec = :spec WHERE id = :run"),
                {"spec": strange, "run": broken.run},
            )
        engine.start_worker()
        status = engine.wait(broken, "paused")
        assert status["reason"] == "internal_error"
        assert "another release" in status["reason_detail"]
        sound = engine.start_run(10, ONE)
        assert engine.wait(sound)["status"] == "completed"
        assert engine.rows("SELECT * FROM llm_usage WHERE workflow_execution_id = :run", run=broken.run) == []
