"""Keeps untrusted text inert: it can be read by a model, and cannot pass for anything but data.

Item text reaches a judge between two delimiter lines that cannot occur in it. What chat templates and readers
would take for structure (role markers, special tokens, our own delimiters) is replaced by look-alikes that a
person reads the same; characters that nobody sees (zero width, bidirectional control, tag characters) are removed,
because text hidden from the reviewer must not be visible to the model. Everything here is deterministic: the
cache key and the id of a call depend on the rendered prompt, so the delimiter is derived from the content
rather than drawn at random.
"""

import hashlib
import re

DEFAULT_LIMIT = 50_000
INLINE_LIMIT = 300

# Line separators that renderers disagree about become plain newlines first, so that line-based rules hold.
_NEWLINES = re.compile("\r\n|[\r\x0b\x0c\x85\u2028\u2029]")
_INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x9f"  # control characters except tab and newline
    "\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f"
    "\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff9-\ufffb"
    "\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
_SURROGATE = re.compile("[\ud800-\udfff]")
_BRACKET_TOKEN = re.compile(
    r"\[(?=[ \t]{0,3}/?[ \t]{0,3}(?:INST|SYS|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|IMG)[ \t]{0,3}\])",
    re.IGNORECASE,
)
_ANGLE_TOKEN = re.compile(
    r"<(?=[ \t]{0,3}/?[ \t]{0,3}(?:system|assistant|user|human|developer|tool|function|instructions?|prompt|"
    r"s|bos|eos|unk|pad|sys|start_of_turn|end_of_turn|start_of_image|untrusted|tool_call|tool_response|function_calls|think|thinking|"
    r"begin_of_text|end_of_text|endoftext)\b[^<>\n]{0,80}>)",
    re.IGNORECASE,
)
# A special token is disarmed by its first character; `|>` alone is left, it is an operator in several languages.
_PIPE_TOKEN = re.compile("<(?=[ \t]{0,3}[|\uff5c])")
_DELIMITER = re.compile("<{3,}")
_ROLE_LINE = re.compile(
    r"^([ \t>*_#]*(?:human|assistant|system|user|developer|ai)[ \t*_]*):", re.IGNORECASE | re.MULTILINE
)
# Most names, addresses and numbers are this plain; every rule below but the one for role lines needs another character.
_PLAIN = re.compile(r"[\t\n !-\"$-;=-Z\\-~]*")
_HEADING_LINE = re.compile(
    r"^([ \t]*)(#{1,6})(?=[ \t]*(?:instructions?|response|input|system|user|assistant|human)\b)",
    re.IGNORECASE | re.MULTILINE,
)


def neutralise(text: str) -> str:
    """Return `text` without hidden characters and without anything a chat template would take for structure.

    Ordinary prose, code and JSON come out unchanged. Safe to repeat: the result is a fixed point.
    """
    if _PLAIN.fullmatch(text):
        return _ROLE_LINE.sub(_wide_colon, text) if ":" in text else text
    text = _NEWLINES.sub("\n", text)
    text = _INVISIBLE.sub("", text)
    text = _SURROGATE.sub("\ufffd", text)
    text = _PIPE_TOKEN.sub("\u2039", text)
    text = _DELIMITER.sub(lambda match: "\u2039" * len(match.group()), text)
    text = _without_angle_tokens(text)
    text = _BRACKET_TOKEN.sub("\u27e6", text)
    text = _HEADING_LINE.sub(lambda match: match.group(1) + "\uff03" * len(match.group(2)), text)
    return _ROLE_LINE.sub(_wide_colon, text)


def _without_angle_tokens(text: str) -> str:
    # A token inside another one hides it until it is gone itself, so once is not always enough.
    while (disarmed := _ANGLE_TOKEN.sub("\u2039", text)) != text:
        text = disarmed
    return text


def _wide_colon(match: re.Match[str]) -> str:
    return match.group(1) + "\uff1a"


def fence(text: str, label: str = "data", limit: int = DEFAULT_LIMIT) -> str:
    """Put `text` between delimiter lines that name `label` and cannot occur in the text.

    Args:
        text: Untrusted text of any content.
        label: What the data is; letters, digits, dash, underscore and dot survive.
        limit: Characters kept; a longer text is cut and the cut is stated inside the fence.

    Returns:
        Three or more lines: the opening delimiter, the neutralised text, the closing delimiter. Equal arguments
        give equal results.
    """
    inside = _cut(neutralise(text), limit)
    name = re.sub(r"[^\w.-]+", "-", label, flags=re.ASCII).strip("-") or "data"
    mark = hashlib.sha256(f"{name}\n{inside}".encode()).hexdigest()[:12]
    return f"<<<untrusted {name} {mark}>>>\n{inside}\n<<<end {name} {mark}>>>"


def inert(text: str, limit: int = INLINE_LIMIT) -> str:
    """Return `text` neutralised and folded to one line of at most `limit` characters, for names and labels."""
    return _cut(" ".join(neutralise(text).split()), limit)


def _cut(text: str, limit: int) -> str:
    kept = max(limit, 0)
    if len(text) <= kept:
        return text
    return f"{text[:kept]} [cut: {len(text) - kept} more characters]"
