-- Individuals who move into an organization with their credits: out of their home first, then in there, under one transfer id.

-- depart: everything in a person's home that no running request holds leaves it, grant by grant. Again is the same departure.
create or replace function credits.depart(
    p_organization_id uuid, p_transfer_id uuid, p_user_id uuid, p_into_organization_id uuid, p_into_kind text, p_created_by uuid,
    p_at timestamptz default null
) returns credits.departures
language plpgsql volatile security definer set search_path = credits, pg_temp as $$
declare
    v_now timestamptz := credits.lock_gate(p_organization_id, p_at);
    v_departure departures;
    v_pool record;
    v_row record;
    v_grant grants;
    v_kept bigint;
    v_take bigint;
    v_gone bigint;
    v_value bigint;
    v_parts jsonb := '[]';
    v_total bigint := 0;
    v_held bigint := 0;
begin
    select * into v_departure from departures where organization_id = p_organization_id and transfer_id = p_transfer_id;
    if found then
        return v_departure;
    end if;
    for v_pool in
        select p.pool_id, p.model_filter, b.held_amount, b.excess_amount
        from pools p join balances b on b.organization_id = p.organization_id and b.balance_id = p.pool_id
        where p.organization_id = p_organization_id and p.kind = 'individual'
        order by p.created_at, p.pool_id
    loop
        if v_pool.excess_amount > 0 then
            raise exception '% owes %', credits.spoken_pool(p_organization_id, v_pool.pool_id), credits.spoken(v_pool.excess_amount) using errcode = 'BR433';
        end if;
        perform credits.pour(p_organization_id, v_pool.pool_id, v_now);
        v_kept := v_pool.held_amount;  -- holds burn first: their grants stay
        v_held := v_held + v_kept;
        v_gone := 0;
        for v_row in
            select s.grant_id, s.left_micros, s.value_left_nano_usd
            from grant_states s join grants g on g.organization_id = s.organization_id and g.grant_id = s.grant_id
            where s.organization_id = p_organization_id and s.pool_id = v_pool.pool_id and s.state in ('active', 'lingering') and s.left_micros > 0
            order by g.priority, g.expires_at, g.is_free desc, g.effective_at, g.created_at, g.grant_id
        loop
            v_take := v_row.left_micros - least(v_row.left_micros, v_kept);
            v_kept := greatest(0, v_kept - v_row.left_micros);
            continue when v_take = 0;  -- so with one that expired: what no hold needed of it is gone since the gate was taken
            select * into strict v_grant from grants where organization_id = p_organization_id and grant_id = v_row.grant_id;
            v_value := credits.value_taken(v_grant, v_row.left_micros, v_row.value_left_nano_usd, v_take);
            insert into ledger.entries (organization_id, entry_id, booked_at, happened_at, kind, from_kind, from_id, to_kind, to_id, amount, grant_id,
                value_nano_usd, actor_id, reason)
            values (p_organization_id, gen_random_uuid(), v_now, v_now, 'transfer_out', 'pool', v_pool.pool_id, 'other_organization',
                p_into_organization_id, v_take, v_row.grant_id, v_value, p_created_by, 'moved to another organization');
            update grant_states set left_micros = left_micros - v_take, value_left_nano_usd = value_left_nano_usd - v_value,
                state = case when left_micros = v_take then 'ended' else state end, ended_at = case when left_micros = v_take then v_now end
            where organization_id = p_organization_id and grant_id = v_row.grant_id;
            v_parts := v_parts || jsonb_build_object('grant_id', v_grant.grant_id, 'model_filter', v_pool.model_filter, 'amount_micros', v_take,
                'value_nano_usd', v_value, 'priority', v_grant.priority, 'is_free', v_grant.is_free, 'effective_at', v_grant.effective_at,
                'expires_at', v_grant.expires_at);
            v_gone := v_gone + v_take;
        end loop;
        if v_gone > 0 then
            perform credits.set_pool_limit(p_organization_id, v_pool.pool_id, -v_gone);
        end if;
        v_total := v_total + v_gone;
    end loop;
    insert into departures (organization_id, transfer_id, user_id, into_organization_id, into_kind, amount_micros, held_micros, parts, left_at)
    values (p_organization_id, p_transfer_id, p_user_id, p_into_organization_id, p_into_kind, v_total, v_held, v_parts, v_now)
    returning * into v_departure;
    return v_departure;
end $$;
comment on function credits.depart is 'Takes what no running request holds out of a person''s home, for another organization';

-- arrive: what left a home comes into an organization, as grants with the same priority, time, kind and money paid. Again changes nothing.
-- What was meant for a shared pool that was divided on the way goes to the person's own.
create or replace function credits.arrive(
    p_organization_id uuid, p_transfer_id uuid, p_user_id uuid, p_from_organization_id uuid, p_kind text, p_parts jsonb, p_created_by uuid,
    p_at timestamptz default null
) returns bigint
language plpgsql volatile security definer set search_path = credits, pg_temp as $$
declare
    v_now timestamptz := credits.lock_gate(p_organization_id, p_at);
    v_is_shared boolean := p_kind = 'shared' and (select is_shared_token_pool from identity.organizations where organization_id = p_organization_id);
    v_part record;
    v_pool uuid;
    v_new uuid;
    v_total bigint := 0;
begin
    if exists (select from arrivals where organization_id = p_organization_id and transfer_id = p_transfer_id) then
        return (select amount_micros from arrivals where organization_id = p_organization_id and transfer_id = p_transfer_id);
    end if;
    for v_part in
        select * from jsonb_to_recordset(p_parts) as p(grant_id uuid, model_filter text, amount_micros bigint, value_nano_usd bigint,
            priority smallint, is_free boolean, effective_at timestamptz, expires_at timestamptz)
    loop
        v_pool := case when v_is_shared then credits.shared_pool(p_organization_id, v_part.model_filter, v_now)
                       else credits.personal_pool(p_organization_id, p_user_id, v_part.model_filter, v_now) end;
        perform credits.pour(p_organization_id, v_pool, v_now);  -- what was used there before is paid by the grants that there were
        v_new := gen_random_uuid();
        insert into grants (organization_id, grant_id, pool_id, source, amount_micros, priority, is_free, cost_basis_nano_usd, effective_at, expires_at,
            parent_grant_id, reason, created_at, created_by)
        values (p_organization_id, v_new, v_pool, 'transfer', v_part.amount_micros, v_part.priority, v_part.is_free, v_part.value_nano_usd,
            v_part.effective_at, v_part.expires_at, v_part.grant_id, 'brought along by a member', v_now, p_created_by);
        insert into grant_states (organization_id, grant_id, pool_id, state, left_micros, value_left_nano_usd)
        values (p_organization_id, v_new, v_pool, 'active', v_part.amount_micros, v_part.value_nano_usd);
        insert into ledger.entries (organization_id, entry_id, booked_at, happened_at, kind, from_kind, from_id, to_kind, to_id, amount, grant_id,
            value_nano_usd, actor_id, reason)
        values (p_organization_id, gen_random_uuid(), v_now, v_now, 'transfer_in', 'other_organization', p_from_organization_id, 'pool', v_pool,
            v_part.amount_micros, v_new, v_part.value_nano_usd, p_created_by, 'brought along by a member');
        perform credits.set_pool_limit(p_organization_id, v_pool, v_part.amount_micros);
        perform credits.fold_pool(p_organization_id, v_pool, v_now);  -- one that expired on the way expires here
        v_total := v_total + v_part.amount_micros;
    end loop;
    perform credits.settle_due(p_organization_id, v_now);
    insert into arrivals (organization_id, transfer_id, user_id, from_organization_id, amount_micros, arrived_at)
    values (p_organization_id, p_transfer_id, p_user_id, p_from_organization_id, v_total, v_now);
    perform credits.limits_changed(p_organization_id);
    return v_total;
end $$;
comment on function credits.arrive is 'Brings what left a person''s home into an organization; returns the micros that arrived';

create or replace function credits.note_arrival(p_organization_id uuid, p_transfer_id uuid, p_at timestamptz default null) returns void
language plpgsql volatile security definer set search_path = credits, pg_temp as $$
declare
    v_now timestamptz := credits.lock_gate(p_organization_id, p_at);
begin
    update departures set arrived_at = v_now
    where organization_id = p_organization_id and transfer_id = p_transfer_id and arrived_at is null;
end $$;
comment on function credits.note_arrival is 'Notes that a departure has arrived';
