"""`bursar providers`: which providers are called, with which keys, and what model names stand for."""

import hashlib
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any
from uuid import UUID

import typer

from bursar import db
from bursar.audit.events import OPERATOR
from bursar.cli.output import Column, JsonOption, print_fields, print_json, print_rows, with_database
from bursar.cli.scope import as_id, org_of
from bursar.gateway.provider_keys import (
    ProviderKey,
    ProviderKeyNotFound,
    add_provider_key,
    list_provider_keys,
    reseal_provider_keys,
    revoke_provider_key,
)
from bursar.gateway.providers import InvalidProviderHeader, Provider, list_providers, put_provider
from bursar.gateway.routes import MOST_RETRIES, ModelRoute, list_model_routes, put_model_route, remove_model_route
from bursar.identity.organizations import PLATFORM_ORGANIZATION_ID, ensure_platform
from bursar.outbox.endpoints import reseal_secrets
from bursar.sealing import Keyring
from bursar.settings import Settings

app = typer.Typer(help="Model providers: add, list, keys, routes.", no_args_is_help=True)

ProviderArgument = Annotated[str, typer.Argument(help="Name of the provider, as in the price list.")]
KeyOrgOption = Annotated[
    str | None,
    typer.Option("--org", help="Organization whose own key it is; the platform's otherwise."),
]
PROVIDER_COLUMNS = [
    Column("name", "Provider"),
    Column("kind", "Speaks"),
    Column("base_url", "Address", show=lambda url: url or "built in"),
    Column("auth", "Key sent as"),
    Column("position", "Position", right=True),
    Column("enabled", "On", show=lambda enabled: "yes" if enabled else "no"),
]
KEY_COLUMNS = [
    Column("provider_key_id", "Key"),
    Column("provider", "Provider"),
    Column("name", "Name"),
    Column("last4", "Ends with"),
    Column("is_own", "Who pays", show=lambda is_own: "the organization" if is_own else "the platform"),
    Column("created_at", "Entered"),
    Column("revoked_at", "Revoked"),
]
ROUTE_COLUMNS = [
    Column("model", "Model"),
    Column("provider", "Provider"),
    Column("upstream_model", "Stands for"),
    Column("enabled", "On", show=lambda enabled: "yes" if enabled else "no"),
    Column("retries", "Retries", right=True),
    Column("fallbacks", "Then", show=", ".join),
]


@app.command()
def add(
    name: ProviderArgument,
    base_url: Annotated[
        str | None, typer.Option(help="Where its paths begin: https://…/v1; known for the large vendors.")
    ] = None,
    kind: Annotated[
        str | None, typer.Option(help="Formats it speaks: openai, anthropic or both; litellm: through LiteLLM.")
    ] = None,
    auth: Annotated[str | None, typer.Option(help="How it takes its key: vendor, bearer, api-key or none.")] = None,
    position: Annotated[int | None, typer.Option(help="Of two that serve a model the lower is called.")] = None,
    stream_usage: Annotated[
        bool | None, typer.Option("--stream-usage/--no-stream-usage", help="Whether it takes stream_options.")
    ] = None,
    batch_price: Annotated[
        float | None,
        typer.Option(help="Price inside a batch where the price list has none, as a part of the usual one: 0.5"),
    ] = None,
    query: Annotated[str | None, typer.Option(help="What every address ends with, such as api-version=….")] = None,
    header: Annotated[
        list[str] | None,
        typer.Option(help="Name: value, sent with every call; may be given again; '' for none. No secrets."),
    ] = None,
    litellm_provider: Annotated[
        str | None, typer.Option(help="What LiteLLM calls it, where that is another name.")
    ] = None,
    on: Annotated[bool, typer.Option("--on/--off", help="Whether it is called.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Add a provider, or change one; what is not given stays as it is.

    Examples: `bursar providers add anthropic`,
    `bursar providers add our-vllm --kind openai --base-url http://127.0.0.1:8000/v1 --auth none`
    """
    headers = None if header is None else _headers_of(header)

    async def run(database: db.Database) -> Provider:
        await _make_platform(database)
        async with database.platform() as conn:
            return await put_provider(
                conn,
                name=name,
                kind=kind,
                base_url=base_url,
                auth=auth,
                position=position,
                asks_for_usage=stream_usage,
                batch_price_ppm=None if batch_price is None else round(batch_price * 1_000_000),
                query=query,
                headers=headers,
                litellm_provider=litellm_provider,
                enabled=on,
                by=OPERATOR,
            )

    added = with_database(run)
    print_fields(added, as_json=as_json)
    if added.kind == "litellm" and added.enabled:
        _warn_without_litellm()


def _warn_without_litellm() -> None:
    """Say early what a call would be refused with. Another interpreter is looked at when the server starts."""
    if Settings.from_environment().litellm_python is None and find_spec("litellm") is None:
        typer.echo(
            "LiteLLM is not installed here: calls of this provider are refused where the server runs without it. "
            "How to install it: docs/providers.md, “Through LiteLLM”.",
            err=True,
        )


@app.command("list")
def list_(as_json: JsonOption = False) -> None:
    """List providers in the order in which they are asked for a model.

    Examples: `bursar providers list`, `bursar providers list --json`
    """

    async def run(database: db.Database) -> list[Provider]:
        async with database.platform() as conn:
            return await list_providers(conn)

    print_rows(with_database(run), PROVIDER_COLUMNS, as_json=as_json)


@app.command()
def key(
    provider: ProviderArgument,
    org: KeyOrgOption = None,
    name: Annotated[str, typer.Option(help="What to call it.")] = "",
    as_json: JsonOption = False,
) -> None:
    """Enter a key at a provider: typed unseen, or read from stdin. It is stored encrypted; the newest one is used.

    Examples: `bursar providers key openai`, `bursar providers key anthropic --org acme < key.txt`
    """
    secret = typer.prompt("Key", hide_input=True) if sys.stdin.isatty() else sys.stdin.read()

    async def run(database: db.Database) -> ProviderKey:
        organization_id = await _owner(database, org)
        keyring = Keyring(database.settings.master_key)
        async with database.tenant(organization_id) as conn:
            return await add_provider_key(
                conn,
                keyring,
                organization_id=organization_id,
                provider=provider,
                secret=secret,
                name=name,
                by=OPERATOR,
            )

    print_fields(with_database(run), as_json=as_json)


@app.command()
def keys(org: KeyOrgOption = None, as_json: JsonOption = False) -> None:
    """List the platform's keys at providers, or an organization's own; the keys themselves cannot be shown.

    Examples: `bursar providers keys`, `bursar providers keys --org acme --json`
    """

    async def run(database: db.Database) -> list[ProviderKey]:
        organization_id = await _owner(database, org)
        async with database.tenant(organization_id) as conn:
            return await list_provider_keys(conn, organization_id=organization_id)

    print_rows(with_database(run), KEY_COLUMNS, as_json=as_json)


@app.command()
def revoke(
    provider_key: Annotated[str, typer.Argument(help="The key's id, as `bursar providers keys` lists it.")],
    org: KeyOrgOption = None,
    as_json: JsonOption = False,
) -> None:
    """Use a key at a provider no more; running servers follow within five seconds.

    Examples: `bursar providers revoke 0193…`, `bursar providers revoke 0193… --org acme`
    """
    provider_key_id = as_id(provider_key, "pvk_")
    if provider_key_id is None:
        raise ProviderKeyNotFound(f"“{provider_key}” is no id. Those there are: bursar providers keys")

    async def run(database: db.Database) -> ProviderKey:
        organization_id = await _owner(database, org)
        async with database.tenant(organization_id) as conn:
            return await revoke_provider_key(
                conn, organization_id=organization_id, provider_key_id=provider_key_id, by=OPERATOR
            )

    print_fields(with_database(run), as_json=as_json)


@app.command()
def route(
    model: Annotated[str, typer.Argument(help="The name that clients ask for.")],
    provider: ProviderArgument,
    upstream_model: Annotated[str, typer.Argument(help="The provider's model that it stands for.")],
    on: Annotated[bool, typer.Option("--on/--off", help="Off refuses the name.")] = True,
    retries: Annotated[int, typer.Option(min=0, max=MOST_RETRIES, help="Ask again so often when it fails.")] = 0,
    fallback: Annotated[
        list[str] | None, typer.Option(help="provider/model to ask when it still fails; may be given again, in order.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Let a model name stand for a provider's model, or change what it stands for; states the whole route.

    Examples: `bursar providers route fast openai gpt-4o-mini --retries 1 --fallback azure/gpt-4o-mini`,
    `bursar providers route gpt-3 openai gpt-3 --off`
    """

    async def run(database: db.Database) -> ModelRoute:
        await _make_platform(database)
        async with database.platform() as conn:
            return await put_model_route(
                conn,
                model=model,
                provider=provider,
                upstream_model=upstream_model,
                enabled=on,
                retries=retries,
                fallbacks=fallback or (),
                by=OPERATOR,
            )

    print_fields(with_database(run), as_json=as_json)


@app.command()
def routes(as_json: JsonOption = False) -> None:
    """List the model names that stand for something else.

    Examples: `bursar providers routes`, `bursar providers routes --json`
    """

    async def run(database: db.Database) -> list[ModelRoute]:
        async with database.platform() as conn:
            return await list_model_routes(conn)

    print_rows(with_database(run), ROUTE_COLUMNS, as_json=as_json)


@app.command()
def unroute(model: Annotated[str, typer.Argument(help="The name that clients asked for.")]) -> None:
    """Take a route away: the name means again what it means without one.

    Examples: `bursar providers unroute fast`, `bursar providers unroute gpt-3`
    """

    async def run(database: db.Database) -> None:
        await _make_platform(database)
        async with database.platform() as conn:
            await remove_model_route(conn, model=model, by=OPERATOR)

    with_database(run)
    typer.echo(f"{model} has no route any more.")


@app.command()
def reseal(
    previous: Annotated[Path, typer.Argument(help="File with the master key that was used before.", exists=True)],
    as_json: JsonOption = False,
) -> None:
    """After a change of the master key: encrypt every secret (provider keys, webhooks') anew under the present one.

    Safe to run again.

    Examples: `bursar providers reseal old-master.key`, `bursar providers reseal old-master.key --json`
    """
    # As Settings.master_key derives it from the key's text.
    older = hashlib.sha256(previous.read_text().strip().encode()).digest()

    async def run(database: db.Database) -> int:
        keyring = Keyring(database.settings.master_key, older)
        return await reseal_provider_keys(database, keyring) + await reseal_secrets(database, keyring)

    resealed = with_database(run)
    if as_json:
        print_json({"resealed": resealed})
    else:
        typer.echo(f"{resealed} secrets are sealed under the present master key.")


def _headers_of(lines: list[str]) -> dict[str, str]:
    """Headers as typed, 'Name: value'; an empty line is none."""
    headers = {}
    for line in filter(None, lines):
        name, colon, value = line.partition(":")
        if not colon:
            raise InvalidProviderHeader(f"“{line[:100]}” is no header: write Name: value.")
        headers[name.strip()] = value.strip()
    return headers


async def _owner(database: db.Database, org: str | None) -> UUID:
    """The organization of --org, else the platform's own."""
    if org is not None:
        return await org_of(database, org)
    await _make_platform(database)
    return PLATFORM_ORGANIZATION_ID


async def _make_platform(database: db.Database) -> Any:
    """The organization in whose audit the operator's changes stand."""
    async with database.tenant(PLATFORM_ORGANIZATION_ID) as conn:
        return await ensure_platform(conn, by=OPERATOR)
