"""Options that several commands share, and the form of a Typer application. Light: nothing else is imported."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

Progress = Literal["auto", "plain", "none"]

Json = Annotated[bool, typer.Option("--json", help="Write JSON.")]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="A run: its id, a part of it, or `latest`.")]
Actor = Annotated[str | None, typer.Option("--as", metavar="NAME", help="Who does it, for the audit log.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
PackName = Annotated[str, typer.Argument(metavar="PACK", help="A shipped pack's name, or a folder.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What `run`, `validate` and `estimate` are asked for, as it was typed."""

    pack: str
    input: str | None
    input_format: str | None
    provider: str | None
    model: str | None
    variables: dict[str, str]
    limit: int | None
    sample: int | None
    seed: int
    budget_usd: Decimal | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Follow:
    """How a run is followed, and when its end counts as a success."""

    as_json: bool
    detach: bool
    progress: Progress
    max_failures: str


Input = Annotated[
    str | None, typer.Option("--input", "-i", help="File of items, `-` for stdin; else the pack's samples.")
]
InputFormat = Annotated[str | None, typer.Option(help="csv, tsv, jsonl, json or parquet; else told from the file.")]
Provider = Annotated[str | None, typer.Option("--provider", "-p", help="Ask this provider.")]
Model = Annotated[str | None, typer.Option("--model", "-m", help="Ask this model.")]
Var = Annotated[list[str] | None, typer.Option("--var", metavar="NAME=VALUE", help="Set a variable; repeatable.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first so many items.")]
Sample = Annotated[int | None, typer.Option(min=1, help="Only so many items, chosen by a hash of seed and key.")]
Seed = Annotated[int, typer.Option(help="For --sample.")]
Budget = Annotated[str | None, typer.Option(metavar="USD", help="Never spend more than this.")]
MaxFailures = Annotated[
    str, typer.Option(metavar="N|SHARE", help="Items that may fail: a number such as 25, or a share such as 0.01.")
]
ProgressOption = Annotated[Progress, typer.Option(help="A live view, a line every 30 s, or nothing.")]
Detach = Annotated[bool, typer.Option("--detach", help="Leave once the run is stored and at work.")]


def plain_app(**options: Any) -> typer.Typer:
    """A Typer application with plain help: it starts faster than a framed one and reads well in every terminal."""
    defaults: dict[str, Any] = {"rich_markup_mode": None, "add_completion": False, "no_args_is_help": True}
    return typer.Typer(pretty_exceptions_enable=False, **(defaults | options))


def read_variables(pairs: list[str] | None) -> dict[str, str]:
    """`NAME=VALUE` pairs as a mapping."""
    found: dict[str, str] = {}
    for pair in pairs or []:
        name, separator, value = pair.partition("=")
        if not separator or not name:
            raise typer.BadParameter(f"{pair!r} is not NAME=VALUE", param_hint="--var")
        found[name] = value
    return found


def read_usd(text: str | None) -> Decimal | None:
    """An amount of US dollars above 0."""
    if text is None:
        return None
    try:
        amount = Decimal(text)
    except InvalidOperation:
        amount = Decimal("NaN")
    if not amount.is_finite() or amount <= 0:
        raise typer.BadParameter(f"{text!r} is no amount above 0", param_hint="--budget")
    return amount


_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


def read_age(text: str | None) -> timedelta | None:
    """A length of time such as `90d`, `12h` or `2w`."""
    if text is None:
        return None
    number, unit = text[:-1], text[-1:]
    if not (number.isascii() and number.isdigit()) or unit not in _UNITS_S or len(number) > 6:
        raise typer.BadParameter(f"{text!r} is no time such as 90d, 12h or 30m", param_hint="--older-than")
    return timedelta(seconds=int(number) * _UNITS_S[unit])


def read_max_failures(text: str) -> str:
    """A whole number, or a share between 0 and 1 with a decimal point."""
    try:
        value = Decimal(text)
    except InvalidOperation:
        value = Decimal(-1)
    is_share = "." in text
    if value < 0 or (is_share and value > 1) or (not is_share and value != value.to_integral_value()):
        raise typer.BadParameter(f"{text!r} is neither a number nor a share", param_hint="--max-failures")
    return text


def home_of(ctx: typer.Context) -> Path | None:
    """The directory given with `--home`."""
    return ctx.obj
