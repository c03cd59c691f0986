"""The cluster's roles: made once, with exactly the rights that migrations count on.

Runs as a superuser or as a CREATEROLE admin who owns the database, on PostgreSQL 15 and later. Passwords are derived
from the master key and sent as SCRAM verifiers, so that no statement log holds one.
"""

import contextlib
import hmac
from typing import Final

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from bursar.db.rows import Connection
from bursar.errors import BursarError

GROUPS: Final = ("bursar_owner", "bursar_money", "bursar_backup")
LOGINS: Final = ("bursar_app", "bursar_platform", "bursar_lane", "bursar_simulator")
LOGIN_SETTINGS: Final = {"timezone": "UTC", "idle_in_transaction_session_timeout": "60s", "lock_timeout": "30s"}
OLDEST_SERVER: Final = 150_000


class RolesNotUsable(BursarError):
    """The admin may not do what is needed, or the roles belong to another installation."""


def role_password(master_key: bytes, role: str) -> str:
    """64 hex digits: HMAC-SHA256 of the role's name."""
    return hmac.new(master_key, f"database role {role}".encode(), "sha256").hexdigest()


async def ensure_roles(conn: Connection, master_key: bytes, *, reset_passwords: bool = False) -> None:
    """Make what is missing and check what is there; changes nothing when all is right. conn: admin, autocommit.

    reset_passwords: take over roles whose passwords come from another master key.

    Raises:
        RolesNotUsable
    """
    if conn.info.server_version < OLDEST_SERVER:
        raise RolesNotUsable(
            f"PostgreSQL {conn.info.server_version // 10000} is too old", next_step="Use PostgreSQL 15 or later"
        )
    try:
        for role in (*GROUPS, *LOGINS):
            await _ensure_role(conn, role, master_key, reset_passwords)
        await _check_attributes(conn)
        for role in ("bursar_owner", "bursar_money"):
            await _let_admin_become(conn, role)
        await _let_owner_create(conn)
    except psycopg.errors.InsufficientPrivilege as error:
        raise RolesNotUsable(
            f"The role {conn.info.user} of DATABASE_URL may not set up the database",
            why=str(error.diag.message_primary),
            next_step=f"Let it own the database and make roles: alter role {conn.info.user} createrole",
        ) from error


async def _ensure_role(conn: Connection, role: str, master_key: bytes, reset_passwords: bool) -> None:
    found = await (await conn.execute("select from pg_roles where rolname = %s", [role])).fetchone()
    if found is None:
        await _create_role(conn, role, master_key)
    elif role in LOGINS and not await _can_log_in(conn, role, master_key):
        if not reset_passwords:
            raise RolesNotUsable(
                f"The role {role} exists and does not take this installation's password",
                why="This cluster's roles were made with another master key",
                next_step="Set BURSAR_MASTER_KEY to that key, or take the roles over: bursar db migrate "
                "--reset-role-passwords",
            )
        await _set_login(conn, role, master_key)


async def _create_role(conn: Connection, role: str, master_key: bytes) -> None:
    # Another database of this cluster may be set up at this moment, and get there first: nobody sees half a role.
    with contextlib.suppress(psycopg.errors.DuplicateObject, psycopg.errors.UniqueViolation):
        async with conn.transaction():
            await conn.execute(sql.SQL("create role {}").format(sql.Identifier(role)))
            if role in LOGINS:
                await _set_login(conn, role, master_key)


async def _set_login(conn: Connection, role: str, master_key: bytes) -> None:
    password = role_password(master_key, role).encode()
    verifier = conn.pgconn.encrypt_password(password, role.encode(), b"scram-sha-256").decode()
    name = sql.Identifier(role)
    await conn.execute(sql.SQL("alter role {} login password {}").format(name, sql.Literal(verifier)))
    for setting, value in LOGIN_SETTINGS.items():
        await conn.execute(
            sql.SQL("alter role {} set {} = {}").format(name, sql.Identifier(setting), sql.Literal(value))
        )


async def _can_log_in(conn: Connection, role: str, master_key: bytes) -> bool:
    parts = conninfo_to_dict(conn.info.dsn)
    parts |= {"user": role, "password": role_password(master_key, role)}
    try:
        async with await psycopg.AsyncConnection.connect(make_conninfo("", **parts)):
            return True
    except psycopg.OperationalError:
        return False


async def _check_attributes(conn: Connection) -> None:
    """None of our roles may get round row-level security."""
    query = "select rolname from pg_roles where rolname = any(%s) and (rolsuper or rolbypassrls)"
    rows = await (await conn.execute(query, [[*GROUPS, *LOGINS]])).fetchall()
    if rows:
        names = ", ".join(row[0] for row in rows)
        raise RolesNotUsable(
            f"Roles that get round row-level security: {names}",
            next_step="As a superuser: alter role … nosuperuser nobypassrls",
        )


async def _let_admin_become(conn: Connection, role: str) -> None:
    """Migrations `set role` to the owner. A superuser may anyway; from PostgreSQL 16 on SET is a right of its own."""
    right = "SET" if conn.info.server_version >= 160_000 else "MEMBER"
    answer = await (await conn.execute("select pg_has_role(current_user, %s, %s)", [role, right])).fetchone()
    if answer is not None and not answer[0]:
        await conn.execute(sql.SQL("grant {} to current_user").format(sql.Identifier(role)))


async def _let_owner_create(conn: Connection) -> None:
    query = "select has_database_privilege('bursar_owner', current_database(), 'create'), current_database()"
    row = await (await conn.execute(query)).fetchone()
    if row is not None and not row[0]:
        await conn.execute(sql.SQL("grant create on database {} to bursar_owner").format(sql.Identifier(row[1])))
