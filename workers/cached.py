"""The form in which an answer lies in the cache."""

import json
from dataclasses import dataclass

from orchestrator.database.runs import CallEnd


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
        return json.dumps(
            {
                "answer": self.answer,
                "quality": self.quality,
                "provider": self.provider,
                "model": self.model,
                "cost_nusd": self.cost_nusd,
            }
        )

    @classmethod
    def from_json(cls, text: str) -> "CachedAnswer":
        """Reads what `to_json` wrote."""
        return cls(**json.loads(text))

    def end(self) -> CallEnd:
        """How a call ends that takes this answer."""
        return CallEnd(
            "completed", result=self.answer, quality_score=self.quality, cached=True, saved_nusd=self.cost_nusd
        )
