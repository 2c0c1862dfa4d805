"""Which messages a worker takes next, given what it holds."""

from hypothesis import given
from hypothesis import strategies as st

from workers.intake import MOST, MOST_PER_LINE, UNREAD_CALLS, Intake, Line

A, B, C = (("llm.x", 0), ("llm.x", 1), ("llm.y", 0))
LINES = [A, B, C]


def fill(intake: Intake, line: Line, calls: int, tag: str = "") -> None:
    """Takes a message from a line whose calls wait here."""
    tag = tag or f"{line}{calls}"
    intake.take(tag, line)
    intake.ticket(tag).read(range(calls))


def test_the_line_of_which_the_fewest_calls_wait_comes_first():
    intake = Intake()
    assert set(intake.wanted(LINES)) == set(LINES)
    fill(intake, A, 30)
    fill(intake, B, 10)
    assert intake.wanted(LINES) == [C, B, A]


def test_lines_that_are_alike_take_turns():
    intake = Intake()
    for turn in range(6):
        line = intake.wanted([A, B])[0]
        assert line == (A, B)[turn % 2]
        fill(intake, line, 0, tag=str(turn))


def test_a_full_line_is_left_alone_until_calls_of_it_were_sent():
    intake = Intake()
    fill(intake, A, MOST_PER_LINE, "a")
    assert A not in intake.wanted(LINES)
    intake.ticket("a").begin(0)
    assert intake.wanted(LINES)[-1] == A


def test_a_message_counts_from_the_moment_it_is_taken():
    intake = Intake()
    taken = MOST_PER_LINE // UNREAD_CALLS
    for number in range(taken):
        assert A in intake.wanted(LINES)
        intake.take(str(number), A)
    assert A not in intake.wanted(LINES)


def test_a_line_that_has_nothing_here_is_served_however_full_the_process_is():
    intake = Intake()
    for number in range(MOST // MOST_PER_LINE + 1):
        fill(intake, ("llm.x", number + 5), MOST_PER_LINE)
    fill(intake, A, 1)
    assert intake.wanted(LINES) == [B, C]


def test_a_call_that_begins_twice_and_one_of_another_message_count_once_and_never():
    intake = Intake()
    fill(intake, A, MOST_PER_LINE + 1, "a")
    for call in (3, 3, 10**6):
        intake.ticket("a").begin(call)
    assert A not in intake.wanted(LINES)


def test_messages_that_nobody_read_are_forgotten_with_their_connection():
    intake = Intake()
    for number in range(MOST_PER_LINE // UNREAD_CALLS):
        intake.take(str(number), A)
    fill(intake, B, MOST_PER_LINE)
    intake.forget_unread()
    assert intake.wanted(LINES) == [C, A]
    intake.ticket("0").read(range(MOST_PER_LINE))
    assert intake.wanted(LINES) == [C]


def test_a_message_nobody_noted_has_a_ticket_that_counts_nowhere():
    intake = Intake()
    intake.ticket("unknown").read(range(10**4))
    assert len(intake.wanted(LINES)) == 3


@given(
    st.lists(
        st.tuples(st.sampled_from(["take", "read", "begin", "end", "forget", "drop"]), st.integers(0, 5)), max_size=60
    )
)
def test_nothing_is_left_when_all_messages_are_gone(events: list[tuple[str, int]]):
    """A count that is never given back would close a line for as long as the process lives."""
    intake, taken = Intake(), set[str]()
    for what, number in events:
        tag = str(number)
        match what:
            case "take":
                if tag not in taken:
                    taken.add(tag)
                    intake.take(tag, LINES[number % 3])
            case "read":
                intake.ticket(tag).read(range(number * 100))
            case "begin":
                intake.ticket(tag).begin(number)
            case "end":
                intake.ticket(tag).end()
            case "forget":
                intake.forget_unread()
            case _:
                intake.drop(tag)
                taken.discard(tag)
    for tag in taken:
        intake.drop(tag)
    assert not intake._waiting
    assert not intake._tickets
