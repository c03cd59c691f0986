"""`bursar prices`: the price book, price lists from files, and what single organizations pay instead."""

import asyncio
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Annotated, Any

import typer

from bursar import clock, db
from bursar.audit.events import OPERATOR
from bursar.cli.output import Column, DryRunOption, JsonOption, print_fields, print_json, print_rows, with_database
from bursar.cli.scope import OrgOption, org_of
from bursar.money import NanoUsd, format_usd
from bursar.pricing import files, importing, terms
from bursar.pricing.book import PriceBook
from bursar.pricing.lists import Change, Difference, Preview, Prices
from bursar.pricing.prices import PAR_PPM, UNITS, PriceVersion, Rate
from bursar.pricing.terms import ANY, UnknownModelPolicy
from bursar.pricing.versions import prices_in_force

app = typer.Typer(help="Prices: the book, lists from files, and what single organizations pay.", no_args_is_help=True)

ProviderArgument = Annotated[str, typer.Argument(help="Provider, such as openai.", show_default=False)]
ModelArgument = Annotated[str, typer.Argument(help="Model, as a request names it.", show_default=False)]
ProviderOption = Annotated[str, typer.Option("--provider", help="Only for this provider.")]
ModelOption = Annotated[str, typer.Option("--model", help="Only for this model, or a beginning followed by *.")]
ReasonOption = Annotated[str, typer.Option("--reason", help="Why, for people and the audit.")]
AtOption = Annotated[str | None, typer.Option("--at", help="At this date or time with offset; now otherwise.")]
FromOption = Annotated[
    str | None, typer.Option("--from", help="Takes effect at this date (UTC) or time with offset; now otherwise.")
]
BackdateOption = Annotated[bool, typer.Option("--backdate", help="Allow --from to lie in the past.")]
EndOption = Annotated[bool, typer.Option("--end", help="End it instead.")]

_SHOWN = {"input_tokens": "input", "output_tokens": "output", "cache_read_tokens": "cache_read"}
LIST_COLUMNS = [
    Column("provider", "Provider"),
    Column("model", "Model"),
    Column("input", "Input $/1M", right=True),
    Column("output", "Output $/1M", right=True),
    Column("cache_read", "Cache read $/1M", right=True),
    Column("other", "Other"),
    Column("list_name", "List"),
]
RATE_COLUMNS = [
    Column("kind", "Kind"),
    Column("price_usd", "Price $", right=True),
    Column("unit", "Per"),
    Column("above_input_tokens", "Above input tokens", right=True, show=lambda value: str(value or "")),
    Column("when", "When", show=lambda value: ", ".join(f"{name}={each}" for name, each in value.items())),
]


@app.command("list")
def list_(
    provider: Annotated[str | None, typer.Option("--provider", help="Only this provider.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="Only models that begin like this.")] = None,
    at: AtOption = None,
    as_json: JsonOption = False,
) -> None:
    """List what each model costs everybody.

    Examples: `bursar prices list --provider anthropic`, `bursar prices list --model gpt-5 --at 2026-01-01 --json`
    """
    instant = _instant(at)

    async def run(database: db.Database) -> list[PriceVersion]:
        async with database.untenanted() as conn:
            return await prices_in_force(conn, at=instant or clock.now(), provider=provider, begins=model)

    found = with_database(run)
    rows = [_document(each) if as_json else _summary(each) for each in found]
    print_rows(rows, LIST_COLUMNS, as_json=as_json, empty="No prices. Import the shipped lists: bursar prices refresh")


@app.command()
def show(
    provider: ProviderArgument,
    model: ModelArgument,
    org: Annotated[str | None, typer.Option("--org", help="What this organization pays.")] = None,
    at: AtOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the price of a model, every kind and tier, and since when; with --org what that organization is charged.

    Examples: `bursar prices show openai gpt-4o-2024-08-06`, `bursar prices show demo demo-1 --org acme --json`
    """
    instant = _instant(at)

    async def run(database: db.Database) -> dict[str, Any]:
        book = PriceBook(database)
        if org is None:
            return _document(await book.list_price(provider=provider, model=model, at=instant))
        organization_id = await org_of(database, org)
        quote = await book.quote(organization_id=organization_id, provider=provider, model=model, at=instant)
        return {
            "organization_id": organization_id,
            "basis": quote.basis,
            "markup": _multiple(quote.markup_ppm),
            "valid_until": quote.valid_until,
            "charge": None if quote.charge is None else _document(quote.charge),
            "cost": None if quote.cost is None else _document(quote.cost),
        }

    found = with_database(run)
    if as_json:
        print_json(found)
        return
    charge = found.get("charge", found) if org else found
    about = {name: value for name, value in (found | (charge or {})).items() if name not in ("charge", "cost", "rates")}
    print_fields(about, as_json=False)
    print_rows(charge["rates"] if charge else [], RATE_COLUMNS, as_json=False, empty="Charged nothing, by policy.")


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="CSV or JSON; - for standard input.", show_default=False)],
    list_name: Annotated[
        str, typer.Option("--list", help="Name of the list, where the file has none.")
    ] = files.OWN_LIST,
    version: Annotated[str, typer.Option(help="Version of the list, where the file has none.")] = "",
    effective_from: FromOption = None,
    backdate: BackdateOption = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Import prices from a file: all of it or, when a row cannot be used, nothing. They go before the shipped lists.

    Examples: `bursar prices import prices.csv --dry-run`,
    `bursar prices import prices.json --list contract-2027 --from 2027-01-01`
    """
    read = files.read(text_of(file), list_name=list_name, version=version)
    instant = _instant(effective_from)

    async def run(database: db.Database) -> Preview:
        listed = importing.accepted(read)
        async with database.platform() as conn:
            if dry_run:
                return await importing.preview_list(conn, listed, effective_from=instant)
            return await importing.import_list(conn, listed, by=OPERATOR, effective_from=instant, backdate=backdate)

    _print_previews([with_database(run)], dry_run=dry_run, as_json=as_json)


@app.command()
def refresh(dry_run: DryRunOption = False, as_json: JsonOption = False) -> None:
    """Import the shipped lists of this version, where they are not in the book yet (`bursar serve` does so by itself).

    Examples: `bursar prices refresh`, `bursar prices refresh --dry-run --json`
    """

    async def run(database: db.Database) -> list[Preview]:
        async with database.platform() as conn:
            if not dry_run:
                return await importing.import_shipped(conn, by=OPERATOR)
            lists = [await asyncio.to_thread(importing.load_shipped, name) for name in importing.SHIPPED]
            return [await importing.preview_list(conn, listed) for listed in lists]

    _print_previews(with_database(run), dry_run=dry_run, as_json=as_json)


@app.command()
def override(
    provider: Annotated[str, typer.Argument(help="Provider, or * for all.", show_default=False)],
    model: Annotated[str, typer.Argument(help="Model, or a beginning followed by *.", show_default=False)],
    org: OrgOption,
    price: Annotated[
        list[str] | None, typer.Option(help="KIND=USD per unit, such as input_tokens=2.50; repeat for each kind.")
    ] = None,
    end: EndOption = False,
    effective_from: FromOption = None,
    backdate: BackdateOption = False,
    reason: ReasonOption = "",
    as_json: JsonOption = False,
) -> None:
    """Give an organization a price of its own, charged as it stands in place of list price and mark-up. 0 is free.

    Examples: `bursar prices override openai gpt-5 --org acme --price input_tokens=1 --price output_tokens=8`,
    `bursar prices override openai 'gpt-5*' --org acme --end --reason "contract ended"`
    """
    if end == bool(price):
        raise typer.BadParameter("either --price or --end")
    prices = None if end else Prices.of(_rate(each) for each in price or ())
    instant = _instant(effective_from)

    async def run(database: db.Database) -> terms.Override:
        organization_id = await org_of(database, org)
        async with database.platform() as conn:
            return await terms.set_override(
                conn, organization_id=organization_id, provider=provider, model_pattern=model, prices=prices,
                reason=reason, by=OPERATOR, effective_from=instant, backdate=backdate,
            )  # fmt: skip

    print_fields(_override_document(with_database(run)), as_json=as_json)


@app.command()
def markup(
    org: OrgOption,
    multiple: Annotated[str | None, typer.Argument(help="Multiple of the list price, such as 1.2.")] = None,
    provider: ProviderOption = ANY,
    model: ModelOption = ANY,
    end: EndOption = False,
    effective_from: FromOption = None,
    backdate: BackdateOption = False,
    reason: ReasonOption = "",
    as_json: JsonOption = False,
) -> None:
    """Charge an organization a multiple of the list price: for everything, a provider, or some models.

    Examples: `bursar prices markup 1.2 --org acme`,
    `bursar prices markup 0.95 --org acme --provider openai --model 'gpt-5*'`
    """
    if end == (multiple is not None):
        raise typer.BadParameter("either a multiple or --end")
    markup_ppm = None if multiple is None else _ppm(multiple)
    instant = _instant(effective_from)

    async def run(database: db.Database) -> terms.Markup:
        organization_id = await org_of(database, org)
        async with database.platform() as conn:
            return await terms.set_markup(
                conn, organization_id=organization_id, markup_ppm=markup_ppm, provider=provider, model_pattern=model,
                reason=reason, by=OPERATOR, effective_from=instant, backdate=backdate,
            )  # fmt: skip

    print_fields(with_database(run), as_json=as_json)


@app.command()
def policy(
    unknown_model: Annotated[UnknownModelPolicy, typer.Argument(help="What happens to a model without a price.")],
    org: OrgOption,
    fallback: Annotated[
        str | None, typer.Option(help="PROVIDER/MODEL whose price is taken, for the policy fallback.")
    ] = None,
    effective_from: FromOption = None,
    backdate: BackdateOption = False,
    reason: ReasonOption = "",
    as_json: JsonOption = False,
) -> None:
    """Say what happens to requests for models without a price: refuse, pass (charged nothing), or a fallback's price.

    Examples: `bursar prices policy pass --org acme --reason "pilot of new models"`,
    `bursar prices policy fallback --fallback openai/gpt-5 --org acme`
    """
    named = _fallback(unknown_model, fallback)
    instant = _instant(effective_from)

    async def run(database: db.Database) -> terms.Policy:
        organization_id = await org_of(database, org)
        if named is not None:
            await PriceBook(database).list_price(provider=named[0], model=named[1], at=instant)
        async with database.platform() as conn:
            return await terms.set_policy(
                conn, organization_id=organization_id, unknown_model=unknown_model, fallback=named,
                reason=reason, by=OPERATOR, effective_from=instant, backdate=backdate,
            )  # fmt: skip

    print_fields(with_database(run), as_json=as_json)


@app.command("terms")
def terms_(org: OrgOption, as_json: JsonOption = False) -> None:
    """Show all that was agreed with an organization: prices of its own, mark-ups, policies, each with its date.

    Examples: `bursar prices terms --org acme`, `bursar prices terms --org acme --json`
    """

    async def run(database: db.Database) -> terms.Terms:
        organization_id = await org_of(database, org)
        async with database.tenant(organization_id) as conn:
            return await terms.load_terms(conn, organization_id=organization_id)

    found = with_database(run)
    rows = [*_term_rows(found)]
    columns = [
        Column("what", "What"), Column("provider", "Provider"), Column("model", "Model"), Column("value", "Value"),
        Column("effective_from", "From", show=_day), Column("reason", "Reason"),
    ]  # fmt: skip
    print_rows(rows, columns, as_json=as_json, empty="List prices; models without a price are refused.")


def _term_rows(found: terms.Terms) -> Iterable[dict[str, Any]]:
    for own in found.overrides:
        value = "ended" if own.prices is None else ", ".join(_rate_text(rate) for rate in own.prices.rates)
        yield _term_row("price", own.provider, own.model_pattern, value, own)
    for mark in found.markups:
        value = "ended" if mark.markup_ppm is None else _multiple(mark.markup_ppm)
        yield _term_row("mark-up", mark.provider, mark.model_pattern, value, mark)
    for each in found.policies:
        value = each.unknown_model.value
        if each.fallback_model is not None:
            value = f"{value} {each.fallback_provider}/{each.fallback_model}"
        yield _term_row("unknown models", ANY, ANY, value, each)


def _term_row(
    what: str, provider: str, model: str, value: str, row: terms.Override | terms.Markup | terms.Policy
) -> dict[str, Any]:
    return {
        "what": what,
        "provider": provider,
        "model": model,
        "value": value,
        "effective_from": row.effective_from,
        "revision": row.revision,
        "reason": row.reason,
    }


def _print_previews(previews: Sequence[Preview], *, dry_run: bool, as_json: bool) -> None:
    if as_json:
        print_json({"dry_run": dry_run, "lists": [_preview_document(each) for each in previews]})
        return
    for preview in previews:
        _print_preview(preview, dry_run=dry_run)
    if not previews:
        typer.echo("The shipped lists are in the book already.")


def _print_preview(preview: Preview, *, dry_run: bool) -> None:
    counts = ", ".join(f"{len(preview.of(outcome))} {outcome}" for outcome in ("added", "changed", "unchanged"))
    would = "would be " if dry_run else ""
    typer.echo(f"{preview.list_name}: {would}{counts}, from {_day(preview.effective_from)} UTC")
    for change in preview.of("changed"):
        for difference in change.differences:
            typer.echo(f"  {change.provider}/{change.model} {_difference_text(difference)}")
    for provider, model in preview.missing:
        typer.echo(f"  {provider}/{model} is not in the list any more; its price stays")
    for reason, models in preview.not_represented.items():
        typer.echo(f"  not imported: {reason} ({len(models)} models, such as {models[0]})")


def _preview_document(preview: Preview) -> dict[str, Any]:
    return {
        "list_name": preview.list_name,
        "effective_from": preview.effective_from,
        "counts": {outcome: len(preview.of(outcome)) for outcome in ("added", "changed", "unchanged")},
        "changes": [_change_document(each) for each in preview.changes if each.segments],
        "missing": [{"provider": provider, "model": model} for provider, model in preview.missing],
        "not_represented": dict(preview.not_represented),
    }


def _change_document(change: Change) -> dict[str, Any]:
    return {
        "provider": change.provider,
        "model": change.model,
        "outcome": change.outcome,
        "differences": [
            {
                "kind": each.kind,
                "unit": UNITS[each.kind],
                "above_input_tokens": each.above_input_tokens,
                "when": dict(each.when),
                "old_usd": _usd(each.old_nano_usd),
                "new_usd": _usd(each.new_nano_usd),
            }
            for each in change.differences
        ],
    }


def _difference_text(each: Difference) -> str:
    tier = f" above {each.above_input_tokens:,} input tokens" if each.above_input_tokens else ""
    when = "".join(f" {name}={value}" for name, value in each.when)
    old, new = _usd(each.old_nano_usd) or "none", _usd(each.new_nano_usd) or "none"
    return f"{each.kind}{tier}{when}: {old} -> {new} USD/{UNITS[each.kind]}"


def _document(version: PriceVersion) -> dict[str, Any]:
    """A price as JSON; rates: standard ones, then conditional ones."""
    conditional = [((), version.rates), *((variant.when, variant.rates) for variant in version.variants)]
    return {
        "price_version_id": version.price_version_id,
        "provider": version.provider,
        "model": version.model,
        "list_name": version.list_name,
        "effective_from": version.effective_from,
        "source": version.source,
        "rates": [_rate_document(rate) | {"when": dict(when)} for when, rates in conditional for rate in rates],
    }


def _rate_document(rate: Rate) -> dict[str, Any]:
    return {
        "kind": rate.kind,
        "price_usd": format_usd(NanoUsd(rate.price_nano_usd)),
        "unit": UNITS[rate.kind],
        "above_input_tokens": rate.above_input_tokens,
        "minimum": rate.minimum,
        "free": rate.free,
    }


def _summary(version: PriceVersion) -> dict[str, Any]:
    """One line of the list."""
    base = [rate for rate in version.rates if not rate.above_input_tokens]
    others = [_rate_text(rate) for rate in base if rate.kind not in _SHOWN]
    tiers = sorted({rate.above_input_tokens for rate in version.rates if rate.above_input_tokens})
    notes = [
        *others,
        *(f"dearer above {each:,}" for each in tiers),
        *(["conditional prices"] if version.variants else []),
    ]
    return {
        "provider": version.provider,
        "model": version.model,
        "list_name": version.list_name,
        "other": ", ".join(notes),
        **{_SHOWN[rate.kind]: _usd(rate.price_nano_usd) for rate in base if rate.kind in _SHOWN},
    }


def _override_document(own: terms.Override) -> dict[str, Any]:
    return {
        "price_version_id": own.price_version_id,
        "provider": own.provider,
        "model": own.model_pattern,
        "effective_from": own.effective_from,
        "prices": [] if own.prices is None else [_rate_text(rate) for rate in own.prices.rates],
        "reason": own.reason,
    }


def _rate_text(rate: Rate) -> str:
    return f"{rate.kind} {format_usd(NanoUsd(rate.price_nano_usd))}/{UNITS[rate.kind]}"


def _usd(nano_usd: int | None) -> str | None:
    return None if nano_usd is None else format_usd(NanoUsd(nano_usd))


def _multiple(ppm: int) -> str:
    return f"{Decimal(ppm) / PAR_PPM:f}"


def _day(value: datetime) -> str:
    return f"{value:%Y-%m-%d %H:%M}"


def _ppm(multiple: str) -> int:
    """'1.2' -> 1,200,000, exactly."""
    try:
        ppm = Decimal(multiple) * PAR_PPM
    except InvalidOperation:
        raise typer.BadParameter(f"{multiple!r} is no number") from None
    if not ppm.is_finite() or ppm != int(ppm):
        raise typer.BadParameter(f"{multiple!r} has more than six decimal places")
    return int(ppm)


def _rate(text: str) -> Rate:
    """'input_tokens=2.50' -> a rate."""
    kind, _, usd = text.partition("=")
    try:
        return files.parse_rate({"kind": kind.strip(), "price_usd": usd.strip(), "free": Decimal(usd or "1") == 0})
    except (ValueError, InvalidOperation) as error:
        raise typer.BadParameter(f"{text}: {error}") from None


def _fallback(unknown_model: UnknownModelPolicy, fallback: str | None) -> tuple[str, str] | None:
    if (unknown_model is UnknownModelPolicy.FALLBACK) != (fallback is not None):
        raise typer.BadParameter("the policy fallback, and only it, names a --fallback PROVIDER/MODEL")
    if fallback is None:
        return None
    provider, slash, model = fallback.partition("/")
    if not (provider and slash and model):
        raise typer.BadParameter("--fallback is PROVIDER/MODEL")
    return provider, model


def _instant(text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        return files.parse_instant(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def text_of(file: Path) -> str:
    """What a file holds, or with - the standard input.

    Raises:
        typer.BadParameter
    """
    try:
        return sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"cannot read {file}: {error}") from None
