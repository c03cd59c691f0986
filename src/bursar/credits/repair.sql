-- What `bursar repair` does to derived values, as the owner of the tables. Nothing here touches ledger, attribution or grants.

-- name: lock
-- Whoever moves credits of the organization waits until the repair has ended. Due pools are not folded: they may be what is wrong.
select organization_id from credits.gates where organization_id = %(organization_id)s for no key update;

-- name: balance
select limit_amount, used_amount, held_amount, excess_amount from credits.balances
where organization_id = %(organization_id)s and balance_id = %(balance_id)s and period_start = %(period_start)s;

-- name: set_balance
update credits.balances set limit_amount = %(limit_amount)s, used_amount = %(used_amount)s, held_amount = %(held_amount)s,
    excess_amount = greatest(0, %(used_amount)s + %(held_amount)s - %(limit_amount)s)
where organization_id = %(organization_id)s and balance_id = %(balance_id)s and period_start = %(period_start)s;

-- name: reserved_use
-- What reserved shares of a pool have used, where every chain that names one pays from the pool in one way only, so that it can be told.
with draws as (
    select a.chain_id, a.charged_micros - coalesce((
        select sum(t.charged_micros) from ledger.attribution_takes t
        where t.organization_id = a.organization_id and t.request_id = a.request_id and t.booked_at = a.booked_at), 0) as micros
    from ledger.attribution a where a.organization_id = %(organization_id)s and a.pool_id = %(pool_id)s
    union all
    select a.chain_id, t.charged_micros
    from ledger.attribution_takes t
    join ledger.attribution a on a.organization_id = t.organization_id and a.request_id = t.request_id and a.booked_at = t.booked_at
    where t.organization_id = %(organization_id)s and t.pool_id = %(pool_id)s
), by_chain as (
    select chain_id, sum(micros) as micros from draws group by 1
)
select s.allocation_id as balance_id, coalesce(sum(d.micros), 0)::bigint as used_amount
from credits.allocations s
left join credits.chains c on c.organization_id = s.organization_id and s.allocation_id = any (c.entry_ids)
left join by_chain d on d.chain_id = c.chain_id
where s.organization_id = %(organization_id)s and s.pool_id = %(pool_id)s and s.kind = 'reserved'
group by 1
having coalesce(bool_and((select count(*) from unnest(c.leg_pool_ids) l where l = s.pool_id) = 1 or c.chain_id is null), true);

-- name: open_part
-- What of a pool's use and holds no reserved share has.
select p.open_part_id as balance_id, b.used_amount - coalesce(sum(s.used_amount), 0)::bigint as used_amount,
    b.held_amount - coalesce(sum(s.held_amount), 0)::bigint as held_amount
from credits.pools p
join credits.balances b on b.organization_id = p.organization_id and b.balance_id = p.pool_id
left join credits.allocations a on a.organization_id = p.organization_id and a.pool_id = p.pool_id and a.kind = 'reserved'
left join credits.balances s on s.organization_id = a.organization_id and s.balance_id = a.allocation_id
where p.organization_id = %(organization_id)s and p.pool_id = %(pool_id)s
group by 1, b.used_amount, b.held_amount;

-- name: grants
-- What each grant of a pool has left by the ledger and by its stretches, and what its state says; in burn order.
select g.grant_id, s.state, s.left_micros, s.value_left_nano_usd, g.expires_at <= clock_timestamp() as is_over, coalesce(e.is_booked, false) as is_booked,
    case when e.is_booked then g.amount_micros + coalesce(e.refunded, 0) - coalesce(e.gone, 0) - coalesce(m.gone, 0)
         when s.state = 'ended' then 0 else g.amount_micros end::bigint as brought_micros,
    g.amount_micros, case when g.is_free then 0 else g.cost_basis_nano_usd end as paid_nano_usd,
    (case when g.is_free then 0 else g.cost_basis_nano_usd end
        + coalesce(e.refunded_value, 0) - coalesce(e.gone_value, 0) - coalesce(m.gone_value, 0))::bigint as brought_nano_usd
from credits.grants g
join credits.grant_states s on s.organization_id = g.organization_id and s.grant_id = g.grant_id
left join (
    select grant_id, bool_or(kind not in ('expiry', 'void', 'transfer_out', 'refund')) as is_booked,
        sum(amount) filter (where kind = 'refund') as refunded, sum(value_nano_usd) filter (where kind = 'refund') as refunded_value,
        sum(amount) filter (where kind in ('expiry', 'void', 'transfer_out')) as gone,
        sum(value_nano_usd) filter (where kind in ('expiry', 'void', 'transfer_out')) as gone_value
    from ledger.entries where organization_id = %(organization_id)s group by 1
) e on e.grant_id = g.grant_id
left join (
    select from_grant_id, sum(amount) as gone, sum(value_nano_usd) as gone_value
    from ledger.entries where organization_id = %(organization_id)s and from_grant_id is not null group by 1
) m on m.from_grant_id = g.grant_id
where g.organization_id = %(organization_id)s and g.pool_id = %(pool_id)s
order by g.priority, g.expires_at, g.is_free desc, g.effective_at, g.created_at, g.grant_id;

-- name: burns
select start_micros, end_micros, grant_id, value_nano_usd, grant_from_micros, poured_at, reason from credits.burns
where organization_id = %(organization_id)s and pool_id = %(pool_id)s order by start_micros;

-- name: pool_of_grant
select pool_id from credits.grant_states where organization_id = %(organization_id)s and grant_id = %(grant_id)s;

-- name: pour
-- Up to where use was poured, by the pool's own word; its limit; its use.
select p.poured_micros, b.limit_amount, b.used_amount
from credits.pools p join credits.balances b on b.organization_id = p.organization_id and b.balance_id = p.pool_id
where p.organization_id = %(organization_id)s and p.pool_id = %(pool_id)s;

-- name: set_poured
update credits.pools set poured_micros = %(poured_micros)s where organization_id = %(organization_id)s and pool_id = %(pool_id)s;

-- name: set_grant
update credits.grant_states set left_micros = %(left_micros)s, state = %(state)s, value_left_nano_usd = %(value_left_nano_usd)s,
    ended_at = case when %(state)s = 'ended' then coalesce(ended_at, clock_timestamp()) end
where organization_id = %(organization_id)s and grant_id = %(grant_id)s;

-- name: drop_burns
delete from credits.burns where organization_id = %(organization_id)s and pool_id = %(pool_id)s and start_micros = %(start_micros)s;

-- name: add_burn
-- One that was missing: nobody knows any more when it was poured, and why that grant burnt first.
insert into credits.burns (organization_id, pool_id, start_micros, end_micros, grant_id, poured_at, grant_from_micros, value_nano_usd, reason)
values (%(organization_id)s, %(pool_id)s, %(start_micros)s, %(end_micros)s, %(grant_id)s, coalesce(%(poured_at)s, clock_timestamp()),
    %(grant_from_micros)s, %(value_nano_usd)s, %(reason)s);

-- name: wake_pool
update credits.pools set next_event_at = %(at)s where organization_id = %(organization_id)s and pool_id = %(pool_id)s;

-- name: wake_gate
update credits.gates set next_event_at = %(at)s where organization_id = %(organization_id)s;

-- name: wake_gate_for_limits
update credits.gates set next_limit_event_at = %(at)s where organization_id = %(organization_id)s;
