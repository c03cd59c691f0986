-- What was so at any past instant: what corrections took back from grants, and what limits and shares were before they were changed.
set local lock_timeout = '5s';

create table credits.unburns (
    organization_id uuid not null,
    pool_id uuid not null,
    taken_back_at timestamptz not null,
    start_micros bigint not null,
    end_micros bigint not null,
    grant_id uuid not null,
    poured_at timestamptz not null,
    constraint unburns_pkey primary key (organization_id, pool_id, taken_back_at, start_micros),
    constraint unburns_grant foreign key (organization_id, grant_id) references credits.grants,
    constraint unburns_forward check (end_micros > start_micros and start_micros >= 0),
    constraint unburns_were_poured check (poured_at < taken_back_at)
);
comment on table credits.unburns is 'Stretches of a pool''s running total that a grant had paid until a correction took the use back; before that they were burns';
comment on column credits.unburns.organization_id is 'Tenant';
comment on column credits.unburns.pool_id is 'The pool';
comment on column credits.unburns.taken_back_at is 'When they returned to the grant';
comment on column credits.unburns.start_micros is 'Running total where the stretch began';
comment on column credits.unburns.end_micros is 'Running total where it ended';
comment on column credits.unburns.grant_id is 'The grant that had paid it';
comment on column credits.unburns.poured_at is 'When it had been poured';
call tenancy.protect('credits.unburns', 'select', 'select, insert');
call tenancy.append_only('credits.unburns');

create table credits.limit_changes (
    organization_id uuid not null,
    limit_id uuid not null,
    nr integer not null,
    changed_at timestamptz not null,
    amount bigint,
    action text not null,
    is_strict boolean not null,
    changed_by uuid,
    constraint limit_changes_pkey primary key (organization_id, limit_id, nr),
    constraint limit_changes_limit foreign key (organization_id, limit_id) references credits.limits,
    constraint limit_changes_counted check (nr > 0)
);
comment on table credits.limit_changes is 'What each limit was set to and when; the last row is what it is. When it was lifted is in the limit itself';
comment on column credits.limit_changes.organization_id is 'Tenant';
comment on column credits.limit_changes.limit_id is 'The limit';
comment on column credits.limit_changes.nr is '1 when it was made, one more with each change';
comment on column credits.limit_changes.changed_at is 'When, by the database''s clock under the gate';
comment on column credits.limit_changes.amount is 'How much per period from then on; null: no limit, in place of a default';
comment on column credits.limit_changes.action is 'stops, asks or warns';
comment on column credits.limit_changes.is_strict is 'Whether holds may be no guesses';
comment on column credits.limit_changes.changed_by is 'Who set it; null: the operator or the system';
call tenancy.protect('credits.limit_changes', 'select', 'select, insert');
call tenancy.append_only('credits.limit_changes');

create table credits.share_changes (
    organization_id uuid not null,
    allocation_id uuid not null,
    nr integer not null,
    changed_at timestamptz not null,
    amount_micros bigint not null,
    limit_micros bigint not null,
    when_empty text not null,
    carry_micros bigint not null,
    changed_by uuid,
    constraint share_changes_pkey primary key (organization_id, allocation_id, nr),
    constraint share_changes_allocation foreign key (organization_id, allocation_id) references credits.allocations,
    constraint share_changes_counted check (nr > 0)
);
comment on table credits.share_changes is 'What each share was set to and when, by people, other shares and refunds; renewals are in allocation_periods, its end in the share itself';
comment on column credits.share_changes.organization_id is 'Tenant';
comment on column credits.share_changes.allocation_id is 'The share';
comment on column credits.share_changes.nr is '1 when it was made, one more with each change';
comment on column credits.share_changes.changed_at is 'When, by the database''s clock under the gate';
comment on column credits.share_changes.amount_micros is 'Its size from then on';
comment on column credits.share_changes.limit_micros is 'All that it could have used by then: of a reserved share its size, what refunds brought back, and what its period began with';
comment on column credits.share_changes.when_empty is 'stops or open_part';
comment on column credits.share_changes.carry_micros is 'What it keeps at most when it is renewed';
comment on column credits.share_changes.changed_by is 'Who set it; null: the operator, another share or a refund';
call tenancy.protect('credits.share_changes', 'select', 'select, insert');
call tenancy.append_only('credits.share_changes');

-- What was set before this was kept is taken to have been so from its beginning.
insert into credits.limit_changes (organization_id, limit_id, nr, changed_at, amount, action, is_strict, changed_by)
select organization_id, limit_id, 1, created_at, amount, action, is_strict, created_by from credits.limits;
insert into credits.share_changes (organization_id, allocation_id, nr, changed_at, amount_micros, limit_micros, when_empty, carry_micros, changed_by)
select a.organization_id, a.allocation_id, 1, a.created_at, a.amount_micros, greatest(0, a.amount_micros + a.refunded_micros + coalesce((
        select p.opening_micros + p.carried_micros + p.adjusted_micros from credits.allocation_periods p
        where p.organization_id = a.organization_id and p.allocation_id = a.allocation_id order by p.period_start desc limit 1), 0)),
    a.when_empty, a.carry_micros, a.created_by
from credits.allocations a;
