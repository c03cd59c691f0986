-- What was so at a past instant, from the ledger, the attribution, and what was kept of changes. Time events count at their own instant;
-- they must have been booked until now, so that nothing is booked into the past any more.

-- name: clock
select clock_timestamp() as now, o.zone from identity.organizations o where o.organization_id = %(organization_id)s

-- name: is_due
select next_event_at <= clock_timestamp() from credits.gates where organization_id = %(organization_id)s

-- name: pools
-- granted: what the ledger had brought into the pool less what it had taken out; used: what was drawn by then; poured: how much of that stood
-- on grants already. Pools that have closed since, and those that had closed and were not even.
with draws as (
    select a.pool_id, a.charged_micros as micros from ledger.attribution a
    where a.organization_id = %(organization_id)s and a.booked_at <= %(at)s and a.pool_id is not null
    union all
    select t.pool_id, t.charged_micros from ledger.attribution_takes t
    where t.organization_id = %(organization_id)s and t.booked_at <= %(at)s
    union all  -- what further pools paid was not drawn from the first
    select a.pool_id, -t.charged_micros
    from ledger.attribution_takes t
    join ledger.attribution a on a.organization_id = t.organization_id and a.request_id = t.request_id and a.booked_at = t.booked_at
    where t.organization_id = %(organization_id)s and t.booked_at <= %(at)s
), moves as (
    select to_id as pool_id, amount from ledger.entries
    where organization_id = %(organization_id)s and happened_at <= %(at)s and to_kind = 'pool' and unit = 'credit'
    union all
    select from_id, -amount from ledger.entries
    where organization_id = %(organization_id)s and happened_at <= %(at)s and from_kind = 'pool' and unit = 'credit'
), stretches as (
    select pool_id, end_micros - start_micros as micros from credits.burns
    where organization_id = %(organization_id)s and poured_at <= %(at)s
    union all
    select pool_id, end_micros - start_micros from credits.unburns
    where organization_id = %(organization_id)s and poured_at <= %(at)s and taken_back_at > %(at)s
)
select p.pool_id, p.kind, p.owner_user_id, p.name, p.model_filter, coalesce(m.amount, 0)::bigint as granted_micros,
    coalesce(d.micros, 0)::bigint as used_micros, coalesce(s.micros, 0)::bigint as poured_micros
from credits.pools p
left join (select pool_id, sum(micros) as micros from draws group by 1) d on d.pool_id = p.pool_id
left join (select pool_id, sum(amount) as amount from moves group by 1) m on m.pool_id = p.pool_id
left join (select pool_id, sum(micros) as micros from stretches group by 1) s on s.pool_id = p.pool_id
where p.organization_id = %(organization_id)s and p.created_at <= %(at)s
  and (%(with_closed)s or p.closed_at is null or p.closed_at > %(at)s or coalesce(m.amount, 0) <> coalesce(d.micros, 0))
order by p.kind <> 'shared', p.created_at, p.pool_id

-- name: grants
-- brought: what entries had brought into the grant less what they had taken out of it; burnt: what had been poured over it. In burn order.
with moves as (
    select grant_id, amount from ledger.entries
    where organization_id = %(organization_id)s and happened_at <= %(at)s and to_kind in ('pool', 'grant') and grant_id is not null
    union all
    select coalesce(from_grant_id, grant_id), -amount from ledger.entries
    where organization_id = %(organization_id)s and happened_at <= %(at)s and from_kind in ('pool', 'grant')
), stretches as (
    select grant_id, end_micros - start_micros as micros from credits.burns
    where organization_id = %(organization_id)s and poured_at <= %(at)s
    union all
    select grant_id, end_micros - start_micros from credits.unburns
    where organization_id = %(organization_id)s and poured_at <= %(at)s and taken_back_at > %(at)s
)
select g.grant_id, g.pool_id, g.source, g.amount_micros, g.priority, g.is_free, g.effective_at,
    case when isfinite(g.expires_at) then g.expires_at end as expires_at, g.reason, g.created_at,
    greatest(g.effective_at, g.created_at) <= %(at)s as has_begun,
    coalesce(m.amount, 0)::bigint as brought_micros, coalesce(s.micros, 0)::bigint as burnt_micros,
    -- One that was voided before its time was never booked.
    m.amount is null and t.state = 'ended' and t.ended_at <= %(at)s as was_withdrawn
from credits.grants g
join credits.grant_states t on t.organization_id = g.organization_id and t.grant_id = g.grant_id
left join (select grant_id, sum(amount) as amount from moves group by 1) m on m.grant_id = g.grant_id
left join (select grant_id, sum(micros) as micros from stretches group by 1) s on s.grant_id = g.grant_id
where g.organization_id = %(organization_id)s and g.created_at <= %(at)s
order by g.pool_id, g.priority, g.expires_at, g.is_free desc, g.effective_at, g.created_at, g.grant_id

-- name: poured_beyond
-- Of pools where a correction had taken back what was poured: what stood on each grant beyond what was used by then.
select b.grant_id, sum(b.end_micros - greatest(b.start_micros, u.used))::bigint as micros
from unnest(%(pool_ids)s::uuid[], %(used)s::bigint[]) u(pool_id, used)
join (
    select pool_id, start_micros, end_micros, grant_id from credits.burns
    where organization_id = %(organization_id)s and poured_at <= %(at)s
    union all
    select pool_id, start_micros, end_micros, grant_id from credits.unburns
    where organization_id = %(organization_id)s and poured_at <= %(at)s and taken_back_at > %(at)s
) b on b.pool_id = u.pool_id and b.end_micros > u.used
group by 1

-- name: limits
-- Limits that were in force, and for each default what it counted of each one. used: from the attribution rows that passed the limit in the
-- period around the instant; of tokens, which attribution does not keep, only where the period counted nothing since.
with in_force as (
    select l.*, c.amount as amount_then, c.action as action_then, c.is_strict as is_strict_then
    from credits.limits l
    cross join lateral (
        select * from credits.limit_changes c
        where c.organization_id = l.organization_id and c.limit_id = l.limit_id and c.changed_at <= %(at)s order by c.nr desc limit 1
    ) c
    where l.organization_id = %(organization_id)s and (l.ended_at is null or l.ended_at > %(at)s)
), found as (
    select l.limit_id, l.balance_id, l.scope_id, l.is_default, l as set_limit from in_force l
    union all
    select l.limit_id, k.balance_id, k.subject_id, true, l
    from in_force l
    join credits.counters k on k.organization_id = l.organization_id and k.limit_id = l.limit_id and k.created_at <= %(at)s
    where not exists (select from in_force o where o.balance_id = k.balance_id)
), periods as (
    select f.balance_id, b.period_start, b.period_end, b.used_amount, (f.set_limit).metric
    from found f
    join credits.balances b on b.organization_id = %(organization_id)s and b.balance_id = f.balance_id and b.period_start <= %(at)s and b.period_end > %(at)s
), rows as materialized (
    select a.chain_id, a.model, a.feature, a.flags & 2 = 2 as is_own, a.booked_at > %(at)s as is_later, sum(a.charged_micros) as charged,
        count(*) filter (where a.kind = 0) as calls
    from ledger.attribution a
    where a.organization_id = %(organization_id)s and a.booked_at >= (select min(period_start) from periods)
    group by 1, 2, 3, 4, 5
), used as (
    select p.balance_id, coalesce(bool_or(r.is_later), false) as has_later,
        sum(case e.metric when 0 then r.charged else r.calls end) filter (where not r.is_later) as amount
    from periods p
    join credits.chains c on c.organization_id = %(organization_id)s and p.balance_id = any (c.entry_ids)
    cross join lateral unnest(c.entry_ids, c.entry_starts, c.entry_metrics, c.entry_legs, c.entry_filters) e(id, start, metric, leg, filter)
    join rows r on r.chain_id = c.chain_id
    where e.id = p.balance_id and e.start = p.period_start and e.leg = 0 and credits.admits(e.filter, r.model, r.feature)
      and not (e.metric = 0 and r.is_own)
    group by 1
)
select f.limit_id, f.balance_id, (f.set_limit).scope, f.scope_id, (f.set_limit).metric, (f.set_limit).model_filter, (f.set_limit).period,
    (f.set_limit).amount_then as amount, (f.set_limit).action_then as action, (f.set_limit).is_strict_then as is_strict, f.is_default,
    (f.set_limit).within_scope, (f.set_limit).within_id, (f.set_limit).created_at,
    coalesce((
        select sum(r.amount) from credits.raises r
        where r.organization_id = %(organization_id)s and r.balance_id = f.balance_id and r.created_at <= %(at)s and r.starts_at <= %(at)s
          and least(r.ends_at, r.ended_at) > %(at)s), 0)::bigint as raised,
    case when f.balance_id is null then null
         when (f.set_limit).metric <> 'tokens' then coalesce(u.amount, 0)
         when not coalesce(u.has_later, false) then coalesce(p.used_amount, 0) end::bigint as used,
    case when isfinite(p.period_start) then p.period_start end as period_start, case when isfinite(p.period_end) then p.period_end end as period_end
from found f
left join periods p on p.balance_id = f.balance_id
left join used u on u.balance_id = f.balance_id
order by (f.set_limit).created_at, f.limit_id, f.balance_id nulls first

-- name: shares
-- Shares that were in force. Of a reserved one whose member could go on in the open part, attribution does not tell what which part paid: used
-- is known only where its requests drew nothing since.
with shares as (
    select a.organization_id, a.allocation_id, a.pool_id, a.user_id, a.kind, a.period, a.created_at,
        c.changed_at, c.amount_micros, c.limit_micros, c.when_empty, c.carry_micros,
        r.period_start as renewed_at, r.period_end as renews_at, r.opening_micros, r.carried_micros
    from credits.allocations a
    cross join lateral (
        select * from credits.share_changes c
        where c.organization_id = a.organization_id and c.allocation_id = a.allocation_id and c.changed_at <= %(at)s order by c.nr desc limit 1
    ) c
    left join lateral (
        select * from credits.allocation_periods r
        where r.organization_id = a.organization_id and r.allocation_id = a.allocation_id and r.period_start <= %(at)s
        order by r.period_start desc limit 1
    ) r on true
    where a.organization_id = %(organization_id)s and (a.ended_at is null or a.ended_at > %(at)s)
), takes as (
    select request_id, booked_at, sum(charged_micros) as micros from ledger.attribution_takes
    where organization_id = %(organization_id)s group by 1, 2
), draws as (
    select a.chain_id, a.pool_id, a.booked_at, a.charged_micros - coalesce(t.micros, 0) as micros, false as is_refund
    from ledger.attribution a left join takes t on t.request_id = a.request_id and t.booked_at = a.booked_at
    where a.organization_id = %(organization_id)s and a.pool_id is not null
    union all
    select a.chain_id, t.pool_id, t.booked_at, t.charged_micros, false
    from ledger.attribution_takes t
    join ledger.attribution a on a.organization_id = t.organization_id and a.request_id = t.request_id and a.booked_at = t.booked_at
    where t.organization_id = %(organization_id)s
    union all
    select a.chain_id, e.to_id, e.booked_at, -e.amount, true
    from ledger.entries e join ledger.attribution a on a.organization_id = e.organization_id and a.request_id = e.from_id and a.kind = 0
    where e.organization_id = %(organization_id)s and e.from_kind = 'usage'
), by_chain as materialized (
    select chain_id, pool_id, is_refund, booked_at > %(at)s as is_later, sum(micros) as micros from draws where micros <> 0 group by 1, 2, 3, 4
), used as (
    select s.allocation_id, b.used_amount, b.period_start, b.period_end,
        sum(d.micros) filter (where not d.is_later) as micros,
        coalesce(bool_or(d.is_later), false) as has_later,
        coalesce(bool_or(d.chain_id is not null and (select count(*) from unnest(c.leg_pool_ids) l where l = s.pool_id) > 1), false) as is_mixed
    from shares s
    join credits.balances b on b.organization_id = s.organization_id and b.balance_id = s.allocation_id and b.period_start <= %(at)s and b.period_end > %(at)s
    left join (
        credits.chains c cross join lateral unnest(c.entry_ids, c.entry_starts) e(id, start)
    ) on c.organization_id = s.organization_id and e.id = s.allocation_id and e.start = b.period_start
    left join by_chain d on d.chain_id = c.chain_id and d.pool_id = s.pool_id and not (d.is_refund and s.kind = 'reserved')
    group by 1, 2, 3, 4
)
select s.allocation_id, s.pool_id, s.user_id, s.kind, s.period, s.when_empty, s.amount_micros,
    case when s.kind = 'reserved' and s.renewed_at > s.changed_at then s.opening_micros + s.amount_micros + s.carried_micros
         else s.limit_micros end as limit_micros,
    coalesce(s.opening_micros, 0) as opening_micros,
    case when not coalesce(u.is_mixed, false) then coalesce(u.micros, 0) when not u.has_later then u.used_amount end::bigint as used_micros,
    coalesce(s.renews_at, case when isfinite(u.period_end) then u.period_end end) as period_end
from shares s left join used u on u.allocation_id = s.allocation_id
order by s.created_at, s.allocation_id

-- name: bounds
-- The first instant of a day, and of the day after the last, by the organization's clocks.
select %(first)s::timestamp at time zone o.zone as starts_at, %(after)s::timestamp at time zone o.zone as ends_at, o.zone, clock_timestamp() as now
from identity.organizations o where o.organization_id = %(organization_id)s

-- name: movements
-- What entries brought into each pool and took out of it, of a time; what went from one grant to the next inside a pool is no movement of it.
select m.pool_id, m.what, m.source, sum(m.amount)::bigint as micros, count(*) as entries
from (
    select e.to_id as pool_id, e.amount, case when e.from_kind = 'usage' then 'refund' when e.kind = 'transfer' then 'transfer_in' else e.kind end as what,
        case when e.kind = 'grant' and e.from_kind <> 'usage' then g.source end as source
    from ledger.entries e left join credits.grants g on g.organization_id = e.organization_id and g.grant_id = e.grant_id
    where e.organization_id = %(organization_id)s and e.happened_at >= %(starts_at)s and e.happened_at < %(ends_at)s and e.to_kind = 'pool' and e.unit = 'credit'
    union all
    select e.from_id, -e.amount, case e.kind when 'transfer' then 'transfer_out' else e.kind end, null
    from ledger.entries e
    where e.organization_id = %(organization_id)s and e.happened_at >= %(starts_at)s and e.happened_at < %(ends_at)s and e.from_kind = 'pool' and e.unit = 'credit'
) m
group by 1, 2, 3 order by 1, 2, 3

-- name: uses
-- What was drawn from each pool by bookings of a time, by the month in which it was used.
with rows as (
    select a.request_id, a.booked_at, a.used_at, a.kind, a.pool_id, a.charged_micros
    from ledger.attribution a
    where a.organization_id = %(organization_id)s and a.booked_at >= %(starts_at)s and a.booked_at < %(ends_at)s and a.pool_id is not null
), takes as (
    select t.request_id, t.booked_at, t.pool_id, t.charged_micros from ledger.attribution_takes t
    where t.organization_id = %(organization_id)s and t.booked_at >= %(starts_at)s and t.booked_at < %(ends_at)s
), draws as (
    select request_id, used_at, kind, pool_id, charged_micros as micros from rows
    union all
    select t.request_id, r.used_at, r.kind, t.pool_id, t.charged_micros from takes t join rows r using (request_id, booked_at)
    union all
    select t.request_id, r.used_at, r.kind, r.pool_id, -t.charged_micros from takes t join rows r using (request_id, booked_at)
)
select pool_id, kind = 1 as is_correction, to_char(used_at at time zone %(zone)s, 'YYYY-MM') as month,
    used_at >= %(starts_at)s and used_at < %(ends_at)s as is_inside, sum(micros)::bigint as micros, count(distinct request_id) as requests
from draws group by 1, 2, 3, 4 having sum(micros) <> 0 order by 1, 3, 2

-- name: late_uses
-- What was used in a time and booked after it, until now.
with rows as (
    select a.request_id, a.booked_at, a.pool_id, a.charged_micros
    from ledger.attribution a
    where a.organization_id = %(organization_id)s and a.booked_at >= %(ends_at)s and a.used_at >= %(starts_at)s and a.used_at < %(ends_at)s
      and a.pool_id is not null
), takes as (
    select t.request_id, t.booked_at, t.pool_id, t.charged_micros, r.pool_id as first_pool_id
    from ledger.attribution_takes t join rows r using (request_id, booked_at)
    where t.organization_id = %(organization_id)s and t.booked_at >= %(ends_at)s
), draws as (
    select request_id, pool_id, charged_micros as micros from rows
    union all
    select request_id, pool_id, charged_micros from takes
    union all
    select request_id, first_pool_id, -charged_micros from takes
)
select pool_id, sum(micros)::bigint as micros, count(distinct request_id) as requests from draws group by 1 having sum(micros) <> 0
