-- Each block returns one row for every offence against its invariant: organization_id, subject, expected, found (texts).
-- The comment under the name is the invariant, in words. No row: it holds.

-- name: balances_add_up
-- A balance is never over its limit but by its excess, and nothing in it is negative.
select organization_id, kind || ' ' || balance_id || ' from ' || period_start as subject,
    greatest(0, used_amount + held_amount - limit_amount)::text as expected, excess_amount::text as found
from credits.balances
where excess_amount <> greatest(0, used_amount + held_amount - limit_amount) or least(limit_amount, used_amount, held_amount, excess_amount) < 0

-- name: periods_do_not_overlap
-- The periods of one balance follow each other without overlap.
select organization_id, kind || ' ' || balance_id as subject, 'from ' || last_end || ' on' as expected, period_start::text as found
from (
    select *, lag(period_end) over (partition by organization_id, balance_id order by period_start) as last_end from credits.balances
) b
where period_start < last_end

-- name: pool_limit_is_the_ledger
-- A pool's limit is what the ledger brought into it less what the ledger took out.
select p.organization_id, 'pool ' || p.pool_id as subject, coalesce(e.amount, 0)::text as expected, b.limit_amount::text as found
from credits.pools p
join credits.balances b on b.organization_id = p.organization_id and b.balance_id = p.pool_id
left join (
    select organization_id, pool_id, sum(amount) as amount
    from (
        select organization_id, to_id as pool_id, amount from ledger.entries where to_kind = 'pool' and unit = 'credit'
        union all
        select organization_id, from_id, -amount from ledger.entries where from_kind = 'pool' and unit = 'credit'
    ) moves
    group by 1, 2
) e on e.organization_id = p.organization_id and e.pool_id = p.pool_id
where b.limit_amount <> coalesce(e.amount, 0)

-- name: pool_use_is_the_attribution
-- What a pool has used is the sum of what attribution and its takes drew from it.
select p.organization_id, 'pool ' || p.pool_id as subject, coalesce(d.drawn, 0)::text as expected, b.used_amount::text as found
from credits.pools p
join credits.balances b on b.organization_id = p.organization_id and b.balance_id = p.pool_id
left join (
    select organization_id, pool_id, sum(micros) as drawn
    from (
        select organization_id, pool_id, charged_micros as micros from ledger.attribution where pool_id is not null
        union all
        select organization_id, pool_id, charged_micros from ledger.attribution_takes
        union all  -- what further pools paid was not drawn from the first
        select t.organization_id, a.pool_id, -t.charged_micros
        from ledger.attribution_takes t
        join ledger.attribution a on a.organization_id = t.organization_id and a.request_id = t.request_id and a.booked_at = t.booked_at
    ) draws
    group by 1, 2
) d on d.organization_id = p.organization_id and d.pool_id = p.pool_id
where b.used_amount <> coalesce(d.drawn, 0)

-- name: positions_tile
-- The draws on a pool, each from its position as long as its charge, lead from 0 to what the pool has used without gap or overlap.
with draws as (
    select a.organization_id, a.pool_id, a.position_micros as start, a.charged_micros - coalesce(t.taken, 0) as micros
    from ledger.attribution a
    left join (
        select organization_id, request_id, booked_at, sum(charged_micros) as taken from ledger.attribution_takes group by 1, 2, 3
    ) t on t.organization_id = a.organization_id and t.request_id = a.request_id and t.booked_at = a.booked_at
    where a.pool_id is not null
    union all
    select organization_id, pool_id, position_micros, charged_micros from ledger.attribution_takes
), ends as (
    -- Named once, so that a question about one organization reads no other's rows.
    select d.organization_id, d.pool_id, e.point, e.n
    from draws d cross join lateral (values (d.start, 1), (d.start + d.micros, -1)) e(point, n) where d.micros <> 0
    union all
    select p.organization_id, p.pool_id, 0, -1 from credits.pools p
    union all
    select p.organization_id, p.pool_id, b.used_amount, 1
    from credits.pools p join credits.balances b on b.organization_id = p.organization_id and b.balance_id = p.pool_id
)
select organization_id, 'pool ' || pool_id || ' at ' || point as subject, 'as many draws begin as end' as expected, sum(n) || ' more begin' as found
from ends group by organization_id, pool_id, point having sum(n) <> 0

-- name: positions_follow_time
-- Draws on a pool without corrections lie in the order in which they were booked.
with draws as (
    select organization_id, pool_id, booked_at, position_micros from ledger.attribution where pool_id is not null
    union all
    select organization_id, pool_id, booked_at, position_micros from ledger.attribution_takes
), ordered as (
    select *, max(position_micros) over (partition by organization_id, pool_id order by booked_at
        range between unbounded preceding and interval '1 microsecond' preceding) as earlier
    from draws
)
select o.organization_id, 'pool ' || o.pool_id || ' booked at ' || o.booked_at as subject, 'not before ' || o.earlier as expected,
    o.position_micros::text as found
from ordered o
where o.position_micros < o.earlier
  and not exists (select from ledger.attribution a where a.organization_id = o.organization_id and a.kind = 1 and a.pool_id = o.pool_id)
  and not exists (
    select from ledger.attribution a
    join ledger.attribution_takes t on t.organization_id = a.organization_id and t.request_id = a.request_id and t.booked_at = a.booked_at
    where a.organization_id = o.organization_id and a.kind = 1 and t.pool_id = o.pool_id)

-- name: takes_belong_to_a_request
-- A take belongs to an attribution row of another first pool.
select t.organization_id, 'request ' || t.request_id || ' booked at ' || t.booked_at as subject, 'a row of another pool' as expected,
    coalesce('pool ' || a.pool_id, 'none') as found
from ledger.attribution_takes t
left join ledger.attribution a on a.organization_id = t.organization_id and a.request_id = t.request_id and a.booked_at = t.booked_at
where a.pool_id is null or a.pool_id = t.pool_id

-- name: holds_fit_their_chain
-- What a hold holds leg by leg adds up to what it holds, on legs that its chain has.
select h.organization_id, 'hold ' || h.request_id as subject, h.amount_micros::text as expected,
    coalesce((select sum(m) from unnest(h.leg_micros) m)::text, 'leg ' || h.leg) as found
from credits.holds h
left join credits.chains c on c.organization_id = h.organization_id and c.chain_id = h.chain_id
where c.chain_id is null
   or (h.leg_micros is null and h.amount_micros > 0 and h.leg not between 1 and cardinality(c.leg_pool_ids))
   or (h.leg_micros is not null and (cardinality(h.leg_micros) <> cardinality(c.leg_pool_ids) or 0 > any (h.leg_micros)
                                     or h.amount_micros <> (select sum(m) from unnest(h.leg_micros) m)))

-- name: held_is_the_open_holds
-- What is held on a balance is the sum of the open holds that took from it.
with held as (
    select h.organization_id, e.id, e.start,
        sum(case e.metric when 1 then 1 when 2 then h.tokens
            else case when e.leg = 0 then h.amount_micros when h.leg_micros is not null then h.leg_micros[e.leg]
                      when e.leg = h.leg then h.amount_micros else 0 end end) as amount
    from credits.holds h
    join credits.chains c on c.organization_id = h.organization_id and c.chain_id = h.chain_id
    cross join lateral unnest(c.entry_ids, c.entry_starts, c.entry_metrics, c.entry_legs, c.entry_filters) e(id, start, metric, leg, filter)
    where credits.admits(e.filter, h.model, h.feature) and not (e.metric = 0 and h.flags & 2 = 2)
    group by 1, 2, 3
)
select b.organization_id, b.kind || ' ' || b.balance_id || ' from ' || b.period_start as subject, coalesce(h.amount, 0)::text as expected,
    b.held_amount::text as found
from credits.balances b
left join held h on h.organization_id = b.organization_id and h.id = b.balance_id and h.start = b.period_start
where b.held_amount <> coalesce(h.amount, 0)

-- name: limit_use_is_the_attribution
-- What a limit on credits or calls has used is the sum of the attribution rows that passed it.
with used as (
    select a.organization_id, e.id, e.start, sum(case e.metric when 0 then a.charged_micros else (a.kind = 0)::int end) as amount
    from ledger.attribution a
    join credits.chains c on c.organization_id = a.organization_id and c.chain_id = a.chain_id
    cross join lateral unnest(c.entry_ids, c.entry_starts, c.entry_metrics, c.entry_legs, c.entry_filters) e(id, start, metric, leg, filter)
    where e.leg = 0 and e.metric in (0, 1) and credits.admits(e.filter, a.model, a.feature) and not (e.metric = 0 and a.flags & 2 = 2)
    group by 1, 2, 3
)
select b.organization_id, 'limit ' || b.balance_id || ' from ' || b.period_start as subject, coalesce(u.amount, 0)::text as expected,
    b.used_amount::text as found
from credits.balances b
left join used u on u.organization_id = b.organization_id and u.id = b.balance_id and u.start = b.period_start
where b.kind = 'limit' and b.used_amount <> coalesce(u.amount, 0)
  and not exists (select from credits.limits l where l.organization_id = b.organization_id and l.balance_id = b.balance_id and l.metric = 'tokens')
  and not exists (select from credits.counters c where c.organization_id = b.organization_id and c.balance_id = b.balance_id and c.metric = 'tokens')

-- name: cap_use_is_the_attribution
-- What a capped share has used is what its pool paid for the requests that passed it.
with draws as (
    select a.organization_id, a.chain_id, a.pool_id, a.charged_micros - coalesce((
        select sum(t.charged_micros) from ledger.attribution_takes t
        where t.organization_id = a.organization_id and t.request_id = a.request_id and t.booked_at = a.booked_at), 0) as micros
    from ledger.attribution a where a.pool_id is not null
    union all
    select t.organization_id, a.chain_id, t.pool_id, t.charged_micros
    from ledger.attribution_takes t
    join ledger.attribution a on a.organization_id = t.organization_id and a.request_id = t.request_id and a.booked_at = t.booked_at
    union all  -- less what was refunded, of each charge by its own row
    select e.organization_id, a.chain_id, e.to_id, -e.amount
    from ledger.entries e
    join ledger.attribution a on a.organization_id = e.organization_id and a.request_id = e.from_id and a.booked_at = e.booked_at and a.kind = 2
    where e.from_kind = 'usage'
), used as (
    select d.organization_id, e.id, e.start, sum(d.micros) as amount
    from draws d
    join credits.chains c on c.organization_id = d.organization_id and c.chain_id = d.chain_id
    cross join lateral unnest(c.entry_ids, c.entry_starts, c.entry_legs) e(id, start, leg)
    where e.leg > 0 and c.leg_pool_ids[e.leg] = d.pool_id
    group by 1, 2, 3
)
select b.organization_id, 'allocation ' || b.balance_id || ' from ' || b.period_start as subject, coalesce(u.amount, 0)::text as expected,
    b.used_amount::text as found
from credits.balances b
join credits.allocations a on a.organization_id = b.organization_id and a.allocation_id = b.balance_id and a.kind = 'capped'
left join used u on u.organization_id = b.organization_id and u.id = b.balance_id and u.start = b.period_start
where b.used_amount <> coalesce(u.amount, 0)

-- name: parts_add_up_to_their_pool
-- A shared pool has used and holds what its open part and its reserved shares have used and hold together.
select p.organization_id, 'pool ' || p.pool_id as subject, b.used_amount || ' used, ' || b.held_amount || ' held' as expected,
    s.used || ' used, ' || s.held || ' held' as found
from credits.pools p
join credits.balances b on b.organization_id = p.organization_id and b.balance_id = p.pool_id
cross join lateral (
    select sum(part.used_amount) as used, sum(part.held_amount) as held
    from credits.balances part
    where part.organization_id = p.organization_id and (part.balance_id = p.open_part_id or part.balance_id in (
        select a.allocation_id from credits.allocations a
        where a.organization_id = p.organization_id and a.pool_id = p.pool_id and a.kind = 'reserved'))
) s
where p.open_part_id is not null and (b.used_amount <> s.used or b.held_amount <> s.held)

-- name: open_part_is_what_nobody_claims
-- The limit of a pool's open part is the pool's limit less what reserved shares claim: their limit, or what they have where that is more.
select p.organization_id, 'open part of pool ' || p.pool_id as subject, greatest(0, b.limit_amount - s.claimed)::text as expected,
    o.limit_amount::text as found
from credits.pools p
join credits.balances b on b.organization_id = p.organization_id and b.balance_id = p.pool_id
join credits.balances o on o.organization_id = p.organization_id and o.balance_id = p.open_part_id
cross join lateral (
    select coalesce(sum(greatest(share.limit_amount, share.used_amount + share.held_amount)), 0) as claimed
    from credits.allocations a
    join credits.balances share on share.organization_id = a.organization_id and share.balance_id = a.allocation_id
    where a.organization_id = p.organization_id and a.pool_id = p.pool_id and a.kind = 'reserved'
) s
where o.limit_amount <> greatest(0, b.limit_amount - s.claimed)

-- name: shares_have_their_size
-- A reserved share's limit is its size, with what refunds gave back to it, what its period opened with, carried over and was given or took; an ended one has none.
select a.organization_id, 'allocation ' || a.allocation_id as subject, s.size::text as expected, b.limit_amount::text as found
from credits.allocations a
join credits.balances b on b.organization_id = a.organization_id and b.balance_id = a.allocation_id
left join lateral (
    select opening_micros + carried_micros + adjusted_micros as micros from credits.allocation_periods p
    where p.organization_id = a.organization_id and p.allocation_id = a.allocation_id order by period_start desc limit 1
) p on true
cross join lateral (select case when a.ended_at is null then greatest(0, a.amount_micros + a.refunded_micros + coalesce(p.micros, 0)) else 0 end as size) s
where a.kind = 'reserved' and b.limit_amount <> s.size

-- name: renewals_follow_each_other
-- The periods of a renewed share follow each other without overlap, and the share is renewed when the last of them ends.
select p.organization_id, 'allocation ' || p.allocation_id as subject, 'from ' || p.last_end || ' on' as expected, p.period_start::text as found
from (
    select *, lag(period_end) over (partition by organization_id, allocation_id order by period_start) as last_end from credits.allocation_periods
) p
where p.period_start < p.last_end
union all
select a.organization_id, 'allocation ' || a.allocation_id, coalesce(p.last_end, 'infinity')::text, a.renews_at::text
from credits.allocations a
left join (select organization_id, allocation_id, max(period_end) as last_end from credits.allocation_periods group by 1, 2) p
    on p.organization_id = a.organization_id and p.allocation_id = a.allocation_id
where a.ended_at is null and a.renews_at <> coalesce(p.last_end, 'infinity')

-- name: raises_are_in_their_limits
-- The limit of a balance that a current chain checks is the amount of its limit, and what active raises add to it.
select b.organization_id, 'limit ' || b.balance_id || ' from ' || b.period_start as subject, (l.amount + r.amount)::text as expected,
    b.limit_amount::text as found
from credits.gates g
join credits.chains c on c.organization_id = g.organization_id and c.replaced_at is null and c.limits_version = g.limits_version
cross join lateral unnest(c.entry_ids, c.entry_starts, c.entry_legs) e(id, start, leg)
join credits.balances b on b.organization_id = c.organization_id and b.balance_id = e.id and b.period_start = e.start
left join credits.counters k on k.organization_id = b.organization_id and k.balance_id = b.balance_id
cross join lateral (
    select amount from credits.limits l
    where l.organization_id = b.organization_id and l.ended_at is null and (l.balance_id = b.balance_id or l.limit_id = k.limit_id)
    order by l.is_default limit 1
) l
cross join lateral (
    select coalesce(sum(amount), 0) as amount from credits.raises r
    where r.organization_id = b.organization_id and r.balance_id = b.balance_id and r.state = 'active'
) r
where e.leg = 0 and c.valid_until > clock_timestamp() and b.limit_amount <> l.amount + r.amount

-- name: raises_follow_their_requests
-- An approved request has its raise, and no other has one.
select q.organization_id, 'request ' || q.limit_request_id as subject, q.state as expected, count(r.raise_id) || ' raises' as found
from credits.limit_requests q
left join credits.raises r on r.organization_id = q.organization_id and r.limit_request_id = q.limit_request_id
    and r.balance_id = q.balance_id
group by q.organization_id, q.limit_request_id, q.state
having count(r.raise_id) <> (q.state = 'approved')::int

-- name: grants_add_up
-- What came into a grant, refunds too, is what it has left and what was burnt of it, expired, was voided or went on; the ledger brought in all of it or nothing yet.
select g.organization_id, 'grant ' || g.grant_id || ' (' || s.state || ')' as subject, g.amount_micros::text as expected,
    s.left_micros || ' left, ' || coalesce(b.burnt, 0) || ' burnt, ' || coalesce(e.gone, 0) + coalesce(m.gone, 0) || ' gone, '
        || coalesce(e.booked, 0) || ' booked, ' || coalesce(e.refunded, 0) || ' refunded' as found
from credits.grants g
join credits.grant_states s on s.organization_id = g.organization_id and s.grant_id = g.grant_id
left join (
    select organization_id, grant_id, sum(end_micros - start_micros) as burnt from credits.burns group by 1, 2
) b on b.organization_id = g.organization_id and b.grant_id = g.grant_id
left join (
    select organization_id, grant_id, sum(amount) filter (where kind in ('grant', 'forgiveness', 'roll_over', 'transfer', 'transfer_in')) as booked,
        sum(amount) filter (where kind in ('expiry', 'void', 'transfer_out')) as gone, sum(amount) filter (where kind = 'refund') as refunded
    from ledger.entries group by 1, 2
) e on e.organization_id = g.organization_id and e.grant_id = g.grant_id
left join (
    select organization_id, from_grant_id, sum(amount) as gone from ledger.entries where from_grant_id is not null group by 1, 2
) m on m.organization_id = g.organization_id and m.from_grant_id = g.grant_id
where case when e.booked is null
    then coalesce(b.burnt, 0) <> 0 or coalesce(e.gone, 0) + coalesce(m.gone, 0) + coalesce(e.refunded, 0) <> 0
         or s.left_micros <> case s.state when 'ended' then 0 else g.amount_micros end or s.state not in ('scheduled', 'ended')
    else e.booked <> g.amount_micros or s.state = 'scheduled'
         or g.amount_micros + coalesce(e.refunded, 0) <> s.left_micros + coalesce(b.burnt, 0) + coalesce(e.gone, 0) + coalesce(m.gone, 0) end
   or (s.state in ('active', 'lingering')) <> (s.left_micros > 0 and e.booked is not null)

-- name: money_adds_up
-- The money paid for a grant, nothing for a complimentary one, is what is still in it and what went along with what was burnt, expired, was voided or went on, less what refunds brought back.
select g.organization_id, 'grant ' || g.grant_id as subject, case when g.is_free then 0 else g.cost_basis_nano_usd end::text as expected,
    s.value_left_nano_usd || ' left, ' || coalesce(b.value, 0) || ' burnt, ' || coalesce(e.gone, 0) + coalesce(m.gone, 0) || ' gone, '
        || coalesce(e.refunded, 0) || ' refunded' as found
from credits.grants g
join credits.grant_states s on s.organization_id = g.organization_id and s.grant_id = g.grant_id
left join (
    select organization_id, grant_id, sum(value_nano_usd) as value from credits.burns group by 1, 2
) b on b.organization_id = g.organization_id and b.grant_id = g.grant_id
left join (
    select organization_id, grant_id, sum(value_nano_usd) filter (where kind in ('expiry', 'void', 'transfer_out')) as gone,
        sum(value_nano_usd) filter (where kind = 'refund') as refunded, bool_or(kind in ('grant', 'forgiveness', 'roll_over', 'transfer', 'transfer_in')) as is_booked
    from ledger.entries group by 1, 2
) e on e.organization_id = g.organization_id and e.grant_id = g.grant_id
left join (
    select organization_id, from_grant_id, sum(value_nano_usd) as gone from ledger.entries where from_grant_id is not null group by 1, 2
) m on m.organization_id = g.organization_id and m.from_grant_id = g.grant_id
where case when g.is_free then 0 else g.cost_basis_nano_usd end + coalesce(e.refunded, 0)
    <> s.value_left_nano_usd + coalesce(b.value, 0) + coalesce(e.gone, 0) + coalesce(m.gone, 0)
  and (e.is_booked or s.state <> 'ended')

-- name: refunds_are_what_came_back
-- What a request was refunded is what came back to grants of it, and no more than it was charged.
select a.organization_id, 'request ' || a.request_id as subject, a.refunded || ' of at most ' || a.charged as expected, coalesce(e.amount, 0)::text as found
from (
    select organization_id, request_id, coalesce(-sum(charged_micros) filter (where kind = 2), 0) as refunded,
        coalesce(sum(charged_micros) filter (where kind < 2), 0) as charged
    from ledger.attribution group by 1, 2 having bool_or(kind = 2)
) a
full join (
    select organization_id, from_id as request_id, sum(amount) as amount from ledger.entries where from_kind = 'usage' group by 1, 2
) e on e.organization_id = a.organization_id and e.request_id = a.request_id
where a.refunded is distinct from e.amount or a.refunded > a.charged

-- name: rolled_over_within_bounds
-- What rolled over of a grant is not beyond its bounds.
select g.organization_id, 'grant ' || g.grant_id as subject, 'from ' || g.min_rollover_micros || ' to ' || g.max_rollover_micros as expected, c.amount::text as found
from credits.grants g
join (
    select organization_id, parent_grant_id, sum(amount_micros) as amount from credits.grants where source = 'roll_over' group by 1, 2
) c on c.organization_id = g.organization_id and c.parent_grant_id = g.grant_id
where g.max_rollover_micros is null or c.amount not between g.min_rollover_micros and g.max_rollover_micros

-- name: closed_pools_are_empty
-- A pool that is closed has nothing to spare but what open holds on it need.
select p.organization_id, 'pool ' || p.pool_id as subject, '0 available' as expected, b.limit_amount - b.used_amount - b.held_amount || ' available' as found
from credits.pools p join credits.balances b on b.organization_id = p.organization_id and b.balance_id = p.pool_id
where p.closed_at is not null and b.limit_amount > b.used_amount + b.held_amount and p.next_event_at > '-infinity'

-- name: burns_tile
-- The stretches that grants paid lead from 0 to what was poured without gap or overlap, and no further than what was used.
with ends as (
    select organization_id, pool_id, start_micros as point, 1 as n from credits.burns
    union all
    select organization_id, pool_id, end_micros, -1 from credits.burns
    union all
    select organization_id, pool_id, 0, -1 from credits.pools
    union all
    select organization_id, pool_id, poured_micros, 1 from credits.pools
)
select organization_id, 'pool ' || pool_id || ' at ' || point as subject, 'as many stretches begin as end' as expected, sum(n) || ' more begin' as found
from ends group by organization_id, pool_id, point having sum(n) <> 0
union all
select p.organization_id, 'pool ' || p.pool_id, 'poured at most ' || b.used_amount, p.poured_micros::text
from credits.pools p join credits.balances b on b.organization_id = p.organization_id and b.balance_id = p.pool_id
where p.poured_micros > b.used_amount

-- name: taken_back_was_poured
-- What a correction took back from a grant had been poured over it, a grant of this pool, and nothing else had the same stretch at that time.
select u.organization_id, 'pool ' || u.pool_id || ' from ' || u.start_micros || ' until ' || u.taken_back_at as subject, 'a grant of the pool' as expected,
    'grant ' || u.grant_id as found
from credits.unburns u join credits.grants g on g.organization_id = u.organization_id and g.grant_id = u.grant_id
where g.pool_id <> u.pool_id
union all
select u.organization_id, 'pool ' || u.pool_id || ' from ' || u.start_micros || ' until ' || u.taken_back_at, 'alone', 'with grant ' || o.grant_id || ', poured at ' || o.poured_at
from credits.unburns u
join (
    select organization_id, pool_id, start_micros, end_micros, grant_id, poured_at, 'infinity'::timestamptz as taken_back_at from credits.burns
    union all
    select organization_id, pool_id, start_micros, end_micros, grant_id, poured_at, taken_back_at from credits.unburns
) o on o.organization_id = u.organization_id and o.pool_id = u.pool_id and o.start_micros < u.end_micros and o.end_micros > u.start_micros
    and o.poured_at < u.taken_back_at and o.taken_back_at > u.poured_at
    and (o.start_micros, o.taken_back_at) is distinct from (u.start_micros, u.taken_back_at)

-- name: limits_are_their_last_change
-- What a limit is, it was set to last, and its changes are counted without gap.
select l.organization_id, 'limit ' || l.limit_id as subject, row(l.amount, l.action, l.is_strict)::text || ', ' || coalesce(c.nr, 0) || ' changes' as expected,
    row(c.amount, c.action, c.is_strict)::text || ', ' || coalesce(n.changes, 0) || ' changes' as found
from credits.limits l
left join (select organization_id, limit_id, count(*) as changes, max(nr) as nr from credits.limit_changes group by 1, 2) n
    on n.organization_id = l.organization_id and n.limit_id = l.limit_id
left join credits.limit_changes c on c.organization_id = n.organization_id and c.limit_id = n.limit_id and c.nr = n.nr
where (l.amount, l.action, l.is_strict) is distinct from (c.amount, c.action, c.is_strict) or c.nr is distinct from n.changes

-- name: shares_are_their_last_change
-- What a share is, it was set to last, and its changes are counted without gap.
select a.organization_id, 'allocation ' || a.allocation_id as subject, row(a.amount_micros, a.when_empty, a.carry_micros)::text || ', ' || coalesce(c.nr, 0) || ' changes' as expected,
    row(c.amount_micros, c.when_empty, c.carry_micros)::text || ', ' || coalesce(n.changes, 0) || ' changes' as found
from credits.allocations a
left join (select organization_id, allocation_id, count(*) as changes, max(nr) as nr from credits.share_changes group by 1, 2) n
    on n.organization_id = a.organization_id and n.allocation_id = a.allocation_id
left join credits.share_changes c on c.organization_id = n.organization_id and c.allocation_id = n.allocation_id and c.nr = n.nr
where (a.amount_micros, a.when_empty, a.carry_micros) is distinct from (c.amount_micros, c.when_empty, c.carry_micros) or c.nr is distinct from n.changes

-- name: closed_accounts_add_up
-- What is still to be got of a closed pool somebody owes it; a pool that is open owes nobody.
select a.organization_id, 'pool ' || a.pool_id as subject, coalesce(-sum(a.rest_micros) filter (where a.rest_micros < 0), 0)::text as expected,
    coalesce(sum(a.rest_micros) filter (where a.rest_micros > 0), 0)::text as found
from credits.closed_accounts a
join credits.pools p on p.organization_id = a.organization_id and p.pool_id = a.pool_id
group by a.organization_id, a.pool_id, p.closed_at
having p.closed_at is null
    or not bool_or(a.is_due) and sum(a.rest_micros) filter (where a.rest_micros > 0) > coalesce(-sum(a.rest_micros) filter (where a.rest_micros < 0), 0)

-- name: events_are_awaited
-- A pool wakes at its grants' next start or end and at its schedules' next grant, at once while a grant lingers or a hold keeps it from closing; the gate wakes with the first of its pools, raises and renewals.
select p.organization_id, 'pool ' || p.pool_id as subject, coalesce(s.at, 'infinity')::text as expected, p.next_event_at::text as found
from credits.pools p
left join (
    select organization_id, pool_id, min(at) as at
    from (
        select s.organization_id, s.pool_id,
            case s.state when 'scheduled' then g.effective_at when 'active' then g.expires_at when 'spent' then g.expires_at else '-infinity' end as at
        from credits.grant_states s join credits.grants g on g.organization_id = s.organization_id and g.grant_id = s.grant_id
        where s.state <> 'ended'
        union all
        select organization_id, pool_id, next_at from credits.grant_schedules
        union all
        select organization_id, pool_id, '-infinity' from credits.sweeps
        union all
        select organization_id, pool_id, '-infinity' from credits.closed_accounts where is_due
    ) events
    group by 1, 2
) s on s.organization_id = p.organization_id and s.pool_id = p.pool_id
where p.next_event_at > coalesce(s.at, 'infinity')
union all
select g.organization_id, 'gate', least(p.at, g.next_limit_event_at)::text, g.next_event_at::text
from credits.gates g
left join (select organization_id, min(next_event_at) as at from credits.pools group by 1) p on p.organization_id = g.organization_id
where g.next_event_at > least(p.at, g.next_limit_event_at)
union all
select g.organization_id, 'gate, for limits', least(a.at, r.at, 'infinity')::text, g.next_limit_event_at::text
from credits.gates g
left join (select organization_id, min(renews_at) as at from credits.allocations group by 1) a on a.organization_id = g.organization_id
left join (
    select organization_id, min(case state when 'scheduled' then least(starts_at, ended_at) else least(ends_at, ended_at) end) as at
    from credits.raises where state <> 'ended' group by 1
) r on r.organization_id = g.organization_id
where g.next_limit_event_at > least(a.at, r.at, 'infinity')

-- name: one_current_chain
-- A user and key have at most one current chain, of no later version than the organization's limits.
select c.organization_id, 'user ' || c.user_id || ' key ' || c.api_key_id as subject, 'one, at version ' || max(g.limits_version) || ' or before' as expected,
    count(*) || ', at version ' || max(c.limits_version) as found
from credits.chains c join credits.gates g on g.organization_id = c.organization_id
where c.replaced_at is null
group by c.organization_id, c.user_id, c.api_key_id
having count(*) > 1 or max(c.limits_version) > max(g.limits_version)

-- name: estimates_were_charged
-- What expiry charged by estimate is in an attribution row that says so.
select e.organization_id, 'request ' || e.request_id as subject, (select coalesce(sum(m), 0) from unnest(e.leg_micros) m)::text as expected,
    coalesce(a.charged_micros::text, 'none') as found
from credits.estimates e
left join ledger.attribution a on a.organization_id = e.organization_id and a.request_id = e.request_id and a.booked_at = e.booked_at
    and a.kind = 0 and a.flags & 64 = 64
where a.charged_micros is distinct from (select coalesce(sum(m), 0) from unnest(e.leg_micros) m)

-- name: acknowledged_charges_are_booked
-- A charge that a stored result acknowledges is in the attribution.
select k.organization_id, 'idempotency key ' || k.idempotency_key as subject, k.outcome ->> 'charged_micros' as expected, 'nothing' as found
from credits.commands k
where (k.outcome ->> 'outcome')::int in (0, 9) and (k.outcome ->> 'charged_micros')::bigint > 0
  and not exists (select from ledger.attribution a where a.organization_id = k.organization_id and a.request_id = k.request_id)

-- name: left_is_the_limit_beyond_the_pour
-- What a pool's grants have left is its limit less what was poured over them.
select p.organization_id, 'pool ' || p.pool_id as subject, (b.limit_amount - p.poured_micros)::text as expected, coalesce(s.micros, 0)::text as found
from credits.pools p
join credits.balances b on b.organization_id = p.organization_id and b.balance_id = p.pool_id
left join (
    select organization_id, pool_id, sum(left_micros) as micros from credits.grant_states where state in ('active', 'lingering') group by 1, 2
) s on s.organization_id = p.organization_id and s.pool_id = p.pool_id
where b.limit_amount - p.poured_micros <> coalesce(s.micros, 0)

-- name: attribution_names_who_its_chain_is_of
-- The user, key, team and department of an attribution row are those of the chain that the request passed.
select a.organization_id, 'request ' || a.request_id || ' booked at ' || a.booked_at as subject,
    row(nullif(c.user_id, '00000000-0000-0000-0000-000000000000'), nullif(c.api_key_id, '00000000-0000-0000-0000-000000000000'),
        c.team_id, c.department_id)::text as expected,
    row(a.user_id, a.api_key_id, a.team_id, a.department_id)::text as found
from ledger.attribution a
left join credits.chains c on c.organization_id = a.organization_id and c.chain_id = a.chain_id
where a.chain_id is not null
  and (nullif(c.user_id, '00000000-0000-0000-0000-000000000000'), nullif(c.api_key_id, '00000000-0000-0000-0000-000000000000'),
       c.team_id, c.department_id) is distinct from (a.user_id, a.api_key_id, a.team_id, a.department_id)

-- name: events_are_numbered_without_gaps
-- The events of one object are 1, 2, 3 …, so that a receiver knows when one is missing; those that were told end, but none within a day.
select organization_id, object_kind || ' ' || object_id as subject, (last_one + 1)::text as expected, sequence::text as found
from (
    select organization_id, object_kind, object_id, sequence, lag(sequence) over numbered as last_one, lag(posted_at) over numbered as last_posted_at
    from outbox.events window numbered as (partition by organization_id, object_kind, object_id order by sequence)
) e
where sequence <> last_one + 1 and last_posted_at > clock_timestamp() - interval '1 day'
