-- Refunds: what a request was charged goes back to the grants that paid it.

-- draws_of: which stretches of which pools' running totals a request drew, in order, corrections included: what one took back is gone from
-- the last of them. charged_at: when the charge was booked of which each is; a request may have been charged again after it had been by estimate,
-- or refunded. refunded: how much was of each, at its end, as each refund found them.
create or replace function credits.draws_of(
    p_organization_id uuid, p_request_id uuid, out pool_ids uuid[], out starts bigint[], out ends bigint[], out charged_at timestamptz[],
    out refunded bigint[]
) language plpgsql stable set search_path = credits, pg_temp as $$
declare
    v_row record;
    v_left bigint;
    v_back bigint;
begin
    pool_ids := '{}'; starts := '{}'; ends := '{}'; charged_at := '{}'; refunded := '{}';
    for v_row in
        select d.pool_id, d.start_micros as start, d.micros, (
            select max(k.booked_at) from ledger.attribution k
            where k.organization_id = p_organization_id and k.request_id = p_request_id and k.kind = 0 and k.booked_at <= d.booked_at
              and k.chain_id is not distinct from d.chain_id and k.model is not distinct from d.model and k.feature is not distinct from d.feature) as charged_at
        from credits.parts_of(p_organization_id, p_request_id) d
        left join chains c on c.organization_id = p_organization_id and c.chain_id = d.chain_id
        where d.micros <> 0
        order by d.booked_at, d.nr, array_position(c.leg_pool_ids, d.pool_id)
    loop
        if v_row.micros > 0 then
            pool_ids := pool_ids || v_row.pool_id; starts := starts || v_row.start; ends := ends || v_row.start + v_row.micros;
            charged_at := charged_at || v_row.charged_at; refunded := refunded || 0::bigint;
            continue;
        end if;
        v_left := -v_row.micros;
        for i in reverse cardinality(pool_ids)..1 loop
            continue when pool_ids[i] <> v_row.pool_id;
            v_back := least(v_left, ends[i] - starts[i] - refunded[i]);
            if v_row.pool_id is null then
                refunded[i] := refunded[i] + v_back;
            else
                ends[i] := ends[i] - v_back;
            end if;
            v_left := v_left - v_back;
        end loop;
    end loop;
end $$;
comment on function credits.draws_of is 'Stretches of pools'' running totals that a request drew, in order';

-- return_to_grant: credits that a grant had paid come back to it, with the money they had taken. Where it has expired meanwhile they expire at
-- once, both booked. Returns by how much the pool grows.
create or replace function credits.return_to_grant(
    p_grant credits.grants, p_request_id uuid, p_micros bigint, p_value bigint, p_reason text, p_actor_id uuid, p_idempotency_key text, p_now timestamptz
) returns bigint
language plpgsql volatile set search_path = credits, pg_temp as $$
begin
    insert into ledger.entries (organization_id, entry_id, booked_at, happened_at, kind, from_kind, from_id, to_kind, to_id, amount, grant_id,
        value_nano_usd, actor_id, reason, idempotency_key)
    values (p_grant.organization_id, gen_random_uuid(), p_now, p_now, 'refund', 'usage', p_request_id, 'pool', p_grant.pool_id, p_micros,
        p_grant.grant_id, p_value, p_actor_id, p_reason, p_idempotency_key);
    if p_grant.expires_at <= p_now then
        insert into ledger.entries (organization_id, entry_id, booked_at, happened_at, kind, from_kind, from_id, to_kind, amount, grant_id,
            value_nano_usd, reason)
        values (p_grant.organization_id, gen_random_uuid(), p_now, p_now, 'expiry', 'pool', p_grant.pool_id, 'expired', p_micros,
            p_grant.grant_id, p_value, 'refunded to an expired grant');
        return 0;
    end if;
    update grant_states set left_micros = left_micros + p_micros, value_left_nano_usd = value_left_nano_usd + p_value, state = 'active', ended_at = null
    where organization_id = p_grant.organization_id and grant_id = p_grant.grant_id;
    return p_micros;
end $$;
comment on function credits.return_to_grant is 'Returns refunded credits to the grant that had paid them';

-- return_draw: refund the last p_micros before p_end of what a request drew from a pool: to the grants that paid, last first. What no grant has
-- paid yet, or what came back to its grant already (by a correction of another request), becomes a grant of its own.
-- Returns by how much the pool grows.
create or replace function credits.return_draw(
    p_organization_id uuid, p_pool_id uuid, p_request_id uuid, p_start bigint, p_end bigint, p_reason text, p_actor_id uuid,
    p_idempotency_key text, p_now timestamptz
) returns bigint
language plpgsql volatile set search_path = credits, pg_temp as $$
declare
    v_row record;
    v_grant grants;
    v_bare bigint := p_end - p_start;
    v_back bigint;
    v_grows bigint := 0;
    v_new uuid := gen_random_uuid();
begin
    for v_row in
        select b.grant_id, sum(least(b.end_micros, p_end) - greatest(b.start_micros, p_start))::bigint as micros,
            sum(credits.value_within(g, b.grant_from_micros, b.end_micros - b.start_micros, b.value_nano_usd, p_end - b.start_micros)
                - credits.value_within(g, b.grant_from_micros, b.end_micros - b.start_micros, b.value_nano_usd, p_start - b.start_micros))::bigint as value,
            max(b.start_micros) as last
        from burns b join grants g on g.organization_id = b.organization_id and g.grant_id = b.grant_id
        where b.organization_id = p_organization_id and b.pool_id = p_pool_id and b.end_micros > p_start and b.start_micros < p_end
        group by b.grant_id order by last desc
    loop
        select * into strict v_grant from grants where organization_id = p_organization_id and grant_id = v_row.grant_id;
        select least(v_row.micros, b.micros - coalesce(e.micros, 0)), least(v_row.value, b.value - coalesce(e.value, 0)) into v_back, v_row.value
        from (select sum(end_micros - start_micros)::bigint as micros, sum(value_nano_usd)::bigint as value from burns
              where organization_id = p_organization_id and pool_id = p_pool_id and grant_id = v_row.grant_id) b,
             (select sum(amount)::bigint as micros, sum(value_nano_usd)::bigint as value from ledger.entries
              where organization_id = p_organization_id and from_kind = 'usage' and kind = 'refund' and grant_id = v_row.grant_id) e;
        if v_back > 0 then
            v_grows := v_grows + credits.return_to_grant(v_grant, p_request_id, v_back, v_row.value, p_reason, p_actor_id, p_idempotency_key, p_now);
            v_bare := v_bare - v_back;
        end if;
    end loop;
    if v_bare > 0 then
        insert into grants (organization_id, grant_id, pool_id, source, amount_micros, is_free, effective_at, reason, created_at, created_by)
        values (p_organization_id, v_new, p_pool_id, 'refund', v_bare, true, p_now, p_reason, p_now, p_actor_id);
        insert into grant_states (organization_id, grant_id, pool_id, state, left_micros) values (p_organization_id, v_new, p_pool_id, 'active', v_bare);
        insert into ledger.entries (organization_id, entry_id, booked_at, happened_at, kind, from_kind, from_id, to_kind, to_id, amount, grant_id,
            actor_id, reason, idempotency_key)
        values (p_organization_id, gen_random_uuid(), p_now, p_now, 'grant', 'usage', p_request_id, 'pool', p_pool_id, v_bare, v_new,
            p_actor_id, p_reason, p_idempotency_key);
        v_grows := v_grows + v_bare;
    end if;
    return v_grows;
end $$;
comment on function credits.return_draw is 'Refunds a stretch of a pool''s running total to the grants that paid it';

-- give_room_back: the caps and shares that a refunded request took have that much more room again, in the periods in which it took it. A pool grows
-- by its grants. A reserved share grows too, by what came back to the pool; where its member goes on in the open part, that gets it.
create or replace function credits.give_room_back(
    p_organization_id uuid, p_chain_id uuid, p_model text, p_feature text, p_pool_ids uuid[], p_refunded bigint[], p_grown bigint[],
    p_charged_at timestamptz, p_now timestamptz
) returns void
language plpgsql volatile set search_path = credits, pg_temp as $$
declare
    v_chain chains;
    v_row record;
begin
    select * into strict v_chain from chains where organization_id = p_organization_id and chain_id = p_chain_id;
    for v_row in
        select e.id, e.start, b.kind, a.kind as share, a.ended_at, r.refunded, r.grown,
            (select count(*) from unnest(v_chain.leg_pool_ids) l where l = v_chain.leg_pool_ids[e.leg]) as legs
        from unnest(v_chain.entry_ids, v_chain.entry_starts, v_chain.entry_metrics, v_chain.entry_legs, v_chain.entry_filters)
            e(id, start, metric, leg, filter)
        join balances b on b.organization_id = p_organization_id and b.balance_id = e.id and b.period_start = e.start
        left join allocations a on a.organization_id = p_organization_id and a.allocation_id = e.id
        cross join lateral (
            select sum(refunded)::bigint as refunded, sum(grown)::bigint as grown from unnest(p_pool_ids, p_refunded, p_grown) r(pool_id, refunded, grown)
            where e.leg = 0 or r.pool_id = v_chain.leg_pool_ids[e.leg]
        ) r
        where e.metric = 0 and b.kind in ('limit', 'allocation') and credits.admits(e.filter, p_model, p_feature) and r.refunded > 0
    loop
        if v_row.share is distinct from 'reserved' then
            update balances set used_amount = used_amount - v_row.refunded,
                excess_amount = greatest(0, used_amount - v_row.refunded + held_amount - limit_amount)
            where organization_id = p_organization_id and balance_id = v_row.id and period_start = v_row.start;
        elsif v_row.ended_at is null and v_row.legs = 1 and v_row.grown > 0 then
            -- One that is renewed grows in the period of the charge alone; when that is over, the open part gets it.
            update allocations set refunded_micros = refunded_micros + v_row.grown
            where organization_id = p_organization_id and allocation_id = v_row.id and period = 'none';
            update allocation_periods set adjusted_micros = adjusted_micros + v_row.grown
            where organization_id = p_organization_id and allocation_id = v_row.id and period_start <= p_charged_at and period_end > p_now;
            perform credits.set_current_limit(p_organization_id, v_row.id, credits.share_size(p_organization_id, v_row.id), p_now);
            perform credits.note_share(p_organization_id, v_row.id, null, p_now);
        end if;
    end loop;
end $$;
comment on function credits.give_room_back is 'Gives what was refunded of a request back to the caps and shares it took it from';

-- refund_charge: what a request was charged, or part of it (null: all that is left of it), goes back to the grants that paid, last first.
-- A request that was charged by estimate is final with it. Calls and tokens that were counted stay counted. Returns the micros refunded.
create or replace function credits.refund_charge(
    p_organization_id uuid, p_request_id uuid, p_amount_micros bigint, p_reason text, p_created_by uuid, p_idempotency_key text,
    p_at timestamptz default null
) returns bigint
language plpgsql volatile security definer set search_path = credits, pg_temp as $$
declare
    v_now timestamptz := credits.lock_gate(p_organization_id, p_at);
    v_hash bytea := credits.hash_of('refund_charge', p_request_id::text, p_amount_micros::text, p_reason);
    v_stored jsonb := credits.stored_outcome(p_organization_id, p_idempotency_key, v_hash, v_now);
    v_row ledger.attribution;
    v_charged bigint;
    v_before bigint;
    v_left bigint;
    v_part bigint;
    v_draws record;
    v_end bigint;
    v_pools uuid[] := '{}';
    v_refunded bigint[] := '{}';
    v_grown bigint[] := '{}';
    v_charges timestamptz[] := '{}';   -- of which charge each part is
    v_bookings timestamptz[] := '{}';  -- and under which instant it is booked: a row for each charge
    v_users uuid[] := '{}';
    v_booked timestamptz;
    v_part_of record;
    v_own record;
begin
    if v_stored is not null then
        return (v_stored ->> 'refunded_micros')::bigint;
    end if;
    if p_amount_micros is not null then
        perform credits.require_amount(p_amount_micros, 1);
    end if;
    -- A row of its own also where much happens to one request at one simulated instant; its entries bear the same.
    select coalesce(sum(charged_micros) filter (where kind < 2), 0), coalesce(-sum(charged_micros) filter (where kind = 2), 0),
        greatest(v_now, max(booked_at) + interval '1 microsecond')
    into v_charged, v_before, v_booked
    from ledger.attribution where organization_id = p_organization_id and request_id = p_request_id;
    if not exists (select from ledger.attribution where organization_id = p_organization_id and request_id = p_request_id and kind = 0) then
        raise exception 'no such charge' using errcode = 'BR404';
    end if;
    v_left := coalesce(p_amount_micros, v_charged - v_before);
    if v_left > v_charged - v_before or v_left = 0 then
        raise exception 'of % that were charged % were refunded, % more are asked for', credits.spoken(v_charged), credits.spoken(v_before),
            credits.spoken(v_left) using errcode = 'BR432';
    end if;
    p_amount_micros := v_left;
    delete from estimates where organization_id = p_organization_id and request_id = p_request_id;

    select * into v_draws from credits.draws_of(p_organization_id, p_request_id);
    perform credits.pour(p_organization_id, pool_id, v_now) from (select distinct unnest(v_draws.pool_ids) as pool_id order by 1) p;
    for i in reverse cardinality(v_draws.pool_ids)..1 loop
        v_end := v_draws.ends[i] - v_draws.refunded[i];
        v_part := least(v_left, v_end - v_draws.starts[i]);
        continue when v_part = 0;
        v_left := v_left - v_part;
        v_pools := v_pools || v_draws.pool_ids[i];
        v_refunded := v_refunded || v_part;
        if v_draws.charged_at[i] <> v_charges[cardinality(v_charges)] then
            v_booked := v_booked + interval '1 microsecond';
        end if;
        v_charges := v_charges || v_draws.charged_at[i];
        v_bookings := v_bookings || v_booked;
        v_grown := v_grown || credits.return_draw(p_organization_id, v_draws.pool_ids[i], p_request_id, v_end - v_part, v_end, p_reason,
            p_created_by, p_idempotency_key, v_booked);
    end loop;
    for v_part_of in select distinct b.booked_at, b.charged_at from unnest(v_bookings, v_charges) b(booked_at, charged_at) order by 1 loop
        select * into strict v_row from ledger.attribution
        where organization_id = p_organization_id and request_id = p_request_id and booked_at = v_part_of.charged_at;
        v_users := v_users || array_fill(v_row.user_id, array[cardinality(array_positions(v_bookings, v_part_of.booked_at))]);
        select array_agg(u.pool_id) as pools, array_agg(u.refunded) as refunded, array_agg(u.grown) as grown into v_own
        from unnest(v_bookings, v_pools, v_refunded, v_grown) u(booked_at, pool_id, refunded, grown) where u.booked_at = v_part_of.booked_at;
        perform credits.give_room_back(p_organization_id, v_row.chain_id, v_row.model, v_row.feature, v_own.pools, v_own.refunded, v_own.grown,
            v_row.booked_at, v_now);
        insert into ledger.attribution (organization_id, request_id, booked_at, used_at, kind, user_id, api_key_id, provider_key_id, provider, model,
            team_id, department_id, department_name, conversation_id, chain_id, price_version_id, charged_micros, hold_micros, provider_cost_nano_usd,
            flags, requests, feature)
        values (p_organization_id, p_request_id, v_part_of.booked_at, v_row.used_at, 2, v_row.user_id,
            v_row.api_key_id, v_row.provider_key_id, v_row.provider, v_row.model, v_row.team_id, v_row.department_id, v_row.department_name,
            v_row.conversation_id, v_row.chain_id, v_row.price_version_id, -(select sum(r) from unnest(v_own.refunded) r), 0, 0, v_row.flags & 12290, 0,
            v_row.feature);
    end loop;
    for i in 1..cardinality(v_pools) loop
        perform credits.set_pool_limit(p_organization_id, v_pools[i], v_grown[i]);
    end loop;

    -- In a pool that has closed since, what came back belongs to who asked.
    for i in 1..cardinality(v_pools) loop
        if v_grown[i] > 0 and exists (
                select from pools where organization_id = p_organization_id and pool_id = v_pools[i] and kind = 'shared' and closed_at is not null) then
            -- Of expired grants, open holds need less now where what came back burns before them.
            perform credits.apply_events(p_organization_id, v_pools[i], v_now);
            perform credits.pass_on(p_organization_id, v_pools[i], credits.personal_pool(p_organization_id, v_users[i],
                (select model_filter from pools where organization_id = p_organization_id and pool_id = v_pools[i]), v_now), v_grown[i], v_now);
        end if;
    end loop;
    for i in 1..cardinality(v_pools) loop
        perform credits.fold_pool(p_organization_id, v_pools[i], v_now);
    end loop;
    perform credits.limits_changed(p_organization_id);
    perform credits.settle_due(p_organization_id, v_now);
    perform credits.store_outcome(p_organization_id, p_idempotency_key, v_hash, jsonb_build_object('refunded_micros', p_amount_micros), v_now);
    return p_amount_micros;
end $$;
comment on function credits.refund_charge is 'Refunds a request, or part of what it was charged, to the grants that paid; returns the micros refunded';
