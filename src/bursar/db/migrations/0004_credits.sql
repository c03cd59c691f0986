-- The treasury: append-only ledger and attribution, and the balances, grants, limits and holds that move credits.
set local lock_timeout = '5s';

-- ---------------------------------------------------------------------------------------------- ledger

create table ledger.entries (
    organization_id uuid not null,
    entry_id uuid not null,
    booked_at timestamptz not null,
    happened_at timestamptz not null,
    kind text not null,
    unit text not null default 'credit',
    from_kind text not null,
    from_id uuid,
    to_kind text not null,
    to_id uuid,
    amount bigint not null,
    grant_id uuid,
    actor_id uuid,
    reason text,
    idempotency_key text,
    constraint entries_pkey primary key (organization_id, entry_id),
    constraint entries_amount_positive check (amount > 0),
    constraint entries_kind_known check (kind in ('grant', 'expiry', 'void', 'roll_over', 'transfer_in', 'transfer_out', 'adjustment')),
    constraint entries_two_accounts check ((from_kind, from_id) is distinct from (to_kind, to_id))
);
comment on table ledger.entries is 'Every movement of credits but usage: one immutable line from one account to another; usage is ledger.attribution';
comment on column ledger.entries.organization_id is 'Tenant';
comment on column ledger.entries.entry_id is 'Identity of the line';
comment on column ledger.entries.booked_at is 'When it was written, by the database''s clock under the gate';
comment on column ledger.entries.happened_at is 'The instant it takes effect: an expiry''s own instant, however late it was booked';
comment on column ledger.entries.kind is 'What moved: grant, expiry, void, roll_over, transfer_in, transfer_out, adjustment';
comment on column ledger.entries.unit is 'credit: amount is in micros; later units (seats) count whole things';
comment on column ledger.entries.from_kind is 'Account that gives: issuance, pool, expired, voided, other_organization';
comment on column ledger.entries.from_id is 'Id of the giving account where its kind has many';
comment on column ledger.entries.to_kind is 'Account that takes';
comment on column ledger.entries.to_id is 'Id of the taking account where its kind has many';
comment on column ledger.entries.amount is 'Always positive; micros for credits';
comment on column ledger.entries.grant_id is 'The grant that moved';
comment on column ledger.entries.actor_id is 'Who asked for it; null: the system';
comment on column ledger.entries.reason is 'Why, in words';
comment on column ledger.entries.idempotency_key is 'Key of the command that booked it';
create index entries_by_time on ledger.entries (organization_id, booked_at desc);
call tenancy.protect('ledger.entries', 'select', 'select, insert');
call tenancy.append_only('ledger.entries');

create table ledger.attribution (
    organization_id uuid not null,
    request_id uuid not null,
    booked_at timestamptz not null,
    used_at timestamptz not null,
    kind smallint not null default 0,
    user_id uuid,
    api_key_id uuid,
    provider_key_id uuid,
    provider text,
    model text,
    team_id uuid,
    department_id uuid,
    department_name text,
    conversation_id uuid,
    chain_id uuid,
    price_version_id uuid,
    pool_id uuid,
    position_micros bigint,
    charged_micros bigint not null,
    hold_micros bigint not null,
    provider_cost_nano_usd bigint not null,
    customer_cost_nano_usd bigint not null default 0,
    flags smallint not null default 0,
    input_tokens integer not null default 0,
    cache_read_tokens integer not null default 0,
    cache_write_5m_tokens integer not null default 0,
    cache_write_1h_tokens integer not null default 0,
    output_tokens integer not null default 0,
    reasoning_tokens integer not null default 0,
    audio_input_tokens integer not null default 0,
    audio_output_tokens integer not null default 0,
    image_input_tokens integer not null default 0,
    image_output_tokens integer not null default 0,
    images integer not null default 0,
    web_searches integer not null default 0,
    audio_milliseconds integer not null default 0,
    characters integer not null default 0,
    requests integer not null default 1,
    constraint attribution_pkey primary key (organization_id, request_id, booked_at),
    constraint attribution_charge_or_correction check (charged_micros >= 0 or kind = 1),
    constraint attribution_pool_where_charged check (charged_micros = 0 or pool_id is not null)
) partition by range (booked_at);
comment on table ledger.attribution is 'One immutable row per answered request: who spent what, when, on what, through which key, from which pool. It is the ledger entry of usage';
comment on column ledger.attribution.organization_id is 'Tenant';
comment on column ledger.attribution.request_id is 'UUIDv7 of the request; a correction carries the id of the request it corrects';
comment on column ledger.attribution.booked_at is 'When it was booked, by the database''s clock under the gate; partitions go by its month';
comment on column ledger.attribution.used_at is 'When it was used';
comment on column ledger.attribution.kind is '0 charge, 1 correction of an earlier row of the same request';
comment on column ledger.attribution.user_id is 'Who used it; null: a service key';
comment on column ledger.attribution.api_key_id is 'Our key it came through; null: a session';
comment on column ledger.attribution.provider_key_id is 'Key at the provider, the platform''s or the customer''s own';
comment on column ledger.attribution.provider is 'Who answered';
comment on column ledger.attribution.model is 'Model as priced';
comment on column ledger.attribution.team_id is 'Team at the time of use';
comment on column ledger.attribution.department_id is 'Department at the time of use';
comment on column ledger.attribution.department_name is 'Its name at the time of use';
comment on column ledger.attribution.conversation_id is 'Conversation, where the caller named one';
comment on column ledger.attribution.chain_id is 'The pools and limits that the request passed';
comment on column ledger.attribution.price_version_id is 'The price used';
comment on column ledger.attribution.pool_id is 'First pool that paid';
comment on column ledger.attribution.position_micros is 'Running total of that pool before this row; the grants that paid follow from it';
comment on column ledger.attribution.charged_micros is 'Charged in micros, over all pools';
comment on column ledger.attribution.hold_micros is 'What had been held for it; 0 for a deduction';
comment on column ledger.attribution.provider_cost_nano_usd is 'What the provider asks the platform, nano-dollars';
comment on column ledger.attribution.customer_cost_nano_usd is 'What it costs the customer at the provider when the key is the customer''s own';
comment on column ledger.attribution.flags is 'Bits: 2 customer''s own key, 4 estimated, 8 streamed, 64 booked by expiry, 128 late, 256 unpriced by policy';
comment on column ledger.attribution.input_tokens is 'Uncached input tokens';
comment on column ledger.attribution.cache_read_tokens is 'Input tokens read from the provider''s cache';
comment on column ledger.attribution.cache_write_5m_tokens is 'Input tokens written to a 5-minute cache';
comment on column ledger.attribution.cache_write_1h_tokens is 'Input tokens written to a 1-hour cache';
comment on column ledger.attribution.output_tokens is 'Output tokens, reasoning included';
comment on column ledger.attribution.reasoning_tokens is 'Of the output tokens, those of reasoning';
comment on column ledger.attribution.audio_input_tokens is 'Audio tokens in';
comment on column ledger.attribution.audio_output_tokens is 'Audio tokens out';
comment on column ledger.attribution.image_input_tokens is 'Image tokens in';
comment on column ledger.attribution.image_output_tokens is 'Image tokens out';
comment on column ledger.attribution.images is 'Images made';
comment on column ledger.attribution.web_searches is 'Web searches billed';
comment on column ledger.attribution.audio_milliseconds is 'Audio heard or spoken, in milliseconds';
comment on column ledger.attribution.characters is 'Characters, where a price goes by them';
comment on column ledger.attribution.requests is 'Provider calls billed';
create index attribution_by_use on ledger.attribution (organization_id, used_at desc);
call tenancy.protect('ledger.attribution', 'select', 'select, insert');
call tenancy.append_only('ledger.attribution');

create table ledger.attribution_rest partition of ledger.attribution default;
comment on table ledger.attribution_rest is 'Rows of a month whose partition does not exist yet: nothing is ever refused for want of one';
call tenancy.protect('ledger.attribution_rest', '', 'select, insert');
call tenancy.append_only('ledger.attribution_rest');

create table ledger.attribution_takes (
    organization_id uuid not null,
    request_id uuid not null,
    booked_at timestamptz not null,
    pool_id uuid not null,
    position_micros bigint not null,
    charged_micros bigint not null,
    constraint attribution_takes_pkey primary key (organization_id, request_id, booked_at, pool_id)
);
comment on table ledger.attribution_takes is 'What the second and later pools paid of a request that drew from several';
comment on column ledger.attribution_takes.organization_id is 'Tenant';
comment on column ledger.attribution_takes.request_id is 'The request';
comment on column ledger.attribution_takes.booked_at is 'As in its attribution row';
comment on column ledger.attribution_takes.pool_id is 'A further pool that paid';
comment on column ledger.attribution_takes.position_micros is 'Running total of this pool before';
comment on column ledger.attribution_takes.charged_micros is 'What this pool paid; contained in the row''s charged_micros';
call tenancy.protect('ledger.attribution_takes', 'select', 'select, insert');
call tenancy.append_only('ledger.attribution_takes');

-- ---------------------------------------------------------------------------------------------- credits

create table credits.gates (
    organization_id uuid not null,
    limits_version bigint not null default 1,
    next_event_at timestamptz not null default 'infinity',
    constraint gates_pkey primary key (organization_id)
) with (fillfactor = 50);
comment on table credits.gates is 'One row per organization; whoever moves its credits locks it first';
comment on column credits.gates.organization_id is 'Tenant';
comment on column credits.gates.limits_version is 'Grows with every change of pools, limits, allocations, keys or members; a chain of another version is rebuilt';
comment on column credits.gates.next_event_at is 'Earliest time event (a grant starts or expires) of any of its pools';
call tenancy.protect('credits.gates', 'select', 'select, insert, update');

create table credits.pools (
    organization_id uuid not null,
    pool_id uuid not null,
    kind text not null,
    owner_user_id uuid,
    name text not null,
    model_filter text,
    open_part_id uuid,
    next_event_at timestamptz not null default 'infinity',
    poured_micros bigint not null default 0,
    closed_at timestamptz,
    created_at timestamptz not null,
    constraint pools_pkey primary key (organization_id, pool_id),
    constraint pools_kind_known check (kind in ('shared', 'personal', 'individual', 'residual')),
    constraint pools_owner_fits check ((kind = 'personal') = (owner_user_id is not null)),
    -- A pattern that LIKE cannot read would fail every batch that meets it.
    constraint pools_model_filter_readable check (model_filter ~ '^([^\\]|\\.){1,200}$')
);
comment on table credits.pools is 'Balances of credits: shared by the organization, personal to one member, or an individual''s own';
comment on column credits.pools.organization_id is 'Tenant';
comment on column credits.pools.pool_id is 'Identity; also the balance_id of the pool''s balance';
comment on column credits.pools.kind is 'shared, personal (one member''s), individual (of a person without company), residual (not spendable)';
comment on column credits.pools.owner_user_id is 'Whose it is, for a personal pool';
comment on column credits.pools.name is 'What people call it';
comment on column credits.pools.model_filter is 'LIKE pattern of the models it may pay for; null: every one. Restricted pools are tried first';
comment on column credits.pools.open_part_id is 'balance_id of the part that no allocation reserves; null where nothing can be reserved';
comment on column credits.pools.next_event_at is 'When the next of its grants starts or expires; the past while an expired grant still covers open holds';
comment on column credits.pools.poured_micros is 'Up to which running total use has been poured over grants';
comment on column credits.pools.closed_at is 'Since when it takes and pays nothing';
comment on column credits.pools.created_at is 'When it was opened';
create unique index pools_one_of_a_kind on credits.pools
    (organization_id, kind, (coalesce(owner_user_id, '00000000-0000-0000-0000-000000000000'::uuid)), (coalesce(model_filter, '')))
    where closed_at is null;
call tenancy.protect('credits.pools', 'select', 'select, insert, update');

create table credits.balances (
    organization_id uuid not null,
    balance_id uuid not null,
    period_start timestamptz not null default '-infinity',
    period_end timestamptz not null default 'infinity',
    kind text not null,
    stops boolean not null default true,
    limit_amount bigint not null,
    used_amount bigint not null default 0,
    held_amount bigint not null default 0,
    excess_amount bigint not null default 0,
    constraint balances_pkey primary key (organization_id, balance_id, period_start),
    constraint balances_never_overrun check (used_amount + held_amount <= limit_amount + excess_amount),
    constraint balances_excess_exact check (excess_amount = 0 or excess_amount = used_amount + held_amount - limit_amount),
    constraint balances_nothing_negative check (held_amount >= 0 and excess_amount >= 0 and limit_amount >= 0 and used_amount >= 0),
    constraint balances_kind_known check (kind in ('pool', 'open', 'allocation', 'limit')),
    constraint balances_period_forward check (period_end > period_start)
) with (fillfactor = 40, autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_cost_delay = 0);
comment on table credits.balances is 'One kind of balance for pools, open parts, allocations and limits: what may be used, is used and is held, per period';
comment on column credits.balances.organization_id is 'Tenant';
comment on column credits.balances.balance_id is 'The pool, open part, allocation or limit it counts for';
comment on column credits.balances.period_start is 'Start of the period; -infinity where the balance has none';
comment on column credits.balances.period_end is 'End of the period, fixed when it began: a change of zone acts from here on; infinity where the balance has none';
comment on column credits.balances.kind is 'pool, open (what no allocation reserves), allocation, limit';
comment on column credits.balances.stops is 'False: over the limit only warns';
comment on column credits.balances.limit_amount is 'What may be used: micros, or a count for limits on calls or tokens';
comment on column credits.balances.used_amount is 'Settled';
comment on column credits.balances.held_amount is 'Held by open requests';
comment on column credits.balances.excess_amount is 'What was used or held beyond the limit: max(0, used + held - limit)';
call tenancy.protect('credits.balances', 'select', 'select, insert, update');

create table credits.grants (
    organization_id uuid not null,
    grant_id uuid not null,
    pool_id uuid not null,
    source text not null,
    amount_micros bigint not null,
    priority smallint not null default 100,
    is_free boolean not null default false,
    cost_basis_nano_usd bigint not null default 0,
    effective_at timestamptz not null,
    expires_at timestamptz not null default 'infinity',
    parent_grant_id uuid,
    reason text,
    created_at timestamptz not null,
    created_by uuid,
    constraint grants_pkey primary key (organization_id, grant_id),
    constraint grants_pool foreign key (organization_id, pool_id) references credits.pools,
    constraint grants_amount_positive check (amount_micros > 0),
    constraint grants_source_known check (source in
        ('purchase', 'plan', 'complimentary', 'code', 'roll_over', 'adjustment', 'credit_line', 'transfer', 'opening')),
    constraint grants_end_after_start check (expires_at > effective_at)
);
comment on table credits.grants is 'Additions of credits to a pool; immutable. Burn order: priority, soonest expiry, free before paid, effective, created, id';
comment on column credits.grants.organization_id is 'Tenant';
comment on column credits.grants.grant_id is 'Identity';
comment on column credits.grants.pool_id is 'Pool that received it';
comment on column credits.grants.source is 'purchase, plan, complimentary, code, roll_over, adjustment, credit_line, transfer, opening';
comment on column credits.grants.amount_micros is 'Micros granted';
comment on column credits.grants.priority is 'Lower burns first';
comment on column credits.grants.is_free is 'Complimentary: brings no revenue';
comment on column credits.grants.cost_basis_nano_usd is 'Money paid for the whole grant, nano-dollars';
comment on column credits.grants.effective_at is 'Spendable from this instant';
comment on column credits.grants.expires_at is 'Spendable before this instant';
comment on column credits.grants.parent_grant_id is 'The grant it rolled over or was transferred from';
comment on column credits.grants.reason is 'Why, in words';
comment on column credits.grants.created_at is 'When it was made';
comment on column credits.grants.created_by is 'Who made it; null: the system';
create index grants_by_pool on credits.grants (organization_id, pool_id);
call tenancy.protect('credits.grants', 'select', 'select, insert');
call tenancy.append_only('credits.grants');

create table credits.grant_states (
    organization_id uuid not null,
    grant_id uuid not null,
    pool_id uuid not null,
    state text not null,
    left_micros bigint not null,
    ended_at timestamptz,
    constraint grant_states_pkey primary key (organization_id, grant_id),
    constraint grant_states_grant foreign key (organization_id, grant_id) references credits.grants,
    constraint grant_states_left check (left_micros >= 0),
    constraint grant_states_known check (state in ('scheduled', 'active', 'lingering', 'ended'))
);
comment on table credits.grant_states is 'What is left of each grant as of its pool''s last pour; recomputable from grants, attribution and ledger';
comment on column credits.grant_states.organization_id is 'Tenant';
comment on column credits.grant_states.grant_id is 'The grant';
comment on column credits.grant_states.pool_id is 'Its pool';
comment on column credits.grant_states.state is 'scheduled (not yet effective), active, lingering (expired, but still covers holds placed before), ended';
comment on column credits.grant_states.left_micros is 'Not yet burnt, expired or voided';
comment on column credits.grant_states.ended_at is 'When it was burnt up, expired or voided';
create index grant_states_by_pool on credits.grant_states (organization_id, pool_id) where state <> 'ended';
call tenancy.protect('credits.grant_states', 'select', 'select, insert, update');

create table credits.burns (
    organization_id uuid not null,
    pool_id uuid not null,
    start_micros bigint not null,
    end_micros bigint not null,
    grant_id uuid not null,
    poured_at timestamptz not null,
    constraint burns_pkey primary key (organization_id, pool_id, start_micros),
    constraint burns_grant foreign key (organization_id, grant_id) references credits.grants,
    constraint burns_forward check (end_micros > start_micros)
);
comment on table credits.burns is 'Which grant paid which stretch of a pool''s running total; written when use is poured over grants';
comment on column credits.burns.organization_id is 'Tenant';
comment on column credits.burns.pool_id is 'The pool';
comment on column credits.burns.start_micros is 'Running total where the stretch begins';
comment on column credits.burns.end_micros is 'Running total where it ends';
comment on column credits.burns.grant_id is 'The grant that paid it';
comment on column credits.burns.poured_at is 'When it was poured';
call tenancy.protect('credits.burns', 'select', 'select, insert, update, delete');

create table credits.allocations (
    organization_id uuid not null,
    allocation_id uuid not null,
    pool_id uuid not null,
    user_id uuid not null,
    kind text not null,
    period text not null default 'none',
    amount_micros bigint not null,
    when_empty text not null default 'stops',
    created_at timestamptz not null,
    created_by uuid,
    ended_at timestamptz,
    constraint allocations_pkey primary key (organization_id, allocation_id),
    constraint allocations_pool foreign key (organization_id, pool_id) references credits.pools,
    constraint allocations_kind_known check (kind in ('reserved', 'capped')),
    constraint allocations_period_known check (period in ('none', 'day', 'week', 'month')),
    constraint allocations_reserved_is_a_lump check (kind = 'capped' or period = 'none'),
    constraint allocations_when_empty_known check (when_empty in ('stops', 'open_part')),
    constraint allocations_amount check (amount_micros >= 0)
);
comment on table credits.allocations is 'A user''s share of a shared pool: reserved (set aside) or capped (only limits)';
comment on column credits.allocations.organization_id is 'Tenant';
comment on column credits.allocations.allocation_id is 'Identity; also the balance_id of its balance';
comment on column credits.allocations.pool_id is 'The shared pool';
comment on column credits.allocations.user_id is 'Whose share';
comment on column credits.allocations.kind is 'reserved: nobody else can spend it; capped: an upper bound only';
comment on column credits.allocations.period is 'none: once; day, week, month in the organization''s zone (capped only)';
comment on column credits.allocations.amount_micros is 'Size of the share';
comment on column credits.allocations.when_empty is 'What happens when a reserved share is empty: stops, or open_part (goes on in the unreserved part)';
comment on column credits.allocations.created_at is 'When it was made';
comment on column credits.allocations.created_by is 'Who made it';
comment on column credits.allocations.ended_at is 'When it ended';
create unique index allocations_one_each on credits.allocations (organization_id, pool_id, user_id) where ended_at is null;
call tenancy.protect('credits.allocations', 'select', 'select, insert, update');

create table credits.limits (
    organization_id uuid not null,
    limit_id uuid not null,
    scope text not null,
    scope_id uuid,
    metric text not null default 'credits',
    model_filter text,
    period text not null default 'month',
    amount bigint not null,
    action text not null default 'stops',
    created_at timestamptz not null,
    created_by uuid,
    ended_at timestamptz,
    constraint limits_pkey primary key (organization_id, limit_id),
    constraint limits_scope_known check (scope in ('organization', 'department', 'team', 'user', 'key')),
    constraint limits_scope_id_fits check ((scope = 'organization') = (scope_id is null)),
    constraint limits_metric_known check (metric in ('credits', 'calls', 'tokens')),
    constraint limits_period_known check (period in ('none', 'day', 'week', 'month')),
    constraint limits_action_known check (action in ('stops', 'warns')),
    constraint limits_amount check (amount >= 0),
    constraint limits_model_filter_readable check (model_filter ~ '^([^\\]|\\.){1,200}$')
);
comment on table credits.limits is 'Caps and budgets of every scope; one authorize checks all that apply';
comment on column credits.limits.organization_id is 'Tenant';
comment on column credits.limits.limit_id is 'Identity; also the balance_id of its balances';
comment on column credits.limits.scope is 'Whose spending it limits: organization, department, team, user, key';
comment on column credits.limits.scope_id is 'Which department, team, user or key';
comment on column credits.limits.metric is 'credits (micros), calls or tokens';
comment on column credits.limits.model_filter is 'LIKE pattern of the models it counts; null: every one';
comment on column credits.limits.period is 'none (for ever), day, week (from Monday), month, in the organization''s zone';
comment on column credits.limits.amount is 'How much per period: micros for credits, else a count';
comment on column credits.limits.action is 'stops: refuses beyond; warns: counts only';
comment on column credits.limits.created_at is 'When it was set';
comment on column credits.limits.created_by is 'Who set it';
comment on column credits.limits.ended_at is 'When it was lifted';
create unique index limits_one_each on credits.limits
    (organization_id, scope, (coalesce(scope_id, '00000000-0000-0000-0000-000000000000'::uuid)), metric, period, (coalesce(model_filter, '')), action)
    where ended_at is null;
call tenancy.protect('credits.limits', 'select', 'select, insert, update');

create table credits.chains (
    organization_id uuid not null,
    chain_id uuid not null,
    user_id uuid not null,
    api_key_id uuid not null,
    limits_version bigint not null,
    valid_until timestamptz not null,
    team_id uuid,
    department_id uuid,
    department_name text,
    refusal text,
    leg_pool_ids uuid[] not null,
    leg_filters text[] not null,
    entry_ids uuid[] not null,
    entry_starts timestamptz[] not null,
    entry_metrics smallint[] not null,
    entry_legs smallint[] not null,
    entry_filters text[] not null,
    is_plain boolean not null,
    tight_id uuid,
    tight_start timestamptz,
    built_at timestamptz not null,
    replaced_at timestamptz,
    constraint chains_pkey primary key (organization_id, chain_id)
);
comment on table credits.chains is 'For one user and key: the pools to draw from, in order, and every balance that must allow it. Kept as the record of what a request passed';
comment on column credits.chains.organization_id is 'Tenant';
comment on column credits.chains.chain_id is 'Identity; holds and attribution name it';
comment on column credits.chains.user_id is 'The user; all zero for a service key';
comment on column credits.chains.api_key_id is 'The key; all zero for a session';
comment on column credits.chains.limits_version is 'Version of the organization''s limits it was built from';
comment on column credits.chains.valid_until is 'Next boundary of any of its periods, or the key''s expiry';
comment on column credits.chains.team_id is 'Team of the key, else of the member';
comment on column credits.chains.department_id is 'Department of the key, else of the member';
comment on column credits.chains.department_name is 'Its name then';
comment on column credits.chains.refusal is 'Why nothing may be spent at all: key_revoked, key_expired, not_a_member, organization_closed, no_pool; null: may spend';
comment on column credits.chains.leg_pool_ids is 'The ways to pay, in the order in which they are tried: one pool each';
comment on column credits.chains.leg_filters is 'LIKE pattern of the models each leg may pay for; null: every one';
comment on column credits.chains.entry_ids is 'Balances to check';
comment on column credits.chains.entry_starts is 'Their period_start';
comment on column credits.chains.entry_metrics is '0 credits, 1 calls, 2 tokens';
comment on column credits.chains.entry_legs is '0: checked always; n: only when leg n pays';
comment on column credits.chains.entry_filters is 'LIKE pattern of the models the entry counts; null: every one';
comment on column credits.chains.is_plain is 'One leg for every model, and every balance counts every model in credits: entries need no second look';
comment on column credits.chains.tight_id is 'The balance that refused it last; a hint where to look first, never the reason of a refusal';
comment on column credits.chains.tight_start is 'Its period_start';
comment on column credits.chains.built_at is 'When it was built';
comment on column credits.chains.replaced_at is 'When a newer one took its place';
create unique index chains_current on credits.chains (organization_id, user_id, api_key_id) where replaced_at is null;
-- One organization may have very many chains and most have few: told that all rows are one organization's, the planner looks a chain up
-- by the whole key and never by the organization alone.
alter table credits.chains alter column organization_id set (n_distinct = 1);
call tenancy.protect('credits.chains', 'select', 'select, insert, update');

create table credits.holds (
    organization_id uuid not null,
    request_id uuid not null,
    chain_id uuid not null,
    is_sent boolean not null default false,
    leg smallint not null,
    leg_micros bigint[],
    amount_micros bigint not null,
    tokens bigint not null default 0,
    floor_micros bigint not null default 0,
    progress_micros bigint not null default 0,
    cost_nano_usd bigint not null default 0,
    flags smallint not null default 0,
    provider text,
    model text,
    price_version_id uuid,
    provider_key_id uuid,
    conversation_id uuid,
    placed_at timestamptz not null,
    lease_expires_at timestamptz not null,
    constraint holds_pkey primary key (organization_id, request_id),
    constraint holds_amounts check (amount_micros >= 0 and tokens >= 0 and floor_micros >= 0 and progress_micros >= 0)
) with (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_cost_delay = 0);
comment on table credits.holds is 'Credits reserved for requests that are running; a row goes when its request is settled, released or expired';
comment on column credits.holds.organization_id is 'Tenant';
comment on column credits.holds.request_id is 'The request; its attribution row will bear the same id';
comment on column credits.holds.chain_id is 'What it was checked against: the balances it took from';
comment on column credits.holds.is_sent is 'The provider call went out: an expired hold is charged, not released';
comment on column credits.holds.leg is 'Leg of the chain that pays';
comment on column credits.holds.leg_micros is 'What each leg holds, where several pay; null: all of it on leg';
comment on column credits.holds.amount_micros is 'Held, in micros';
comment on column credits.holds.tokens is 'Held on token limits';
comment on column credits.holds.floor_micros is 'Cost of the input alone: least charge of a cut stream';
comment on column credits.holds.progress_micros is 'Cost of what was streamed at the last progress mark, input included';
comment on column credits.holds.cost_nano_usd is 'Provider cost that the held amount stands for';
comment on column credits.holds.flags is 'Bits as in attribution';
comment on column credits.holds.provider is 'Who is asked';
comment on column credits.holds.model is 'Model as priced';
comment on column credits.holds.price_version_id is 'Price pinned at authorize';
comment on column credits.holds.provider_key_id is 'Key at the provider';
comment on column credits.holds.conversation_id is 'Conversation, where named';
comment on column credits.holds.placed_at is 'When it was placed';
comment on column credits.holds.lease_expires_at is 'When it ends by itself unless progress renews it';
call tenancy.protect('credits.holds', 'select', 'select, insert, update, delete');

create table credits.estimates (
    organization_id uuid not null,
    request_id uuid not null,
    chain_id uuid not null,
    leg_micros bigint[] not null,
    tokens bigint not null,
    cost_nano_usd bigint not null,
    flags smallint not null,
    booked_at timestamptz not null,
    constraint estimates_pkey primary key (organization_id, request_id)
) with (fillfactor = 70);
comment on table credits.estimates is 'What expiry charged by estimate; a row goes when the true cost comes and the difference is booked';
comment on column credits.estimates.organization_id is 'Tenant';
comment on column credits.estimates.request_id is 'The request';
comment on column credits.estimates.chain_id is 'The balances it was charged to';
comment on column credits.estimates.leg_micros is 'What each leg of the chain was charged';
comment on column credits.estimates.tokens is 'Tokens counted on token limits';
comment on column credits.estimates.cost_nano_usd is 'Provider cost that the estimate stands for';
comment on column credits.estimates.flags is 'Bits as in attribution';
comment on column credits.estimates.booked_at is 'When it was charged';
call tenancy.protect('credits.estimates', 'select', 'select, insert, update, delete');

create table credits.commands (
    organization_id uuid not null,
    idempotency_key text not null,
    body_hash bytea not null,
    request_id uuid,
    outcome jsonb not null,
    answered_at timestamptz not null,
    kept_until timestamptz not null,
    constraint commands_pkey primary key (organization_id, idempotency_key),
    constraint commands_key_length check (length(idempotency_key) between 1 and 255)
);
comment on table credits.commands is 'Stored results of commands by their idempotency key: money 35 days, refusals 24 hours';
comment on column credits.commands.organization_id is 'Tenant';
comment on column credits.commands.idempotency_key is 'The client''s key, unique in the organization';
comment on column credits.commands.body_hash is 'Hash of the command''s body: the same key with another body is an error';
comment on column credits.commands.request_id is 'Request it belongs to, where it is one';
comment on column credits.commands.outcome is 'The stored result';
comment on column credits.commands.answered_at is 'When it was decided';
comment on column credits.commands.kept_until is 'When it may be forgotten';
call tenancy.protect('credits.commands', 'select', 'select, insert, delete');

create table credits.unbilled_requests (
    organization_id uuid not null,
    request_id uuid not null,
    happened_at timestamptz not null,
    outcome text not null,
    user_id uuid,
    api_key_id uuid,
    provider text,
    model text,
    conversation_id uuid,
    wanted_micros bigint not null,
    binding_id uuid,
    detail text,
    constraint unbilled_requests_pkey primary key (organization_id, request_id),
    constraint unbilled_requests_outcome_known check (outcome in ('refused', 'released', 'expired'))
);
comment on table credits.unbilled_requests is 'Requests that cost nothing: refused by a limit, released after a failure, or expired before they were sent';
comment on column credits.unbilled_requests.organization_id is 'Tenant';
comment on column credits.unbilled_requests.request_id is 'The request';
comment on column credits.unbilled_requests.happened_at is 'When it ended';
comment on column credits.unbilled_requests.outcome is 'refused, released, expired';
comment on column credits.unbilled_requests.user_id is 'Who asked';
comment on column credits.unbilled_requests.api_key_id is 'Through which key';
comment on column credits.unbilled_requests.provider is 'Who would have answered';
comment on column credits.unbilled_requests.model is 'Model asked for';
comment on column credits.unbilled_requests.conversation_id is 'Conversation, where named';
comment on column credits.unbilled_requests.wanted_micros is 'What would have been or was held';
comment on column credits.unbilled_requests.binding_id is 'The balance that refused';
comment on column credits.unbilled_requests.detail is 'Reason code';
create index unbilled_requests_by_time on credits.unbilled_requests (organization_id, happened_at desc);
call tenancy.protect('credits.unbilled_requests', 'select', 'select, insert');

create type credits.verdict as (
    place integer,          -- 1-based place in the batch
    outcome smallint,       -- see move_batch
    request_id uuid,
    held_micros bigint,
    charged_micros bigint,
    available_micros bigint,
    binding_id uuid,
    detail text
);
comment on type credits.verdict is 'What move_batch decided on one request';

-- The money functions are owned by bursar_money: it may do to rows only what protect() granted above.
grant create on schema credits to bursar_money;
