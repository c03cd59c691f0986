-- The facts of the treasury under the names that analysts know. Every view shows what its reader may see: row-level security is the tables'.
-- Amounts are micros (1 credit = 1,000,000 micros = 0.01 USD at list price), or credits where a name says quantity.
drop view if exists credits.grant_balances, reporting.unified_payment_source, reporting.organization_credit_pools, reporting.user_credit_allocations, reporting.credit_usage_attribution,
    reporting.org_billing_summary, reporting.user_multi_org_credits, reporting.top_credit_users_by_org, reporting.org_billing_metrics,
    reporting.purchased_consumables, reporting.consumed_consumables, reporting.transaction;

-- ------------------------------------------------------------------------------------------------ grants now

-- Use is poured over grants at time events only; what was used since then falls on the active grants in burn order.
create view credits.grant_balances with (security_invoker = true) as
select s.organization_id, s.grant_id, s.pool_id, s.state, s.left_micros - f.fallen_micros as left_micros,
    coalesce(u.burnt_micros, 0) + f.fallen_micros as burnt_micros
from (
    select s.*, case when s.state in ('active', 'lingering') then
            sum(s.left_micros) filter (where s.state in ('active', 'lingering')) over (
                partition by s.organization_id, s.pool_id
                order by g.priority, g.expires_at, g.is_free desc, g.effective_at, g.created_at, g.grant_id) - s.left_micros end as before_micros
    from credits.grant_states s
    join credits.grants g on g.organization_id = s.organization_id and g.grant_id = s.grant_id
) s
join credits.pools p on p.organization_id = s.organization_id and p.pool_id = s.pool_id
join credits.balances b on b.organization_id = s.organization_id and b.balance_id = s.pool_id and b.period_start = '-infinity'
cross join lateral (
    select coalesce(least(s.left_micros, greatest(0, b.used_amount - p.poured_micros - s.before_micros)), 0)::bigint as fallen_micros
) f
left join lateral (
    select sum(u.end_micros - u.start_micros)::bigint as burnt_micros from credits.burns u
    where u.organization_id = s.organization_id and u.pool_id = s.pool_id and u.grant_id = s.grant_id
) u on true;
comment on view credits.grant_balances is 'What is left of each grant now: as of its pool''s last pour, less what was used since then';
comment on column credits.grant_balances.organization_id is 'Tenant';
comment on column credits.grant_balances.grant_id is 'The grant';
comment on column credits.grant_balances.pool_id is 'Its pool';
comment on column credits.grant_balances.state is 'scheduled, active, lingering or ended, as of the pool''s last time event';
comment on column credits.grant_balances.left_micros is 'Not yet burnt, expired or voided';
comment on column credits.grant_balances.burnt_micros is 'Burnt by use, corrections taken back';
grant select on credits.grant_balances to bursar_app, bursar_platform, bursar_backup;

-- ------------------------------------------------------------------------------------------------ pools and shares

create view reporting.organization_credit_pools with (security_invoker = true) as
select p.organization_id, p.pool_id, p.kind as pool_kind, p.owner_user_id, p.name as pool_name, p.model_filter,
    b.limit_amount as granted_micros, b.used_amount as used_micros, b.held_amount as held_micros,
    greatest(0, b.limit_amount - b.used_amount - b.held_amount) as available_micros, b.excess_amount as overage_micros,
    o.limit_amount - o.used_amount - o.held_amount as unreserved_micros, p.created_at, p.closed_at
from credits.pools p
join credits.balances b on b.organization_id = p.organization_id and b.balance_id = p.pool_id
left join credits.balances o on o.organization_id = p.organization_id and o.balance_id = p.open_part_id;
comment on view reporting.organization_credit_pools is 'One row per pool: what was granted and is still valid, used, held and available';
comment on column reporting.organization_credit_pools.organization_id is 'The organization';
comment on column reporting.organization_credit_pools.pool_id is 'The pool';
comment on column reporting.organization_credit_pools.pool_kind is 'shared, personal, individual or residual';
comment on column reporting.organization_credit_pools.owner_user_id is 'Whose it is, for a personal pool';
comment on column reporting.organization_credit_pools.pool_name is 'What people call it';
comment on column reporting.organization_credit_pools.model_filter is 'What it may pay for: a LIKE pattern of models, or after # of features; null: everything';
comment on column reporting.organization_credit_pools.granted_micros is 'Granted, less what expired, was voided or moved away';
comment on column reporting.organization_credit_pools.used_micros is 'Charged to it so far';
comment on column reporting.organization_credit_pools.held_micros is 'Reserved by running requests';
comment on column reporting.organization_credit_pools.available_micros is 'What can be spent now';
comment on column reporting.organization_credit_pools.overage_micros is 'Used or held beyond what was granted: its debt';
comment on column reporting.organization_credit_pools.unreserved_micros is 'Of the available, what no reserved share claims; null where nothing can be reserved';
comment on column reporting.organization_credit_pools.created_at is 'When it was opened';
comment on column reporting.organization_credit_pools.closed_at is 'Since when it takes and pays nothing';

create view reporting.user_credit_allocations with (security_invoker = true) as
select a.organization_id, a.allocation_id, a.pool_id, a.user_id, a.kind as allocation_kind, a.period, a.amount_micros as allocated_micros,
    case when r.period_start is null then b.period_start else r.period_start end as period_start,
    case when r.period_end is null then b.period_end else r.period_end end as period_end,
    greatest(0, coalesce(b.used_amount, 0) - coalesce(r.opening_micros, 0)) as used_micros, coalesce(b.held_amount, 0) as held_micros,
    greatest(0, coalesce(b.limit_amount - b.used_amount - b.held_amount, a.amount_micros)) as available_micros, a.when_empty, a.created_at,
    a.created_by, a.ended_at
from credits.allocations a
left join lateral (
    select * from credits.balances b
    where b.organization_id = a.organization_id and b.balance_id = a.allocation_id and b.period_start <= now()
    order by b.period_start desc limit 1
) b on b.period_end > now()
-- A reserved share that is renewed has one balance for ever: what it had used before its period is past.
left join credits.allocation_periods r
    on r.organization_id = a.organization_id and r.allocation_id = a.allocation_id and r.period_end = a.renews_at;
comment on view reporting.user_credit_allocations is 'One row per share of a shared pool, with what is used of it in its current period';
comment on column reporting.user_credit_allocations.organization_id is 'The organization';
comment on column reporting.user_credit_allocations.allocation_id is 'The share';
comment on column reporting.user_credit_allocations.pool_id is 'The pool it is a share of';
comment on column reporting.user_credit_allocations.user_id is 'Whose share';
comment on column reporting.user_credit_allocations.allocation_kind is 'reserved (set aside) or capped (an upper bound)';
comment on column reporting.user_credit_allocations.period is 'How often it begins anew; none: once';
comment on column reporting.user_credit_allocations.allocated_micros is 'Its size';
comment on column reporting.user_credit_allocations.period_start is 'Since when the current period counts; null: nothing was asked of it in it yet';
comment on column reporting.user_credit_allocations.period_end is 'When it begins anew';
comment on column reporting.user_credit_allocations.used_micros is 'Used in the current period';
comment on column reporting.user_credit_allocations.held_micros is 'Reserved by running requests';
comment on column reporting.user_credit_allocations.available_micros is 'What is left of it; the pool may have less';
comment on column reporting.user_credit_allocations.when_empty is 'stops, or open_part: goes on in what nobody reserves';
comment on column reporting.user_credit_allocations.created_at is 'When it was made';
comment on column reporting.user_credit_allocations.created_by is 'Who made it';
comment on column reporting.user_credit_allocations.ended_at is 'When it ended; null: in force';

-- ------------------------------------------------------------------------------------------------ use

create view reporting.credit_usage_attribution with (security_invoker = true) as
select a.organization_id, a.request_id, a.booked_at, a.used_at,
    case a.kind when 0 then 'charge' when 1 then 'correction' when 2 then 'refund' end as entry_kind,
    a.user_id, a.api_key_id, a.provider_key_id, a.provider, a.model, a.team_id, a.department_id, a.department_name, a.conversation_id,
    a.pool_id, a.charged_micros, a.hold_micros, a.provider_cost_nano_usd, a.customer_cost_nano_usd,
    a.charged_micros * 10 - a.provider_cost_nano_usd as profit_nano_usd,
    a.input_tokens + a.cache_read_tokens + a.cache_write_5m_tokens + a.cache_write_1h_tokens as input_tokens, a.output_tokens,
    a.flags & 2 <> 0 as is_own_key, a.flags & 4 <> 0 as is_estimated, a.flags & 8 <> 0 as is_streamed, a.flags & 128 <> 0 as is_late
from ledger.attribution a;
comment on view reporting.credit_usage_attribution is 'Who spent what, when, on what, through which key, from which pool: one row per charge, correction or refund';
comment on column reporting.credit_usage_attribution.organization_id is 'The organization';
comment on column reporting.credit_usage_attribution.request_id is 'The request; corrections and refunds carry the id of theirs';
comment on column reporting.credit_usage_attribution.booked_at is 'When it was booked';
comment on column reporting.credit_usage_attribution.used_at is 'When it was used: by this, months are told apart';
comment on column reporting.credit_usage_attribution.entry_kind is 'charge, correction of an estimate, or refund';
comment on column reporting.credit_usage_attribution.user_id is 'Who used it; null: a service key';
comment on column reporting.credit_usage_attribution.api_key_id is 'Our key it came through';
comment on column reporting.credit_usage_attribution.provider_key_id is 'Key at the provider';
comment on column reporting.credit_usage_attribution.provider is 'Who answered';
comment on column reporting.credit_usage_attribution.model is 'Model as priced';
comment on column reporting.credit_usage_attribution.team_id is 'Team at the time of use';
comment on column reporting.credit_usage_attribution.department_id is 'Department at the time of use';
comment on column reporting.credit_usage_attribution.department_name is 'Its name at the time of use';
comment on column reporting.credit_usage_attribution.conversation_id is 'Conversation, where named';
comment on column reporting.credit_usage_attribution.pool_id is 'First pool that paid';
comment on column reporting.credit_usage_attribution.charged_micros is 'Charged; negative where a correction or refund gave back';
comment on column reporting.credit_usage_attribution.hold_micros is 'What had been held for it';
comment on column reporting.credit_usage_attribution.provider_cost_nano_usd is 'What the provider asks the platform, nano-dollars';
comment on column reporting.credit_usage_attribution.customer_cost_nano_usd is 'What it costs the customer whose own key it was, nano-dollars';
comment on column reporting.credit_usage_attribution.profit_nano_usd is 'Charged at list price less provider cost, nano-dollars (1 micro = 10 of them)';
comment on column reporting.credit_usage_attribution.input_tokens is 'Input tokens, cached ones included';
comment on column reporting.credit_usage_attribution.output_tokens is 'Output tokens, reasoning included';
comment on column reporting.credit_usage_attribution.is_own_key is 'Through the customer''s own key at the provider';
comment on column reporting.credit_usage_attribution.is_estimated is 'The provider''s own usage did not come';
comment on column reporting.credit_usage_attribution.is_streamed is 'The answer was streamed';
comment on column reporting.credit_usage_attribution.is_late is 'Booked after its hold had ended';

create view reporting.consumed_consumables with (security_invoker = true) as
select d.organization_id, d.request_id as consumption_id, d.booked_at, d.used_at, d.pool_id,
    coalesce(p.owner_user_id, d.organization_id) as ltid, d.user_id as consumed_by_ltid, p.kind = 'shared' as is_shared_token_pool,
    d.model, (d.micros / 1000000.0)::numeric(24, 6) as quantity
from (
    select a.organization_id, a.request_id, a.booked_at, a.used_at, a.pool_id, a.user_id, a.model,
        a.charged_micros - coalesce((
            select sum(t.charged_micros) from ledger.attribution_takes t
            where t.organization_id = a.organization_id and t.request_id = a.request_id and t.booked_at = a.booked_at), 0) as micros
    from ledger.attribution a where a.pool_id is not null
    union all
    select t.organization_id, t.request_id, t.booked_at, a.used_at, t.pool_id, a.user_id, a.model, t.charged_micros
    from ledger.attribution_takes t
    join ledger.attribution a on a.organization_id = t.organization_id and a.request_id = t.request_id and a.booked_at = t.booked_at
) d
join credits.pools p on p.organization_id = d.organization_id and p.pool_id = d.pool_id
where d.micros <> 0;
comment on view reporting.consumed_consumables is 'What was drawn from which pool by whom: one row per request and pool, corrections as rows of their own';
comment on column reporting.consumed_consumables.organization_id is 'The organization';
comment on column reporting.consumed_consumables.consumption_id is 'The request';
comment on column reporting.consumed_consumables.booked_at is 'When it was booked';
comment on column reporting.consumed_consumables.used_at is 'When it was used';
comment on column reporting.consumed_consumables.pool_id is 'The pool it was drawn from';
comment on column reporting.consumed_consumables.ltid is 'Owner of that pool: the organization when it is shared, else the user';
comment on column reporting.consumed_consumables.consumed_by_ltid is 'The member who used it; null: a service key';
comment on column reporting.consumed_consumables.is_shared_token_pool is 'Whether the pool is the organization''s shared one';
comment on column reporting.consumed_consumables.model is 'Model as priced';
comment on column reporting.consumed_consumables.quantity is 'Credits, exact to a millionth';

create view reporting.purchased_consumables with (security_invoker = true) as
select g.organization_id, g.grant_id as consumable_id, g.pool_id, coalesce(p.owner_user_id, g.organization_id) as ltid,
    p.kind = 'shared' as is_shared_token_pool, g.source, (g.amount_micros / 1000000.0)::numeric(24, 6) as quantity,
    (s.left_micros / 1000000.0)::numeric(24, 6) as quantity_left, g.cost_basis_nano_usd, g.is_free, g.priority, g.effective_at,
    nullif(g.expires_at, 'infinity') as expires_at, g.parent_grant_id as parent_consumable_id, k.campaign || ' …' || k.hint as complimentary_code,
    g.created_at, g.created_by
from credits.grants g
left join lateral (
    -- What was rolled over or moved on leads back to the code of the first.
    with recursive line as (
        select g.grant_id, g.parent_grant_id
        union all
        select p.grant_id, p.parent_grant_id from line l join credits.grants p on p.organization_id = g.organization_id and p.grant_id = l.parent_grant_id
    )
    select k.campaign, k.hint from line l join credits.grant_codes k on k.organization_id = g.organization_id and k.grant_id = l.grant_id
) k on true
join credits.grant_balances s on s.organization_id = g.organization_id and s.grant_id = g.grant_id
join credits.pools p on p.organization_id = g.organization_id and p.pool_id = g.pool_id;
comment on view reporting.purchased_consumables is 'Every addition of credits: purchases, opening balances, plans, codes, roll-overs';
comment on column reporting.purchased_consumables.organization_id is 'The organization';
comment on column reporting.purchased_consumables.consumable_id is 'The grant';
comment on column reporting.purchased_consumables.pool_id is 'Pool that received it';
comment on column reporting.purchased_consumables.ltid is 'Owner: the organization when its pool is shared, else the user';
comment on column reporting.purchased_consumables.is_shared_token_pool is 'Whether the pool is the organization''s shared one';
comment on column reporting.purchased_consumables.source is 'purchase, plan, complimentary, code, opening …';
comment on column reporting.purchased_consumables.quantity is 'Credits granted, exact to a millionth';
comment on column reporting.purchased_consumables.quantity_left is 'Of these not yet burnt, expired or voided';
comment on column reporting.purchased_consumables.cost_basis_nano_usd is 'Money paid for it, nano-dollars';
comment on column reporting.purchased_consumables.is_free is 'Complimentary: brings no revenue';
comment on column reporting.purchased_consumables.priority is 'Lower burns first';
comment on column reporting.purchased_consumables.effective_at is 'Spendable from this instant';
comment on column reporting.purchased_consumables.expires_at is 'Spendable before this instant; null: for ever';
comment on column reporting.purchased_consumables.parent_consumable_id is 'The grant it rolled over or was moved from';
comment on column reporting.purchased_consumables.complimentary_code is 'Campaign and last four characters of the code it came of; null: of none';
comment on column reporting.purchased_consumables.created_at is 'When it was made';
comment on column reporting.purchased_consumables.created_by is 'Who made it; null: the system';

create view reporting.unified_payment_source with (security_invoker = true) as
select p.organization_id, p.consumable_id as payment_source_id, p.ltid, p.is_shared_token_pool,
    case when p.complimentary_code is not null then 'complimentary_code' when p.is_free then 'complimentary' else p.source end as payment_kind,
    p.complimentary_code, p.cost_basis_nano_usd as paid_nano_usd, p.quantity, p.quantity_left, p.created_at
from reporting.purchased_consumables p;
comment on view reporting.unified_payment_source is 'What pays for use: one row per addition of credits, with how it was paid for';
comment on column reporting.unified_payment_source.organization_id is 'The organization';
comment on column reporting.unified_payment_source.payment_source_id is 'The grant';
comment on column reporting.unified_payment_source.ltid is 'Owner: the organization when its pool is shared, else the user';
comment on column reporting.unified_payment_source.is_shared_token_pool is 'Whether the pool is the organization''s shared one';
comment on column reporting.unified_payment_source.payment_kind is 'complimentary_code, complimentary, or the grant''s source: purchase, plan, top_up …';
comment on column reporting.unified_payment_source.complimentary_code is 'Campaign and last four characters of the code; null: of none';
comment on column reporting.unified_payment_source.paid_nano_usd is 'Money paid for it, nano-dollars';
comment on column reporting.unified_payment_source.quantity is 'Credits granted';
comment on column reporting.unified_payment_source.quantity_left is 'Of these not yet burnt, expired or voided';
comment on column reporting.unified_payment_source.created_at is 'When it was made';

create view reporting.transaction with (security_invoker = true) as
select e.organization_id, e.entry_id as transaction_id, e.booked_at, e.happened_at, e.kind as transaction_kind, e.unit, e.from_kind, e.from_id,
    e.to_kind, e.to_id, e.amount, e.grant_id, e.actor_id, e.reason
from ledger.entries e
union all
select a.organization_id, a.request_id, a.booked_at, a.used_at, case a.kind when 0 then 'usage' else 'usage_correction' end, 'credit', 'pool', a.pool_id,
    'used', null, a.charged_micros, null, coalesce(a.user_id, a.api_key_id), a.model
from ledger.attribution a where a.pool_id is not null and a.charged_micros <> 0;
comment on view reporting.transaction is 'The whole story of an organization''s credits in one list: every movement from one account to another, and every use';
comment on column reporting.transaction.organization_id is 'The organization';
comment on column reporting.transaction.transaction_id is 'The ledger entry, or the request';
comment on column reporting.transaction.booked_at is 'When it was booked';
comment on column reporting.transaction.happened_at is 'When it took effect, or was used';
comment on column reporting.transaction.transaction_kind is 'usage, usage_correction, or the kind of ledger entry';
comment on column reporting.transaction.unit is 'credit: the amount is in micros';
comment on column reporting.transaction.from_kind is 'Account that gives';
comment on column reporting.transaction.from_id is 'Which of its kind';
comment on column reporting.transaction.to_kind is 'Account that takes';
comment on column reporting.transaction.to_id is 'Which of its kind';
comment on column reporting.transaction.amount is 'Micros; negative only where a correction gave use back';
comment on column reporting.transaction.grant_id is 'The grant that moved';
comment on column reporting.transaction.actor_id is 'Who did it: user or key; null: the system';
comment on column reporting.transaction.reason is 'Why, in words; of use the model';

-- ------------------------------------------------------------------------------------------------ summaries

create view reporting.org_billing_summary with (security_invoker = true) as
select o.organization_id, o.name as organization_name, o.status, o.is_shared_token_pool, coalesce(p.pools, 0) as pools,
    coalesce(p.granted_micros, 0) as granted_micros, coalesce(p.used_micros, 0) as used_micros, coalesce(p.held_micros, 0) as held_micros,
    coalesce(p.available_micros, 0) as available_micros, coalesce(p.overage_micros, 0) as overage_micros,
    (select count(*) from identity.memberships m where m.organization_id = o.organization_id and m.status = 'active') as members,
    coalesce(u.charged_micros, 0) as month_charged_micros, coalesce(u.provider_cost_nano_usd, 0) as month_provider_cost_nano_usd,
    coalesce(u.requests, 0) as month_requests, coalesce(u.active_users, 0) as month_active_users
from identity.organizations o
left join lateral (
    select count(*) as pools, sum(granted_micros)::bigint as granted_micros, sum(used_micros)::bigint as used_micros,
        sum(held_micros)::bigint as held_micros, sum(available_micros)::bigint as available_micros, sum(overage_micros)::bigint as overage_micros
    from reporting.organization_credit_pools p where p.organization_id = o.organization_id and p.closed_at is null
) p on true
left join lateral (
    select sum(a.charged_micros)::bigint as charged_micros, sum(a.provider_cost_nano_usd)::bigint as provider_cost_nano_usd,
        count(*) filter (where a.kind = 0) as requests, count(distinct a.user_id) as active_users
    from ledger.attribution a
    where a.organization_id = o.organization_id and a.used_at >= date_trunc('month', now() at time zone o.zone) at time zone o.zone
) u on true;
comment on view reporting.org_billing_summary is 'One row per organization: its credits, people, and use of the running month in its zone';
comment on column reporting.org_billing_summary.organization_id is 'The organization';
comment on column reporting.org_billing_summary.organization_name is 'What people call it';
comment on column reporting.org_billing_summary.status is 'active, frozen or closed';
comment on column reporting.org_billing_summary.is_shared_token_pool is 'Whether members spend from one shared pool';
comment on column reporting.org_billing_summary.pools is 'Open pools';
comment on column reporting.org_billing_summary.granted_micros is 'In all of them: granted and still valid';
comment on column reporting.org_billing_summary.used_micros is 'Used';
comment on column reporting.org_billing_summary.held_micros is 'Held';
comment on column reporting.org_billing_summary.available_micros is 'Available';
comment on column reporting.org_billing_summary.overage_micros is 'Debt';
comment on column reporting.org_billing_summary.members is 'Active members';
comment on column reporting.org_billing_summary.month_charged_micros is 'Charged this month';
comment on column reporting.org_billing_summary.month_provider_cost_nano_usd is 'What providers ask for it, nano-dollars';
comment on column reporting.org_billing_summary.month_requests is 'Requests this month';
comment on column reporting.org_billing_summary.month_active_users is 'People who used something this month';

create view reporting.org_billing_metrics with (security_invoker = true) as
select a.organization_id, (a.used_at at time zone o.zone)::date as usage_date, count(*) filter (where a.kind = 0) as requests,
    sum(a.charged_micros)::bigint as charged_micros, sum(a.provider_cost_nano_usd)::bigint as provider_cost_nano_usd,
    (sum(a.charged_micros) * 10 - sum(a.provider_cost_nano_usd))::bigint as profit_nano_usd, count(distinct a.user_id) as active_users,
    count(distinct a.model) as models
from ledger.attribution a
join identity.organizations o on o.organization_id = a.organization_id
where a.used_at >= (date_trunc('day', now() at time zone o.zone) - interval '29 days') at time zone o.zone
group by a.organization_id, usage_date;
comment on view reporting.org_billing_metrics is 'Per organization and day of its zone, the last 30 days: requests, charged, provider cost, profit, active people';
comment on column reporting.org_billing_metrics.organization_id is 'The organization';
comment on column reporting.org_billing_metrics.usage_date is 'The day, in the organization''s zone';
comment on column reporting.org_billing_metrics.requests is 'Requests';
comment on column reporting.org_billing_metrics.charged_micros is 'Charged, corrections and refunds included';
comment on column reporting.org_billing_metrics.provider_cost_nano_usd is 'What providers ask for it, nano-dollars';
comment on column reporting.org_billing_metrics.profit_nano_usd is 'Charged at list price less provider cost, nano-dollars';
comment on column reporting.org_billing_metrics.active_users is 'Different people';
comment on column reporting.org_billing_metrics.models is 'Different models';

create view reporting.top_credit_users_by_org with (security_invoker = true) as
select u.organization_id, u.user_id, m.display_name, u.charged_micros, u.requests,
    rank() over (partition by u.organization_id order by u.charged_micros desc) as place
from (
    select a.organization_id, a.user_id, sum(a.charged_micros)::bigint as charged_micros, count(*) filter (where a.kind = 0) as requests
    from ledger.attribution a
    where a.used_at >= now() - interval '30 days' and a.user_id is not null
    group by a.organization_id, a.user_id
) u
left join identity.memberships m on m.organization_id = u.organization_id and m.user_id = u.user_id;
comment on view reporting.top_credit_users_by_org is 'Who spent most in the last 30 days, by organization';
comment on column reporting.top_credit_users_by_org.organization_id is 'The organization';
comment on column reporting.top_credit_users_by_org.user_id is 'The person';
comment on column reporting.top_credit_users_by_org.display_name is 'Their name; null: erased, or no member';
comment on column reporting.top_credit_users_by_org.charged_micros is 'Charged in the last 30 days';
comment on column reporting.top_credit_users_by_org.requests is 'Requests in the last 30 days';
comment on column reporting.top_credit_users_by_org.place is '1 spent most; equals share a place';

create view reporting.user_multi_org_credits with (security_invoker = true) as
select m.organization_id, m.user_id, o.name as organization_name, o.is_shared_token_pool, m.status as membership_status,
    coalesce(p.available_micros, 0) as personal_available_micros, a.allocated_micros, a.available_micros as allocation_available_micros,
    coalesce(u.charged_micros, 0) as month_charged_micros, coalesce(u.requests, 0) as month_requests
from identity.memberships m
join identity.organizations o on o.organization_id = m.organization_id
left join lateral (
    select sum(p.available_micros)::bigint as available_micros from reporting.organization_credit_pools p
    where p.organization_id = m.organization_id and p.closed_at is null
      and (p.owner_user_id = m.user_id or p.pool_kind = 'individual')
) p on true
left join lateral (
    select sum(a.allocated_micros)::bigint as allocated_micros, sum(a.available_micros)::bigint as available_micros
    from reporting.user_credit_allocations a where a.organization_id = m.organization_id and a.user_id = m.user_id and a.ended_at is null
) a on true
left join lateral (
    select sum(r.charged_micros)::bigint as charged_micros, count(*) filter (where r.kind = 0) as requests
    from ledger.attribution r
    where r.organization_id = m.organization_id and r.user_id = m.user_id
      and r.used_at >= date_trunc('month', now() at time zone o.zone) at time zone o.zone
) u on true;
comment on view reporting.user_multi_org_credits is 'One row per person and organization: personal credits, share, and use of the running month';
comment on column reporting.user_multi_org_credits.organization_id is 'The organization';
comment on column reporting.user_multi_org_credits.user_id is 'The person; the same id in every organization';
comment on column reporting.user_multi_org_credits.organization_name is 'What people call it';
comment on column reporting.user_multi_org_credits.is_shared_token_pool is 'Whether members spend from one shared pool';
comment on column reporting.user_multi_org_credits.membership_status is 'active, suspended or left';
comment on column reporting.user_multi_org_credits.personal_available_micros is 'Credits of their own there';
comment on column reporting.user_multi_org_credits.allocated_micros is 'Their share of the shared pool; null: none set';
comment on column reporting.user_multi_org_credits.allocation_available_micros is 'What is left of it';
comment on column reporting.user_multi_org_credits.month_charged_micros is 'Charged to them there this month';
comment on column reporting.user_multi_org_credits.month_requests is 'Their requests there this month';

grant select on all tables in schema reporting to bursar_app, bursar_platform, bursar_backup;
