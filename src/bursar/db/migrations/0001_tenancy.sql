-- The ground: one schema per capability, the routing schema, and the one place that says how a tenant table is protected.
set local lock_timeout = '5s';

create schema tenancy;
comment on schema tenancy is 'How tables are kept apart by organization: protect() and the routing helpers';
create schema route;
comment on schema route is 'Global uniqueness and lookups across organizations; read only by definer functions, granted to nobody';
create schema audit;
comment on schema audit is 'Append-only record of who did what';
create schema identity;
comment on schema identity is 'Organizations, people, teams, keys and sessions';
create schema pricing;
comment on schema pricing is 'The price book: what a model costs and since when';
create schema ledger;
comment on schema ledger is 'Append-only entries and attribution: every movement of credits';
create schema credits;
comment on schema credits is 'Pools, grants, limits, holds and the functions that move credits';
create schema gateway;
comment on schema gateway is 'Providers, provider keys and model aliases of the request path';
create schema reporting;
comment on schema reporting is 'Views under the names that analysts know';

grant usage on schema tenancy, audit, identity, pricing, ledger, credits, gateway, reporting to bursar_app, bursar_platform, bursar_money, bursar_backup;
grant usage on schema route, identity, audit, pricing, credits to bursar_lane, bursar_simulator;
grant usage on schema route to bursar_app, bursar_platform, bursar_money;

-- protect: force row-level security on a tenant table and give each role exactly what it may do there.
-- p_app: what bursar_app may do to rows of the organization that is set ('select', 'select, insert, update' ...; '' for nothing).
-- p_money: what the money functions may do to rows of any organization.
create procedure tenancy.protect(p_table regclass, p_app text, p_money text default '')
language plpgsql as $$
begin
    execute format('alter table %s enable row level security', p_table);
    execute format('alter table %s force row level security', p_table);
    execute format(
        'create policy own_organization on %s for all to bursar_app '
        'using (organization_id = (select nullif(current_setting(''app.organization_id'', true), '''')::uuid)) '
        'with check (organization_id = (select nullif(current_setting(''app.organization_id'', true), '''')::uuid))',
        p_table);
    execute format('create policy platform_reads on %s for select to bursar_platform, bursar_backup using (true)', p_table);
    execute format('grant select on %s to bursar_platform, bursar_backup', p_table);
    -- The owner runs the definer functions of identity and route; forced row-level security binds it too.
    execute format('create policy owner_functions on %s for all to bursar_owner using (true) with check (true)', p_table);
    if p_app <> '' then
        execute format('grant %s on %s to bursar_app', p_app, p_table);
    end if;
    if p_money <> '' then
        execute format('create policy money_functions on %s for all to bursar_money using (true) with check (true)', p_table);
        execute format('grant %s on %s to bursar_money', p_money, p_table);
    end if;
end $$;
comment on procedure tenancy.protect is 'Forces row-level security on a tenant table and grants each role what it may do there';

-- append_only: rows of this table are never changed, deleted or truncated, whoever asks. Call it for each partition too.
create function tenancy.refuse_change() returns trigger language plpgsql as $$
begin
    raise exception 'rows of %.% are never changed; book a new row instead', tg_table_schema, tg_table_name
        using errcode = 'BR409';
end $$;
comment on function tenancy.refuse_change is 'Trigger function of append-only tables';

create procedure tenancy.append_only(p_table regclass)
language plpgsql as $$
begin
    -- A partition has its parent's row trigger already; that for truncate each needs for itself.
    if not exists (select from pg_catalog.pg_trigger where tgrelid = p_table and tgname = 'append_only') then
        execute format('create trigger append_only before update or delete on %s for each row execute function tenancy.refuse_change()', p_table);
    end if;
    execute format('create trigger append_only_truncate before truncate on %s for each statement execute function tenancy.refuse_change()', p_table);
end $$;
comment on procedure tenancy.append_only is 'Guards a table against update, delete and truncate';
