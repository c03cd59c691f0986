-- What the credits engine books beyond grants and charges: transfers, refunds, roll-over, recurrence, and the money value of what is burnt.
set local lock_timeout = '5s';

-- ---------------------------------------------------------------------------------------------- ledger

alter table ledger.entries
    add column from_grant_id uuid,
    add column value_nano_usd bigint not null default 0,
    drop constraint entries_kind_known,
    add constraint entries_kind_known check (kind in ('grant', 'expiry', 'void', 'roll_over', 'transfer', 'transfer_in', 'transfer_out',
        'adjustment', 'refund', 'forgiveness'));
comment on column ledger.entries.kind is
    'What moved: grant, expiry, void, roll_over, transfer, transfer_in, transfer_out, adjustment, refund, forgiveness';
comment on column ledger.entries.from_kind is
    'Account that gives: issuance, pool, expired, voided, other_organization, usage (from_id: the request), grant (inside its pool)';
comment on column ledger.entries.grant_id is 'The grant that moved; of a transfer or roll-over the one that came of it';
comment on column ledger.entries.from_grant_id is 'The grant that a transferred or rolled over one came from';
comment on column ledger.entries.value_nano_usd is 'Money paid for what moved, nano-dollars: its part of the grant''s cost basis';
create index entries_of_requests on ledger.entries (organization_id, from_id) where from_kind = 'usage';

alter table ledger.attribution
    drop constraint attribution_charge_or_correction,
    drop constraint attribution_pool_where_charged,
    add constraint attribution_charge_or_correction check (kind = 1 or (kind = 2) = (charged_micros < 0)),
    add constraint attribution_pool_where_charged check (charged_micros = 0 or (pool_id is null) = (kind = 2));
comment on column ledger.attribution.kind is
    '0 charge, 1 correction of an earlier row of the same request, 2 refund: what came back to grants is in the entries from usage of the request';

-- ---------------------------------------------------------------------------------------------- grants

alter table credits.grants
    add column min_rollover_micros bigint,
    add column max_rollover_micros bigint,
    add column rollover_expires_at timestamptz not null default 'infinity',
    add column schedule_id uuid,
    add constraint grants_rollover_bounds check ((min_rollover_micros is null) = (max_rollover_micros is null)
        and min_rollover_micros >= 0 and max_rollover_micros >= min_rollover_micros),
    drop constraint grants_source_known,
    add constraint grants_source_known check (source in ('purchase', 'plan', 'complimentary', 'code', 'roll_over', 'adjustment',
        'credit_line', 'transfer', 'opening', 'top_up', 'forgiveness', 'refund'));
comment on column credits.grants.source is
    'purchase, plan, complimentary, code, roll_over, adjustment, credit_line, transfer, opening, top_up, forgiveness, refund';
comment on column credits.grants.min_rollover_micros is 'At its end at least this much goes on, made up where less is left; null: nothing rolls over';
comment on column credits.grants.max_rollover_micros is 'At its end at most this much goes on; the rest expires';
comment on column credits.grants.rollover_expires_at is 'Until when what goes on can be spent';
comment on column credits.grants.schedule_id is 'The schedule that it is an occurrence of';

alter table credits.grant_states
    add column lapsed_micros bigint not null default 0,
    add column value_left_nano_usd bigint not null default 0,
    drop constraint grant_states_known,
    add constraint grant_states_known check (state in ('scheduled', 'active', 'lingering', 'spent', 'ended')),
    drop constraint grant_states_left,
    add constraint grant_states_left check (left_micros >= 0 and lapsed_micros >= 0 and value_left_nano_usd >= 0);
comment on column credits.grant_states.state is
    'scheduled (not yet effective), active, lingering (expired, but still covers holds placed before), spent (burnt up, but makes up a least roll-over at its end), ended';
comment on column credits.grant_states.lapsed_micros is 'What it had left at its end, expired or rolled over; bounds of a roll-over go by it';
comment on column credits.grant_states.value_left_nano_usd is 'Money paid for it that nothing it lost has taken along yet, nano-dollars; 0 of a complimentary one';

alter table credits.burns
    add column grant_from_micros bigint not null default 0,
    add column value_nano_usd bigint not null default 0,
    add column reason text not null default 'unknown',
    add constraint burns_reason_known check (reason in ('priority', 'expiry', 'free_before_paid', 'effective', 'created', 'id', 'only', 'unknown'));
comment on column credits.burns.grant_from_micros is 'How much of the grant was gone before';
comment on column credits.burns.value_nano_usd is 'Money paid for this stretch: its revenue, nano-dollars';
comment on column credits.burns.reason is
    'Why it burnt before the next grant there was: priority, expiry, free_before_paid, effective, created, id; only: there was no other; unknown: before this was kept';

-- The value of what was burnt before: the first micros of a grant, in the order in which they were burnt.
with sums as (
    select b.organization_id, b.pool_id, b.start_micros, b.end_micros - b.start_micros as micros, g.amount_micros,
        case when g.is_free then 0 else g.cost_basis_nano_usd end as basis,
        sum(b.end_micros - b.start_micros) over (partition by b.organization_id, b.grant_id order by b.pool_id, b.start_micros) as upto
    from credits.burns b join credits.grants g on g.organization_id = b.organization_id and g.grant_id = b.grant_id
)
update credits.burns b set grant_from_micros = s.upto - s.micros,
    value_nano_usd = floor(s.basis::numeric * s.upto / s.amount_micros) - floor(s.basis::numeric * (s.upto - s.micros) / s.amount_micros)
from sums s where b.organization_id = s.organization_id and b.pool_id = s.pool_id and b.start_micros = s.start_micros;
update credits.grant_states s set value_left_nano_usd = g.cost_basis_nano_usd - coalesce((
    select sum(b.value_nano_usd) from credits.burns b where b.organization_id = g.organization_id and b.grant_id = g.grant_id), 0)
from credits.grants g where g.organization_id = s.organization_id and g.grant_id = s.grant_id and not g.is_free;

create table credits.grant_schedules (
    organization_id uuid not null,
    schedule_id uuid not null,
    pool_id uuid not null,
    source text not null,
    amount_micros bigint not null,
    priority smallint not null default 100,
    is_free boolean not null default false,
    cost_basis_nano_usd bigint not null default 0,
    zone text not null,
    anchor_at timestamptz not null,
    unit text not null,
    every integer not null default 1,
    lasts interval,
    is_lasting boolean not null default false,
    ends_at timestamptz not null default 'infinity',
    min_rollover_micros bigint,
    max_rollover_micros bigint,
    next_number integer not null,
    next_at timestamptz not null,
    reason text,
    created_at timestamptz not null,
    created_by uuid,
    constraint grant_schedules_pkey primary key (organization_id, schedule_id),
    constraint grant_schedules_pool foreign key (organization_id, pool_id) references credits.pools,
    constraint grant_schedules_amount_positive check (amount_micros > 0),
    constraint grant_schedules_unit_known check (unit in ('day', 'week', 'month', 'year')),
    constraint grant_schedules_every check (every between 1 and 1000),
    constraint grant_schedules_rollover_bounds check ((min_rollover_micros is null) = (max_rollover_micros is null)
        and min_rollover_micros >= 0 and max_rollover_micros >= min_rollover_micros)
);
comment on table credits.grant_schedules is 'Grants that come again and again; each occurrence is a grant of its own, made at its very instant';
comment on column credits.grant_schedules.organization_id is 'Tenant';
comment on column credits.grant_schedules.schedule_id is 'Identity';
comment on column credits.grant_schedules.pool_id is 'Pool that receives its grants';
comment on column credits.grant_schedules.source is 'Source of its grants';
comment on column credits.grant_schedules.amount_micros is 'Micros of each grant';
comment on column credits.grant_schedules.priority is 'Priority of each grant';
comment on column credits.grant_schedules.is_free is 'Whether its grants are complimentary';
comment on column credits.grant_schedules.cost_basis_nano_usd is 'Money paid for each grant, nano-dollars';
comment on column credits.grant_schedules.zone is 'Time zone by whose clocks occurrences are counted';
comment on column credits.grant_schedules.anchor_at is 'The occurrence with number 0; every other is counted from its local date and time, so that none drifts';
comment on column credits.grant_schedules.unit is 'day, week, month, year';
comment on column credits.grant_schedules.every is 'How many units lie between two occurrences';
comment on column credits.grant_schedules.lasts is 'How long each grant can be spent; null: until the next occurrence';
comment on column credits.grant_schedules.is_lasting is 'Its grants never expire';
comment on column credits.grant_schedules.ends_at is 'No occurrence at or after this instant: its end date, or when it was canceled';
comment on column credits.grant_schedules.min_rollover_micros is 'Bound of each grant';
comment on column credits.grant_schedules.max_rollover_micros is 'Bound of each grant';
comment on column credits.grant_schedules.next_number is 'Number of the occurrence to come';
comment on column credits.grant_schedules.next_at is 'Its instant; infinity: there is none';
comment on column credits.grant_schedules.reason is 'Why, in words';
comment on column credits.grant_schedules.created_at is 'When it was made';
comment on column credits.grant_schedules.created_by is 'Who made it; null: the system';
create index grant_schedules_awaited on credits.grant_schedules (organization_id, pool_id, next_at) where next_at < 'infinity';
call tenancy.protect('credits.grant_schedules', 'select', 'select, insert, update');

-- ---------------------------------------------------------------------------------------------- shares and closed pools

alter table credits.allocations
    add column refunded_micros bigint not null default 0,
    add constraint allocations_refunded check (refunded_micros >= 0);
comment on column credits.allocations.refunded_micros is 'What refunds gave back to a reserved share: its balance''s limit is its size and this';

create table credits.sweeps (
    organization_id uuid not null,
    pool_id uuid not null,
    request_id uuid not null,
    kept_micros bigint not null,
    to_pool_id uuid not null,
    constraint sweeps_pkey primary key (organization_id, pool_id, request_id)
);
comment on table credits.sweeps is 'Open holds on a pool that closed: where goes what each does not use; a row goes when its hold has ended';
comment on column credits.sweeps.organization_id is 'Tenant';
comment on column credits.sweeps.pool_id is 'The closed pool';
comment on column credits.sweeps.request_id is 'The request that holds credits of it';
comment on column credits.sweeps.kept_micros is 'What it held there when the pool closed';
comment on column credits.sweeps.to_pool_id is 'The pool that gets what it frees';
call tenancy.protect('credits.sweeps', 'select', 'select, insert, update, delete');

-- It has arguments more now.
drop function if exists credits.add_grant(uuid, uuid, uuid, text, bigint, smallint, boolean, bigint, timestamptz, timestamptz, text, uuid, text, timestamptz);
