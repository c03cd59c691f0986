"""People across organizations: one id, a home organization of kind individual, a default; nothing personal here."""

from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from uuid import UUID

from bursar import clock, db
from bursar.audit.events import Actor, record
from bursar.identity.addresses import Address
from bursar.identity.memberships import Membership, add_membership, check_new_member
from bursar.identity.organizations import QUERIES, Organization, create_organization
from bursar.identity.roles import Role
from bursar.problems import Problem

# What a layer above does for a new organization in the same transaction: it opens the organization's credits.
OnOpening = Callable[[db.Connection, Organization], Awaitable[None]]


class EmailTaken(Problem):
    """The address belongs to another person."""

    status, code, title = 409, "email_taken", "This e-mail address belongs to somebody"


class UserNotFound(Problem):
    """No such person."""

    status, code, title = 404, "user_not_found", "No such person"


class NotAMember(Problem):
    """A person's default organization is one they belong to."""

    status, code, title = 422, "not_a_member", "This person does not belong to that organization"


@dataclass(frozen=True, slots=True, kw_only=True)
class User:
    """A person. default_organization_id: None is the company joined first."""

    user_id: UUID
    home_organization_id: UUID
    default_organization_id: UUID | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a person actively belongs, and as what; nothing personal. Organizations that are closed are no places."""

    organization_id: UUID
    slug: str
    name: str
    kind: str
    zone: str
    shows_margin: bool
    status: str
    roles: tuple[Role, ...]
    team_id: UUID | None
    department_id: UUID | None


async def find_user_by_email(conn: db.Connection, address: Address) -> User | None:
    """The person with this address. Works without a tenant."""
    return await db.fetch_optional(conn, User, QUERIES.find_user_by_email, email_hash=address.email_hash)


async def get_user(conn: db.Connection, *, user_id: UUID) -> User:
    """Home and default of a person. Works without a tenant.

    Raises:
        UserNotFound
    """
    found = await db.fetch_optional(conn, User, QUERIES.find_user, user_id=user_id)
    if found is None:
        raise UserNotFound
    return found


async def places_of_user(conn: db.Connection, *, user_id: UUID) -> list[Place]:
    """Where a person belongs, first joined first, the home among them. Works without a tenant."""
    return await db.fetch_all(conn, Place, QUERIES.places_of_user, user_id=user_id)


async def create_user(
    conn: db.Connection,
    *,
    home_organization_id: UUID,
    address: Address,
    display_name: str,
    by: Actor,
    zone: str = "UTC",
) -> tuple[User, Organization]:
    """A new person with a home organization of their own. conn: acts for `home_organization_id`, a new id.

    Raises:
        InvalidName, InvalidZone
        EmailTaken: of racing claims exactly one wins.
    """
    user = User(user_id=clock.uuid7(), home_organization_id=home_organization_id, default_organization_id=None)
    claim = {"home_organization_id": home_organization_id, "user_id": user.user_id, "email_hash": address.email_hash}
    if not await db.fetch_value(conn, QUERIES.claim_user, **claim):
        raise EmailTaken
    home = await create_organization(
        conn,
        organization_id=home_organization_id,
        # A slug stands in addresses and logs, so nothing personal is in it.
        slug=f"u-{user.user_id.hex}",
        name="Personal",
        kind="individual",
        zone=zone,
        is_shared_token_pool=False,
        by=by,
    )
    await add_membership(
        conn,
        organization_id=home_organization_id,
        user_id=user.user_id,
        address=address,
        display_name=display_name,
        roles=[Role.ORG_ADMIN],
        by=by,
    )
    return user, home


async def find_or_create_user(
    database: db.Database, *, address: Address, display_name: str, by: Actor, on_opening: OnOpening, zone: str = "UTC"
) -> User:
    """The person with this address, made in a transaction of their own when there is none yet.

    on_opening: called with a new person's home organization, in the transaction that makes it.

    Raises:
        InvalidName, InvalidZone
    """
    async with database.untenanted() as conn:
        user = await find_user_by_email(conn, address)
    if user is not None:
        return user
    home_id = clock.uuid7()
    try:
        async with database.tenant(home_id) as conn:
            user, home = await create_user(
                conn, home_organization_id=home_id, address=address, display_name=display_name, by=by, zone=zone
            )
            await on_opening(conn, home)
            return user
    except EmailTaken:
        # Somebody made the same person between the look and the claim.
        async with database.untenanted() as conn:
            user = await find_user_by_email(conn, address)
        assert user is not None
        return user


async def invite(
    database: db.Database,
    *,
    organization_id: UUID,
    address: Address,
    display_name: str,
    roles: Collection[Role],
    by: Actor,
    on_opening: OnOpening,
    team_id: UUID | None = None,
    department_id: UUID | None = None,
) -> Membership:
    """Make whoever has this address a member; who is not known yet is created, once nothing else can be refused.

    Raises:
        AlreadyMember, OrganizationOfOne, RoleNotHere, InvalidName, TeamNotFound, DepartmentNotFound
    """
    async with database.tenant(organization_id) as conn:
        await check_new_member(
            conn, organization_id=organization_id, roles=roles, team_id=team_id, department_id=department_id
        )
    user = await find_or_create_user(database, address=address, display_name=display_name, by=by, on_opening=on_opening)
    async with database.tenant(organization_id) as conn:
        return await add_membership(
            conn,
            organization_id=organization_id,
            user_id=user.user_id,
            address=address,
            display_name=display_name,
            roles=roles,
            team_id=team_id,
            department_id=department_id,
            by=by,
        )


async def choose_default(conn: db.Connection, *, user: User, organization_id: UUID | None, by: Actor) -> None:
    """Set where a person acts unless a request chooses; None: in the company joined first. conn: acts for their home.

    Raises:
        NotAMember
    """
    chosen = await db.fetch_value(
        conn,
        QUERIES.choose_default,
        home_organization_id=user.home_organization_id,
        user_id=user.user_id,
        organization_id=organization_id,
    )
    if not chosen:
        raise NotAMember
    await record(
        conn,
        organization_id=user.home_organization_id,
        by=by,
        action="user.default_changed",
        object_id=user.user_id,
        old={"default_organization_id": user.default_organization_id},
        new={"default_organization_id": organization_id},
    )
