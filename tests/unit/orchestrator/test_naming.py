"""Names of runs sort by time, can be said, and are never given twice."""

import json
import re

from orchestrator.naming import metadata, new_run_id

FORM = re.compile(r"20\d{6}-\d{6}-[a-z]+-[a-z]+-[0-9a-f]{2}")


def test_a_name_is_time_two_words_and_two_digits():
    names = [new_run_id() for _ in range(200)]
    assert all(FORM.fullmatch(name) for name in names)
    assert all(len(name) <= 64 for name in names)


def test_names_of_the_same_second_differ():
    names = [new_run_id() for _ in range(200)]
    assert len(set(names)) >= 199


def test_later_names_sort_behind_earlier_ones():
    earlier, later = new_run_id(), new_run_id()
    assert earlier[:15] <= later[:15]


def test_metadata_is_json_of_what_was_read():
    told = json.loads(metadata('a "file".csv', "abc", "1.2.3"))
    assert told == {"input": 'a "file".csv', "input_sha256": "abc", "version": "1.2.3"}
