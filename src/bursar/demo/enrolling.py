"""Writing who there is in a sample company: organization, departments, people, keys; by identity's own functions."""

import asyncio
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final
from uuid import UUID
from zoneinfo import ZoneInfo

from bursar import db
from bursar.audit.events import OPERATOR, Actor
from bursar.clock import uuid7_at
from bursar.credits.pools import open_credits
from bursar.demo.rhythm import Calendar
from bursar.demo.stories import Company, Move, Person
from bursar.identity.addresses import Address
from bursar.identity.api_keys import create_api_key, revoke_api_key
from bursar.identity.departments import create_department
from bursar.identity.memberships import add_membership, place_member, set_team_lead
from bursar.identity.organizations import create_organization
from bursar.identity.roles import Role, Scope
from bursar.identity.teams import create_team
from bursar.identity.users import User, find_or_create_user
from bursar.pricing.terms import set_markup

PEOPLE_AT_ONCE: Final = 3
ACCESS_KEY: Final = "Demo"
"""Name of the keys whose texts are printed."""


@dataclass(slots=True)
class Site:
    """A company under construction, and the ids behind its names. texts: of the keys to print, by owner's address."""

    company: Company
    organization_id: UUID
    joined: datetime
    users: dict[str, User] = field(default_factory=dict)
    departments: dict[str, UUID] = field(default_factory=dict)
    teams: dict[str, UUID] = field(default_factory=dict)
    keys: dict[str, UUID] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict, repr=False)

    @property
    def admin(self) -> Actor:
        """Who does what a company's people do themselves."""
        return Actor(kind="user", id=self.users[self.company.admin].user_id)


async def found(database: db.Database, company: Company, as_of: datetime) -> Site:
    """The organization, with its mark-up from the beginning; for an individual, the person and their home."""
    began = Calendar(as_of, ZoneInfo(company.zone)).day_start(company.joined)
    joined = began if company.joined else as_of - timedelta(minutes=10)
    if company.kind == "individual":
        user = await _user(database, company, company.people[0])
        return Site(company, user.home_organization_id, joined, users={company.admin: user})
    site = Site(company, uuid7_at(joined), joined)
    async with database.tenant(site.organization_id) as conn:
        await create_organization(
            conn,
            organization_id=site.organization_id,
            slug=company.slug,
            name=company.name,
            kind=company.kind,
            zone=company.zone,
            currency=company.currency,
            is_shared_token_pool=company.is_shared,
            shows_margin=company.shows_margin,
            by=OPERATOR,
            at=joined,
        )
    if company.markup_ppm is not None:
        await _mark_up(database, site, company.markup_ppm)
    return site


async def _mark_up(database: db.Database, site: Site, markup_ppm: int) -> None:
    async with database.platform() as conn:
        await set_markup(
            conn,
            organization_id=site.organization_id,
            markup_ppm=markup_ppm,
            reason="As agreed",
            by=OPERATOR,
            effective_from=site.joined,
            backdate=True,
        )


async def enroll(database: db.Database, site: Site) -> None:
    """Departments, teams, people and keys of a company that was founded."""
    some = asyncio.Semaphore(PEOPLE_AT_ONCE)

    async def find(person: Person) -> None:
        async with some:
            site.users[person.email] = await _user(database, site.company, person)

    async with asyncio.TaskGroup() as group:
        for person in site.company.people:
            group.create_task(find(person))
    async with database.tenant(site.organization_id) as conn:
        await _arrange(conn, site)
        for person in site.company.people:
            await _join(conn, database, site, person)
        for person in site.company.people:
            if Role.TEAM_LEAD in person.roles and person.team is not None:
                await _lead(conn, site, person, site.teams[person.team])
        await _make_keys(conn, site)


async def _user(database: db.Database, company: Company, person: Person) -> User:
    return await find_or_create_user(
        database,
        address=Address.of(person.email, database.settings),
        display_name=person.name,
        by=OPERATOR,
        on_opening=open_credits,
        zone=company.zone,
    )


async def _arrange(conn: db.Connection, site: Site) -> None:
    organization_id, at = site.organization_id, site.joined
    for name, teams in site.company.departments.items():
        made = await create_department(conn, organization_id=organization_id, name=name, by=OPERATOR, at=at)
        department_id = site.departments[name] = made.department_id
        for team in teams:
            found = await create_team(
                conn, organization_id=organization_id, name=team, department_id=department_id, by=OPERATOR, at=at
            )
            site.teams[team] = found.team_id


async def _join(conn: db.Connection, database: db.Database, site: Site, person: Person) -> None:
    await add_membership(
        conn,
        organization_id=site.organization_id,
        user_id=site.users[person.email].user_id,
        address=Address.of(person.email, database.settings),
        display_name=person.name,
        roles=person.roles,
        by=OPERATOR,
        team_id=site.teams[person.team] if person.team else None,
        department_id=site.departments[person.department] if person.department else None,
        at=site.joined,
    )


async def _lead(conn: db.Connection, site: Site, person: Person, team_id: UUID) -> None:
    await set_team_lead(
        conn,
        organization_id=site.organization_id,
        team_id=team_id,
        user_id=site.users[person.email].user_id,
        by=OPERATOR,
    )


async def _make_keys(conn: db.Connection, site: Site) -> None:
    """The story's keys, and one of the administrator and of the member for whoever tries the demo."""
    for key in site.company.keys:
        made = await create_api_key(
            conn,
            organization_id=site.organization_id,
            user_id=site.users[key.owner].user_id if key.owner else None,
            name=key.name,
            by=site.admin,
            department_id=site.departments[key.department] if key.department else None,
            at=site.joined,
        )
        site.keys[key.name] = made.key.api_key_id
    for email in {site.company.admin: None, site.company.member: None}:
        made = await create_api_key(
            conn,
            organization_id=site.organization_id,
            user_id=site.users[email].user_id,
            name=ACCESS_KEY,
            by=site.admin,
            scopes=tuple(Scope),
            at=site.joined,
        )
        site.texts[email] = made.text


async def move(database: db.Database, site: Site, moved: Move) -> None:
    """Somebody goes to another department; what they used before stays where it was."""
    async with database.tenant(site.organization_id) as conn:
        await place_member(
            conn,
            organization_id=site.organization_id,
            user_id=site.users[moved.person].user_id,
            team_id=site.teams[moved.team] if moved.team else None,
            department_id=site.departments[moved.department],
            by=site.admin,
        )


async def delete_keys(database: db.Database, site: Site) -> None:
    """Revoke the keys that the story says are deleted."""
    async with database.tenant(site.organization_id) as conn:
        for key in site.company.keys:
            if key.is_deleted:
                await revoke_api_key(
                    conn,
                    organization_id=site.organization_id,
                    api_key_id=site.keys[key.name],
                    by=site.admin,
                    reason="Replaced by Build agents",
                )
