-- Shares of a pool, and caps of every scope.

-- allocate: set a user's share of a shared pool. A reserved share larger than the open part is refused unless p_oversubscribe.
create or replace function credits.allocate(
    p_organization_id uuid, p_allocation_id uuid, p_pool_id uuid, p_user_id uuid, p_kind text, p_period text, p_amount_micros bigint,
    p_when_empty text, p_oversubscribe boolean, p_created_by uuid, p_idempotency_key text, p_at timestamptz default null,
    p_carry_micros bigint default 0
) returns uuid
language plpgsql volatile security definer set search_path = credits, pg_temp as $$
declare
    v_now timestamptz := credits.lock_gate(p_organization_id, p_at);
    v_hash bytea := credits.hash_of('allocate', p_pool_id::text, p_user_id::text, p_kind, p_period, p_amount_micros::text, p_when_empty,
        p_oversubscribe::text, nullif(p_carry_micros, 0)::text);
    v_stored jsonb := credits.stored_outcome(p_organization_id, p_idempotency_key, v_hash, v_now);
    v_old allocations;
    v_id uuid := p_allocation_id;
    v_open_room bigint;
    v_grows bigint;
begin
    if v_stored is not null then
        return (v_stored ->> 'allocation_id')::uuid;
    end if;
    perform credits.require_amount(p_amount_micros, 0);
    perform credits.require_amount(p_carry_micros, 0);
    select b.limit_amount - b.used_amount - b.held_amount into v_open_room
    from pools p join balances b on b.organization_id = p.organization_id and b.balance_id = p.open_part_id
    where p.organization_id = p_organization_id and p.pool_id = p_pool_id and p.closed_at is null;
    if not found then  -- only shared pools have an open part
        raise exception 'no such shared pool' using errcode = 'BR404';
    end if;
    select * into v_old from allocations
    where organization_id = p_organization_id and pool_id = p_pool_id and user_id = p_user_id and ended_at is null;
    if found and v_old.kind = p_kind and v_old.period = p_period then
        v_id := v_old.allocation_id;
    elsif found then
        perform credits.close_allocation(p_organization_id, v_old.allocation_id, v_now);
        v_old := null;
        select b.limit_amount - b.used_amount - b.held_amount into v_open_room
        from pools p join balances b on b.organization_id = p.organization_id and b.balance_id = p.open_part_id
        where p.organization_id = p_organization_id and p.pool_id = p_pool_id;
    end if;
    v_grows := p_amount_micros - coalesce(v_old.amount_micros, 0);
    if p_kind = 'reserved' and v_grows > 0 and v_grows > v_open_room and not p_oversubscribe then
        raise exception 'the pool has % that no share reserves, % more are asked for', credits.spoken(greatest(0, v_open_room)), credits.spoken(v_grows)
            using errcode = 'BR430';
    end if;
    if v_old.allocation_id is null then
        insert into allocations (organization_id, allocation_id, pool_id, user_id, kind, period, amount_micros, when_empty, carry_micros,
                                 created_at, created_by)
        values (p_organization_id, v_id, p_pool_id, p_user_id, p_kind, p_period, p_amount_micros, p_when_empty, p_carry_micros, v_now, p_created_by);
        if p_kind = 'reserved' then
            insert into balances (organization_id, balance_id, kind, limit_amount)
            values (p_organization_id, v_id, 'allocation', p_amount_micros);
            perform credits.begin_renewals(p_organization_id, v_id, v_now);
        end if;
    else
        update allocations set amount_micros = p_amount_micros, when_empty = p_when_empty, carry_micros = p_carry_micros
        where organization_id = p_organization_id and allocation_id = v_id;
        perform credits.set_current_limit(p_organization_id, v_id, credits.share_size(p_organization_id, v_id), v_now);
    end if;
    perform credits.note_share(p_organization_id, v_id, p_created_by, v_now);
    perform credits.set_pool_limit(p_organization_id, p_pool_id, 0);
    perform credits.limits_changed(p_organization_id);
    perform credits.store_outcome(p_organization_id, p_idempotency_key, v_hash, jsonb_build_object('allocation_id', v_id), v_now);
    return v_id;
end $$;
comment on function credits.allocate is 'Sets a user''s share of a shared pool, reserved or capped';

-- set_current_limit: the limit of a balance's current period (or its only one); past periods are history.
create or replace function credits.set_current_limit(p_organization_id uuid, p_balance_id uuid, p_amount bigint, p_now timestamptz) returns void
language sql volatile set search_path = credits, pg_temp as $$
    update balances set limit_amount = p_amount, excess_amount = greatest(0, used_amount + held_amount - p_amount)
    where organization_id = p_organization_id and balance_id = p_balance_id and period_start <= p_now and period_end > p_now;
$$;
comment on function credits.set_current_limit is 'Sets the limit of a balance''s current period';

create or replace function credits.close_allocation(p_organization_id uuid, p_allocation_id uuid, p_now timestamptz) returns void
language plpgsql volatile set search_path = credits, pg_temp as $$
declare
    v_row allocations;
begin
    update allocations set ended_at = p_now, renews_at = 'infinity'
    where organization_id = p_organization_id and allocation_id = p_allocation_id and ended_at is null
    returning * into v_row;
    if not found then
        raise exception 'no such allocation' using errcode = 'BR404';
    end if;
    if v_row.kind = 'reserved' then
        -- From now on it claims what it has used and holds, and nothing can be held on it any more.
        perform credits.set_current_limit(p_organization_id, p_allocation_id, 0, p_now);
        perform credits.await_limits(p_organization_id);
    end if;
    perform credits.set_pool_limit(p_organization_id, v_row.pool_id, 0);
end $$;
comment on function credits.close_allocation is 'Ends an allocation; what it had not used returns to the open part';

create or replace function credits.end_allocation(
    p_organization_id uuid, p_allocation_id uuid, p_at timestamptz default null
) returns void
language plpgsql volatile security definer set search_path = credits, pg_temp as $$
declare
    v_now timestamptz := credits.lock_gate(p_organization_id, p_at);
begin
    perform credits.close_allocation(p_organization_id, p_allocation_id, v_now);
    perform credits.limits_changed(p_organization_id);
end $$;
comment on function credits.end_allocation is 'Ends a user''s share; its open holds settle against it';

-- set_limit: the cap of a scope, metric, period and model filter, or the default for all of a scope; set again, it changes its amount, its
-- strictness, and whether a limit that stops may be asked about. A limit of one's own takes the place of a default, and goes on counting
-- where that one had counted; without amount it is none at all.
create or replace function credits.set_limit(
    p_organization_id uuid, p_limit_id uuid, p_scope text, p_scope_id uuid, p_metric text, p_model_filter text, p_period text,
    p_amount bigint, p_action text, p_created_by uuid, p_at timestamptz default null, p_is_strict boolean default false,
    p_is_default boolean default false, p_within_scope text default null, p_within_id uuid default null
) returns uuid
language plpgsql volatile security definer set search_path = credits, pg_temp as $$
declare
    v_now timestamptz := credits.lock_gate(p_organization_id, p_at);
    v_id uuid;
    v_balance uuid;
begin
    if p_amount is null and p_scope_id is null and p_within_id is null then
        raise exception 'only one member, key, team or department can be without limit' using errcode = 'BR400';
    end if;
    perform credits.require_amount(coalesce(p_amount, 0), 0);
    select limit_id, balance_id into v_id, v_balance from limits
    where organization_id = p_organization_id and scope = p_scope and scope_id is not distinct from p_scope_id and is_default = p_is_default
      and within_scope is not distinct from p_within_scope and within_id is not distinct from p_within_id and metric = p_metric
      and period = p_period and model_filter is not distinct from p_model_filter and (action = 'warns') = (p_action = 'warns') and ended_at is null;
    if found then
        update limits set amount = p_amount, is_strict = p_is_strict, action = p_action
        where organization_id = p_organization_id and limit_id = v_id;
    else
        v_id := p_limit_id;
        if not p_is_default then
            select balance_id into v_balance from counters
            where organization_id = p_organization_id and scope = p_scope and subject_id = p_scope_id and metric = p_metric and period = p_period
              and model_filter is not distinct from p_model_filter and stops = (p_action <> 'warns');
            v_balance := coalesce(v_balance, v_id);
        end if;
        insert into limits (organization_id, limit_id, scope, scope_id, metric, model_filter, period, amount, action, is_strict, is_default,
                            within_scope, within_id, balance_id, created_at, created_by)
        values (p_organization_id, v_id, p_scope, p_scope_id, p_metric, p_model_filter, p_period, p_amount, p_action, p_is_strict, p_is_default,
                p_within_scope, p_within_id, v_balance, v_now, p_created_by);
    end if;
    insert into limit_changes (organization_id, limit_id, nr, changed_at, amount, action, is_strict, changed_by)
    select p_organization_id, v_id, count(*) + 1, v_now, p_amount, p_action, p_is_strict, p_created_by
    from limit_changes where organization_id = p_organization_id and limit_id = v_id;
    -- A default's balances follow as chains are built anew, before anybody else is authorized.
    if v_balance is not null and p_amount is not null then
        perform credits.set_current_limit(p_organization_id, v_balance, p_amount + credits.raised(p_organization_id, v_balance), v_now);
    end if;
    perform credits.limits_changed(p_organization_id);
    return v_id;
end $$;
comment on function credits.set_limit is 'Sets a cap or a default; the same again changes its amount, strictness and whether it may be asked about';

create or replace function credits.end_limit(p_organization_id uuid, p_limit_id uuid, p_at timestamptz default null) returns void
language plpgsql volatile security definer set search_path = credits, pg_temp as $$
declare
    v_now timestamptz := credits.lock_gate(p_organization_id, p_at);
begin
    update limits set ended_at = v_now where organization_id = p_organization_id and limit_id = p_limit_id and ended_at is null;
    if not found then
        raise exception 'no such limit' using errcode = 'BR404';
    end if;
    perform credits.limits_changed(p_organization_id);
end $$;
comment on function credits.end_limit is 'Lifts a cap';
