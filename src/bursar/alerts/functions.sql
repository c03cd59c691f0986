-- How far a balance is, by the rules that are about it. These act with the rights of who asks.

-- default_rule: what is told where an organization has set nothing.
create or replace function alerts.default_rule(p_watches text)
returns table (rule_id uuid, measure text, thresholds bigint[], readers text[], addresses text[], collect_minutes integer)
language sql immutable set search_path = alerts, pg_temp as $$
    select r.rule_id, 'percent', r.thresholds, array['concerned'], '{}'::text[], 5
    from (values
        ('pool', '00000000-0000-7000-8000-0000000a1e01'::uuid, array[50, 80, 90, 100]::bigint[]),
        ('allocation', '00000000-0000-7000-8000-0000000a1e02', array[90, 100]),
        ('limit', '00000000-0000-7000-8000-0000000a1e03', array[50, 80, 90, 100])) r(watches, rule_id, thresholds)
    where r.watches = p_watches;
$$;
comment on function alerts.default_rule is 'The rule for pools, shares or limits where an organization has none of its own';

-- level: how many of a rule's thresholds, which are in rising order, are reached. p_filled: what 100 % is; nothing is reached of a limit of 0.
-- It has no search_path of its own, so that it is written out wherever it stands.
create or replace function alerts.level(p_measure text, p_thresholds bigint[], p_filled bigint, p_left bigint) returns smallint
language sql immutable as $$
    select case when p_filled <= 0 then 0
                when p_measure = 'percent' then width_bucket(div((p_filled - p_left)::numeric * 100, p_filled)::bigint, p_thresholds)
                else cardinality(p_thresholds) - width_bucket(p_left - 1, p_thresholds) end::smallint
$$;
comment on function alerts.level is 'How many thresholds of a rule are reached';

-- crossed: of some balances, those that are further than was told, or of which less has to be taken as told since their limit was raised.
-- period_start is a text, since it may be -infinity. p_since: refusals since then count: a balance that refuses with a hundredth left is at 100 %.
create or replace function alerts.crossed(p_organization_ids uuid[], p_balance_ids uuid[], p_period_starts timestamptz[], p_since timestamptz)
returns table (
    organization_id uuid, rule_id uuid, balance_id uuid, period_start text, watches text, measure text, thresholds bigint[], readers text[],
    addresses text[], collect_minutes integer, limit_amount bigint, used_amount bigint, filled_amount bigint, left_amount bigint, period_end timestamptz,
    stops boolean, level smallint, told_level smallint, told_limit bigint, base_level smallint
)
language sql stable set search_path = alerts, pg_temp as $$
    with defaults as materialized (
        select k.watches, d.* from (values ('pool'), ('allocation'), ('limit')) k(watches) cross join lateral alerts.default_rule(k.watches) d)
    select b.organization_id, r.rule_id, b.balance_id, o.period_start::text, b.kind, r.measure, r.thresholds, r.readers, r.addresses, r.collect_minutes,
        b.limit_amount, b.used_amount, f.filled, f.rest, case when isfinite(o.period_end) then o.period_end end, b.stops, l.now, s.level, s.limit_amount, l.base
    from unnest(p_organization_ids, p_balance_ids, p_period_starts) w(organization_id, balance_id, period_start)
    join credits.balances b
        on b.organization_id = w.organization_id and b.balance_id = w.balance_id and b.period_start = w.period_start and b.kind <> 'open'
    left join credits.allocations a on b.kind = 'allocation' and a.organization_id = b.organization_id and a.allocation_id = b.balance_id
    left join credits.allocation_periods ap on ap.organization_id = a.organization_id and ap.allocation_id = a.allocation_id
        and ap.period_end = a.renews_at
    cross join lateral (
        -- A share that is renewed has one row for ever: what it had used before its period is past.
        select coalesce(ap.period_start, b.period_start) as period_start, coalesce(ap.period_end, b.period_end) as period_end,
            coalesce(ap.opening_micros, 0) as before) o
    cross join lateral (
        -- Of a pool 100 % is what its present grants were; what earlier ones were is past.
        select case when b.kind <> 'pool' then b.limit_amount - o.before else greatest(b.limit_amount - b.used_amount, (
            select coalesce(sum(g.amount_micros), 0)::bigint
            from credits.grant_states t
            join credits.grants g on g.organization_id = t.organization_id and g.grant_id = t.grant_id
            where t.organization_id = b.organization_id and t.pool_id = b.balance_id and t.state in ('active', 'lingering'))) end as filled,
            greatest(0, b.limit_amount - b.used_amount) as rest) q
    cross join lateral (
        select q.filled, case when q.rest > 0 and q.rest * 100 <= q.filled and exists (
            select from credits.unbilled_requests u
            where u.organization_id = b.organization_id and u.happened_at > p_since and u.outcome = 'refused' and u.binding_id = b.balance_id)
            then 0 else q.rest end as rest) f
    cross join lateral (
        -- The rules of the balance itself, else the organization's for its kind, else the default.
        select r.rule_id, r.measure, r.thresholds, r.readers, r.addresses, r.collect_minutes
        from rules r
        where r.organization_id = b.organization_id and r.ended_at is null and r.watches = b.kind
          and (r.object_id = b.balance_id or r.object_id is null and not exists (
            select from rules own where own.organization_id = b.organization_id and own.ended_at is null and own.watches = b.kind
                and own.object_id = b.balance_id))
        union all
        select d.rule_id, d.measure, d.thresholds, d.readers, d.addresses, d.collect_minutes
        from defaults d
        where d.watches = b.kind and not exists (
            select from rules r where r.organization_id = b.organization_id and r.ended_at is null and r.watches = b.kind
                and (r.object_id is null or r.object_id = b.balance_id))) r
    left join reached s on s.organization_id = b.organization_id and s.rule_id = r.rule_id and s.balance_id = b.balance_id
        and s.period_start = o.period_start
    cross join lateral (
        select alerts.level(r.measure, r.thresholds, f.filled, f.rest) as now,
            case when s.level is null then 0::smallint
                 when b.limit_amount > s.limit_amount then least(s.level, alerts.level(r.measure, r.thresholds,
                    case when b.kind = 'pool' then greatest(f.filled, b.limit_amount - s.used_amount) else f.filled end,
                    greatest(0, b.limit_amount - s.used_amount)))
                 else s.level end as base) l
    where l.now > l.base or l.base < s.level;
$$;
comment on function alerts.crossed is 'Of some balances, those that are further than was told, or whose limit was raised since';

revoke all on all functions in schema alerts from public;
grant execute on all functions in schema alerts to bursar_app, bursar_platform;
