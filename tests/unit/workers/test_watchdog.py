"""A consumer is still when messages wait, it has nothing else to do, and takes none. Everything else is patience."""

from workers.watchdog import Stillness


def test_it_is_still_while_messages_wait_and_none_is_taken() -> None:
    stillness = Stillness(0.0)
    assert [stillness.seconds(now, queued=3, taken=7, is_at_work=False) for now in (1.0, 31.0, 61.0)] == [0, 30, 60]


def test_an_empty_queue_a_taken_message_and_work_at_hand_begin_anew() -> None:
    stillness = Stillness(0.0)
    stillness.seconds(0.0, queued=3, taken=7, is_at_work=False)
    assert stillness.seconds(50.0, queued=3, taken=8, is_at_work=False) == 0
    assert stillness.seconds(90.0, queued=0, taken=8, is_at_work=False) == 0
    assert stillness.seconds(120.0, queued=3, taken=8, is_at_work=True) == 0
    assert stillness.seconds(125.0, queued=3, taken=8, is_at_work=False) == 5


def test_while_the_broker_is_away_nobody_is_still() -> None:
    stillness = Stillness(0.0)
    stillness.seconds(0.0, queued=3, taken=7, is_at_work=False)
    stillness.begin_anew(300.0)
    assert stillness.seconds(310.0, queued=3, taken=7, is_at_work=False) == 10
