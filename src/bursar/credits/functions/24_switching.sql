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
        values (p_organization_id, p_pool_id, v_row.request_id, v_row.micros,
            coalesce(p_to_pool_id, credits.personal_pool(p_organization_id, v_row.user_id, v_filter, p_now)));
        v_kept := v_kept + v_row.micros;
    end loop;
    return v_kept;
end $$;
comment on function credits.watch_holds is 'Notes for each open hold on a closing pool where goes what it does not use; returns what they hold';

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
            raise exception 'pool % owes % micros', v_row.pool_id, v_row.excess_amount using errcode = 'BR433';
        end if;
        v_pools := v_pools + 1;
        perform credits.fold_pool(p_organization_id, v_row.pool_id, v_now);
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
        else
            v_shared := credits.shared_pool(p_organization_id, v_row.model_filter, v_now);
            v_room := credits.room_of_pool(p_organization_id, v_row.pool_id);
            v_moved := v_moved + v_room;
            perform credits.divide(p_organization_id, v_row.pool_id, array[v_shared], array[v_room], 'switch to a shared pool', p_created_by,
                p_idempotency_key, v_now);
            v_held := v_held + credits.watch_holds(p_organization_id, v_row.pool_id, v_shared, v_now);
        end if;
        update pools set closed_at = v_now where organization_id = p_organization_id and pool_id = v_row.pool_id;
        perform credits.fold_pool(p_organization_id, v_row.pool_id, v_now);
    end loop;
    if p_to = 'shared' then
        perform credits.shared_pool(p_organization_id, null, v_now);
    end if;
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
