"""A network that can be broken: a TCP proxy between a process under test and a server.

Inside a test use `running_proxy()`; it serves from a thread. Set `target` before the first connection. What it does
with traffic is changed at any time: `cut` ends every connection and refuses new ones, `stall` carries no byte in either
direction and lets nobody notice, `heal` ends both.

In front of Postgres it can lose the reply to a COMMIT: `lose_commit(*words)` lets the next COMMIT of a transaction with
a statement that holds all these words reach the server, waits for the reply, and ends the connection instead of handing
it on. The server has committed; the client cannot know.
"""

from __future__ import annotations

import asyncio
import struct
import threading
from collections.abc import Coroutine, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

CHUNK = 65_536
ANSWER_S = 5.0
ASKS_FOR_ENCRYPTION = (struct.pack(">I", 80877103), struct.pack(">I", 80877104))


class CommitWatch:
    """Follows the statements of one Postgres client, also those that it has prepared and only names."""

    def __init__(self) -> None:
        self._buffer = b""
        self._is_started = False
        self._prepared: dict[bytes, bytes] = {}
        self._statements: list[bytes] = []

    def commits(self, data: bytes) -> list[list[bytes]]:
        """The statements of each transaction whose COMMIT ends in these bytes."""
        self._buffer += data
        found: list[list[bytes]] = []
        while message := self._next_message():
            kind, body = message
            match kind:
                case b"P":
                    name, sql = body.split(b"\0", 2)[:2]
                    self._prepared[name] = sql
                case b"B":
                    self._statements.append(self._prepared.get(body.split(b"\0", 2)[1], b""))
                case b"Q" if body.startswith(b"BEGIN"):
                    self._statements = []
                case b"Q" if body.startswith(b"COMMIT"):
                    found.append(self._statements)
                    self._statements = []
                case _:
                    pass
        return found

    def _next_message(self) -> tuple[bytes, bytes] | None:
        # The messages that open a connection have no letter in front.
        head = 1 if self._is_started else 0
        if len(self._buffer) < head + 4:
            return None
        (size,) = struct.unpack_from(">I", self._buffer, head)
        end = head + size
        if len(self._buffer) < end:
            return None
        message = self._buffer[:head], self._buffer[head + 4 : end]
        self._buffer = self._buffer[end:]
        self._is_started = self._is_started or message[1][:4] not in ASKS_FOR_ENCRYPTION
        return message


class TcpProxy:
    """A proxy on 127.0.0.1; `target` is a host with its port, or the path of a unix socket."""

    def __init__(self, target: tuple[str, int] | Path | None, is_postgres: bool) -> None:
        self.target = target
        self._is_postgres = is_postgres
        self.lost_commits = 0
        self.held = 0
        """Clients that have something to say and are held back."""
        self._wanted: list[tuple[bytes, ...]] = []
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._moving = asyncio.Event()
        self._moving.set()
        self._server = self._loop.run_until_complete(asyncio.start_server(self._accept, "127.0.0.1", 0))
        self.port: int = self._server.sockets[0].getsockname()[1]
        self._thread = threading.Thread(target=self._loop.run_forever, name="tcp-proxy", daemon=True)
        self._thread.start()

    def cut(self) -> None:
        """Ends every connection, refuses new ones; in force when it returns."""
        self._do(self._cut())

    def stall(self) -> None:
        """Carries nothing any more; connections stay and new ones are taken."""
        self._do(self._stall())

    def heal(self) -> None:
        """Lets everything pass again, also what was held back."""
        self._do(self._heal())

    def lose_commit(self, *words: str) -> None:
        """Loses the reply to the next COMMIT of a transaction with a statement that holds all these words."""
        self._wanted.append(tuple(word.encode() for word in words))

    def close(self) -> None:
        """Ends it with all connections."""
        self._do(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(ANSWER_S)

    async def _cut(self) -> None:
        self._server.close()
        self._end_connections()

    async def _stall(self) -> None:
        self._moving.clear()

    async def _heal(self) -> None:
        self._moving.set()
        if not self._server.is_serving():
            self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)

    async def _close(self) -> None:
        self._server.close()
        self._moving.set()
        self._end_connections()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        while self._writers:
            await asyncio.sleep(0)

    def _end_connections(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self._writers.add(writer)
        with suppress(OSError, asyncio.CancelledError):
            try:
                await self._serve(reader, writer)
            finally:
                self._writers.discard(writer)
                writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._hold_back()
        if isinstance(self.target, Path):
            to_reader, to_writer = await asyncio.open_unix_connection(self.target)
        else:
            assert self.target is not None, "the proxy has no target"
            to_reader, to_writer = await asyncio.open_connection(*self.target)
        self._writers.add(to_writer)
        link = _Link()
        back = asyncio.ensure_future(self._carry_back(to_reader, writer, link))
        try:
            await self._carry_there(reader, to_writer, link)
        finally:
            back.cancel()
            self._writers.discard(to_writer)
            to_writer.transport.abort()
            await asyncio.gather(back, return_exceptions=True)

    async def _hold_back(self) -> None:
        self.held += 1
        try:
            await self._moving.wait()
        finally:
            self.held -= 1

    async def _carry_there(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, link: _Link) -> None:
        watch = CommitWatch() if self._is_postgres else None
        while data := await reader.read(CHUNK):
            await self._hold_back()
            if watch is not None and self._is_wanted(watch.commits(data)):
                link.loses_reply = True
            writer.write(data)
            await writer.drain()

    async def _carry_back(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, link: _Link) -> None:
        while data := await reader.read(CHUNK):
            await self._moving.wait()
            if link.loses_reply:
                self.lost_commits += 1
                break
            writer.write(data)
            await writer.drain()
        # Both directions end together: nobody here half-closes a connection.
        writer.transport.abort()

    def _is_wanted(self, commits: list[list[bytes]]) -> bool:
        for words in self._wanted:
            if any(all(word in one for word in words) for statements in commits for one in statements):
                self._wanted.remove(words)
                return True
        return False


class _Link:
    """What both directions of a connection know."""

    loses_reply = False


@contextmanager
def running_proxy(target: tuple[str, int] | Path | None = None, *, is_postgres: bool = False) -> Generator[TcpProxy]:
    """A proxy while the block runs."""
    proxy = TcpProxy(target, is_postgres)
    try:
        yield proxy
    finally:
        proxy.close()
