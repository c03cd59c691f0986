-- What was burnt is worth: the money value of use, as far as grants have paid it.

-- tails: which grants would pay what pools have used since the last pour, as pouring now would have it. p_pool_id null: of every pool. Reads
-- with the caller's rights.
create or replace function credits.tails(p_organization_id uuid, p_pool_id uuid default null)
returns table (pool_id uuid, start_micros bigint, end_micros bigint, grant_id uuid, grant_from_micros bigint, value_nano_usd bigint, reason text)
language sql stable set search_path = credits, pg_temp as $$
    select t.pool_id, t.start, least(t.start + t.left_micros, t.used), (t.g).grant_id, (t.g).amount_micros - t.left_micros,
        credits.value_taken(t.g, t.left_micros, t.value_left_nano_usd, least(t.left_micros, t.used - t.start)), credits.burn_reason(t.g, t.next)
    from (
        select p.pool_id, b.used_amount as used, g, s.left_micros, s.value_left_nano_usd, lead(g) over burn_order as next,
            (p.poured_micros + sum(s.left_micros) over burn_order - s.left_micros)::bigint as start
        from pools p
        join balances b on b.organization_id = p.organization_id and b.balance_id = p.pool_id
        join grant_states s on s.organization_id = p.organization_id and s.pool_id = p.pool_id and s.state in ('active', 'lingering') and s.left_micros > 0
        join grants g on g.organization_id = s.organization_id and g.grant_id = s.grant_id
        where p.organization_id = p_organization_id and (p_pool_id is null or p.pool_id = p_pool_id) and b.used_amount > p.poured_micros
        window burn_order as (partition by p.pool_id
            order by g.priority, g.expires_at, g.is_free desc, g.effective_at, g.created_at, g.grant_id)
    ) t
    where t.start < t.used;
$$;
comment on function credits.tails is 'Which grants would pay what pools have used since the last pour';

-- stretches: which grant paid which stretch of a pool's running total, at what value, and why that one.
create or replace function credits.stretches(p_organization_id uuid, p_pool_id uuid default null)
returns table (pool_id uuid, start_micros bigint, end_micros bigint, grant_id uuid, grant_from_micros bigint, value_nano_usd bigint, reason text)
language sql stable set search_path = credits, pg_temp as $$
    select b.pool_id, b.start_micros, b.end_micros, b.grant_id, b.grant_from_micros, b.value_nano_usd, b.reason
    from burns b where b.organization_id = p_organization_id and (p_pool_id is null or b.pool_id = p_pool_id)
    union all
    select * from credits.tails(p_organization_id, p_pool_id);
$$;
comment on function credits.stretches is 'Which grant paid which stretch of a pool''s running total, its value in nano-dollars and why it burnt before the next';

-- revenue_of_requests: the money value of what requests drew, row by row: of charges and corrections by the grants behind their stretch, of
-- refunds what went back. Sums over all rows are what was burnt, to the nano-dollar. Reads with the caller's rights.
create or replace function credits.revenue_of_requests(p_organization_id uuid, p_from timestamptz, p_to timestamptz, p_request_id uuid default null)
returns table (request_id uuid, booked_at timestamptz, used_at timestamptz, kind smallint, charged_micros bigint, revenue_nano_usd bigint)
language sql stable set search_path = credits, pg_temp as $$
    with rows as materialized (
        select a.* from ledger.attribution a
        where a.organization_id = p_organization_id and a.used_at >= p_from and a.used_at < p_to and (p_request_id is null or a.request_id = p_request_id)
    ), takes as materialized (
        select t.* from ledger.attribution_takes t join rows r on r.request_id = t.request_id and r.booked_at = t.booked_at
        where t.organization_id = p_organization_id
    ), draws as (
        select r.request_id, r.booked_at, r.pool_id, r.position_micros as start, r.charged_micros - coalesce(t.micros, 0) as micros
        from rows r
        left join (select t.request_id, t.booked_at, sum(t.charged_micros)::bigint as micros from takes t group by 1, 2) t
            on t.request_id = r.request_id and t.booked_at = r.booked_at
        where r.pool_id is not null
        union all
        select t.request_id, t.booked_at, t.pool_id, t.position_micros, t.charged_micros from takes t
    ), paid as (
        select d.request_id, d.booked_at, sum(case when d.micros > 0 then 1 else -1 end * (
            credits.value_within(g, s.grant_from_micros, s.end_micros - s.start_micros, s.value_nano_usd, greatest(d.start, d.start + d.micros) - s.start_micros)
            - credits.value_within(g, s.grant_from_micros, s.end_micros - s.start_micros, s.value_nano_usd, least(d.start, d.start + d.micros) - s.start_micros)
        ))::bigint as value
        from draws d
        join credits.stretches(p_organization_id) s on s.pool_id = d.pool_id
            and s.end_micros > least(d.start, d.start + d.micros) and s.start_micros < greatest(d.start, d.start + d.micros)
        join grants g on g.organization_id = p_organization_id and g.grant_id = s.grant_id
        group by 1, 2
    ), refunds as (
        select r.request_id, r.booked_at, -sum(e.value_nano_usd)::bigint as value
        from rows r
        join ledger.entries e on e.organization_id = p_organization_id and e.from_kind = 'usage' and e.from_id = r.request_id
            and e.booked_at = r.booked_at and e.kind in ('refund', 'grant')
        where r.kind = 2 group by 1, 2
    )
    select r.request_id, r.booked_at, r.used_at, r.kind, r.charged_micros, coalesce(p.value, f.value, 0)
    from rows r
    left join paid p on p.request_id = r.request_id and p.booked_at = r.booked_at
    left join refunds f on f.request_id = r.request_id and f.booked_at = r.booked_at;
$$;
comment on function credits.revenue_of_requests is 'Money value of what requests of a time of use drew, a row of the attribution each, nano-dollars';
