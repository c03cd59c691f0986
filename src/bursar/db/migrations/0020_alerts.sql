-- Alerts: which levels of which balances are told to whom, and which were.
set local lock_timeout = '5s';

create schema alerts;
comment on schema alerts is 'Rules of what is told when credits run low, and what was told';
grant usage on schema alerts to bursar_app, bursar_platform, bursar_money, bursar_backup;

create table alerts.rules (
    organization_id uuid not null,
    rule_id uuid not null,
    watches text not null,
    object_id uuid,
    measure text not null,
    thresholds bigint[] not null,
    readers text[] not null,
    addresses text[] not null default '{}',
    collect_minutes integer not null,
    created_at timestamptz not null default clock_timestamp(),
    created_by uuid,
    ended_at timestamptz,
    constraint rules_pkey primary key (organization_id, rule_id),
    constraint rules_watches_known check (watches in ('pool', 'allocation', 'limit')),
    constraint rules_measure_known check (measure in ('percent', 'left')),
    constraint rules_thresholds_few check (cardinality(thresholds) <= 20 and 0 <= all (thresholds)),
    constraint rules_percents check (measure <> 'percent' or (100 >= all (thresholds) and 1 <= all (thresholds))),
    constraint rules_readers_known check (readers <@ array['concerned', 'lead', 'admins', 'finance']),
    constraint rules_addresses_few check (cardinality(addresses) <= 20),
    constraint rules_collect check (collect_minutes between 0 and 1440)
);
comment on table alerts.rules is 'What is told: levels of pools, shares or limits, to whom. What no rule is about goes by alerts.default_rule';
comment on column alerts.rules.organization_id is 'Tenant';
comment on column alerts.rules.rule_id is 'Identity';
comment on column alerts.rules.watches is 'pool, allocation (a member''s share) or limit (a cap of any scope)';
comment on column alerts.rules.object_id is 'The one pool, share or limit; null: all that no rule of their own is about';
comment on column alerts.rules.measure is 'percent: of the limit, used; left: what is left, micros or a count';
comment on column alerts.rules.thresholds is 'Levels, each told once a period; empty: nothing is told';
comment on column alerts.rules.readers is 'Who is mailed: concerned (whose it is), lead (of their team), admins, finance';
comment on column alerts.rules.addresses is 'Personal: further addresses that are mailed';
comment on column alerts.rules.collect_minutes is 'How long an e-mail waits for more to tell; 0: at once';
comment on column alerts.rules.created_at is 'Since when it is in force';
comment on column alerts.rules.created_by is 'User who set it; null: the operator';
comment on column alerts.rules.ended_at is 'Until when it was in force';
create unique index rules_one_each on alerts.rules
    (organization_id, watches, (coalesce(object_id, '00000000-0000-0000-0000-000000000000'::uuid)), measure) where ended_at is null;
call tenancy.protect('alerts.rules', 'select, insert, update (ended_at)');

create table alerts.reached (
    organization_id uuid not null,
    rule_id uuid not null,
    balance_id uuid not null,
    period_start timestamptz not null,
    level smallint not null,
    limit_amount bigint not null,
    used_amount bigint not null,
    told_at timestamptz not null default clock_timestamp(),
    constraint reached_pkey primary key (organization_id, rule_id, balance_id, period_start),
    constraint reached_level check (level >= 0)
);
comment on table alerts.reached is 'How far each balance was told to be in each period, so that each level is told once';
comment on column alerts.reached.organization_id is 'Tenant';
comment on column alerts.reached.rule_id is 'The rule, or the default one';
comment on column alerts.reached.balance_id is 'The balance';
comment on column alerts.reached.period_start is 'Its period';
comment on column alerts.reached.level is 'How many levels of the rule were told; falls when the limit is raised above them';
comment on column alerts.reached.limit_amount is 'The limit then';
comment on column alerts.reached.used_amount is 'What was used then';
comment on column alerts.reached.told_at is 'When';
call tenancy.protect('alerts.reached', 'select, insert, update (level, limit_amount, used_amount, told_at)');

create table alerts.notices (
    organization_id uuid not null,
    kind text not null,
    object_id uuid not null,
    at timestamptz not null,
    told_at timestamptz not null default clock_timestamp(),
    constraint notices_pkey primary key (organization_id, kind, object_id, at),
    constraint notices_kind_known check (kind in ('grant.expiring', 'grant.expired', 'deduction.refused'))
);
comment on table alerts.notices is 'What was told of single grants and of refusals, so that it is told once';
comment on column alerts.notices.organization_id is 'Tenant';
comment on column alerts.notices.kind is 'grant.expiring, grant.expired, deduction.refused';
comment on column alerts.notices.object_id is 'The grant, or the balance that refused';
comment on column alerts.notices.at is 'The grant''s end, or the hour of the refusals';
comment on column alerts.notices.told_at is 'When it was told';
call tenancy.protect('alerts.notices', 'select, insert');

create table alerts.looks (
    organization_id uuid not null,
    looked_until timestamptz not null,
    leased_until timestamptz not null,
    swept_at timestamptz not null,
    constraint looks_pkey primary key (organization_id)
);
comment on table alerts.looks is 'One row, of the platform''s organization: up to where the workers have looked';
comment on column alerts.looks.organization_id is 'The platform''s organization';
comment on column alerts.looks.looked_until is 'Use until then was looked at';
comment on column alerts.looks.leased_until is 'Until when a worker looks; what it has not noted by then another one does again';
comment on column alerts.looks.swept_at is 'When every balance was looked at last, moved or not';
call tenancy.protect('alerts.looks', 'select, insert, update (looked_until, leased_until, swept_at)');
