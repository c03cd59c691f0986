"""A customer's program that takes webhooks: what it got, and what it answers."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from tests.fakes.serving import serving


@dataclass(frozen=True, slots=True)
class Got:
    """One webhook as it came; names of headers in lower case."""

    headers: dict[str, str]
    body: bytes
    host: str

    @property
    def webhook_id(self) -> str:
        return self.headers["webhook-id"]

    @property
    def document(self) -> dict[str, Any]:
        return dict(json.loads(self.body))

    @property
    def place(self) -> tuple[str, int]:
        """Object and sequence."""
        thing = self.document["data"]["object"]
        return thing["id"], thing["sequence"]


@dataclass(slots=True)
class Receiver:
    """answer: the status for what came; 200 as long as nothing else is set."""

    url: str = ""
    got: list[Got] = field(default_factory=list)
    answer: Callable[[Got], int] = lambda got: 200
    seconds: float = 0

    async def take(self, request: web.Request) -> web.Response:
        headers = {name.lower(): value for name, value in request.headers.items()}
        got = Got(headers, await request.read(), request.host)
        status = self.answer(got)
        self.got.append(got)
        await asyncio.sleep(self.seconds)
        return web.Response(status=status, text="thank you")

    @property
    def ids(self) -> list[str]:
        return [each.webhook_id for each in self.got]


@asynccontextmanager
async def receiving(seconds: float = 0) -> AsyncIterator[Receiver]:
    """A receiver on a port of this machine. seconds: how long it thinks before it answers."""
    receiver = Receiver(seconds=seconds)
    app = web.Application()
    app.router.add_post("/hooks", receiver.take)
    async with serving(app) as base_url:
        receiver.url = f"{base_url}/hooks"
        yield receiver
