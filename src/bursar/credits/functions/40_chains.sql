-- What one user and key must pass: periods, and the chain of pools and limits.

-- period_start: where the period that contains p_at begins, in a zone. 'none' has no beginning.
create or replace function credits.period_start(p_period text, p_zone text, p_at timestamptz) returns timestamptz
language sql stable set search_path = pg_catalog, pg_temp as $$
    -- Where clocks fall back over midnight it comes twice and counts the second time: until then it is still the day before.
    select case when p_period = 'none' then '-infinity'::timestamptz
                when s.start <= p_at then s.start
                else (s.local - ('1 ' || p_period)::interval) at time zone p_zone end
    from (select t.local, t.local at time zone p_zone as start
          from (select date_trunc(nullif(p_period, 'none'), p_at at time zone p_zone) as local) t) s;
$$;
comment on function credits.period_start is 'Start of the day, week (Monday) or month that contains an instant, in a zone; -infinity for none';

create or replace function credits.period_end(p_period text, p_zone text, p_at timestamptz) returns timestamptz
language sql stable set search_path = pg_catalog, pg_temp as $$
    select case when p_period = 'none' then 'infinity'::timestamptz
                when s.start > p_at then s.start
                else (s.local + ('1 ' || p_period)::interval) at time zone p_zone end
    from (select t.local, t.local at time zone p_zone as start
          from (select date_trunc(nullif(p_period, 'none'), p_at at time zone p_zone) as local) t) s;
$$;

-- open_period: the row of a balance for the period that contains p_now, made when it is missing. A period keeps the end it began with,
-- so that a change of zone starts at the next boundary and gives nobody a fresh limit.
create or replace function credits.open_period(
    p_organization_id uuid, p_balance_id uuid, p_kind text, p_stops boolean, p_amount bigint, p_period text, p_zone text, p_now timestamptz,
    out period_start timestamptz, out period_end timestamptz
) language plpgsql volatile set search_path = credits, pg_temp as $$
#variable_conflict use_column
declare
    v_last timestamptz;
begin
    select b.period_start, b.period_end into open_period.period_start, open_period.period_end from balances b
    where b.organization_id = p_organization_id and b.balance_id = p_balance_id and b.period_start <= p_now and b.period_end > p_now;
    if found then
        return;
    end if;
    select max(b.period_end) into v_last from balances b where b.organization_id = p_organization_id and b.balance_id = p_balance_id;
    open_period.period_start := greatest(credits.period_start(p_period, p_zone, p_now), v_last);
    open_period.period_end := credits.period_end(p_period, p_zone, p_now);
    insert into balances (organization_id, balance_id, period_start, period_end, kind, stops, limit_amount)
    values (p_organization_id, p_balance_id, open_period.period_start, open_period.period_end, p_kind, p_stops, p_amount);
end $$;
comment on function credits.open_period is 'Start and end of the current period of a balance, whose row is made when it is missing';
comment on function credits.period_end is 'End of the day, week or month that contains an instant, in a zone; infinity for none';

-- chain_refusal: why this user and key may spend nothing in the organization; null when they may. v_until: when that may change by itself.
create or replace function credits.chain_refusal(
    p_organization identity.organizations, p_key identity.api_keys, p_user_id uuid, p_api_key_id uuid, p_now timestamptz
) returns text
language plpgsql stable set search_path = credits, pg_temp as $$
begin
    if p_organization.organization_id is null or p_organization.status <> 'active' then
        return 'organization_closed';
    elsif p_api_key_id <> '00000000-0000-0000-0000-000000000000' and (p_key.api_key_id is null or p_key.user_id <> p_user_id) then
        return 'key_unknown';
    elsif p_key.revoked_at <= p_now then
        return 'key_revoked';
    elsif p_key.expires_at <= p_now then
        return 'key_expired';
    elsif p_user_id <> '00000000-0000-0000-0000-000000000000' and not exists (
        select 1 from identity.memberships m
        where m.organization_id = p_organization.organization_id and m.user_id = p_user_id and m.status = 'active') then
        return 'not_a_member';
    end if;
    return null;
end $$;
comment on function credits.chain_refusal is 'Reason why a user and key may spend nothing in an organization; null: they may';

-- build_chain: what one user and key must pass, as of now; creates the period rows it needs and replaces the older chain.
create or replace function credits.build_chain(p_organization_id uuid, p_user_id uuid, p_api_key_id uuid, p_now timestamptz) returns uuid
language plpgsql volatile set search_path = credits, pg_temp as $$
declare
    v_zero constant uuid := '00000000-0000-0000-0000-000000000000';
    v_organization identity.organizations;
    v_key identity.api_keys;
    v_member identity.memberships;
    v_chain chains;
    v_row record;
    v_entry record;
    v_leg smallint := 0;
begin
    select * into v_organization from identity.organizations where organization_id = p_organization_id;
    if p_api_key_id <> v_zero then
        -- A personal key lives in its user's home organization and acts in the companies its user belongs to.
        select * into v_key from identity.api_keys
        where api_key_id = p_api_key_id and organization_id in (p_organization_id, route.home_of_user(p_user_id));
    end if;
    select * into v_member from identity.memberships where organization_id = p_organization_id and user_id = p_user_id;

    v_chain.organization_id := p_organization_id;
    v_chain.chain_id := gen_random_uuid();
    v_chain.user_id := p_user_id;
    v_chain.api_key_id := p_api_key_id;
    select limits_version into strict v_chain.limits_version from gates where organization_id = p_organization_id;
    v_chain.refusal := credits.chain_refusal(v_organization, v_key, p_user_id, p_api_key_id, p_now);
    v_chain.valid_until := coalesce(least(v_key.expires_at, v_key.revoked_at), 'infinity');
    if v_chain.valid_until <= p_now then
        v_chain.valid_until := 'infinity';
    end if;
    v_chain.team_id := coalesce(case when v_key.organization_id = p_organization_id then v_key.team_id end, v_member.team_id);
    v_chain.department_id := coalesce(case when v_key.organization_id = p_organization_id then v_key.department_id end, v_member.department_id);
    select name into v_chain.department_name from identity.departments
    where organization_id = p_organization_id and department_id = v_chain.department_id;
    v_chain.leg_pool_ids := '{}'; v_chain.leg_filters := '{}'; v_chain.is_strict := false;
    v_chain.entry_ids := '{}'; v_chain.entry_starts := '{}'; v_chain.entry_metrics := '{}'; v_chain.entry_legs := '{}'; v_chain.entry_filters := '{}';

    perform credits.open_period(a.organization_id, a.allocation_id, 'allocation', true, a.amount_micros, a.period, v_organization.zone, p_now)
    from allocations a
    where a.organization_id = p_organization_id and a.user_id = p_user_id and a.kind = 'capped' and a.ended_at is null;
    -- Legs: restricted pools first, then personal, then shared; an empty one is skipped while another has something for the same models.
    for v_row in
        with legs as (
            select p.pool_id, p.model_filter, part.part_id, part.nr as part_nr,
                   (p.model_filter is null)::int as filter_rank, array_position(array['personal', 'shared', 'individual'], p.kind) as kind_rank,
                   p.created_at, cap.balance_id as cap_id, cap.period_start as cap_start, cap.period_end as cap_end,
                   b.limit_amount - b.used_amount > 0 and coalesce(pb.limit_amount - pb.used_amount > 0, true)
                   and coalesce(cap.limit_amount - cap.used_amount > 0, true) as has_some
            from pools p
            left join allocations a on a.organization_id = p.organization_id and a.pool_id = p.pool_id and a.user_id = p_user_id and a.ended_at is null
            left join balances cap on a.kind = 'capped' and cap.organization_id = a.organization_id and cap.balance_id = a.allocation_id
                and cap.period_start <= p_now and cap.period_end > p_now
            cross join lateral (
                select a.allocation_id as part_id, 1 as nr where a.kind = 'reserved'
                union all
                select p.open_part_id, 2 where a.kind is distinct from 'reserved' or a.when_empty = 'open_part'
            ) part
            join balances b on b.organization_id = p.organization_id and b.balance_id = p.pool_id
            left join balances pb on pb.organization_id = p.organization_id and pb.balance_id = part.part_id
            where p.organization_id = p_organization_id and p.closed_at is null and p.kind <> 'residual'
              and (p.owner_user_id is null or p.owner_user_id = p_user_id)
        )
        select l.*, not has_some and exists (
                select 1 from legs o where o.has_some and (o.model_filter is null or o.model_filter = l.model_filter)) as is_skipped
        from legs l order by filter_rank, kind_rank, created_at, pool_id, part_nr
    loop
        v_chain.valid_until := least(v_chain.valid_until, v_row.cap_end);
        continue when v_row.is_skipped;
        v_leg := v_leg + 1;
        v_chain.leg_pool_ids := v_chain.leg_pool_ids || v_row.pool_id;
        v_chain.leg_filters := v_chain.leg_filters || v_row.model_filter;
        for v_entry in
            select e.id, coalesce(e.start, '-infinity') as start
            from (values (v_row.pool_id, null, 1), (v_row.part_id, null, 2), (v_row.cap_id, v_row.cap_start, 3)) e(id, start, nr)
            where e.id is not null order by e.nr
        loop
            v_chain.entry_ids := v_chain.entry_ids || v_entry.id;
            v_chain.entry_starts := v_chain.entry_starts || v_entry.start;
            v_chain.entry_metrics := v_chain.entry_metrics || 0::smallint;
            v_chain.entry_legs := v_chain.entry_legs || v_leg;
            v_chain.entry_filters := v_chain.entry_filters || null::text;
        end loop;
    end loop;
    if v_leg = 0 and v_chain.refusal is null then
        v_chain.refusal := 'no_pool';
    end if;

    for v_row in
        select l.limit_id as id, array_position(array['credits', 'calls', 'tokens'], l.metric) - 1 as metric, l.model_filter, l.is_strict,
               t.period_start, t.period_end
        from limits l
        cross join lateral credits.open_period(l.organization_id, l.limit_id, 'limit', l.action = 'stops', l.amount, l.period,
            v_organization.zone, p_now) t
        where l.organization_id = p_organization_id and l.ended_at is null
          and (l.scope = 'organization' or (l.scope = 'user' and l.scope_id = p_user_id) or (l.scope = 'key' and l.scope_id in (p_api_key_id, v_key.original_api_key_id))
               or (l.scope = 'team' and l.scope_id = v_chain.team_id) or (l.scope = 'department' and l.scope_id = v_chain.department_id))
        order by 1
    loop
        v_chain.entry_ids := v_chain.entry_ids || v_row.id;
        v_chain.entry_starts := v_chain.entry_starts || v_row.period_start;
        v_chain.entry_metrics := v_chain.entry_metrics || v_row.metric::smallint;
        v_chain.entry_legs := v_chain.entry_legs || 0::smallint;
        v_chain.entry_filters := v_chain.entry_filters || v_row.model_filter;
        v_chain.valid_until := least(v_chain.valid_until, v_row.period_end);
        v_chain.is_strict := v_chain.is_strict or v_row.is_strict;
    end loop;

    v_chain.is_plain := v_leg = 1 and v_chain.leg_filters[1] is null and 0 = all (v_chain.entry_metrics)
        and array_remove(v_chain.entry_filters, null) = '{}';
    v_chain.built_at := p_now;
    update chains set replaced_at = p_now
    where organization_id = p_organization_id and user_id = p_user_id and api_key_id = p_api_key_id and replaced_at is null;
    insert into chains select v_chain.*;
    return v_chain.chain_id;
end $$;
comment on function credits.build_chain is 'Builds what one user and key must pass now: legs to pay from and balances to check';

-- first_leg: the first leg whose filter admits the model; 0 when none does.
create or replace function credits.first_leg(p_filters text[], p_model text) returns smallint
language sql immutable set search_path = pg_catalog, pg_temp as $$
    select coalesce((select min(nr) from unnest(p_filters) with ordinality f(filter, nr) where filter is null or p_model like filter), 0)::smallint;
$$;
comment on function credits.first_leg is 'First leg of a chain that may pay for a model; 0: none';

-- is_strict_for: whether a strict limit of a chain counts a request for this model.
create or replace function credits.is_strict_for(p_chain credits.chains, p_model text, p_is_own_key boolean) returns boolean
language sql stable set search_path = credits, pg_temp as $$
    select exists (
        select from unnest(p_chain.entry_ids, p_chain.entry_metrics, p_chain.entry_filters) e(id, metric, filter)
        join limits l on l.organization_id = p_chain.organization_id and l.limit_id = e.id
        where l.is_strict and (e.filter is null or p_model like e.filter) and not (e.metric = 0 and p_is_own_key));
$$;
comment on function credits.is_strict_for is 'Whether a strict limit of a chain counts requests for a model: their holds must not be guesses';
