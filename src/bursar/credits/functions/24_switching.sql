-- The switch of an organization between one shared pool and personal ones.

-- watch_holds: open holds on a pool that closes: what each does not use goes to its user's pool, or to p_to_pool_id where one is given.
create or replace function credits.watch_holds(p_organization_id uuid, p_pool_id uuid, p_to_pool_id uuid, p_now timestamptz) returns bigint
language plpgsql volatile set search_path = credits, pg_temp as $$
declare
    v_filter text;
    v_row record;
    v_kept bigint := 0;
begin
    select model_filter into strict v_filter from pools where organization_id = p_organization_id and pool_id = p_pool_id;
    for v_row in
        select h.request_id, nullif(c.user_id, '00000000-0000-0000-0000-000000000000') as user_id,
            sum(case when h.leg_micros is not null then h.leg_micros[l.leg] when h.leg = l.leg then h.amount_micros else 0 end)::bigint as micros
        from holds h
        join chains c on c.organization_id = h.organization_id and c.chain_id = h.chain_id
        cross join lateral unnest(c.leg_pool_ids) with ordinality l(pool_id, leg)
        where h.organization_id = p_organization_id and l.pool_id = p_pool_id and h.flags & 2 = 0
        group by 1, 2 order by 1
    loop
        insert into sweeps (organization_id, pool_id, request_id, kept_micros, to_pool_id)
        values (p_organization_id, p_pool_id, v_row.request_id, v_row.micros + credits.charged_to(p_organization_id, v_row.request_id, p_pool_id),
            coalesce(p_to_pool_id, credits.personal_pool(p_organization_id, v_row.user_id, v_filter, p_now)));
        v_kept := v_kept + v_row.micros;
    end loop;
    return v_kept;
end $$;
comment on function credits.watch_holds is 'Notes for each open hold on a closing pool where goes what it does not use; returns what they hold';

-- watch_charge: a charge on a pool is corrected; where the pool has closed since, the difference is settled with the pool from which its user spends
-- now, as that of a hold that was open when it closed. p_moved: by how much the pool was charged otherwise, which is booked already. Returns
-- whether it is closed.
create or replace function credits.watch_charge(
    p_organization_id uuid, p_pool_id uuid, p_user_id uuid, p_moved bigint, p_now timestamptz
) returns boolean
language plpgsql volatile set search_path = credits, pg_temp as $$
declare
    v_pool pools;
    v_to uuid;
begin
    select * into v_pool from pools where organization_id = p_organization_id and pool_id = p_pool_id and closed_at is not null;
    if not found then
        return false;
    end if;
    if v_pool.kind = 'shared' then
        v_to := credits.personal_pool(p_organization_id, p_user_id, v_pool.model_filter, p_now);
    else
        select pool_id into v_to from pools
        where organization_id = p_organization_id and kind = 'shared' and model_filter is not distinct from v_pool.model_filter and closed_at is null;
    end if;
    if v_to is not null then
        insert into closed_accounts as a (organization_id, pool_id, to_pool_id, rest_micros, is_due)
        values (p_organization_id, p_pool_id, v_to, -p_moved, true)
        on conflict on constraint closed_accounts_pkey do update set rest_micros = a.rest_micros + excluded.rest_micros, is_due = true;
    end if;
    return true;
end $$;
comment on function credits.watch_charge is 'Notes with which pool the correction of a charge on a closed pool is settled; returns whether it is closed';

-- origin_of: the grant that a transferred one was before any transfer within its organization.
create or replace function credits.origin_of(p_organization_id uuid, p_grant_id uuid) returns uuid
language sql stable set search_path = credits, pg_temp as $$
    with recursive line as (
        select grant_id, parent_grant_id, source from grants where organization_id = p_organization_id and grant_id = p_grant_id
        union all
        select g.grant_id, g.parent_grant_id, g.source from line l join grants g on g.organization_id = p_organization_id and g.grant_id = l.parent_grant_id
        where l.source = 'transfer'
    )
    select l.grant_id from line l
    where l.source <> 'transfer' or not exists (select from grants g where g.organization_id = p_organization_id and g.grant_id = l.parent_grant_id);
$$;
comment on function credits.origin_of is 'The grant that a transferred one was before any transfer';

-- gather: what several pools can spare goes into one. What was one grant before it was divided is one again, so that switching back and forth
-- does not grind grants to dust; its entries name the part that each came from. The pools are folded and owe nothing. Returns how much moved.
create or replace function credits.gather(
    p_organization_id uuid, p_pool_ids uuid[], p_to_pool_id uuid, p_reason text, p_actor_id uuid, p_idempotency_key text, p_now timestamptz
) returns bigint
language plpgsql volatile set search_path = credits, pg_temp as $$
declare
    v_group record;
    v_new uuid;
    v_moved bigint := 0;
begin
    -- What was used before is paid by the grants that there were, in the pool that receives too.
    perform credits.pour(p_organization_id, pool_id, p_now) from unnest(p_pool_ids || p_to_pool_id) pool_id;
    for v_group in
        with parts as (
            select g.*, s.left_micros, s.value_left_nano_usd, s.state, s.left_micros - least(s.left_micros, greatest(0, b.held_amount
                - (sum(s.left_micros) over (partition by s.pool_id
                    order by g.priority, g.expires_at, g.is_free desc, g.effective_at, g.created_at, g.grant_id) - s.left_micros)))::bigint as free
            from grant_states s
            join grants g on g.organization_id = s.organization_id and g.grant_id = s.grant_id
            join balances b on b.organization_id = s.organization_id and b.balance_id = s.pool_id
            where s.organization_id = p_organization_id and s.pool_id = any (p_pool_ids) and s.state in ('active', 'lingering') and s.left_micros > 0
        )
        select credits.origin_of(p_organization_id, p.grant_id) as origin, p.priority, p.is_free, p.effective_at, p.expires_at, p.rollover_expires_at,
            sum(p.free)::bigint as micros, sum(v.value)::bigint as value,
            sum(case when p.free = p.amount_micros then p.min_rollover_micros when p.max_rollover_micros is not null then 0 end)::bigint as least_micros,
            sum(floor(p.max_rollover_micros::numeric * p.free / p.amount_micros))::bigint as most_micros,
            array_agg(p.grant_id order by p.grant_id) as grant_ids, array_agg(p.pool_id order by p.grant_id) as pool_ids,
            array_agg(p.free order by p.grant_id) as parts, array_agg(v.value order by p.grant_id) as values
        from parts p
        cross join lateral (
            select credits.value_taken(g, p.left_micros, p.value_left_nano_usd, p.free) as value
            from grants g where g.organization_id = p_organization_id and g.grant_id = p.grant_id
        ) v
        where p.state = 'active' and p.free > 0
        group by 1, 2, 3, 4, 5, 6, p.max_rollover_micros is null
        order by 1
    loop
        v_new := gen_random_uuid();
        insert into grants (organization_id, grant_id, pool_id, source, amount_micros, priority, is_free, cost_basis_nano_usd, effective_at, expires_at,
            parent_grant_id, min_rollover_micros, max_rollover_micros, rollover_expires_at, reason, created_at, created_by)
        values (p_organization_id, v_new, p_to_pool_id, 'transfer', v_group.micros, v_group.priority, v_group.is_free, v_group.value,
            v_group.effective_at, v_group.expires_at, v_group.origin, v_group.least_micros, v_group.most_micros, v_group.rollover_expires_at,
            p_reason, p_now, p_actor_id);
        insert into grant_states (organization_id, grant_id, pool_id, state, left_micros, value_left_nano_usd)
        values (p_organization_id, v_new, p_to_pool_id, 'active', v_group.micros, v_group.value);
        insert into ledger.entries (organization_id, entry_id, booked_at, happened_at, kind, from_kind, from_id, to_kind, to_id, amount, grant_id,
            from_grant_id, value_nano_usd, actor_id, reason, idempotency_key)
        select p_organization_id, gen_random_uuid(), p_now, p_now, 'transfer', 'pool', u.pool_id, 'pool', p_to_pool_id, u.micros, v_new,
            u.grant_id, u.value, p_actor_id, p_reason, p_idempotency_key
        from unnest(v_group.grant_ids, v_group.pool_ids, v_group.parts, v_group.values) u(grant_id, pool_id, micros, value);
        update grant_states s set left_micros = s.left_micros - u.micros, value_left_nano_usd = s.value_left_nano_usd - u.value,
            state = case when s.left_micros = u.micros then 'ended' else s.state end, ended_at = case when s.left_micros = u.micros then p_now end
        from unnest(v_group.grant_ids, v_group.parts, v_group.values) u(grant_id, micros, value)
        where s.organization_id = p_organization_id and s.grant_id = u.grant_id;
        perform credits.set_pool_limit(p_organization_id, u.pool_id, -u.micros)
        from (select pool_id, sum(micros)::bigint as micros from unnest(v_group.pool_ids, v_group.parts) u(pool_id, micros) group by pool_id order by pool_id) u;
        perform credits.set_pool_limit(p_organization_id, p_to_pool_id, v_group.micros);
        v_moved := v_moved + v_group.micros;
    end loop;
    perform credits.fold_pool(p_organization_id, p_to_pool_id, p_now);
    return v_moved;
end $$;
comment on function credits.gather is 'Moves what several pools can spare into one, where what was one grant is one again; returns the micros moved';

-- switch_pools: an organization's credits from shared to personal pools, or back. p_to: personal or shared.
-- To personal: each member gets what is left of their reserved share, then all active members the same, and what cannot be divided goes to a
-- residual pool; each part of every grant, which keeps its priority, time and cost basis. Shares end. To shared: personal and residual
-- pools are gathered. Open holds settle where they began; what they free follows (sweep_pool). The caller sets how the organization shares.
-- Returns {moved_micros, residual_micros, held_micros, pools}.
create or replace function credits.switch_pools(
    p_organization_id uuid, p_to text, p_created_by uuid, p_idempotency_key text, p_at timestamptz default null
) returns jsonb
language plpgsql volatile security definer set search_path = credits, pg_temp as $$
declare
    v_now timestamptz := credits.lock_gate(p_organization_id, p_at);
    v_hash bytea := credits.hash_of('switch_pools', p_to);
    v_stored jsonb := credits.stored_outcome(p_organization_id, p_idempotency_key, v_hash, v_now);
    v_row record;
    v_users uuid[];
    v_rests bigint[];
    v_moved bigint := 0;
    v_residual bigint := 0;
    v_held bigint := 0;
    v_pools integer := 0;
    v_closing uuid[] := '{}';
    v_room bigint;
    v_shared uuid;
begin
    if v_stored is not null then
        return v_stored;
    end if;
    if p_to is null or p_to not in ('personal', 'shared') or not exists (
            select from identity.organizations where organization_id = p_organization_id and kind = 'company') then
        raise exception 'a company''s pools become personal or shared' using errcode = 'BR400';
    end if;
    for v_row in
        select p.pool_id, p.kind, p.model_filter, b.excess_amount
        from pools p join balances b on b.organization_id = p.organization_id and b.balance_id = p.pool_id
        where p.organization_id = p_organization_id and p.closed_at is null
          and case p_to when 'personal' then p.kind = 'shared' else p.kind in ('personal', 'residual') end
        order by p.created_at, p.pool_id
    loop
        if v_row.excess_amount > 0 then
            raise exception '% owes %', credits.spoken_pool(p_organization_id, v_row.pool_id), credits.spoken(v_row.excess_amount) using errcode = 'BR433';
        end if;
        v_pools := v_pools + 1;
        perform credits.fold_pool(p_organization_id, v_row.pool_id, v_now);
        v_closing := v_closing || v_row.pool_id;
        if p_to = 'personal' then
            select array_agg(a.user_id), array_agg(greatest(0, b.limit_amount - b.used_amount - b.held_amount)) into v_users, v_rests
            from allocations a join balances b on b.organization_id = a.organization_id and b.balance_id = a.allocation_id
            where a.organization_id = p_organization_id and a.pool_id = v_row.pool_id and a.kind = 'reserved' and a.ended_at is null;
            perform credits.close_allocation(p_organization_id, allocation_id, v_now) from allocations
            where organization_id = p_organization_id and pool_id = v_row.pool_id and ended_at is null;
            v_room := credits.room_of_pool(p_organization_id, v_row.pool_id);
            v_moved := v_moved + v_room;
            v_residual := v_residual + credits.spread_over_members(p_organization_id, v_row.pool_id, coalesce(v_users, '{}'),
                coalesce(v_rests, '{}'), 'switch to personal pools', p_created_by, p_idempotency_key, v_now);
            v_held := v_held + credits.watch_holds(p_organization_id, v_row.pool_id, null, v_now);
        end if;
    end loop;
    if p_to = 'shared' then
        perform credits.shared_pool(p_organization_id, model_filter, v_now)  -- also those that nothing goes to now: they are there again
        from (select null as model_filter union select model_filter from pools where organization_id = p_organization_id and kind = 'shared') f;
        for v_row in
            select p.model_filter, array_agg(p.pool_id order by p.pool_id) as pool_ids from pools p
            where p.organization_id = p_organization_id and p.pool_id = any (v_closing) group by 1 order by 1
        loop
            v_shared := credits.shared_pool(p_organization_id, v_row.model_filter, v_now);
            v_moved := v_moved + credits.gather(p_organization_id, v_row.pool_ids, v_shared, 'switch to a shared pool', p_created_by,
                p_idempotency_key, v_now);
            select v_held + coalesce(sum(credits.watch_holds(p_organization_id, pool_id, v_shared, v_now)), 0) into v_held from unnest(v_row.pool_ids) pool_id;
        end loop;
    end if;
    update pools set closed_at = v_now where organization_id = p_organization_id and pool_id = any (v_closing);
    perform credits.fold_pool(p_organization_id, pool_id, v_now) from unnest(v_closing) pool_id;
    perform credits.settle_due(p_organization_id, v_now);
    perform credits.limits_changed(p_organization_id);
    v_stored := jsonb_build_object('moved_micros', v_moved, 'residual_micros', v_residual, 'held_micros', v_held, 'pools', v_pools);
    perform credits.store_outcome(p_organization_id, p_idempotency_key, v_hash, v_stored, v_now);
    return v_stored;
end $$;
comment on function credits.switch_pools is 'Moves an organization''s credits from its shared pool to personal ones, or back, to the micro';

-- shared_pool: the shared pool of a filter, opened where it is missing.
create or replace function credits.shared_pool(p_organization_id uuid, p_model_filter text, p_now timestamptz) returns uuid
language plpgsql volatile set search_path = credits, pg_temp as $$
declare
    v_pool uuid := credits.reopen_pool(p_organization_id, 'shared', null, p_model_filter);
    v_open uuid := gen_random_uuid();
begin
    if v_pool is null then
        v_pool := gen_random_uuid();
        insert into pools (organization_id, pool_id, kind, name, model_filter, open_part_id, created_at)
        values (p_organization_id, v_pool, 'shared', 'Shared credits', p_model_filter, v_open, p_now);
        insert into balances (organization_id, balance_id, kind, limit_amount) values (p_organization_id, v_pool, 'pool', 0), (p_organization_id, v_open, 'open', 0);
    end if;
    return v_pool;
end $$;
comment on function credits.shared_pool is 'The shared pool for all models, or for those of a filter, opened where it is missing';
