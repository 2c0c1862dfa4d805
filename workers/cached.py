"""The form in which an answer lies in the cache."""

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class CachedAnswer:
    """An answer that was paid for.

    Attributes:
        answer: JSON text.
        cost_nusd: what it cost then, in nano-USD; using it again costs nothing.
    """

    answer: str
    quality: float
    provider: str
    model: str
    cost_nusd: int

    def to_json(self) -> str:
        """JSON text that `from_json` reads back."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "CachedAnswer":
        """Reads what `to_json` wrote."""
        return cls(**json.loads(text))
