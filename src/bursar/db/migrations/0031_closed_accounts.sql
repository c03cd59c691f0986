-- What a request was charged in a pool before that closed counts among what it may use there, and what is owed to a closed pool, or by it, stays noted
-- until it is paid.
set local lock_timeout = '5s';

create table credits.closed_accounts (
    organization_id uuid not null,
    pool_id uuid not null,
    to_pool_id uuid not null,
    rest_micros bigint not null,
    is_due boolean not null default false,
    constraint closed_accounts_pkey primary key (organization_id, pool_id, to_pool_id)
);
comment on table credits.closed_accounts is 'What closed pools owe and are owed, by where their members spend now, until it is paid';
comment on column credits.closed_accounts.organization_id is 'Tenant';
comment on column credits.closed_accounts.pool_id is 'The closed pool';
comment on column credits.closed_accounts.to_pool_id is 'Where a member of it spends now';
comment on column credits.closed_accounts.rest_micros is 'What that pool is still to get; negative: what it owes the closed one';
comment on column credits.closed_accounts.is_due is 'Whether credits have come that may settle it: with the next movement';
call tenancy.protect('credits.closed_accounts', 'select', 'select, insert, update, delete');

comment on table credits.sweeps is 'Open holds on a pool that closed; a row goes when its hold has ended, and what it leaves or owes is noted in closed_accounts';
comment on column credits.sweeps.kept_micros is 'What it may use there: what it was charged there already and what it held when the pool closed';
comment on column credits.sweeps.to_pool_id is 'The pool that gets what it leaves, or pays for what it used beyond';

update credits.sweeps w set kept_micros = w.kept_micros
    + coalesce((select sum(a.charged_micros) from ledger.attribution a
        where a.organization_id = w.organization_id and a.request_id = w.request_id and a.pool_id = w.pool_id), 0)
    - coalesce((select sum(t.charged_micros) from ledger.attribution_takes t
        join ledger.attribution a on a.organization_id = t.organization_id and a.request_id = t.request_id and a.booked_at = t.booked_at
        where t.organization_id = w.organization_id and t.request_id = w.request_id and a.pool_id = w.pool_id), 0)
    + coalesce((select sum(t.charged_micros) from ledger.attribution_takes t
        where t.organization_id = w.organization_id and t.request_id = w.request_id and t.pool_id = w.pool_id), 0)
where exists (select from credits.holds h where h.organization_id = w.organization_id and h.request_id = w.request_id);

-- Their results or arguments are others now.
drop function if exists credits.pass_on(uuid, uuid, uuid, bigint, timestamptz);
drop function if exists credits.draws_of(uuid, uuid);
drop function if exists credits.watch_charge(uuid, uuid, uuid, uuid, bigint, timestamptz);
