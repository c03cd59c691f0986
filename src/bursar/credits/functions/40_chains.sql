-- What one user and key must pass: the chain of pools and limits.

-- admits: whether the filter of a pool or limit takes a request. A filter that begins with # is a LIKE pattern over the feature, any other one
-- over the model; none takes everything, and what names no feature no filter by feature takes. It stands for its expression wherever it is
-- called, so it has no search_path of its own.
create or replace function credits.admits(p_filter text, p_model text, p_feature text) returns boolean
language sql immutable parallel safe as $$
    select p_filter is null or coalesce(case when starts_with(p_filter, '#') then p_feature like substr(p_filter, 2) else p_model like p_filter end, false)
$$;
comment on function credits.admits is 'Whether the filter of a pool or limit takes a request for this model and feature';

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

-- limits_on: the limits that apply to a user and key. Each of its own applies; a default where there is none of its own with the same scope,
-- metric, period, filter and kind of action, and of several defaults the narrowest: of the team, the department, the organization. What is
-- without limit passes that one alone. A member is counted in the team and department of the membership, a key in its own or its owner's.
create or replace function credits.limits_on(
    p_organization_id uuid, p_user_id uuid, p_api_key_id uuid, p_original_key_id uuid, p_member_team_id uuid, p_member_department_id uuid,
    p_team_id uuid, p_department_id uuid
) returns table (set_limit credits.limits, subject_id uuid)
-- Place by place, through the index: an organization may have thousands of limits, of which a few apply.
language sql stable set search_path = credits, pg_temp set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off as $$
    with places as (
        select distinct p.scope, p.place, p.subject_id
        from (values
            ('organization', null, null), ('user', p_user_id, p_user_id), ('key', p_api_key_id, p_original_key_id),
            ('key', p_original_key_id, p_original_key_id), ('team', p_team_id, p_team_id), ('department', p_department_id, p_department_id),
            ('user', null, p_user_id), ('user', p_member_team_id, p_user_id), ('user', p_member_department_id, p_user_id),
            ('key', null, p_original_key_id), ('key', p_team_id, p_original_key_id), ('key', p_department_id, p_original_key_id),
            ('team', null, p_team_id), ('team', (select department_id from identity.teams
                                                 where organization_id = p_organization_id and team_id = p_team_id), p_team_id),
            ('department', null, p_department_id)
        ) p(scope, place, subject_id)
        where p.scope = 'organization' or p.subject_id is not null
    ), ranked as (
        select l as set_limit, p.subject_id, l.is_default, l.amount, row_number() over (
            partition by l.scope, l.metric, l.period, l.model_filter, l.action = 'warns'
            order by case when not l.is_default then 0 when l.within_scope = 'team' then 1 when l.within_scope = 'department' then 2 else 3 end) as nr
        from places p
        join limits l on l.organization_id = p_organization_id and l.scope = p.scope and l.ended_at is null
            and coalesce(l.scope_id, l.within_id, '00000000-0000-0000-0000-000000000000') = coalesce(p.place, '00000000-0000-0000-0000-000000000000')
    )
    select r.set_limit, r.subject_id from ranked r where r.amount is not null and (not r.is_default or r.nr = 1);
$$;
comment on function credits.limits_on is 'The limits that apply to a user and key, defaults included where nothing of their own takes their place';

-- build_chain: what one user and key must pass, as of now; creates the period rows it needs and replaces the older chain.
create or replace function credits.build_chain(p_organization_id uuid, p_user_id uuid, p_api_key_id uuid, p_now timestamptz) returns uuid
language plpgsql volatile set search_path = credits, pg_temp as $$
declare
    v_zero constant uuid := '00000000-0000-0000-0000-000000000000';
    v_organization identity.organizations;
    v_key identity.api_keys;
    v_member identity.memberships;
    v_chain chains;
    v_anchor timestamptz := (select anchor from credits.calendar_of(p_organization_id));
    v_row record;
    v_entry record;
    v_leg smallint := 0;
    v_limit limits;
    v_balance uuid;
    v_amount bigint;
    v_period record;
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

    perform credits.open_period(a.organization_id, a.allocation_id, 'allocation', true, a.amount_micros, a.period, v_organization.zone, v_anchor, p_now)
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
        select * from credits.limits_on(p_organization_id, nullif(p_user_id, v_zero), nullif(p_api_key_id, v_zero),
            coalesce(v_key.original_api_key_id, nullif(p_api_key_id, v_zero)), v_member.team_id, v_member.department_id,
            v_chain.team_id, v_chain.department_id) o
        order by (o.set_limit).limit_id, o.subject_id
    loop
        v_limit := v_row.set_limit;
        v_balance := coalesce(v_limit.balance_id, credits.counter_of(v_limit, v_row.subject_id, p_now));
        v_amount := v_limit.amount + credits.raised(p_organization_id, v_balance);
        select t.period_start, t.period_end into v_period
        from credits.open_period(p_organization_id, v_balance, 'limit', v_limit.action <> 'warns', v_amount, v_limit.period,
            v_organization.zone, v_anchor, p_now) t;
        -- What was changed for everybody, or for those of a team, reaches a balance when it is next looked at.
        update balances set limit_amount = v_amount, excess_amount = greatest(0, used_amount + held_amount - v_amount)
        where organization_id = p_organization_id and balance_id = v_balance and period_start = v_period.period_start and limit_amount <> v_amount;
        v_chain.entry_ids := v_chain.entry_ids || v_balance;
        v_chain.entry_starts := v_chain.entry_starts || v_period.period_start;
        v_chain.entry_metrics := v_chain.entry_metrics || (array_position(array['credits', 'calls', 'tokens'], v_limit.metric) - 1)::smallint;
        v_chain.entry_legs := v_chain.entry_legs || 0::smallint;
        v_chain.entry_filters := v_chain.entry_filters || v_limit.model_filter;
        v_chain.valid_until := least(v_chain.valid_until, v_period.period_end);
        v_chain.is_strict := v_chain.is_strict or v_limit.is_strict;
    end loop;

    v_chain.is_plain := v_leg = 1 and v_chain.leg_filters[1] is null and 0 = all (v_chain.entry_metrics)
        and array_remove(v_chain.entry_filters, null) = '{}';
    v_chain.entry_conditions := array(
        select case when e.metric = 0 and e.filter is null and (e.leg = 0 or (v_leg = 1 and v_chain.leg_filters[1] is null)) then 0 else e.nr end
        from unnest(v_chain.entry_metrics, v_chain.entry_legs, v_chain.entry_filters) with ordinality e(metric, leg, filter, nr) order by e.nr);
    v_chain.built_at := p_now;
    update chains set replaced_at = p_now
    where organization_id = p_organization_id and user_id = p_user_id and api_key_id = p_api_key_id and replaced_at is null;
    insert into chains select v_chain.*;
    return v_chain.chain_id;
end $$;
comment on function credits.build_chain is 'Builds what one user and key must pass now: legs to pay from and balances to check';

-- every_place: stands for the entry_conditions of a chain that is older than these: each of its so many entries is looked at closely.
create or replace function credits.every_place(p_entries integer) returns smallint[]
language sql immutable parallel safe set search_path = pg_catalog, pg_temp as $$
    select array(select generate_series(1, p_entries))::smallint[]
$$;
comment on function credits.every_place is 'The numbers from 1 to so many';

-- conditions_of: the conditions of a chain's entries, one for each; null where all of them ask credits of every request. It stands for its
-- expression, as admits does.
create or replace function credits.conditions_of(p_is_plain boolean, p_conditions smallint[], p_entry_ids uuid[]) returns smallint[]
language sql immutable parallel safe as $$
    select case when not p_is_plain then coalesce(p_conditions, credits.every_place(cardinality(p_entry_ids))) end
$$;
comment on function credits.conditions_of is 'What is looked at of each entry of a chain; null: nothing but credits';

-- first_leg: the first leg whose filter admits the request; 0 when none does.
create or replace function credits.first_leg(p_filters text[], p_model text, p_feature text) returns smallint
language sql immutable set search_path = pg_catalog, pg_temp as $$
    select coalesce((select min(nr) from unnest(p_filters) with ordinality f(filter, nr) where credits.admits(filter, p_model, p_feature)), 0)::smallint;
$$;
comment on function credits.first_leg is 'First leg of a chain that may pay for a request; 0: none';

-- is_strict_for: whether a strict limit of a chain counts a request for this model and feature. A balance is counted by the limit of its own that is in
-- force, else by the default.
create or replace function credits.is_strict_for(p_chain credits.chains, p_model text, p_feature text, p_is_own_key boolean) returns boolean
language sql stable set search_path = credits, pg_temp as $$
    select exists (
        select from unnest(p_chain.entry_ids, p_chain.entry_metrics, p_chain.entry_filters) e(id, metric, filter)
        left join counters k on k.organization_id = p_chain.organization_id and k.balance_id = e.id
        cross join lateral (
            select l.is_strict from limits l
            where l.organization_id = p_chain.organization_id and l.ended_at is null and (l.balance_id = e.id or l.limit_id = k.limit_id)
            order by l.is_default limit 1
        ) l
        where l.is_strict and credits.admits(e.filter, p_model, p_feature) and not (e.metric = 0 and p_is_own_key));
$$;
comment on function credits.is_strict_for is 'Whether a strict limit of a chain counts requests for a model and feature: their holds must not be guesses';
