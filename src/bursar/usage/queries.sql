-- name: due_event
-- Whether a grant began or ended and no movement of credits has folded that in yet.
select next_event_at <= clock_timestamp() from credits.gates where organization_id = %(organization_id)s

-- name: fold_due_pools
-- Asks what nobody in particular must pass: that moves nothing, but takes the gate, and whoever takes the gate folds what is due.
select credits.current_chain(%(organization_id)s, null, null)

-- name: snapshot
set transaction isolation level repeatable read, read only

-- name: pool_figures
-- One row per kind of pool and filter, since credit for some models is not credit for all.
select p.kind, p.model_filter, count(*) as pools,
    sum(greatest(0, b.limit_amount - b.used_amount - b.held_amount))::bigint as available_micros,
    sum(b.used_amount)::bigint as used_micros, sum(b.held_amount)::bigint as held_micros, sum(b.excess_amount)::bigint as overage_micros,
    sum(b.limit_amount)::bigint as granted_micros
from credits.pools p
join credits.balances b on b.organization_id = p.organization_id and b.balance_id = p.pool_id and b.period_start = '-infinity'
where p.organization_id = %(organization_id)s and p.closed_at is null
group by p.kind, p.model_filter
order by array_position(array['shared', 'personal', 'individual', 'residual'], p.kind), p.model_filter nulls first

-- name: people_with_access
select count(*) from identity.memberships
where organization_id = %(organization_id)s and status = 'active' and roles && %(roles_with_access)s::text[]

-- name: last_use
select max(used_at) from ledger.attribution where organization_id = %(organization_id)s and used_at < %(before)s

-- name: plan_for_sums
-- There are few groups, but no statistics say so: with this much room they are summed in hash tables, not by five sorts. A plan made
-- for any organization and time would not know either, and be three times slower.
select set_config('work_mem', '256MB', true), set_config('plan_cache_mode', 'force_custom_plan', true)

-- name: usage_parts
-- Everything an overview says about usage, from one reading of the attribution: each row is added to every breakdown at once
-- (grouping sets), so that all of them agree to the micro. period: 1 the month, 2 what it is compared with, 0 neither.
with sums as materialized (
    select
        case when grouping(user_id) = 0 then 'person' when grouping(api_key_id) = 0 then 'key' when grouping(department_id) = 0 then 'department'
             when grouping(model) = 0 then 'model_of_segment' else 'segment' end as part,
        segment, period, user_id, api_key_id, is_service, has_user, provider, model, department_id, max(department_name) as department_name,
        sum(charged_micros)::bigint as charged, sum(provider_cost_nano_usd)::bigint as cost,
        count(*) filter (where kind = 0) as requests, count(*) filter (where kind = 0 and flags & 256 <> 0) as unpriced
    from (
        select (%(periods)s::int[])[segment] as period, *
        from (
            select width_bucket(used_at, %(edges)s::timestamptz[]) as segment, user_id, api_key_id, user_id is null and api_key_id is not null as is_service,
                user_id is not null as has_user, provider, model, department_id, department_name, charged_micros, provider_cost_nano_usd, kind, flags
            from ledger.attribution
            where organization_id = %(organization_id)s and used_at >= %(starts_at)s and used_at < %(ends_at)s
            offset 0  -- worked out once a row, not once for each grouping
        ) a
        offset 0
    ) a
    group by grouping sets ((segment), (segment, provider, model), (period, user_id, is_service), (period, api_key_id, has_user), (period, department_id))
)
select part, segment, null::uuid as id, model as name, provider as detail, null as state, charged as charged_micros, cost as cost_nano_usd,
    requests, unpriced as unpriced_requests, 0 as people
from sums where part in ('segment', 'model_of_segment')
union all
select 'people_before', 0, null, null, null, null, 0, 0, 0, 0, count(*)::int
from sums where part = 'person' and period = 2 and user_id is not null and requests > 0
union all
select 'person', 0, p.user_id, m.display_name, null,
    case when p.is_service then 'service' when p.user_id is null then 'unattributed' when m.user_id is null then 'unknown'
         when m.status = 'active' and not m.roles && %(roles_with_access)s::text[] then 'no_access' else m.status end,
    p.charged, 0, p.requests, 0, (p.requests > 0 and p.user_id is not null)::int
from sums p
left join identity.memberships m on m.organization_id = %(organization_id)s and m.user_id = p.user_id
where p.part = 'person' and p.period = 1
union all
-- A key and what rotations put in its place are one row. A person's own key was made at their home, out of sight here.
select 'key', 0, k.id, newest.name, newest.last4,
    case when k.state <> 'own' then k.state when newest.revoked_at is not null then 'deleted' else 'active' end,
    k.charged, 0, k.requests, 0, 0
from (
    select coalesce(key.original_api_key_id, s.api_key_id) as id,
        case when s.api_key_id is null then 'none' when key.api_key_id is not null then 'own' when s.has_user then 'personal' else 'unknown' end as state,
        sum(s.charged)::bigint as charged, sum(s.requests)::bigint as requests
    from sums s
    left join identity.api_keys key on key.organization_id = %(organization_id)s and key.api_key_id = s.api_key_id
    where s.part = 'key' and s.period = 1
    group by 1, 2
) k
left join lateral (
    select n.name, n.last4, n.revoked_at from identity.api_keys n
    where n.organization_id = %(organization_id)s and n.original_api_key_id = k.id
    order by n.created_at desc, n.api_key_id desc limit 1
) newest on k.state = 'own'
union all
select 'model', 0, null, model, provider, case when model is null then 'unknown' else 'active' end,
    sum(charged)::bigint, 0, sum(requests)::bigint, 0, 0
from sums where part = 'model_of_segment' and (%(periods)s::int[])[segment] = 1 group by provider, model
union all
select 'department', 0, d.department_id, coalesce(n.name, d.department_name), null,
    case when d.department_id is null then 'unattributed' when n.archived_at is not null then 'archived' else 'active' end,
    d.charged, 0, d.requests, 0, 0
from sums d
left join identity.departments n on n.organization_id = %(organization_id)s and n.department_id = d.department_id
where d.part = 'department' and d.period = 1
