"""Addresses that prompts and keys are never sent to."""

from __future__ import annotations

import pytest

from providers.http import checked_url


@pytest.mark.parametrize(
    "url",
    [
        "https://api.openai.com/v1",
        "http://localhost:11434/v1",
        "http://127.0.0.1:8000/v1",
        "http://[::1]:8000/v1",
        "http://192.168.1.20/v1",
        "http://vllm:8000/v1",
        "http://vllm.default.svc.cluster.local/v1",
    ],
)
def test_hosted_and_private_addresses_pass(url: str) -> None:
    assert str(checked_url(url)) == url


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("https://user:hunter2@api.example.com/v1", "user name or password"),
        ("ftp://api.example.com/v1", "http:// or https://"),
        ("file:///etc/passwd", "http:// or https://"),
        ("api.example.com/v1", "http:// or https://"),
        ("https:///v1", "no host"),
        ("http://api.example.com/v1", "must use https"),
        ("http://8.8.8.8/v1", "must use https"),
        ("http://169.254.169.254/latest", "metadata"),
        ("https://169.254.169.254/latest", "metadata"),
        ("http://2852039166/latest", "metadata"),
        ("http://0xA9FEA9FE/latest", "metadata"),
        ("http://[fe80::1]/v1", "metadata"),
        ("http://[::ffff:169.254.169.254]/v1", "metadata"),
        ("http://metadata.google.internal./v1", "metadata"),
        ("http://100.100.100.200/v1", "metadata"),
    ],
)
def test_dangerous_addresses_are_refused_without_repeating_secrets(url: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        checked_url(url)
    assert "hunter2" not in str(caught.value)
