"""A strict OpenAI-compatible service over real sockets, with faults on demand and a book of its own.

Run it with `python -m tests.fakes.provider_server --port 0 --rpm 60`; it prints one JSON line with its port. Inside a
test use `running_server(...)`, which serves from a thread. It checks requests as the vendor does, enforces its limits
without mercy, and logs each request before it answers (see `provider_log`).

HTTP is written by hand on `asyncio.Protocol`: one core then serves several thousand requests a second, so that tests
measure the product and not the fake.

`POST /control` (loopback only) takes `{"set": {option: value}, "script": [fault, ...], "reset": true}` and returns
statistics. A fault is a name of `FAULTS` or an object `{"status", "headers", "body", "delay_s"}` that is sent as it is.
Scripted faults go to the next requests in order, before any drawn by rates; `"ok"` lets one request pass.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from tests.fakes.provider_log import ProviderLog, read_log
from tests.fakes.provider_service import (
    Exchange,
    FakeProvider,
    ServerOptions,
    apply_control,
    completion,
    header_of,
)

REASONS = {200: "OK", 307: "Temporary Redirect", 400: "Bad Request", 429: "Too Many Requests", 503: "Unavailable"}
TWENTY_MIB = 20 * 1024 * 1024


class Connection(asyncio.Protocol):
    """One kept-alive connection: requests are served one after the other."""

    def __init__(self, provider: FakeProvider, connected: set[asyncio.Transport] | None = None) -> None:
        self._provider = provider
        self._connected = set[asyncio.Transport]() if connected is None else connected
        self._buffer = b""
        self._is_busy = False
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._connected.add(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._connected.discard(self._transport)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while not self._is_busy and not self._transport.is_closing():
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            head = self._buffer[:end]
            size = int(header_of(head, b"content-length") or 0)
            if len(self._buffer) < end + 4 + size:
                return
            body = self._buffer[end + 4 : end + 4 + size]
            self._buffer = self._buffer[end + 4 + size :]
            self._route(head, body)

    def _route(self, head: bytes, body: bytes) -> None:
        method, path, _ = head.split(b"\r\n", 1)[0].split(b" ", 2)
        match method, path:
            case b"POST", b"/v1/chat/completions":
                self._chat(head, body)
            case b"GET", _ if path.startswith(b"/v1/chat/completions?"):
                self._write(200, "", self._provider.stored_page(path.decode()))
            case b"GET", b"/v1/models":
                names = sorted(filter(None, self._provider.options.models.split(","))) or ["fake-model"]
                rows = [{"id": name, "object": "model", "created": 1, "owned_by": "fake"} for name in names]
                self._write(200, "", json.dumps({"object": "list", "data": rows}).encode())
            case ((b"POST" | b"GET"), b"/control"):
                self._control(body)
            case _:
                self._error(404, "unknown_url", "Unknown request URL")

    def _control(self, body: bytes) -> None:
        if self._transport.get_extra_info("peername")[0] not in {"127.0.0.1", "::1"}:
            self._error(403, "forbidden", "loopback only")
            return
        apply_control(self._provider, json.loads(body or b"{}"))
        self._write(200, "", json.dumps(self._provider.statistics()).encode())

    def _chat(self, head: bytes, body: bytes) -> None:
        provider = self._provider
        provider.in_flight += 1
        provider.most_in_flight = max(provider.most_in_flight, provider.in_flight)
        exchange, problem = provider.receive(head, body)
        if problem is not None:
            provider.in_flight -= 1
            provider.book_answered(exchange, problem[0], 0, billed=False)
            self._error(*problem, headers=exchange.headers)
            return
        latency_s = provider.latency_s(exchange)
        if latency_s <= 0:
            self._answer(exchange)
            return
        self._is_busy = True
        asyncio.get_running_loop().call_later(latency_s, self._answer_late, exchange)

    def _answer_late(self, exchange: Exchange) -> None:
        self._is_busy = False
        self._answer(exchange)
        self.data_received(b"")

    def _answer(self, exchange: Exchange) -> None:
        provider = self._provider
        provider.in_flight -= 1
        match exchange.fault:
            case "raw":
                raw = exchange.raw
                headers = "".join(f"{name}: {value}\r\n" for name, value in raw.get("headers", {}).items())
                provider.book_answered(exchange, raw.get("status", 200), 0, billed=False)
                self._write(raw.get("status", 200), headers, raw.get("body", "").encode())
            case "reset_before":
                provider.book_answered(exchange, 0, 0, billed=False)
                self._transport.abort()
            case "rate_limit":
                exchange.headers += "retry-after: 1\r\n"
                self._refuse(exchange, 429, "rate_limit_exceeded", "Rate limit reached (injected)")
            case "quota":
                self._refuse(exchange, 429, "insufficient_quota", "You exceeded your current quota")
            case "error_500":
                self._refuse(exchange, 500, "server_error", "The server had an error")
            case "error_503":
                exchange.headers += "retry-after: 1\r\n"
                self._refuse(exchange, 503, "server_is_overloaded", "The server is overloaded")
            case _:
                self._answer_generated(exchange)

    def _answer_generated(self, exchange: Exchange) -> None:
        """Send an answer that the service counts as made, whole or spoiled on its way."""
        output_tokens, payload = completion(exchange)
        fault = exchange.fault
        self._provider.keep(exchange, payload)
        self._provider.book_answered(exchange, 0 if fault in {"reset_after", "truncated"} else 200, output_tokens, True)
        match fault:
            case "not_json":
                self._write(200, "", b"<html>hello</html>")
            case "oversized":
                self._write(200, "", b" " * TWENTY_MIB + payload)
            case "gzip_bomb":
                bomb = gzip.compress(b" " * (TWENTY_MIB * 4) + payload)
                self._write(200, "content-encoding: gzip\r\n", bomb)
            case "reset_after" | "truncated":
                self._transport.write(_head(200, exchange.headers, len(payload)) + payload[: len(payload) // 2])
                # A close is orderly (FIN), an abort is not (RST); both leave the client with half an answer.
                self._transport.close() if fault == "truncated" else self._transport.abort()
            case _:
                self._write(200, exchange.headers, payload)

    def _refuse(self, exchange: Exchange, status: int, code: str, message: str) -> None:
        self._provider.book_answered(exchange, status, 0, billed=False)
        self._error(status, code, message, exchange.headers)

    def _error(self, status: int, code: str, message: str, headers: str = "") -> None:
        kind = "invalid_request_error" if status < 429 else code
        error = {"error": {"message": message, "type": kind, "param": None, "code": code}}
        self._write(status, headers, json.dumps(error).encode())

    def _write(self, status: int, headers: str, body: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(_head(status, headers, len(body)) + body)


def _head(status: int, headers: str, size: int) -> bytes:
    lines = f"HTTP/1.1 {status} {REASONS.get(status, 'Status')}\r\ncontent-type: application/json\r\n"
    return f"{lines}{headers}content-length: {size}\r\n\r\n".encode("latin-1")


class RunningServer:
    """A server in a thread of this process."""

    def __init__(self, options: ServerOptions, port: int = 0) -> None:
        self.provider = FakeProvider(options)
        self._connections: set[asyncio.Transport] = set()
        self._loop = asyncio.new_event_loop()
        self._server = self._loop.run_until_complete(
            self._loop.create_server(
                lambda: Connection(self.provider, self._connections), "127.0.0.1", port, backlog=4096
            )
        )
        self.port: int = self._server.sockets[0].getsockname()[1]
        self.base_url = f"http://127.0.0.1:{self.port}/v1"
        self._thread = threading.Thread(target=self._loop.run_forever, name="fake-provider", daemon=True)
        self._thread.start()

    def control(self, *script: str | dict[str, Any], reset: bool = False, **options: Any) -> None:
        """Change options and append scripted faults; in force when it returns."""
        command: dict[str, Any] = {"script": script, "set": options, "reset": reset}
        asyncio.run_coroutine_threadsafe(self._apply(command), self._loop).result(5)

    def log(self) -> ProviderLog:
        """Read the book; the options must name one."""
        return read_log(Path(self.provider.options.log))

    def close(self) -> None:
        """End it. Connections are ended, too, and all that is closed is really closed before the loop goes away."""
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(5)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self.provider.close()

    async def _end(self) -> None:
        self._server.close()
        for connection in list(self._connections):
            connection.abort()
        while self._connections:
            await asyncio.sleep(0)

    async def _apply(self, command: dict[str, Any]) -> None:
        apply_control(self.provider, command)


@contextmanager
def running_server(port: int = 0, **options: Any) -> Iterator[RunningServer]:
    """Serve from a thread while the block runs; keyword arguments are `ServerOptions`."""
    server = RunningServer(ServerOptions(**options), port)
    try:
        yield server
    finally:
        server.close()


async def serve(host: str, port: int, options: ServerOptions) -> None:
    """Serve until cancelled; prints one JSON line with the port when ready."""
    provider = FakeProvider(options)
    server = await asyncio.get_running_loop().create_server(lambda: Connection(provider), host, port, backlog=4096)
    bound = server.sockets[0].getsockname()[1]
    sys.stdout.write(json.dumps({"port": bound, "pid": os.getpid(), "base_url": f"http://{host}:{bound}/v1"}) + "\n")
    sys.stdout.flush()
    await server.serve_forever()


def main() -> None:
    """Read the command line and serve; every option of `ServerOptions` is a flag, `--latency-s 0.2` for example."""
    parser = argparse.ArgumentParser(description="Strict fake of an OpenAI-compatible service")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    for option in fields(ServerOptions):
        kind = type(option.default)
        parser.add_argument("--" + option.name.replace("_", "-"), type=kind, default=option.default)
    given = vars(parser.parse_args())
    host, port = given.pop("host"), given.pop("port")
    try:
        asyncio.run(serve(host, port, ServerOptions(**given)))
    except KeyboardInterrupt:
        return


if __name__ == "__main__":
    main()
