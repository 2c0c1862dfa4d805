"""Speaks to LLM services and knows nothing of runs, queues or tables.

Each dialect is one module with one class that turns a `ChatRequest` into a `ChatReply` or raises one `ProviderError`.
Services that differ only by address, limits or field names are rows in `catalog.toml`. This file imports nothing, so
that a program which needs only the values (`messages`, `errors`, `pricing`, `tokens`) never loads an HTTP client.
"""
