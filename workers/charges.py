"""Pure: a provider's limits, what one request takes of them, what it really took, and what the reply says about them.

The names are those of `workers.limiter.PoolLimits`; a provider that has no such limit ignores the charge.
"""

from collections.abc import Mapping

from orchestrator.settings import LLMProviderConfig
from providers.messages import RateLimitHint, Usage
from workers.limiter import MINUTE_S, PoolLimits, Sighting

UNTOLD = Sighting()

MOST_WEIGHT = 10
"""Priorities beyond this, up or down, change nothing more: a thousandth is next to nothing already."""


def pool_limits(config: LLMProviderConfig) -> tuple[PoolLimits, PoolLimits]:
    """The limits of each model, and those that all models of an account share."""
    configured = {
        "rpm": config.rate_limit_rpm,
        "tpm": config.rate_limit_tpm,
        "itpm": config.rate_limit_itpm,
        "otpm": config.rate_limit_otpm,
        "rpd": config.rate_limit_rpd,
        "concurrency": config.concurrency,
    }
    shared = {name: units for name, units in configured.items() if name in config.shared_limits}
    own = {name: units for name, units in configured.items() if name not in config.shared_limits}
    return _limits(config, own), _limits(config, shared)


def _limits(config: LLMProviderConfig, units: Mapping[str, int | None]) -> PoolLimits:
    return PoolLimits(
        rpm=units.get("rpm"),
        tpm=units.get("tpm"),
        concurrency=units.get("concurrency"),
        rpm_burst=config.burst,
        itpm=units.get("itpm"),
        otpm=units.get("otpm"),
        rpd=units.get("rpd"),
        day_zone=config.day_zone,
    )


def expected(input_tokens: int, output_cap: int) -> Mapping[str, int]:
    """What a request is charged before it leaves; providers reserve the whole cap too."""
    return {"rpm": 1, "rpd": 1, "tpm": input_tokens + output_cap, "itpm": input_tokens, "otpm": output_cap}


def real(usage: Usage) -> Mapping[str, int]:
    """What it took by the provider's own count; input that came from the prompt cache is not counted as input."""
    return {
        "tpm": usage.input_tokens + usage.output_tokens,
        "itpm": max(0, usage.input_tokens - usage.cached_tokens),
        "otpm": usage.output_tokens,
    }


def sightings(hint: RateLimitHint) -> Mapping[str, Sighting]:
    """What headers say about limits per minute; what takes longer than a minute to be full again is another limit."""
    told = {
        "rpm": Sighting(hint.requests_limit, hint.requests_remaining, hint.requests_reset_s),
        "tpm": Sighting(hint.tokens_limit, hint.tokens_remaining, hint.tokens_reset_s),
        "itpm": Sighting(hint.input_tokens_limit, hint.input_tokens_remaining, hint.input_tokens_reset_s),
        "otpm": Sighting(hint.output_tokens_limit, hint.output_tokens_remaining, hint.output_tokens_reset_s),
    }
    return {name: one for name, one in told.items() if one != UNTOLD and (one.full_s or 0.0) <= MINUTE_S}


def weight(priority: int) -> float:
    """The share of a run beside others: each step of priority doubles it."""
    return 2.0 ** max(-MOST_WEIGHT, min(MOST_WEIGHT, priority))
