"""`bursar demo`: sample companies with their past, served at once."""

import asyncio
import os
import shlex
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final

import aiohttp
import typer
import uvicorn

from bursar import clock, db
from bursar.audit.events import OPERATOR
from bursar.cli.output import JsonOption, print_json, this_program
from bursar.cli.progress import Bars, bars
from bursar.demo import homes
from bursar.demo.companies import companies
from bursar.demo.homes import Demo
from bursar.demo.seeding import Access, SeededCompany, seed
from bursar.demo.stories import Company
from bursar.errors import BursarError
from bursar.identity.sessions import create_sign_in_link
from bursar.identity.users import User
from bursar.server import ServedApp
from bursar.serving import GRACE_SECONDS
from bursar.settings import Settings, default_data_dir

HOST: Final = "127.0.0.1"
PORT: Final = 8321
START_SECONDS: Final = 60.0
HEADLINES: Final = ("acme-corp", "quill-co", "meridian-group", "lumen-loop", "helix-foods", "blank-canvas")
"""The six whose links are printed; of Helix Foods it is the consultant's."""

TRIED_AT: Final = "fernwood-school"
"""Whose key stands in the `curl` line: credits that never end, and no figure that has to stay as it is."""

_NOT_A_DEMOS: Final = ("DATABASE_URL", "BURSAR_MASTER_KEY")


class PortInUse(BursarError):
    """Something listens there already."""


class NotStarted(BursarError):
    """The server ended before it answered."""


def demo(
    as_json: JsonOption = False,
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535)] = PORT,
    data_dir: Annotated[Path | None, typer.Option(help="Folder of the demo, and of nothing else.")] = None,
    reset: Annotated[bool, typer.Option("--reset", help="Delete the demo that is there and make it anew.")] = False,
    remove: Annotated[bool, typer.Option("--remove", help="Delete the demo that is there, and end.")] = False,
    as_of: Annotated[
        str | None, typer.Option(help="Tell the past until this day (or instant) and not until now.", metavar="DATE")
    ] = None,
    no_serve: Annotated[bool, typer.Option("--no-serve", help="Make the demo, print how to get in, and end.")] = False,
) -> None:
    """Make sample companies with thirteen months of use, once, and serve them until SIGINT or SIGTERM.

    With --json one JSON document is printed as soon as everything answers; all else goes to stderr.

    Examples: `bursar demo`, `bursar demo --json --port 0 --data-dir /tmp/demo`
    """
    settings = demo_settings(os.environ, data_dir)
    if remove:
        homes.remove(settings.data_dir)
        typer.echo(f"There is no demo in {settings.data_dir} now.", err=True)
        return
    until = clock.now() if as_of is None else parse_as_of(as_of)
    with _listening(port) as listener:
        try:
            asyncio.run(_demo(settings, listener, until, reset=reset, as_json=as_json, serves=not no_serve))
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None


def demo_settings(environment: Mapping[str, str], data_dir: Path | None) -> Settings:
    """Settings of a demo: a folder and an embedded server of its own, whatever database the environment names.

    data_dir: else the folder `demo` in BURSAR_DATA_DIR, else beside the usual data folder.
    """
    usual = default_data_dir(environment)
    given = environment.get("BURSAR_DATA_DIR")
    chosen = data_dir or (Path(given) / "demo" if given else usual.with_name(f"{usual.name}-demo"))
    kept = {name: value for name, value in environment.items() if name not in _NOT_A_DEMOS}
    return Settings.from_environment(kept, data_dir=chosen.expanduser().absolute())


def parse_as_of(text: str) -> datetime:
    """'2026-11-20' is that day at 14:00 UTC; an instant is taken as it is, in UTC where it names no offset.

    Raises:
        BursarError: it is none, or it lies ahead.
    """
    try:
        instant = datetime.fromisoformat(text)
    except ValueError as error:
        raise BursarError(f"{text!r} is no date", next_step="Write 2026-11-20 or 2026-11-20T14:00:00+01:00") from error
    instant = instant if instant.tzinfo else instant.replace(tzinfo=UTC)
    now = clock.now()
    if len(text) == len("2026-11-20"):
        instant = now if instant.date() == now.date() else instant.replace(hour=14)
    if instant > now:
        raise BursarError(f"{text} lies ahead", why="The past of a demo ends now at the latest")
    return instant.astimezone(UTC)


@contextmanager
def _listening(port: int) -> Iterator[socket.socket]:
    """The port, taken before anything is made."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
        except OSError as error:
            raise PortInUse(
                f"Port {port} of {HOST} cannot be used",
                why=str(error),
                next_step=f"{this_program()} demo --port 0 takes a free one",
            ) from error
        yield listener


async def _demo(
    settings: Settings, listener: socket.socket, as_of: datetime, *, reset: bool, as_json: bool, serves: bool
) -> None:
    task = asyncio.current_task()
    assert task is not None
    _on_signals(task.cancel)
    base_url = f"http://{HOST}:{listener.getsockname()[1]}"
    made = _made(settings.data_dir, reset=reset)
    if made is None:
        homes.write(settings.data_dir, as_of=as_of, companies=None)
    async with db.opened(settings, migrate=True) as database:
        if made is None:
            made = await _make(database, as_of)
        if serves:
            await _serve(settings, listener, base_url, partial(_tell, database, made, base_url, as_json=as_json))
        else:
            await _tell(database, made, base_url, as_json=as_json)


def _made(data_dir: Path, *, reset: bool) -> Demo | None:
    """The demo that is there; one that was broken off, or is to be reset, is removed."""
    made = homes.read(data_dir)
    if made is None:
        return None
    if reset or not made.is_complete:
        typer.echo("Removing the demo that was there …" if reset else "Removing a demo that was broken off …", err=True)
        homes.remove(data_dir)
        return None
    typer.echo(f"This demo was made as of {made.as_of:%Y-%m-%d %H:%M} UTC; --reset makes it anew.", err=True)
    return made


async def _make(database: db.Database, as_of: datetime) -> Demo:
    told = companies(as_of)
    with bars("people and requests") as shown:
        seeded = await seed(database, told, as_of=as_of, progress=_Shown(shown, told))
    return homes.write(database.settings.data_dir, as_of=as_of, companies=seeded)


class _Shown:
    """A bar for each company; one for all small ones together."""

    def __init__(self, shown: Bars, told: Sequence[Company]) -> None:
        self._bars = shown
        self._small = sum(company.is_small for company in told)

    def begin(self, company: Company) -> None:
        """It is begun."""
        self._bars.begin(self._name(company), self._small if company.is_small else 1)

    def size(self, company: Company, total: int) -> None:
        """It will be so many units."""
        self._bars.add(self._name(company), total)

    def advance(self, company: Company, units: int) -> None:
        """So many more are done."""
        self._bars.advance(self._name(company), units)

    def end(self, company: Company) -> None:
        """It is done."""
        self._bars.end(self._name(company))

    def _name(self, company: Company) -> str:
        return f"{self._small} small ones" if company.is_small else company.name


# ------------------------------------------------------------------------------------------------ serving


class _Server(uvicorn.Server):
    """A server in this process that ends when it is told to; signals are ours, so that the database ends after it."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(
            uvicorn.Config(
                ServedApp(settings, is_demo=True),
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                http="bursar.asgi:Protocol",
                ws="none",
                timeout_graceful_shutdown=GRACE_SECONDS,
                timeout_keep_alive=75,
            )
        )

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """None of them: see `_on_signals`."""
        yield

    def end(self) -> None:
        """Take no more requests, finish those under way."""
        self.should_exit = True


async def _serve(
    settings: Settings, listener: socket.socket, base_url: str, when_ready: Callable[[], Awaitable[None]]
) -> None:
    """Serve until a signal comes. when_ready: called once everything answers."""
    server = _Server(settings)
    _on_signals(server.end)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        await _until_ready(serving, base_url)
        await when_ready()
    except BaseException:
        server.end()
        raise
    finally:
        await serving


async def _until_ready(serving: asyncio.Task[None], base_url: str) -> None:
    """Wait until the server says that it is ready.

    Raises:
        NotStarted
    """
    async with asyncio.timeout(START_SECONDS), aiohttp.ClientSession() as client:
        while True:
            if serving.done():
                await serving
                raise NotStarted("The server ended before it was ready", why="Its log is above")
            try:
                async with client.get(f"{base_url}/readyz") as answer:
                    if answer.status == 200:
                        return
            except aiohttp.ClientConnectionError:
                pass  # it does not listen yet
            await asyncio.sleep(0.05)


def _on_signals(act: Callable[[], object]) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, act)


# ------------------------------------------------------------------------------------------------ telling how to get in


@dataclass(frozen=True, slots=True, kw_only=True)
class _Door:
    """A person's way into a company."""

    company: SeededCompany
    role: str
    access: Access
    url: str

    @property
    def document(self) -> dict[str, Any]:
        return {"company": self.company.slug, "email": self.access.email, "role": self.role, "url": self.url}


async def _tell(database: db.Database, made: Demo, base_url: str, *, as_json: bool) -> None:
    """Print how to get in: one JSON document about every company, or a page of text about a few."""
    shown = (*HEADLINES, TRIED_AT)
    told = made.companies if as_json else [each for each in made.companies if each.slug in shown]
    doors = [await _door(database, company, role, base_url) for company in told for role in ("admin", "member")]
    if as_json:
        print_json(_document(made, doors, base_url, database.settings.data_dir))
        sys.stdout.flush()
        return
    for line in _page(made, {(door.company.slug, door.role): door for door in doors}, base_url, database.settings):
        typer.echo(line)


async def _door(database: db.Database, company: SeededCompany, role: str, base_url: str) -> _Door:
    access = company.admin if role == "admin" else company.member
    home = access.home_organization_id
    user = User(user_id=access.user_id, home_organization_id=home, default_organization_id=None)
    async with database.tenant(home) as conn:
        token = await create_sign_in_link(conn, user=user, by=OPERATOR)
    return _Door(company=company, role=role, access=access, url=f"{base_url}/sign-in/{token}")


def _document(made: Demo, doors: Sequence[_Door], base_url: str, data_dir: Path) -> dict[str, Any]:
    urls = {(door.company.slug, door.role): door.url for door in doors}
    return {
        "base_url": base_url,
        "data_dir": data_dir,
        "as_of": made.as_of,
        "sign_in_links": [door.document for door in doors],
        "companies": [
            {
                "id": company.organization_id,
                "slug": company.slug,
                "name": company.name,
                **{
                    role: {
                        "email": access.email,
                        "api_key": access.api_key,
                        "sign_in_url": urls[company.slug, role],
                    }
                    for role, access in (("admin", company.admin), ("member", company.member))
                },
            }
            for company in made.companies
        ],
    }


def _page(made: Demo, doors: Mapping[tuple[str, str], _Door], base_url: str, settings: Settings) -> Iterator[str]:
    """What is printed on a terminal."""
    yield f"\nBursar's demo answers at {base_url} (Ctrl-C ends it).\n"
    yield "Each of these links signs you in once, within 24 hours:\n"
    for slug in HEADLINES:
        role = "member" if slug == "helix-foods" else "admin"
        yield from _lines_of(doors[slug, role], doors[slug, role].company.story)
    alice = doors["acme-corp", "member"]
    yield from _lines_of(alice, "One of its members, who may not see what all spend: the page says who may")
    here, program = f"BURSAR_DATA_DIR={shlex.quote(str(settings.data_dir))}", this_program()
    yield f"Another link:     {here} {program} users link {alice.access.email} --base-url {base_url}\n"
    tried = doors[TRIED_AT, "member"]
    yield f"Keys of {tried.company.name}:"
    yield f"  administrator   {tried.company.admin.api_key}"
    yield f"  member          {tried.access.api_key}"
    yield "A metered request, answered by the offline provider:"
    yield f"  curl -si {base_url}/v1/chat/completions -H 'Authorization: Bearer {tried.access.api_key}' \\"
    yield "    -H 'Content-Type: application/json' \\"
    yield """    -d '{"model": "demo-1", "messages": [{"role": "user", "content": "Hello"}]}'\n"""
    option = f" --data-dir {shlex.quote(str(settings.data_dir))}"
    yield f"Make it anew:     {program} demo --reset{option}"
    yield f"Remove it:        {program} demo --remove{option}"


def _lines_of(door: _Door, sentence: str) -> Iterator[str]:
    yield f"{door.company.name}, as {door.access.email} ({'administrator' if door.role == 'admin' else 'member'})"
    yield f"  {sentence}."
    yield f"  {door.url}\n"
