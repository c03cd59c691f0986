-- Limits in full: cycles of a subscription, defaults that everybody inherits, limits that may be asked about, raises for a time,
-- and reserved shares that are renewed.
set local lock_timeout = '5s';

-- ---------------------------------------------------------------------------------------------- cycles and events

alter table credits.gates add column anchored_at timestamptz;
alter table credits.gates add column next_limit_event_at timestamptz not null default 'infinity';
alter table credits.gates add constraint gates_anchor_finite check (isfinite(anchored_at));
comment on column credits.gates.anchored_at is 'When the subscription began: cycles begin at its day and time of each month; null: when the organization was made';
comment on column credits.gates.next_limit_event_at is 'Earliest instant at which a raise starts or ends or a reserved share is renewed';
comment on column credits.gates.next_event_at is 'Earliest time event of the organization: a grant starts or expires, or next_limit_event_at';

drop function if exists credits.period_start(text, text, timestamptz);
drop function if exists credits.period_end(text, text, timestamptz);
drop function if exists credits.open_period(uuid, uuid, text, boolean, bigint, text, text, timestamptz);

-- ---------------------------------------------------------------------------------------------- limits

alter table credits.limits add column is_default boolean not null default false;
alter table credits.limits add column within_scope text;
alter table credits.limits add column within_id uuid;
alter table credits.limits add column balance_id uuid;
update credits.limits set balance_id = limit_id;
alter table credits.limits alter column amount drop not null;
alter table credits.limits drop constraint limits_scope_id_fits;
alter table credits.limits add constraint limits_scope_id_fits check ((scope = 'organization' or is_default) = (scope_id is null));
alter table credits.limits add constraint limits_default_fits check (not is_default or scope <> 'organization');
alter table credits.limits add constraint limits_within_fits check (
    (within_scope is null) = (within_id is null)
    and (within_scope is null or (is_default and (scope in ('user', 'key') and within_scope in ('team', 'department')
                                                  or scope = 'team' and within_scope = 'department'))));
alter table credits.limits add constraint limits_none_lifts_a_default check (amount is not null or scope_id is not null or within_id is not null);
alter table credits.limits add constraint limits_balance_fits check (is_default = (balance_id is null));
alter table credits.limits drop constraint limits_period_known;
alter table credits.limits add constraint limits_period_known check (period in ('none', 'day', 'week', 'month', 'cycle'));
alter table credits.limits drop constraint limits_action_known;
alter table credits.limits add constraint limits_action_known check (action in ('stops', 'warns', 'asks'));
alter table credits.limits drop constraint limits_strict_fits;
alter table credits.limits add constraint limits_strict_fits check (not is_strict or (action <> 'warns' and metric <> 'calls' and amount is not null));
comment on column credits.limits.limit_id is 'Identity';
comment on column credits.limits.scope is 'Whose spending it limits: organization, department, team, user, key; of a default each of these';
comment on column credits.limits.scope_id is 'Which department, team, user or key; null for the organization, and for a default';
comment on column credits.limits.period is 'none (for ever), day, week (from Monday), month, in the organization''s zone; cycle: month of the subscription';
comment on column credits.limits.amount is 'How much per period: micros for credits, else a count; null: no limit, where a default would apply';
comment on column credits.limits.action is 'stops: refuses beyond; asks: the same, but a raise may be asked for; warns: counts only';
comment on column credits.limits.is_default is 'It is for each one that has no limit of its own with the same scope, metric, period, filter and kind of action';
comment on column credits.limits.within_scope is 'A default for those of one team or department alone: team, department; null: for everybody';
comment on column credits.limits.within_id is 'Which team or department';
comment on column credits.limits.balance_id is 'Identity of its balances: its own id, or the counter''s where a default had counted before; null for a default';
drop index credits.limits_one_each;
create unique index limits_one_each on credits.limits
    (organization_id, scope, (coalesce(scope_id, within_id, '00000000-0000-0000-0000-000000000000'::uuid)), is_default, metric, period,
     (coalesce(model_filter, '')), (action = 'warns'))
    where ended_at is null;

create index limits_by_balance on credits.limits (organization_id, balance_id);

drop function if exists credits.set_limit(uuid, uuid, text, uuid, text, text, text, bigint, text, uuid, timestamptz, boolean);

create table credits.counters (
    organization_id uuid not null,
    balance_id uuid not null,
    scope text not null,
    subject_id uuid not null,
    metric text not null,
    model_filter text,
    period text not null,
    stops boolean not null,
    limit_id uuid not null,
    created_at timestamptz not null,
    constraint counters_pkey primary key (organization_id, balance_id),
    constraint counters_scope_known check (scope in ('department', 'team', 'user', 'key')),
    constraint counters_limit foreign key (organization_id, limit_id) references credits.limits
);
comment on table credits.counters is 'What a default counts for one user, key, team or department; made when that one first spends under it';
comment on column credits.counters.organization_id is 'Tenant';
comment on column credits.counters.balance_id is 'Identity of its balances; also of a limit of its own that takes the default''s place';
comment on column credits.counters.scope is 'Whose spending it counts: department, team, user, key';
comment on column credits.counters.subject_id is 'Which one; of a key the one that it is a rotation of';
comment on column credits.counters.metric is 'As in its limits';
comment on column credits.counters.model_filter is 'As in its limits';
comment on column credits.counters.period is 'As in its limits';
comment on column credits.counters.stops is 'Whether its limits stop (or ask), or warn only';
comment on column credits.counters.limit_id is 'The default that it counted for last';
comment on column credits.counters.created_at is 'Since when it counts';
create unique index counters_one_each on credits.counters
    (organization_id, scope, subject_id, metric, period, (coalesce(model_filter, '')), stops);
call tenancy.protect('credits.counters', 'select', 'select, insert, update');

-- ---------------------------------------------------------------------------------------------- asking for more

create table credits.limit_requests (
    organization_id uuid not null,
    limit_request_id uuid not null,
    balance_id uuid not null,
    limit_id uuid not null,
    user_id uuid not null,
    amount bigint not null,
    until_at timestamptz not null,
    reason text not null,
    created_at timestamptz not null,
    lapses_at timestamptz not null,
    state text not null default 'open',
    decided_at timestamptz,
    decided_by uuid,
    note text,
    constraint limit_requests_pkey primary key (organization_id, limit_request_id),
    constraint limit_requests_amount check (amount > 0),
    constraint limit_requests_reason_length check (length(reason) between 1 and 1000),
    constraint limit_requests_state_known check (state in ('open', 'approved', 'denied')),
    constraint limit_requests_decided_dated check ((state = 'open') = (decided_at is null))
);
comment on table credits.limit_requests is 'Members ask for more than a limit gives, for a time';
comment on column credits.limit_requests.organization_id is 'Tenant';
comment on column credits.limit_requests.limit_request_id is 'Identity';
comment on column credits.limit_requests.balance_id is 'The balance that shall be raised';
comment on column credits.limit_requests.limit_id is 'The limit that it was counted under when it was asked';
comment on column credits.limit_requests.user_id is 'Who asks';
comment on column credits.limit_requests.amount is 'How much on top: micros for credits, else a count';
comment on column credits.limit_requests.until_at is 'Until when';
comment on column credits.limit_requests.reason is 'Why, in words';
comment on column credits.limit_requests.created_at is 'When it was asked';
comment on column credits.limit_requests.lapses_at is 'From then on it cannot be decided any more';
comment on column credits.limit_requests.state is 'open, approved, denied; an open one that has lapsed is nothing any more';
comment on column credits.limit_requests.decided_at is 'When it was decided';
comment on column credits.limit_requests.decided_by is 'Who decided; null: the operator';
comment on column credits.limit_requests.note is 'What they said to it';
create unique index limit_requests_one_open on credits.limit_requests (organization_id, balance_id, user_id) where state = 'open';
call tenancy.protect('credits.limit_requests', 'select', 'select, insert, update');

create table credits.raises (
    organization_id uuid not null,
    raise_id uuid not null,
    balance_id uuid not null,
    limit_id uuid not null,
    limit_request_id uuid,
    amount bigint not null,
    starts_at timestamptz not null,
    ends_at timestamptz not null,
    state text not null default 'scheduled',
    reason text,
    created_at timestamptz not null,
    created_by uuid,
    ended_at timestamptz,
    constraint raises_pkey primary key (organization_id, raise_id),
    constraint raises_amount check (amount > 0),
    constraint raises_end_after_start check (ends_at > starts_at),
    constraint raises_state_known check (state in ('scheduled', 'active', 'ended')),
    constraint raises_request foreign key (organization_id, limit_request_id) references credits.limit_requests
);
comment on table credits.raises is 'What is granted on top of a limit for a time; its amount and time never change, and it ends by itself or is ended before';
comment on column credits.raises.organization_id is 'Tenant';
comment on column credits.raises.raise_id is 'Identity';
comment on column credits.raises.balance_id is 'The balance whose limit it raises, in every period that it reaches into';
comment on column credits.raises.limit_id is 'The limit that was counted there when it was given';
comment on column credits.raises.limit_request_id is 'The request that it answers; null: given unasked';
comment on column credits.raises.amount is 'On top of the limit: micros for credits, else a count';
comment on column credits.raises.starts_at is 'From this instant';
comment on column credits.raises.ends_at is 'Before this instant';
comment on column credits.raises.state is 'As the balance has it: scheduled, active (contained in its limit), ended; follows time when credits are next moved';
comment on column credits.raises.reason is 'Why, in words';
comment on column credits.raises.created_at is 'When it was given';
comment on column credits.raises.created_by is 'Who gave it; null: the operator';
comment on column credits.raises.ended_at is 'When somebody ended it before its time';
create index raises_running on credits.raises (organization_id, balance_id) where state <> 'ended';
call tenancy.protect('credits.raises', 'select', 'select, insert, update');

-- ---------------------------------------------------------------------------------------------- shares that are renewed

alter table credits.allocations drop constraint allocations_reserved_is_a_lump;
alter table credits.allocations drop constraint allocations_period_known;
alter table credits.allocations add constraint allocations_period_known check (period in ('none', 'day', 'week', 'month', 'cycle'));
alter table credits.allocations add column carry_micros bigint not null default 0;
alter table credits.allocations add column renews_at timestamptz not null default 'infinity';
alter table credits.allocations add constraint allocations_carry_fits check (carry_micros >= 0 and (carry_micros = 0 or (kind = 'reserved' and period <> 'none')));
alter table credits.allocations add constraint allocations_renewal_fits check (renews_at = 'infinity' or (kind = 'reserved' and period <> 'none' and ended_at is null));
comment on column credits.allocations.period is 'none: once; day, week, month in the organization''s zone; cycle: month of the subscription';
comment on column credits.allocations.carry_micros is 'Of what a reserved share has left when it is renewed, at most this much stays in it; the rest lapses';
comment on column credits.allocations.renews_at is 'When a reserved share with a period is renewed; infinity for every other';
create index allocations_by_renewal on credits.allocations (organization_id, renews_at) where renews_at < 'infinity';
drop function if exists credits.allocate(uuid, uuid, uuid, uuid, text, text, bigint, text, boolean, uuid, text, timestamptz);

create table credits.allocation_periods (
    organization_id uuid not null,
    allocation_id uuid not null,
    period_start timestamptz not null,
    period_end timestamptz not null,
    opening_micros bigint not null,
    carried_micros bigint not null default 0,
    lapsed_micros bigint not null default 0,
    adjusted_micros bigint not null default 0,
    constraint allocation_periods_pkey primary key (organization_id, allocation_id, period_start),
    constraint allocation_periods_allocation foreign key (organization_id, allocation_id) references credits.allocations,
    constraint allocation_periods_amounts check (opening_micros >= 0 and carried_micros >= 0 and lapsed_micros >= 0),
    constraint allocation_periods_forward check (period_end > period_start)
);
comment on table credits.allocation_periods is 'The renewals of reserved shares: what each period began with. The share''s limit is opening + its size + carried + adjusted';
comment on column credits.allocation_periods.organization_id is 'Tenant';
comment on column credits.allocation_periods.allocation_id is 'The share';
comment on column credits.allocation_periods.period_start is 'The instant of the renewal, or when the share was made';
comment on column credits.allocation_periods.period_end is 'When it is renewed next, fixed when the period began';
comment on column credits.allocation_periods.opening_micros is 'What the share had used and held when the period began';
comment on column credits.allocation_periods.carried_micros is 'Left over from before, and kept';
comment on column credits.allocation_periods.lapsed_micros is 'Left over from before, and returned to the open part; of periods that nobody used in between, too';
comment on column credits.allocation_periods.adjusted_micros is 'Given from other shares in this period, less what was given to others or taken back';
call tenancy.protect('credits.allocation_periods', 'select', 'select, insert, update');
