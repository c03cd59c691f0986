"""PostgreSQL: connections by role, the tenant of a transaction, named queries, migrations, the embedded server.

Promises:
- The tenant is set in one place, `Database.tenant()`, with SET LOCAL; no other code sets `app.organization_id`.
- A role's password is derived from the master key; nobody types or stores one.
- A migration runs once, whole or not at all, and is never edited afterwards.
- The embedded server loses nothing that was committed, however it or we are killed.

Tables: schema `db` (what has been applied here), written by `migrate` only.
"""

from bursar.db.connections import Database, connect, held, opened
from bursar.db.queries import Queries, load_queries
from bursar.db.rows import Connection, NoRow, execute, fetch_all, fetch_one, fetch_optional, fetch_value, fetch_values
from bursar.db.space import Space

__all__ = [
    "Connection",
    "Database",
    "NoRow",
    "Queries",
    "Space",
    "connect",
    "execute",
    "fetch_all",
    "fetch_one",
    "fetch_optional",
    "fetch_value",
    "fetch_values",
    "held",
    "load_queries",
    "opened",
]
