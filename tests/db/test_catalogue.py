"""The rules of the schema, put to the catalogue itself, so that a new table, view or function that breaks one fails.

Each rule is a query that finds what breaks it. Each is tried too: a breaker, rolled back, must be found by it.
"""

import psycopg
import pytest

from bursar import db

# Tables that belong to no organization, with the reason. Everything else needs organization_id and row-level security.
GLOBAL_TABLES = {
    "audit.anchors": "an anchor is over the seals of all organizations",
    "audit.epochs": "the clusters that the database has lived in",
    "audit.forms": "which columns a table has is the same for all",
    "audit.sealed_tables": "which tables are sealed is the same for all",
    "audit.verifications": "a verification is of all organizations",
    "audit.sealing": "a round of sealing is over all organizations",
    "gateway.providers": "who sells models is the same for all",
    "gateway.model_routes": "which provider serves a model is the platform's decision",
    "gateway.route_fallbacks": "as the routes",
    "pricing.book": "the state of the one price book",
    "pricing.imports": "where the price book came from",
    "pricing.kinds": "the kinds of usage there are",
    "pricing.lists": "the price lists there are",
    "pricing.models": "the models there are",
    "pricing.providers": "who sells models is the same for all",
    "pricing.rates": "list prices are the same for all",
    "pricing.versions": "list prices are the same for all",
}

OUR_SCHEMAS = """
    select oid, nspname from pg_namespace
    where nspname !~ '^pg_' and nspname not in ('information_schema', 'public', 'db', 'procrastinate')
"""
TABLES = f"""
    select c.oid, c.oid::regclass::text as name, s.nspname, c.relname, c.relkind, c.relrowsecurity,
           c.relforcerowsecurity, c.relowner, c.relacl, c.reloptions, c.relispartition
    from pg_class c join ({OUR_SCHEMAS}) s on s.oid = c.relnamespace
    where c.relkind in ('r', 'p', 'f')
"""
TENANT_TABLES = f"""
    select * from ({TABLES}) t
    where nspname <> 'route' and name <> all (array[{", ".join(f"'{name}'" for name in GLOBAL_TABLES)}])
"""
ORGANIZATION = "(select attnum from pg_attribute where attrelid = {0} and attname = 'organization_id')"
FUNCTIONS = f"""
    select p.*, p.oid::regprocedure::text as name, s.nspname
    from pg_proc p join ({OUR_SCHEMAS}) s on s.oid = p.pronamespace
"""
OWN = "(organization_id = ( SELECT (NULLIF(current_setting(''app.organization_id''::text, true), ''''::text))::uuid"

RULES = {
    "the first column of a tenant table is organization_id": f"""
        select name from ({TENANT_TABLES}) t where not exists (
            select from pg_attribute a where a.attrelid = t.oid and a.attnum = 1 and a.attname = 'organization_id'
            and a.atttypid = 'uuid'::regtype and a.attnotnull)
    """,
    "every table has a primary key": f"""
        select name from ({TABLES}) t
        where not exists (select from pg_index i where i.indrelid = t.oid and i.indisprimary)
    """,
    "every key and index of a tenant table begins with organization_id": f"""
        select i.indexrelid::regclass::text from ({TENANT_TABLES}) t join pg_index i on i.indrelid = t.oid
        where i.indkey[0] is distinct from {ORGANIZATION.format("t.oid")}
    """,
    "a foreign key between tenant tables begins with organization_id on both sides": f"""
        select k.conname from ({TENANT_TABLES}) t
        join pg_constraint k on k.conrelid = t.oid and k.contype = 'f' join ({TENANT_TABLES}) f on f.oid = k.confrelid
        where k.conkey[1] is distinct from {ORGANIZATION.format("k.conrelid")}
        or k.confkey[1] is distinct from {ORGANIZATION.format("k.confrelid")}
    """,
    "row-level security is forced on every tenant table": f"""
        select name from ({TENANT_TABLES}) t where not (relrowsecurity and relforcerowsecurity)
    """,
    "the application sees its own organization and nothing else": f"""
        select name from ({TENANT_TABLES}) t where not exists (
            select from pg_policy p where p.polrelid = t.oid and p.polroles = array['bursar_app'::regrole::oid]
            and position('{OWN}' in pg_get_expr(p.polqual, p.polrelid)) = 1
            and position('{OWN}' in pg_get_expr(p.polwithcheck, p.polrelid)) = 1)
        union all
        select p.polrelid::regclass || ' ' || p.polname from pg_policy p join ({TABLES}) t on t.oid = p.polrelid
        where p.polroles && array['bursar_app'::regrole::oid, 'bursar_lane'::regrole::oid, 0::oid]
        and (p.polname <> 'own_organization' or p.polroles <> array['bursar_app'::regrole::oid])
    """,
    "the tables of route are granted to nobody": f"""
        select name from ({TABLES}) t, aclexplode(t.relacl) a
        where nspname = 'route' and a.grantee <> t.relowner
    """,
    "nobody else owns a table, and no login owns anything": f"""
        select name from ({TABLES}) t where relowner <> 'bursar_owner'::regrole
        union all
        select name from ({FUNCTIONS}) f where proowner not in ('bursar_owner'::regrole, 'bursar_money'::regrole)
    """,
    "the application changes no table that belongs to all": f"""
        select name || ' ' || a.privilege_type from ({TABLES}) t, aclexplode(t.relacl) a
        where name = any (array[{", ".join(f"'{name}'" for name in GLOBAL_TABLES)}])
        and a.grantee = 'bursar_app'::regrole and a.privilege_type <> 'SELECT'
    """,
    "no login may truncate, reference or put triggers on a table": f"""
        select name || ' ' || a.privilege_type from ({TABLES}) t, aclexplode(t.relacl) a
        where a.grantee not in (t.relowner, 'bursar_money'::regrole)
        and a.privilege_type not in ('SELECT', 'INSERT', 'UPDATE', 'DELETE')
    """,
    "rows of append-only tables may be changed by nobody": f"""
        select name || ' ' || a.privilege_type from ({TABLES}) t, aclexplode(t.relacl) a
        where exists (select from pg_trigger g where g.tgrelid = t.oid and g.tgname = 'append_only')
        and a.grantee <> t.relowner and a.privilege_type in ('UPDATE', 'DELETE', 'TRUNCATE')
    """,
    "a partition of an append-only table is guarded against truncate as its parent is": f"""
        select t.name from ({TABLES}) t join pg_inherits i on i.inhrelid = t.oid
        where exists (select from pg_trigger g where g.tgrelid = i.inhparent and g.tgname = 'append_only_truncate')
        and not exists (select from pg_trigger g where g.tgrelid = t.oid and g.tgname = 'append_only_truncate')
    """,
    "the lanes and the simulator read and write no table themselves": f"""
        select name from ({TABLES}) t, aclexplode(t.relacl) a
        where a.grantee in ('bursar_lane'::regrole, 'bursar_simulator'::regrole, 0)
    """,
    "there are no sequences": f"""
        select c.oid::regclass::text from pg_class c join ({OUR_SCHEMAS}) s on s.oid = c.relnamespace
        where c.relkind = 'S'
    """,
    "every schema, table, column, view, function and type has a comment": f"""
        select nspname from ({OUR_SCHEMAS}) s where obj_description(oid, 'pg_namespace') is null
        union all
        select c.oid::regclass || coalesce('.' || a.attname, '') from pg_class c
        join ({OUR_SCHEMAS}) s on s.oid = c.relnamespace
        join pg_attribute a on a.attrelid = c.oid and a.attnum >= 0 and not a.attisdropped
        where c.relkind in ('r', 'p', 'v', 'm') and not c.relispartition
        and (col_description(c.oid, a.attnum) is null or obj_description(c.oid, 'pg_class') is null)
        union all
        select name from ({FUNCTIONS}) f where obj_description(oid, 'pg_proc') is null
        union all
        select t.oid::regtype::text from pg_type t join ({OUR_SCHEMAS}) s on s.oid = t.typnamespace
        left join pg_class c on c.oid = t.typrelid
        where t.typtype in ('c', 'd', 'e') and (c.oid is null or c.relkind = 'c')
        and obj_description(t.oid, 'pg_type') is null
    """,
    "a definer function has a fixed search_path that ends with pg_temp or has only the catalogue": f"""
        select name from ({FUNCTIONS}) f where prosecdef and not exists (
            select from unnest(proconfig) c where c ~ '^search_path=' and c !~ 'public|\\$user'
            and (c ~ ', pg_temp$' or c ~ ', pg_catalog$'))
    """,
    "a definer function is executed by named roles only": f"""
        select name from ({FUNCTIONS}) f where prosecdef
        and (proacl is null or exists (select from aclexplode(proacl) a where a.grantee = 0))
    """,
    "every view answers with the rights of who asks, and none is materialized": f"""
        select c.oid::regclass::text from pg_class c join ({OUR_SCHEMAS}) s on s.oid = c.relnamespace
        where c.relkind = 'm'
        or (c.relkind = 'v' and not coalesce(c.reloptions @> array['security_invoker=true'], false))
    """,
    "what lanes call is theirs alone, or acts for others only in the organization that is set": f"""
        select name from ({FUNCTIONS}) f where has_function_privilege('bursar_app', oid, 'execute')
        and (prosecdef and has_function_privilege('bursar_lane', oid, 'execute')
             and prosrc !~ 'require_tenant\\(p_organization_id\\)'
             or nspname = 'credits' and proargtypes::oid[] @> array['uuid[]'::regtype::oid])
    """,
    "organization_id is the first argument": f"""
        select name from ({FUNCTIONS}) f
        where nspname <> 'route' and array_position(proargnames, 'p_organization_id') > 1
        and coalesce(proargmodes[array_position(proargnames, 'p_organization_id')], 'i') = 'i'
    """,
    "triggers only guard": f"""
        select t.name || ' ' || g.tgname from ({TABLES}) t join pg_trigger g on g.tgrelid = t.oid
        where not g.tgisinternal
        and g.tgfoid <> all (array['tenancy.refuse_change'::regproc, 'outbox.refuse_change'::regproc])
    """,
    "nothing depends on advisory locks, notifications or sequences": f"""
        select name from ({FUNCTIONS}) f
        where prosrc ~* 'pg_(try_)?advisory|pg_notify|\\mnotify\\M|\\mlisten\\M|nextval'
    """,
    "there are no floats, and every instant has its zone": f"""
        select t.name || '.' || a.attname from ({TABLES}) t join pg_attribute a on a.attrelid = t.oid and a.attnum > 0
        where a.atttypid in ('real'::regtype, 'double precision'::regtype, 'money'::regtype, 'timestamp'::regtype,
                             'time with time zone'::regtype)
    """,
    "amounts are bigint": f"""
        select t.name || '.' || a.attname from ({TABLES}) t join pg_attribute a on a.attrelid = t.oid and a.attnum > 0
        where a.attname ~ '_(micros|nano_usd)$' and a.atttypid not in ('bigint'::regtype, 'bigint[]'::regtype)
    """,
    "nothing lives in public, and no extension is needed": """
        select relname from pg_class where relnamespace = 'public'::regnamespace
        union all select proname from pg_proc where pronamespace = 'public'::regnamespace
        union all select extname from pg_extension where extname <> 'plpgsql'
    """,
    "no role gets round row-level security or is a member of another": """
        select rolname from pg_roles where rolname ~ '^bursar_'
        and (rolsuper or rolbypassrls or rolcreaterole or rolcreatedb or rolreplication)
        union all
        select m.member::regrole || ' in ' || m.roleid::regrole from pg_auth_members m
        where m.member::regrole::text ~ '^bursar_' and m.roleid::regrole::text ~ '^bursar_'
    """,
}

TENANT = "create table identity.broken (organization_id uuid not null, thing_id uuid not null, {0});"
GOOD = TENANT.format("primary key (organization_id, thing_id)") + "call tenancy.protect('identity.broken', 'select');"
FUNCTION = "create function identity.broken({0}) returns integer language sql {1} as 'select 1';"

# One way to break each rule. Only new things are made: a test may not lock what the others use.
BREAKERS = {
    "the first column of a tenant table is organization_id": (
        "create table identity.broken (thing_id uuid primary key);"
    ),
    "every table has a primary key": "create table route.broken (x uuid);",
    "every key and index of a tenant table begins with organization_id": GOOD
    + "create index on identity.broken (thing_id);",
    "a foreign key between tenant tables begins with organization_id on both sides": GOOD
    + "create table identity.child (organization_id uuid primary key, thing_id uuid unique);"
    + "alter table identity.broken add foreign key (thing_id) references identity.child (thing_id);",
    "row-level security is forced on every tenant table": TENANT.format("primary key (organization_id)"),
    "the application sees its own organization and nothing else": GOOD
    + "create policy more on identity.broken for select to bursar_app using (true);",
    "the tables of route are granted to nobody": "create table route.broken (x uuid primary key);"
    + "grant select on route.broken to bursar_platform;",
    "nobody else owns a table, and no login owns anything": GOOD
    + "reset role; alter table identity.broken owner to current_user;",
    "the application changes no table that belongs to all": "",
    "no login may truncate, reference or put triggers on a table": GOOD
    + "grant truncate on identity.broken to bursar_platform;",
    "rows of append-only tables may be changed by nobody": GOOD
    + "call tenancy.append_only('identity.broken'); grant update on identity.broken to bursar_app;",
    "a partition of an append-only table is guarded against truncate as its parent is": (
        "create table identity.broken (organization_id uuid not null, primary key (organization_id))"
        " partition by hash (organization_id); call tenancy.append_only('identity.broken');"
        " create table identity.part partition of identity.broken for values with (modulus 1, remainder 0);"
    ),
    "the lanes and the simulator read and write no table themselves": GOOD
    + "grant select on identity.broken to bursar_lane;",
    "there are no sequences": "create sequence identity.broken;",
    "every schema, table, column, view, function and type has a comment": GOOD,
    "a definer function has a fixed search_path that ends with pg_temp or has only the catalogue": FUNCTION.format(
        "", "security definer"
    ),
    "a definer function is executed by named roles only": FUNCTION.format("", "security definer"),
    "every view answers with the rights of who asks, and none is materialized": (
        "create view identity.broken as select 1;"
    ),
    "what lanes call is theirs alone, or acts for others only in the organization that is set": FUNCTION.format(
        "", "security definer"
    ),
    "organization_id is the first argument": FUNCTION.format("p_user_id uuid, p_organization_id uuid", ""),
    "triggers only guard": GOOD
    + "create function identity.meaning() returns trigger language plpgsql as 'begin return new; end';"
    + "create trigger meaning before insert on identity.broken for each row execute function identity.meaning();",
    "nothing depends on advisory locks, notifications or sequences": "create function identity.broken() returns void "
    "language plpgsql as 'begin perform pg_advisory_xact_lock(1); end';",
    "there are no floats, and every instant has its zone": "create table identity.broken (x double precision);",
    "amounts are bigint": "create table identity.broken (amount_micros numeric);",
    "nothing lives in public, and no extension is needed": "reset role; create table public.broken (x integer);",
    "no role gets round row-level security or is a member of another": "",
}


async def faults(conn: db.Connection, rule: str) -> list[str]:
    rows = await (await conn.execute(RULES[rule])).fetchall()
    return sorted({row[0] for row in rows})


@pytest.mark.parametrize("rule", RULES)
async def test_the_schema_keeps_its_rules(database: db.Database, rule: str) -> None:
    async with await psycopg.AsyncConnection.connect(database.dsn("admin")) as conn:
        assert await faults(conn, rule) == []


@pytest.mark.parametrize("rule", [rule for rule, breaker in BREAKERS.items() if breaker])
async def test_the_rule_finds_what_breaks_it(database: db.Database, rule: str) -> None:
    async with await psycopg.AsyncConnection.connect(database.dsn("admin")) as conn:
        await conn.execute("set local role bursar_owner")
        await conn.execute(BREAKERS[rule])
        assert await faults(conn, rule) != []
        await conn.rollback()


def test_every_rule_has_a_breaker() -> None:
    assert BREAKERS.keys() == RULES.keys()


async def test_every_global_table_exists(database: db.Database) -> None:
    async with await psycopg.AsyncConnection.connect(database.dsn("admin")) as conn:
        rows = await (
            await conn.execute("select name, to_regclass(name) from unnest(%s::text[]) name", [[*GLOBAL_TABLES]])
        ).fetchall()
        assert [name for name, found in rows if found is None] == []


async def test_the_application_cannot_reach_route_or_another_organization_whatever_it_runs(
    database: db.Database,
) -> None:
    async with database.untenanted() as conn:
        for table in ("route.users", "route.api_keys", "db.installation"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                async with conn.transaction():
                    await conn.execute(f"select * from {table}")
        tables = await db.fetch_value(
            conn,
            """
            select array_agg(c.oid::regclass::text) from pg_class c where relkind in ('r', 'p') and relrowsecurity
            and has_table_privilege(c.oid, 'select')
            """,
        )
        for table in tables:
            assert await db.fetch_value(conn, f"select count(*) from {table}") == 0
