"""`bursar codes`: complimentary codes, made in campaigns and redeemed into personal balances."""

from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

import typer

from bursar import db
from bursar.audit.events import OPERATOR
from bursar.cli.credits import credits_of
from bursar.cli.output import (
    Column,
    DryRunOption,
    JsonOption,
    YesOption,
    print_fields,
    print_json,
    print_rows,
    with_database,
)
from bursar.cli.scope import as_id, every_page, org_of, user_of
from bursar.clock import in_utc
from bursar.credits import codes
from bursar.credits.codes import Campaign, Terms
from bursar.identity.organizations import PLATFORM_ORGANIZATION_ID, get_organization
from bursar.money import Micros, format_credits
from bursar.problems import NotFound

app = typer.Typer(help="Complimentary codes: create, list, revoke, redeem.", no_args_is_help=True)

CampaignArgument = Annotated[str, typer.Argument(help="The campaign's name or id.")]
OfOption = Annotated[
    str | None, typer.Option("--org", envvar="BURSAR_ORG", help="For members of this organization only.")
]


@app.command()
def create(
    amount: Annotated[str, typer.Argument(help="Credits that one redemption gives, such as 500.")],
    campaign: Annotated[str, typer.Option(help="What it is called; a campaign of this name gets more codes.")],
    count: Annotated[int, typer.Option(help="How many codes.", min=1, max=codes.MOST_AT_ONCE)] = 1,
    org: OfOption = None,
    valid_from: Annotated[datetime | None, typer.Option(help="Redeemable from this instant (UTC).")] = None,
    valid_until: Annotated[datetime | None, typer.Option(help="Redeemable before this instant (UTC).")] = None,
    credits_until: Annotated[datetime | None, typer.Option(help="The credits expire at this instant (UTC).")] = None,
    credits_days: Annotated[int | None, typer.Option(help="The credits last so many days.", min=1, max=3660)] = None,
    domain: Annotated[list[str] | None, typer.Option(help="Only for people of this e-mail domain; repeatable.")] = None,
    per_code: Annotated[int, typer.Option(help="People who may redeem one code.", min=1)] = 1,
    per_person: Annotated[int, typer.Option(help="Codes of the campaign one person may redeem.", min=1)] = 1,
    per_domain: Annotated[int | None, typer.Option(help="Redemptions by people of one domain.", min=1)] = None,
    per_organization: Annotated[int | None, typer.Option(help="Redemptions into one organization.", min=1)] = None,
    per_day: Annotated[int | None, typer.Option(help="Redemptions on one UTC day.", min=1)] = None,
    in_all: Annotated[int | None, typer.Option(help="Redemptions in all.", min=1)] = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Make codes. Their texts are printed once, one a line, and kept nowhere.

    Examples: `bursar codes create 500 --campaign Spring --count 20 --credits-days 90`,
    `bursar codes create 50 --campaign Welcome --org acme --per-code 100 --domain acme.example`
    """
    terms = Terms(
        name=campaign,
        amount_micros=credits_of(amount),
        valid_from=in_utc(valid_from),
        valid_until=in_utc(valid_until),
        credits_expire_at=in_utc(credits_until),
        credits_days=credits_days,
        domains=tuple(domain or ()),
        most_per_code=per_code,
        most_per_person=per_person,
        most_per_domain=per_domain,
        most_per_organization=per_organization,
        most_per_day=per_day,
        most_in_all=in_all,
    )

    async def work(database: db.Database) -> list[str]:
        organization_id = await _owner(database, org)
        async with database.tenant(organization_id) as conn:
            campaign_id = await _named(conn, database, organization_id, terms)
            if dry_run:
                return []
            if campaign_id is None:
                campaign_id = await codes.open_campaign(
                    conn,
                    settings=database.settings,
                    organization_id=organization_id,
                    terms=terms,
                    created_by=None,
                    by=OPERATOR,
                )
            made = await codes.add_codes(
                conn, organization_id=organization_id, campaign_id=campaign_id, count=count, by=OPERATOR
            )
        return list(made.values())

    texts = with_database(work)
    if dry_run:
        at_most = min(count * per_code, in_all or count * per_code) * terms.amount_micros
        print_fields({"codes": count, "credits_at_most": format_credits(Micros(at_most))}, as_json=as_json)
    elif as_json:
        print_json({"campaign": campaign, "codes": texts})
    else:
        typer.echo("\n".join(texts))


async def _named(conn: db.Connection, database: db.Database, organization_id: UUID, terms: Terms) -> UUID | None:
    """The open campaign of this name, whose codes must give what is asked for; None: there is none."""
    found = await codes.find_open_campaign(
        conn, settings=database.settings, organization_id=organization_id, terms=terms
    )
    if found is None:
        return None
    if found.other_terms:
        raise typer.BadParameter(
            f"the campaign of this name has other terms ({', '.join(found.other_terms)}); name another"
        )
    return found.campaign_id


@app.command("list")
def list_(org: OfOption = None, as_json: JsonOption = False) -> None:
    """List campaigns: codes, redemptions, what was granted.

    Examples: `bursar codes list`, `bursar codes list --org acme --json`
    """

    async def work(database: db.Database) -> list[Campaign]:
        organization_id = await _owner(database, org)
        async with database.platform() as conn:
            return await codes.list_campaigns(conn, organization_id=organization_id)

    rows = [_campaign_row(each) for each in with_database(work)]
    columns = [Column("campaign", "Campaign"), Column("state", "State"), Column("valid_until", "Valid until")]
    columns += [
        Column(key, key.replace("_", " ").capitalize(), right=True)
        for key in ("credits", "codes", "redemptions", "people", "granted", "burnt")
    ]
    print_rows(rows, columns, as_json=as_json, empty="No campaign yet: `bursar codes create` opens one.")


def _campaign_row(each: Campaign) -> dict[str, Any]:
    return {
        "campaign": each.name,
        "state": "revoked" if each.revoked_at else "open",
        "valid_from": each.valid_from,
        "valid_until": each.valid_until,
        "credits": format_credits(each.amount_micros),
        "codes": each.codes,
        "redemptions": each.redemptions,
        "people": each.people,
        "granted": format_credits(each.granted_micros),
        "burnt": format_credits(each.burnt_micros),
        "id": f"cmp_{each.campaign_id.hex}",
    }


@app.command()
def show(campaign: CampaignArgument, org: OfOption = None, as_json: JsonOption = False) -> None:
    """List the codes of a campaign by their last four characters, and how often each was redeemed.

    Examples: `bursar codes show Spring`, `bursar codes show Welcome --org acme --json`
    """

    async def work(database: db.Database) -> list[codes.Code]:
        organization_id = await _owner(database, org)
        async with database.tenant(organization_id) as conn:
            campaign_id = (await _campaign(conn, organization_id, campaign)).campaign_id
            return await every_page(
                lambda after: codes.list_codes(
                    conn, organization_id=organization_id, campaign_id=campaign_id, after=after
                ),
                lambda code: code.code_id,
            )

    rows = [
        {
            "code": f"…{each.hint}",
            "state": "revoked" if each.revoked_at else "open",
            "redemptions": each.redemptions,
            "id": f"cod_{each.code_id.hex}",
        }
        for each in with_database(work)
    ]
    columns = [Column("code", "Code"), Column("state", "State"), Column("redemptions", "Redemptions", right=True)]
    print_rows(rows, [*columns, Column("id", "Id")], as_json=as_json)


@app.command()
def revoke(
    campaign: CampaignArgument,
    code: Annotated[str | None, typer.Option(help="Only this one: its text or its id.")] = None,
    org: OfOption = None,
    reason: Annotated[str | None, typer.Option(help="Why, in words.")] = None,
    dry_run: DryRunOption = False,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Revoke a campaign's codes, or one of them. What was granted stays.

    Examples: `bursar codes revoke Spring --yes --reason "over"`,
    `bursar codes revoke Spring --code 7Q2KD-0000A-1111B-2222C`
    """
    if code is None and not yes and not dry_run:
        typer.confirm(f"Revoke every code of “{campaign}”?", abort=True)

    async def work(database: db.Database) -> int:
        organization_id = await _owner(database, org)
        async with database.tenant(organization_id) as conn, conn.transaction(force_rollback=dry_run):
            found = await _campaign(conn, organization_id, campaign)
            code_id = None
            if code is not None:
                code_id = as_id(code, "cod_") or (await codes.find_code(conn, code))[1]
            return await codes.revoke_codes(
                conn,
                organization_id=organization_id,
                campaign_id=found.campaign_id,
                code_id=code_id,
                reason=reason,
                by=OPERATOR,
            )

    print_fields({"revoked": with_database(work)}, dry_run=dry_run, as_json=as_json)


@app.command()
def redeem(
    code: Annotated[str, typer.Argument(help="The code, as it was printed.")],
    user: Annotated[str, typer.Option(help="Who redeems it: an e-mail address or id.")],
    into: Annotated[
        str | None, typer.Option(help="Organization in which their balance is; else the code's, or home.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Redeem a code for a person into their own balance.

    Examples: `bursar codes redeem 7Q2KD-0000A-1111B-2222C --user dana@acme.example`,
    `bursar codes redeem 7Q2KD-0000A-1111B-2222C --user dana@acme.example --into acme`
    """

    async def work(database: db.Database) -> dict[str, Any]:
        async with database.untenanted() as conn:
            person = await user_of(conn, database, user)
        redemption = await codes.redeem(
            database,
            text=code,
            user_id=person.user_id,
            into=await org_of(database, into) if into else None,
            by=OPERATOR,
        )
        async with database.tenant(redemption.into_organization_id) as conn:
            organization = await get_organization(conn, organization_id=redemption.into_organization_id)
        return {
            "credits": format_credits(redemption.amount_micros),
            "campaign": redemption.campaign,
            "into": "their own" if organization.kind == "individual" else organization.slug,
            "redeemed": redemption.claimed_at,
            "expires": redemption.credits_expire_at,
            "organization_id": f"org_{redemption.into_organization_id.hex}",
            "grant_id": f"grt_{redemption.grant_id.hex}" if redemption.grant_id else None,
            "is_again": redemption.is_again,
        }

    found = with_database(work)
    if found["is_again"] and not as_json:
        typer.echo(
            f"Already redeemed on {found['redeemed']:%Y-%m-%d %H:%M} UTC into {found['into']}: nothing was granted now."
        )
    print_fields(found, as_json=as_json)


async def _owner(database: db.Database, org: str | None) -> UUID:
    return PLATFORM_ORGANIZATION_ID if org is None else await org_of(database, org)


async def _campaign(conn: db.Connection, organization_id: UUID, reference: str) -> Campaign:
    campaigns = await codes.list_campaigns(conn, organization_id=organization_id)
    wanted = as_id(reference, "cmp_")
    found = [each for each in campaigns if each.campaign_id == wanted or each.name == reference]
    if not found:
        raise NotFound(f"no campaign “{reference}”. Those there are: bursar codes list")
    return next((each for each in found if each.revoked_at is None), found[0])
