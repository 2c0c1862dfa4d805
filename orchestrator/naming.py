"""Names of runs: sortable, short enough to say, and hard to mix up."""

import json
import secrets
from datetime import UTC, datetime

# fmt: off
_ADJECTIVES = (
    "amber", "brave", "brisk", "calm", "clear", "clever", "eager", "early", "fair", "fancy", "fleet", "fresh",
    "gentle", "glad", "golden", "grand", "happy", "honest", "keen", "kind", "lively", "loyal", "lucky",
    "mellow", "merry", "mild", "modest", "neat", "noble", "patient", "polite", "proud", "quick", "quiet",
    "ready", "rosy", "sharp", "shy", "silent", "silver", "sincere", "smart", "snug", "solid", "spry",
    "steady", "stout", "sunny", "swift", "tidy", "tough", "true", "vivid", "warm", "wise", "witty", "young",
)
# fmt: on
# fmt: off
_ANIMALS = (
    "ant", "badger", "bat", "bear", "beaver", "bee", "bison", "boar", "camel", "carp", "cat", "cod", "crab",
    "crane", "crow", "deer", "dog", "dove", "duck", "eagle", "eel", "elk", "finch", "fox", "frog", "gnu",
    "goat", "goose", "gull", "hare", "hawk", "hen", "heron", "ibex", "jay", "kite", "koala", "lark", "lion",
    "llama", "lynx", "mole", "moose", "moth", "mouse", "newt", "orca", "otter", "owl", "panda", "pike",
    "pony", "puma", "quail", "ram", "raven", "robin", "seal", "shrew", "skunk", "sloth", "snail", "stork",
    "swan", "tern", "tiger", "toad", "trout", "tuna", "vole", "wasp", "whale", "wolf", "wren", "yak", "zebra",
)
# fmt: on


def new_run_id() -> str:
    """A name such as `20261122-134500-brave-otter-3f`: UTC time, two words, and two random digits."""
    time = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    return f"{time}-{secrets.choice(_ADJECTIVES)}-{secrets.choice(_ANIMALS)}-{secrets.token_hex(1)}"


def metadata(input_name: str, input_hash: str, version: str) -> str:
    """JSON for the `metadata` column of a run."""
    return json.dumps({"input": input_name, "input_sha256": input_hash, "version": version})
