-- Automatic top-ups: when to buy more credits for a pool, within which bounds, and each purchase.
set local lock_timeout = '5s';

create table credits.top_up_policies (
    organization_id uuid not null,
    pool_id uuid not null,
    threshold_micros bigint not null,
    amount_micros bigint not null,
    ceiling_micros bigint not null,
    most_per_hour integer not null default 3,
    state text not null default 'active',
    declines integer not null default 0,
    next_try_at timestamptz not null default '-infinity',
    set_at timestamptz not null,
    set_by uuid,
    constraint top_up_policies_pkey primary key (organization_id, pool_id),
    constraint top_up_policies_pool foreign key (organization_id, pool_id) references credits.pools,
    constraint top_up_policies_amounts check (threshold_micros >= 0 and amount_micros > 0 and ceiling_micros >= amount_micros),
    constraint top_up_policies_counts check (most_per_hour > 0 and declines >= 0),
    constraint top_up_policies_state_known check (state in ('active', 'runaway', 'declined', 'ended'))
);
comment on table credits.top_up_policies is 'When a pool buys more credits by itself, and within which bounds';
comment on column credits.top_up_policies.organization_id is 'Tenant';
comment on column credits.top_up_policies.pool_id is 'The pool';
comment on column credits.top_up_policies.threshold_micros is 'Bought when less than this is available';
comment on column credits.top_up_policies.amount_micros is 'How much one purchase brings';
comment on column credits.top_up_policies.ceiling_micros is 'Most that the purchases of one calendar month of the organization''s zone may come to, open ones included';
comment on column credits.top_up_policies.most_per_hour is 'More purchases than this within an hour are taken for a runaway, and stop the policy';
comment on column credits.top_up_policies.state is 'active; runaway or declined: stopped until it is set again; ended: switched off';
comment on column credits.top_up_policies.declines is 'Purchases that failed one after the other';
comment on column credits.top_up_policies.next_try_at is 'Nothing is bought before: after a decline, or until the month is over whose ceiling is reached';
comment on column credits.top_up_policies.set_at is 'When it was set';
comment on column credits.top_up_policies.set_by is 'Who set it; null: the operator';
call tenancy.protect('credits.top_up_policies', 'select', 'select, insert, update');

create table credits.top_ups (
    organization_id uuid not null,
    top_up_id uuid not null,
    pool_id uuid not null,
    amount_micros bigint not null,
    state text not null default 'pending',
    requested_at timestamptz not null,
    decided_at timestamptz,
    paid_nano_usd bigint,
    reference text,
    reason text,
    grant_id uuid,
    constraint top_ups_pkey primary key (organization_id, top_up_id),
    constraint top_ups_pool foreign key (organization_id, pool_id) references credits.pools,
    constraint top_ups_state_known check (state in ('pending', 'succeeded', 'failed')),
    constraint top_ups_decided check ((state = 'pending') = (decided_at is null)),
    constraint top_ups_granted check ((state = 'succeeded') = (grant_id is not null) and (state = 'succeeded') = (paid_nano_usd is not null)),
    constraint top_ups_amounts check (amount_micros > 0 and paid_nano_usd >= 0)
);
comment on table credits.top_ups is 'Purchases that a pool made by itself';
comment on column credits.top_ups.organization_id is 'Tenant';
comment on column credits.top_ups.top_up_id is 'Identity; whoever takes the money is given it as idempotency key';
comment on column credits.top_ups.pool_id is 'The pool';
comment on column credits.top_ups.amount_micros is 'Micros bought';
comment on column credits.top_ups.state is 'pending, succeeded, failed';
comment on column credits.top_ups.requested_at is 'When it was begun';
comment on column credits.top_ups.decided_at is 'When it succeeded or failed';
comment on column credits.top_ups.paid_nano_usd is 'Money paid, nano-dollars';
comment on column credits.top_ups.reference is 'What whoever took the money calls it';
comment on column credits.top_ups.reason is 'Why it failed';
comment on column credits.top_ups.grant_id is 'The grant that came of it';
create unique index top_ups_one_open on credits.top_ups (organization_id, pool_id) where state = 'pending';
create index top_ups_by_time on credits.top_ups (organization_id, pool_id, requested_at desc);
call tenancy.protect('credits.top_ups', 'select', 'select, insert, update');
