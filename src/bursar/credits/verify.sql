-- One query per invariant of the books: each returns the rows where it does not hold, so that an empty answer means that all is well.

-- name: used_is_attributed
-- A pool has used what attribution says it was charged: its own part of each row, and its takes.
with own as (
    select a.organization_id, a.pool_id, a.charged_micros - coalesce(sum(t.charged_micros), 0)::bigint as micros
    from ledger.attribution a
    left join ledger.attribution_takes t on t.organization_id = a.organization_id and t.request_id = a.request_id and t.booked_at = a.booked_at
    where a.pool_id is not null
    group by a.organization_id, a.pool_id, a.request_id, a.booked_at, a.charged_micros
    union all
    select organization_id, pool_id, charged_micros from ledger.attribution_takes
), charged as (select organization_id, pool_id, sum(micros)::bigint as micros from own group by 1, 2)
select b.organization_id, b.balance_id as subject, coalesce(c.micros, 0) as expected, b.used_amount as found
from credits.balances b
left join charged c on c.organization_id = b.organization_id and c.pool_id = b.balance_id
where b.kind = 'pool' and b.used_amount <> coalesce(c.micros, 0)

-- name: positions_tile
-- The rows of a pool follow one another without gap or overlap from 0 to what it has used.
with drawn as (
    select a.organization_id, a.pool_id, a.booked_at, a.position_micros, a.charged_micros - coalesce(sum(t.charged_micros), 0)::bigint as micros, a.kind
    from ledger.attribution a
    left join ledger.attribution_takes t on t.organization_id = a.organization_id and t.request_id = a.request_id and t.booked_at = a.booked_at
    where a.pool_id is not null
    group by a.organization_id, a.pool_id, a.request_id, a.booked_at, a.position_micros, a.charged_micros, a.kind
    union all
    select organization_id, pool_id, booked_at, position_micros, charged_micros, 0 from ledger.attribution_takes
), corrected as (select distinct organization_id, pool_id from drawn where kind = 1),
ordered as (
    -- A correction may step back, so that such a pool is read in the order of booking; every other by position alone.
    select d.organization_id, d.pool_id, d.position_micros, d.micros,
        lag(d.position_micros + d.micros, 1, 0::bigint) over (
            partition by d.organization_id, d.pool_id
            order by case when c.pool_id is not null then d.booked_at end, d.position_micros, abs(d.micros)) as expected
    from drawn d left join corrected c on c.organization_id = d.organization_id and c.pool_id = d.pool_id
)
select organization_id, pool_id as subject, expected, position_micros as found from ordered where position_micros <> expected

-- name: held_is_the_sum_of_holds
-- What is held on a balance is what the open holds that took from it hold.
with entries as (
    select h.organization_id, e.id, e.start,
        case e.metric
            when 0 then case when e.leg = 0 or h.leg_micros is null then h.amount_micros else h.leg_micros[e.leg] end
            when 1 then 1 else h.tokens end as held
    from credits.holds h
    join credits.chains c on c.organization_id = h.organization_id and c.chain_id = h.chain_id
    cross join lateral unnest(c.entry_ids, c.entry_starts, c.entry_metrics, c.entry_legs, c.entry_filters) e(id, start, metric, leg, filter)
    where (e.leg = 0 or e.leg = h.leg or h.leg_micros is not null) and (e.filter is null or h.model like e.filter)
      and not (e.metric = 0 and h.flags & 2 = 2)
), sums as (select organization_id, id, start, sum(held)::bigint as held from entries group by 1, 2, 3)
select b.organization_id, b.balance_id as subject, coalesce(s.held, 0) as expected, b.held_amount as found
from credits.balances b
left join sums s on s.organization_id = b.organization_id and s.id = b.balance_id and s.start = b.period_start
where b.held_amount <> coalesce(s.held, 0)

-- name: limit_is_booked
-- A pool's limit is what the ledger moved into it less what it moved out.
with moved as (
    select organization_id, to_id as pool_id, amount from ledger.entries where to_kind = 'pool'
    union all select organization_id, from_id, -amount from ledger.entries where from_kind = 'pool'
), sums as (select organization_id, pool_id, sum(amount)::bigint as amount from moved group by 1, 2)
select b.organization_id, b.balance_id as subject, coalesce(s.amount, 0) as expected, b.limit_amount as found
from credits.balances b
left join sums s on s.organization_id = b.organization_id and s.pool_id = b.balance_id
where b.kind = 'pool' and b.limit_amount <> coalesce(s.amount, 0)

-- name: grants_add_up
-- What was granted is burnt, expired, voided or left.
with out_of as (
    select organization_id, grant_id, amount from ledger.entries where kind in ('expiry', 'void')
    union all select organization_id, grant_id, end_micros - start_micros from credits.burns
), sums as (select organization_id, grant_id, sum(amount)::bigint as amount from out_of group by 1, 2)
select g.organization_id, g.grant_id as subject, g.amount_micros as expected, s.left_micros + coalesce(o.amount, 0) as found
from credits.grants g
join credits.grant_states s on s.organization_id = g.organization_id and s.grant_id = g.grant_id
left join sums o on o.organization_id = g.organization_id and o.grant_id = g.grant_id
where g.amount_micros <> s.left_micros + coalesce(o.amount, 0)
  -- One voided before it took effect was never booked.
  and not (s.state = 'ended' and o.amount is null and s.left_micros = 0
           and not exists (select 1 from ledger.entries e where e.organization_id = g.organization_id and e.grant_id = g.grant_id and e.kind = 'grant'))

-- name: burns_tile
-- The stretches that grants paid follow one another from 0 to where the pool is poured.
with ordered as (
    select organization_id, pool_id, start_micros, end_micros,
        lag(end_micros, 1, 0::bigint) over (partition by organization_id, pool_id order by start_micros) as expected
    from credits.burns
)
select organization_id, pool_id as subject, expected, start_micros as found from ordered where start_micros <> expected
union all
select p.organization_id, p.pool_id, coalesce(max(b.end_micros), 0), p.poured_micros
from credits.pools p
left join credits.burns b on b.organization_id = p.organization_id and b.pool_id = p.pool_id
group by p.organization_id, p.pool_id, p.poured_micros
having coalesce(max(b.end_micros), 0) <> p.poured_micros

-- name: left_is_what_the_limit_has_beyond_the_pour
-- What active grants have left is the pool's limit less what is poured.
select b.organization_id, b.balance_id as subject, b.limit_amount - p.poured_micros as expected, coalesce(sum(s.left_micros), 0)::bigint as found
from credits.pools p
join credits.balances b on b.organization_id = p.organization_id and b.balance_id = p.pool_id
left join credits.grant_states s on s.organization_id = p.organization_id and s.pool_id = p.pool_id and s.state in ('active', 'lingering')
group by b.organization_id, b.balance_id, b.limit_amount, p.poured_micros
having b.limit_amount - p.poured_micros <> coalesce(sum(s.left_micros), 0)

-- name: excess_is_exact
-- Excess is what was used and held beyond the limit.
select organization_id, balance_id as subject, greatest(0, used_amount + held_amount - limit_amount) as expected, excess_amount as found
from credits.balances where excess_amount <> greatest(0, used_amount + held_amount - limit_amount)

-- name: parts_make_the_pool
-- What a shared pool has used and holds is what its open part and its reserved shares have.
select p.organization_id, p.pool_id as subject, b.used_amount + b.held_amount as expected,
    (o.used_amount + o.held_amount + coalesce(sum(r.used_amount + r.held_amount), 0))::bigint as found
from credits.pools p
join credits.balances b on b.organization_id = p.organization_id and b.balance_id = p.pool_id
join credits.balances o on o.organization_id = p.organization_id and o.balance_id = p.open_part_id
left join credits.allocations a on a.organization_id = p.organization_id and a.pool_id = p.pool_id and a.kind = 'reserved'
left join credits.balances r on r.organization_id = a.organization_id and r.balance_id = a.allocation_id
group by p.organization_id, p.pool_id, b.used_amount, b.held_amount, o.used_amount, o.held_amount
having b.used_amount + b.held_amount <> o.used_amount + o.held_amount + coalesce(sum(r.used_amount + r.held_amount), 0)

-- name: open_part_is_what_nobody_reserves
-- The open part's limit is the pool's less what reserved shares claim.
select p.organization_id, p.open_part_id as subject,
    greatest(0, b.limit_amount - coalesce(sum(greatest(r.limit_amount, r.used_amount + r.held_amount)), 0))::bigint as expected, o.limit_amount as found
from credits.pools p
join credits.balances b on b.organization_id = p.organization_id and b.balance_id = p.pool_id
join credits.balances o on o.organization_id = p.organization_id and o.balance_id = p.open_part_id
left join credits.allocations a on a.organization_id = p.organization_id and a.pool_id = p.pool_id and a.kind = 'reserved'
left join credits.balances r on r.organization_id = a.organization_id and r.balance_id = a.allocation_id
group by p.organization_id, p.open_part_id, b.limit_amount, o.limit_amount
having o.limit_amount <> greatest(0, b.limit_amount - coalesce(sum(greatest(r.limit_amount, r.used_amount + r.held_amount)), 0))

-- name: limits_count_what_was_charged
-- A limit on credits or calls has used what the requests that passed it were charged, and how many they were.
with counted as (
    select a.organization_id, e.id, e.start, case e.metric when 0 then a.charged_micros else (a.kind = 0)::int end as amount
    from ledger.attribution a
    join credits.chains c on c.organization_id = a.organization_id and c.chain_id = a.chain_id
    cross join lateral unnest(c.entry_ids, c.entry_starts, c.entry_metrics, c.entry_legs, c.entry_filters) e(id, start, metric, leg, filter)
    where e.leg = 0 and e.metric in (0, 1) and (e.filter is null or a.model like e.filter)
), sums as (select organization_id, id, start, sum(amount)::bigint as amount from counted group by 1, 2, 3)
select b.organization_id, b.balance_id as subject, coalesce(s.amount, 0) as expected, b.used_amount as found
from credits.balances b
left join credits.limits l on l.organization_id = b.organization_id and l.limit_id = b.balance_id
left join credits.allocations a on a.organization_id = b.organization_id and a.allocation_id = b.balance_id
left join sums s on s.organization_id = b.organization_id and s.id = b.balance_id and s.start = b.period_start
where ((b.kind = 'limit' and l.metric <> 'tokens') or (b.kind = 'allocation' and a.kind = 'capped'))
  and b.used_amount <> coalesce(s.amount, 0)
