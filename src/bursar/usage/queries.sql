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

-- name: usage_parts
-- Everything an overview says about usage, from one reading of the attribution: it is summed once by what it can be broken down
-- into (base), and every part below is a sum over that base, so that all of them agree to the micro.
with base as materialized (
    select width_bucket(a.used_at, %(edges)s::timestamptz[]) as segment, a.user_id, a.api_key_id, a.provider, a.model, a.department_id,
        max(a.department_name) as department_name, sum(a.charged_micros)::bigint as charged, sum(a.provider_cost_nano_usd)::bigint as cost,
        count(*) filter (where a.kind = 0) as requests, count(*) filter (where a.kind = 0 and a.flags & 256 <> 0) as unpriced
    from ledger.attribution a
    where a.organization_id = %(organization_id)s and a.used_at >= %(starts_at)s and a.used_at < %(ends_at)s
    group by 1, 2, 3, 4, 5, 6
), month as materialized (
    select * from base where segment = any (%(month)s::int[])
)
select 'segment' as part, segment, null::uuid as id, null as name, null as detail, null as state, sum(charged)::bigint as charged_micros,
    sum(cost)::bigint as cost_nano_usd, sum(requests)::bigint as requests, sum(unpriced)::bigint as unpriced_requests, 0::bigint as people
from base group by segment
union all
select 'model_of_segment', segment, null, model, provider, null, sum(charged)::bigint, 0, sum(requests)::bigint, 0, 0
from base where segment = any (%(days)s::int[]) group by segment, provider, model
union all
select 'people_before', 0, null, null, null, null, 0, 0, 0, 0, count(distinct user_id)
from base where segment = any (%(before)s::int[]) and requests > 0
union all
select 'person', 0, p.user_id, m.display_name, null,
    case when p.user_id is null and p.has_key then 'service' when p.user_id is null then 'unattributed' when m.user_id is null then 'unknown'
         when m.status = 'active' and not m.roles && %(roles_with_access)s::text[] then 'no_access' else m.status end,
    p.charged, 0, p.requests, 0, (p.requests > 0 and p.user_id is not null)::int
from (
    select user_id, user_id is null and api_key_id is not null as has_key, sum(charged)::bigint as charged, sum(requests)::bigint as requests
    from month group by 1, 2
) p
left join identity.memberships m on m.organization_id = %(organization_id)s and m.user_id = p.user_id
union all
-- A key and what rotations put in its place are one row. A person's own key was made at their home, out of sight here.
select 'key', 0, k.id, newest.name, newest.last4,
    case when k.state <> 'own' then k.state when newest.revoked_at is not null then 'deleted' else 'active' end,
    k.charged, 0, k.requests, 0, 0
from (
    select coalesce(key.original_api_key_id, month.api_key_id) as id,
        case when month.api_key_id is null then 'none' when key.api_key_id is not null then 'own'
             when month.user_id is not null then 'personal' else 'unknown' end as state,
        sum(month.charged)::bigint as charged, sum(month.requests)::bigint as requests
    from month
    left join identity.api_keys key on key.organization_id = %(organization_id)s and key.api_key_id = month.api_key_id
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
from month group by provider, model
union all
select 'department', 0, d.department_id, coalesce(n.name, d.name), null,
    case when d.department_id is null then 'unattributed' when n.archived_at is not null then 'archived' else 'active' end,
    d.charged, 0, d.requests, 0, 0
from (select department_id, max(department_name) as name, sum(charged)::bigint as charged, sum(requests)::bigint as requests
      from month group by department_id) d
left join identity.departments n on n.organization_id = %(organization_id)s and n.department_id = d.department_id
