-- What only the simulator calls: one organization brought to an instant of its choosing.

-- bring_up_to_date: apply every time event until p_at and pour all that was used, so that each grant's row says what it has left.
create or replace function credits.bring_up_to_date(p_organization_id uuid, p_at timestamptz) returns void
language plpgsql volatile security definer set search_path = credits, pg_temp as $$
declare
    v_now timestamptz := credits.lock_gate(p_organization_id, p_at);
begin
    perform credits.pour(p_organization_id, pool_id, v_now) from pools where organization_id = p_organization_id order by pool_id;
end $$;
comment on function credits.bring_up_to_date is 'Applies an organization''s time events until an instant and pours its use over its grants';

-- What a simulation reads of its organization. The role bursar_simulator has no right to any table.

create or replace function credits.told_open_part(p_organization_id uuid, p_pool_id uuid) returns uuid
language sql stable security definer set search_path = credits, pg_temp as $$
    select open_part_id from pools where organization_id = p_organization_id and pool_id = p_pool_id;
$$;
comment on function credits.told_open_part is 'The balance of what no allocation of a pool reserves';

create or replace function credits.told_next_events(p_organization_id uuid, out grants_at timestamptz, out holds_at timestamptz)
language sql stable security definer set search_path = credits, pg_temp as $$
    select
        (select min(e.at)
         from (select case s.state when 'scheduled' then g.effective_at else g.expires_at end as at
               from grant_states s join grants g on g.organization_id = s.organization_id and g.grant_id = s.grant_id
               where s.organization_id = p_organization_id and s.state in ('scheduled', 'active', 'spent')
               union all select next_at from grant_schedules where organization_id = p_organization_id) e
         where isfinite(e.at)),
        (select min(lease_expires_at) from holds where organization_id = p_organization_id);
$$;
comment on function credits.told_next_events is 'When the next grant starts or ends, and when the next hold ends by itself; null: never';

create or replace function credits.told_pools(p_organization_id uuid)
returns table (pool_id uuid, limit_micros bigint, used bigint, held bigint, overage bigint)
language sql stable security definer set search_path = credits, pg_temp as $$
    select p.pool_id, b.limit_amount, b.used_amount, b.held_amount, b.excess_amount
    from pools p
    join balances b on b.organization_id = p.organization_id and b.balance_id = p.pool_id and b.period_start = '-infinity'
    where p.organization_id = p_organization_id
    order by p.created_at, p.pool_id;
$$;
comment on function credits.told_pools is 'Balances of an organization''s pools, in micros';

create or replace function credits.told_grants(p_organization_id uuid)
returns table (
    grant_id uuid, pool_id uuid, parent_grant_id uuid, schedule_id uuid, source text, state text, amount bigint, remaining bigint, burnt bigint,
    expired bigint, voided bigint, refunded bigint, effective_at timestamptz, expires_at timestamptz
)
language sql stable security definer set search_path = credits, pg_temp as $$
    select g.grant_id, g.pool_id, g.parent_grant_id, g.schedule_id, g.source, s.state, g.amount_micros, s.left_micros, coalesce(u.burnt, 0)::bigint,
        coalesce(e.expired, 0)::bigint, coalesce(e.voided, 0)::bigint, coalesce(e.refunded, 0)::bigint, g.effective_at,
        case when isfinite(g.expires_at) then g.expires_at end
    from grants g
    join grant_states s on s.organization_id = g.organization_id and s.grant_id = g.grant_id
    left join (
        select b.grant_id, sum(b.end_micros - b.start_micros) as burnt
        from burns b where b.organization_id = p_organization_id group by b.grant_id) u on u.grant_id = g.grant_id
    left join (
        select l.grant_id, sum(l.amount) filter (where l.kind = 'expiry') as expired, sum(l.amount) filter (where l.kind = 'void') as voided,
            sum(l.amount) filter (where l.kind = 'refund') as refunded
        from ledger.entries l where l.organization_id = p_organization_id group by l.grant_id) e on e.grant_id = g.grant_id
    where g.organization_id = p_organization_id
    order by g.pool_id, g.priority, g.expires_at, g.is_free desc, g.effective_at, g.created_at, g.grant_id;
$$;
comment on function credits.told_grants is 'An organization''s grants in burn order, with what became of each, in micros';

create or replace function credits.told_limits(p_organization_id uuid, p_at timestamptz)
returns table (balance_id uuid, metric text, period text, limit_amount bigint, used bigint, held bigint, overage bigint, resets_at timestamptz)
language sql stable security definer set search_path = credits, pg_temp as $$
    select o.id, o.metric, o.period, coalesce(b.limit_amount - r.opening, o.amount), greatest(0, coalesce(b.used_amount, 0) - r.opening),
        coalesce(b.held_amount, 0), coalesce(b.excess_amount, 0),
        case when isfinite(b.period_end) then b.period_end when isfinite(o.renews_at) then o.renews_at end
    from (
        select coalesce(l.balance_id, l.limit_id) as id, l.metric, l.period, l.amount, 'infinity'::timestamptz as renews_at, l.created_at from limits l
        where l.organization_id = p_organization_id and l.ended_at is null and l.amount is not null
        union all
        select a.allocation_id, 'credits', a.period, a.amount_micros, a.renews_at, a.created_at from allocations a
        where a.organization_id = p_organization_id and a.ended_at is null) o
    left join balances b on b.organization_id = p_organization_id and b.balance_id = o.id and b.period_start <= p_at and b.period_end > p_at
    -- A reserved share that is renewed has one balance for ever: what it had used before its period is past.
    left join allocation_periods p on p.organization_id = p_organization_id and p.allocation_id = o.id and p.period_end = o.renews_at
    cross join lateral (select coalesce(p.opening_micros, 0) as opening) r
    order by o.created_at, o.id;
$$;
comment on function credits.told_limits is 'Caps and shares in force, in the period around an instant; one that nobody has met in it has used nothing';

create or replace function credits.told_holds(p_organization_id uuid) returns table (request_id uuid, held bigint, placed_at timestamptz)
language sql stable security definer set search_path = credits, pg_temp as $$
    select h.request_id, h.amount_micros, h.placed_at from holds h
    where h.organization_id = p_organization_id order by h.placed_at, h.request_id;
$$;
comment on function credits.told_holds is 'Open holds of an organization, in micros';
