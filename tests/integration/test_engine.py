"""Runs from first item to last answer, through real worker processes, a real broker and strict fake services."""

import json
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from orchestrator.database import budgets
from orchestrator.errors import OrchestratorError
from tests.engine import Engine, launch_engine
from tests.packs import CHOOSY, GRAPH, ONE, SURVEY, one_step
from tests.servers import wait_until
from tests.strict_limits import token_bucket


def _overloaded(retry_after_s: int) -> dict[str, object]:
    error = {"message": "The server is overloaded", "type": "server_is_overloaded", "code": "server_is_overloaded"}
    return {"status": 503, "headers": {"retry-after": str(retry_after_s)}, "body": json.dumps({"error": error})}


@pytest.fixture(scope="module")
def installation() -> Iterator[Engine]:
    """Two workers: one for everything but the spare provider, one for the spare provider alone."""
    with launch_engine(workers=0) as engine:
        first = engine.start_worker(["control", "llm.main"], ready=False)
        second = engine.start_worker(["llm.spare"], ready=False)
        wait_until(lambda: first.is_ready() and second.is_ready(), 30)
        yield engine


@pytest.fixture
def engine(installation: Engine) -> Engine:
    """The shared installation with providers that behave well."""
    return installation.calm()


class TestAnswers:
    def test_a_survey_asks_every_item_ranks_them_and_reports(self, engine: Engine) -> None:
        run = engine.start_run(10, SURVEY, salt="survey")
        status = engine.wait(run)
        assert status["status"] == "completed"
        assert status["items"] == {"total": 10, "completed": 10, "failed": 0, "skipped": 0}
        assert status["completed_at"] > status["started_at"]
        history = engine.check(run)
        assert history.received == history.calls["completed"] == 21
        ranked = engine.rows(
            "SELECT rank, score FROM verdicts WHERE workflow_execution_id = :run ORDER BY position", run=run.run
        )
        assert len(ranked) == 10
        assert [row.score for row in ranked] == sorted((row.score for row in ranked), reverse=True)

    def test_steps_wait_for_the_answers_they_need_in_a_graph_of_levels(self, engine: Engine) -> None:
        run = engine.start_run(30, GRAPH, salt="graph")
        assert engine.wait(run)["status"] == "completed"
        assert engine.check(run).received == 30 * GRAPH.calls_per_item

    def test_a_condition_skips_items_and_what_depends_on_them(self, engine: Engine) -> None:
        run = engine.start_run(10, CHOOSY, salt="when")
        assert engine.wait(run)["status"] == "completed"
        history = engine.check(run)
        assert history.calls == {"completed": 10 + 4 + 1, "skipped": 6}
        ranked = engine.rows("SELECT 1 FROM verdicts WHERE workflow_execution_id = :run", run=run.run)
        assert len(ranked) == 4

    def test_a_malformed_answer_is_asked_again(self, engine: Engine) -> None:
        engine.fake.control("malformed", "malformed", "malformed")
        run = engine.start_run(10, ONE, salt="malformed")
        assert engine.wait(run)["status"] == "completed"
        history = engine.check(run, repeats=3)
        assert history.attempts == {"ok": 10, "bad_output": 3}

    def test_a_call_fails_when_the_answer_stays_malformed(self, engine: Engine) -> None:
        engine.fake.control(malformed=1.0)
        run = engine.start_run(6, one_step(reasks=2), salt="hopeless")
        status = engine.wait(run)
        assert (status["status"], status["reason"]) == ("failed", "all_items_failed")
        history = engine.check(run, repeats=12)
        assert history.attempts == {"bad_output": 18}
        assert {
            row.error_code
            for row in engine.rows(
                "SELECT error_code FROM prompt_executions WHERE workflow_execution_id = :run", run=run.run
            )
        } == {"bad_output"}

    @pytest.mark.parametrize("text", ["null \u0000 byte", "half a pair \ud800", "over \x1b[31m there"])
    def test_text_that_a_database_refuses_harms_no_other_call(self, engine: Engine, text: str) -> None:
        content = json.dumps({"score": 5, "reason": text})
        message = {"role": "assistant", "content": content}
        body = {
            "id": "x",
            "model": "fake-model",
            "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
        }
        body["usage"] = {"prompt_tokens": 10, "completion_tokens": 5}
        engine.fake.control({"status": 200, "body": json.dumps(body)}, latency_s=0.1)
        run = engine.start_run(10, ONE, salt=f"hostile {len(text)}")
        assert engine.wait(run)["status"] == "completed"
        assert engine.check(run, repeats=1).calls["completed"] >= 9

    def test_an_equal_run_is_answered_from_the_cache(self, engine: Engine) -> None:
        pack = one_step(cache=True)
        first = engine.start_run(10, pack, salt="cached")
        engine.wait(first)
        second = engine.start_run(10, pack, salt="cached")
        status = engine.wait(second)
        assert (status["status"], status["cost_usd"]) == ("completed", "0.00")
        assert engine.check(second).received == 0
        answers = "SELECT result FROM prompt_executions WHERE workflow_execution_id = :run ORDER BY item_ordinal"
        assert engine.rows(answers, run=first.run) == engine.rows(answers, run=second.run)


class TestFallback:
    @pytest.mark.parametrize("trouble", [{"error_503": 1.0}, {"models": "another-model"}], ids=["503", "404"])
    def test_calls_go_on_at_the_second_provider_by_its_own_queue(
        self, engine: Engine, trouble: dict[str, object]
    ) -> None:
        engine.fake.control(**trouble)
        run = engine.start_run(12, one_step(attempts=2, fallback=True), salt=f"fallback {sorted(trouble)}")
        assert engine.wait(run)["status"] == "completed"
        history = engine.check(run, repeats=24)
        assert history.attempts["ok"] == 12
        asked = engine.rows(
            "SELECT DISTINCT provider, worker_id FROM llm_usage WHERE workflow_execution_id = :run", run=run.run
        )
        assert len(asked) == 2
        assert len({row.worker_id for row in asked}) == 2
        final = engine.rows(
            "SELECT DISTINCT llm_provider FROM prompt_executions WHERE workflow_execution_id = :run", run=run.run
        )
        assert [row.llm_provider for row in final] == ["spare"]

    def test_a_model_that_nobody_has_pauses_the_run_and_loses_nothing(self, engine: Engine) -> None:
        engine.fake.control(models="another-model")
        run = engine.start_run(8, ONE, salt="no model")
        status = engine.wait(run, "paused")
        assert status["reason"] == "provider_model"
        engine.fake.control(models="")
        engine.manager.resume(run.run_id)
        assert engine.wait(run)["status"] == "completed"
        engine.check(run, repeats=8)


class TestBudgets:
    def test_a_run_over_budget_pauses_and_goes_on_with_more(self, engine: Engine) -> None:
        engine.fake.control(latency_s=0.02)
        run = engine.start_run(60, ONE, salt="budget", budget_usd="0.03")
        status = engine.wait(run, "paused")
        assert status["reason"] == "budget"
        wait_until(lambda: engine.status(run)["calls"]["running"] == 0)
        before = engine.check(run, ended=False)
        assert 0 < before.cost_nusd <= 30_000_000
        assert before.calls["completed"] > 10
        engine.manager.resume(run.run_id, budget_usd=1)
        assert engine.wait(run)["status"] == "completed"
        assert engine.check(run).received == 60

    def test_runs_share_the_budget_of_the_installation(self, engine: Engine) -> None:
        engine.fake.control(latency_s=0.02)
        spent = engine.rows("SELECT spent_nusd FROM budgets WHERE scope = 'global' UNION SELECT 0 ORDER BY 1 DESC")[0][
            0
        ]
        limit = spent + 30_000_000
        with engine.with_flags({"global.cost_limit_usd": f"{limit / 1e9:.9f}"}) as limited:
            runs = [limited.start_run(60, ONE, salt=f"shared {name}") for name in "ab"]
        for run in runs:
            assert engine.wait(run, "paused")["reason"] == "budget"
            wait_until(lambda run=run: engine.status(run)["calls"]["running"] == 0)
        histories = [engine.check(run, ended=False) for run in runs]
        assert spent + sum(history.cost_nusd for history in histories) <= limit
        with engine.manager.database.transaction() as connection:
            budgets.set_limit(connection, budgets.GLOBAL_SCOPE, None)
        for run in runs:
            engine.manager.resume(run.run_id)
            assert engine.wait(run)["status"] == "completed"
            assert engine.check(run).received == 60


@contextmanager
def slowed(engine: Engine) -> Iterator[None]:
    """Lets few calls be in flight, so that some are left when a test changes its mind."""
    engine.manager.set_limits("main", concurrency=30)
    yield
    engine.manager.clear_limits("main")


class TestControl:
    def test_pause_reaches_the_workers_and_resume_repeats_nothing(self, engine: Engine) -> None:
        engine.fake.control(latency_s=0.3)
        with slowed(engine):
            run = engine.start_run(2000, ONE, salt="pause")
            engine.wait_received(60)
            assert engine.manager.pause(run.run_id)
        wait_until(lambda: engine.status(run)["calls"]["running"] == 0, 5)
        received = engine.fake.provider.number
        held = engine.check(run, ended=False)
        assert held.received < 2000
        engine.manager.resume(run.run_id)
        assert engine.wait(run)["status"] == "completed"
        assert received < engine.fake.provider.number
        assert engine.check(run).received == 2000

    def test_a_call_that_waits_to_be_sent_again_survives_a_pause(self, engine: Engine) -> None:
        engine.fake.control(_overloaded(30), latency_s=0.05)
        run = engine.start_run(5, ONE, salt="backoff")
        engine.wait_calls(run, 4)
        assert engine.manager.pause(run.run_id)
        wait_until(lambda: engine.status(run)["calls"]["running"] == 0, 5)
        engine.manager.resume(run.run_id)
        assert engine.status(run)["calls"]["failed"] == 0
        engine.manager.cancel(run.run_id)
        wait_until(lambda: engine.status(run)["calls"]["cancelled"] == 1, 5)
        engine.check(run, repeats=1)

    def test_cancel_ends_every_call_and_keeps_what_was_answered(self, engine: Engine) -> None:
        engine.fake.control(latency_s=0.3)
        with slowed(engine):
            run = engine.start_run(2000, ONE, salt="cancel")
            engine.wait_received(60)
            assert engine.manager.cancel(run.run_id)
        wait_until(lambda: engine.status(run)["calls"]["running"] == 0, 5)
        assert not engine.manager.cancel(run.run_id)
        history = engine.check(run)
        assert history.calls["completed"] + history.calls["cancelled"] == 2000
        assert history.calls["cancelled"] > 0

    def test_a_call_that_waits_to_be_sent_again_is_cancelled_too(self, engine: Engine) -> None:
        engine.fake.control(_overloaded(30), latency_s=0.05)
        run = engine.start_run(5, ONE, salt="cancelled backoff")
        engine.wait_calls(run, 4)
        assert engine.manager.cancel(run.run_id)
        wait_until(lambda: engine.status(run)["calls"]["cancelled"] == 1, 5)
        engine.check(run)

    def test_controls_of_an_ended_run_change_nothing(self, engine: Engine) -> None:
        run = engine.start_run(2, ONE, salt="ended")
        engine.wait(run)
        assert not engine.manager.pause(run.run_id)
        assert not engine.manager.cancel(run.run_id)
        with pytest.raises(OrchestratorError):
            engine.manager.find_run("no-such-run")
        engine.manager.resume(run.run_id)
        assert engine.status(run)["status"] == "completed"
        engine.check(run)


class TestWindows:
    def test_lanes_bound_what_is_outstanding(self) -> None:
        """200 items in windows of 20, two lanes: while nothing is answered, only 40 items have calls."""
        settings = {"worker": {"window_size": 20, "lanes": 2, "shard_size": 10}}
        query = "SELECT count(DISTINCT item_ordinal) AS items FROM prompt_executions WHERE workflow_execution_id = :run"
        with launch_engine(settings=settings, fakes={"main": {"latency_s": 6.0}}, workers=1) as engine:
            run = engine.start_run(200, GRAPH)
            engine.wait_received(40)
            assert engine.rows(query, run=run.run)[0].items == 40
            engine.fake.control(latency_s=0.0)
            assert engine.wait(run)["status"] == "completed"
            assert engine.check(run).received == 1000

    def test_a_call_that_hangs_does_not_hold_up_its_lane(self) -> None:
        """Of each of the first three windows one call is not answered; the only lane goes on to the last window."""
        settings = {"worker": {"window_size": 20, "lanes": 1, "shard_size": 5}}
        with launch_engine(settings=settings, workers=1) as engine:
            engine.fake.control(*(["hang"] + ["ok"] * 19) * 3)
            run = engine.start_run(160, ONE)
            engine.wait_calls(run, 157)
            status = engine.status(run)
            assert status["status"] == "running"
            assert status["attempts"]["sent"] == 3


class TestLimits:
    def test_two_workers_use_the_whole_limit_and_never_more(self) -> None:
        """The service refuses what does not fit its bucket of 20 per second; nothing is refused, nothing wasted.

        Its bucket holds one second more than ours, because on a busy machine one request takes longer than the next.
        A quiet machine uses 98.6 %; a busy one wakes senders late, and what is late is not sent.
        """
        limits = {"rate_limit_rpm": 1200, "burst": 20}
        service = {"rpm": 1200, "limiter": "bucket", "burst": 40, "latency_s": 0.05}
        # Eight shards, of which one worker can hold four: neither can take them all.
        few = {"worker": {"shards": 2}}
        with launch_engine(providers={"main": limits}, settings=few, fakes={"main": service}, workers=2) as engine:
            run = engine.start_run(220, ONE)
            assert engine.wait(run)["status"] == "completed"
            history = engine.check(run)
            assert history.attempts == {"ok": 220}
            sent = [line.mono for line in engine.fake.log().received]
            steady = sent[40:-10]
            used = (len(steady) - 1) / (steady[-1] - steady[0]) / 20
            workers = engine.rows("SELECT DISTINCT worker_id FROM llm_usage")
            print(f"1200 rpm over two workers: 0 of {len(sent)} refused, {used:.2%} of the limit in steady state")
            assert len(workers) == 2
            # Busy machines wake senders late; `python -m benchmarks.limiter` measures the real share.
            assert used >= 0.8

    def test_calls_that_wait_for_their_second_try_keep_no_worker_from_the_first_tries_of_others(self) -> None:
        """Every shard has a call that is told to come back in 8 s: more shards than a worker would have places for."""
        settings = {"worker": {"concurrency": 10, "shard_size": 5}}
        with launch_engine(settings=settings, fakes={"main": {"latency_s": 0.02}}, workers=1) as engine:
            # Every fifth of the first 300 requests, at one request per call: 60 shards that wait.
            later = [_overloaded(8) if number % 5 == 0 else "ok" for number in range(300)]
            engine.fake.control(*later)
            run = engine.start_run(400, ONE)
            assert engine.wait(run)["status"] == "completed"
            engine.check(run, repeats=60)
            sent = sorted(line.mono for line in engine.fake.log().received)
            refused = [line.mono for line in engine.fake.log().answered if line.status == 503]
            took_s = sent[399] - sent[0]
            print(f"400 calls begun in {took_s:.2f} s, {len(refused)} of them told to come back in 8 s")
            assert sum(moment < refused[0] + 8 for moment in sent) >= 400

    def test_tokens_are_paced_by_what_calls_really_used(self) -> None:
        with launch_engine(providers={"main": {"rate_limit_tpm": 60_000}}, workers=1) as engine:
            run = engine.start_run(175, ONE)
            assert engine.wait(run)["status"] == "completed"
            engine.check(run)
            log = engine.fake.log()
            used = [(line.mono, line.input_tokens + line.output_tokens) for line in log.answered]
            assert token_bucket(used, 60_000, 60.0, 15_000 + 500) == 0
            total, took_s = sum(cost for _, cost in used), used[-1][0] - used[0][0]
            print(f"60,000 tpm: {total} tokens in {took_s:.1f} s")

    def test_a_pause_that_the_provider_asks_for_holds_the_whole_pool(self) -> None:
        with launch_engine(providers={"main": {"rate_limit_rpm": 2400, "burst": 10}}, workers=2) as engine:
            engine.fake.control(*["ok"] * 30, {"status": 429, "headers": {"retry-after": "2"}, "body": "{}"})
            run = engine.start_run(70, ONE)
            assert engine.wait(run)["status"] == "completed"
            engine.check(run, repeats=1)
            log = engine.fake.log()
            told = next(line.mono for line in log.answered if line.status == 429)
            after = sorted(line.mono - told for line in log.received if line.mono > told)
            early = [late for late in after if late < 2.0]
            print(f"after 'retry after 2 s': {len(early)} calls, the last at {max(early, default=0):.2f} s")
            # What had its permit within the quarter of a second in which processes hear of each other may still leave.
            assert all(late < 0.4 for late in early)
            assert len(log.statuses()) == 2
            assert log.statuses()[429] == 1


class TestDrain:
    def test_calls_in_flight_end_and_none_begins_when_a_worker_is_told_to_stop(self) -> None:
        providers = {"main": {"concurrency": 40}}
        with launch_engine(providers=providers, fakes={"main": {"latency_s": 0.8}}, workers=1) as engine:
            run = engine.start_run(110, ONE)
            engine.wait_received(50)
            received = engine.fake.provider.number
            took_s = engine.workers[0].sigterm()
            print(f"calls of 0.8 s drained in {took_s:.1f} s")
            assert engine.fake.provider.number - received <= 40
            assert took_s < 5
            engine.check(run, ended=False)
            engine.start_worker()
            assert engine.wait(run)["status"] == "completed"
            assert engine.check(run).received == 110

    def test_shards_that_wait_for_a_slow_limit_or_a_second_try_do_not_hold_up_the_end(self) -> None:
        providers = {"main": {"rate_limit_rpm": 60, "burst": 5}}
        with launch_engine(providers=providers, workers=1) as engine:
            engine.fake.control(_overloaded(40))
            run = engine.start_run(60, ONE)
            engine.wait_received(6)
            took_s = engine.workers[0].sigterm()
            print(f"left {engine.status(run)['calls']['pending']} waiting calls in {took_s:.1f} s")
            assert took_s < 4
            history = engine.check(run, ended=False)
            assert history.calls["running"] == 0

    def test_calls_that_outlast_the_grace_are_booked_as_unknown(self) -> None:
        settings = {"worker": {"drain_seconds": 1.0}}
        with launch_engine(settings=settings, fakes={"main": {"latency_s": 6.0}}, workers=1) as engine:
            run = engine.start_run(10, ONE)
            engine.wait_received(10)
            took_s = engine.workers[0].sigterm()
            assert 1 <= took_s < 5
            history = engine.check(run, ended=False, unknown=10)
            assert history.attempts == {"unknown": 10}
            assert engine.status(run)["unconfirmed_usd"] != "0.00"
            engine.fake.control(latency_s=0.0)
            engine.start_worker()
            assert engine.wait(run)["status"] == "completed"
            engine.check(run, unknown=10, repeats=10)
