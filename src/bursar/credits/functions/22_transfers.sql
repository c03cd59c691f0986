-- Credits that go on elsewhere: transfers between pools of one organization, and the sweep of closed pools.

-- move_part: some of what a grant has left goes on in another pool, as a grant with the same priority, time and kind and its share of the
-- money paid. The caller moves the limits of both pools. Returns the new grant. Bounds of a roll-over go along with an untouched
-- grant; a part of one takes its share of the most, and the least stays behind.
create or replace function credits.move_part(
    p_organization_id uuid, p_grant_id uuid, p_to_pool_id uuid, p_micros bigint, p_reason text, p_actor_id uuid, p_idempotency_key text,
    p_now timestamptz
) returns uuid
language plpgsql volatile set search_path = credits, pg_temp as $$
declare
    v_grant grants;
    v_state grant_states;
    v_value bigint;
    v_new uuid := gen_random_uuid();
begin
    select * into strict v_grant from grants where organization_id = p_organization_id and grant_id = p_grant_id;
    select * into strict v_state from grant_states where organization_id = p_organization_id and grant_id = p_grant_id;
    v_value := credits.value_taken(v_grant, v_state.left_micros, v_state.value_left_nano_usd, p_micros);
    insert into grants (organization_id, grant_id, pool_id, source, amount_micros, priority, is_free, cost_basis_nano_usd, effective_at, expires_at,
        parent_grant_id, min_rollover_micros, max_rollover_micros, rollover_expires_at, reason, created_at, created_by)
    values (p_organization_id, v_new, p_to_pool_id, 'transfer', p_micros, v_grant.priority, v_grant.is_free, v_value, v_grant.effective_at,
        v_grant.expires_at, p_grant_id,
        case when v_grant.max_rollover_micros is null then null when p_micros = v_grant.amount_micros then v_grant.min_rollover_micros else 0 end,
        floor(v_grant.max_rollover_micros::numeric * p_micros / v_grant.amount_micros)::bigint,
        v_grant.rollover_expires_at, p_reason, p_now, p_actor_id);
    insert into grant_states (organization_id, grant_id, pool_id, state, left_micros, value_left_nano_usd)
    values (p_organization_id, v_new, p_to_pool_id, 'active', p_micros, v_value);
    insert into ledger.entries (organization_id, entry_id, booked_at, happened_at, kind, from_kind, from_id, to_kind, to_id, amount, grant_id,
        from_grant_id, value_nano_usd, actor_id, reason, idempotency_key)
    values (p_organization_id, gen_random_uuid(), p_now, p_now, 'transfer', 'pool', v_state.pool_id, 'pool', p_to_pool_id, p_micros, v_new,
        p_grant_id, v_value, p_actor_id, p_reason, p_idempotency_key);
    update grant_states set left_micros = left_micros - p_micros, value_left_nano_usd = value_left_nano_usd - v_value,
        state = case when left_micros = p_micros then 'ended' else state end, ended_at = case when left_micros = p_micros then p_now end
    where organization_id = p_organization_id and grant_id = p_grant_id;
    return v_new;
end $$;
comment on function credits.move_part is 'Moves some of what a grant has left into another pool, as a grant of its own';

-- room_of_pool: what of a pool neither holds nor reserved shares need.
create or replace function credits.room_of_pool(p_organization_id uuid, p_pool_id uuid) returns bigint
language sql stable set search_path = credits, pg_temp as $$
    select greatest(0, least(b.limit_amount - b.used_amount - b.held_amount, o.limit_amount - o.used_amount - o.held_amount))
    from pools p
    join balances b on b.organization_id = p.organization_id and b.balance_id = p.pool_id
    left join balances o on o.organization_id = p.organization_id and o.balance_id = p.open_part_id
    where p.organization_id = p_organization_id and p.pool_id = p_pool_id;
$$;
comment on function credits.room_of_pool is 'Micros of a pool that no hold and no reserved share needs';

-- divide: what a pool can spare goes to others, so much to each, grant by grant in burn order; each gets its part of every grant, exactly.
-- Open holds keep the grants that they would burn. p_shares: micros for each of p_to_pool_ids; together at most what the pool can spare.
-- The pools are folded. Returns the new grants.
create or replace function credits.divide(
    p_organization_id uuid, p_pool_id uuid, p_to_pool_ids uuid[], p_shares bigint[], p_reason text, p_actor_id uuid, p_idempotency_key text,
    p_now timestamptz
) returns uuid[]
language plpgsql volatile set search_path = credits, pg_temp as $$
declare
    v_row record;
    v_held bigint;
    v_kept bigint;
    v_needs bigint[] := p_shares;
    v_need bigint;
    v_total bigint;
    v_take bigint;
    v_part bigint;
    v_before bigint;
    v_new uuid[] := '{}';
begin
    select coalesce(sum(s), 0) into v_total from unnest(p_shares) s;
    if v_total = 0 then
        return v_new;
    end if;
    v_need := v_total;
    -- Whatever is due there belongs to the time before these credits came.
    perform credits.fold_pool(organization_id, pool_id, p_now) from pools
    where organization_id = p_organization_id and pool_id = any (p_to_pool_ids) and closed_at is null and next_event_at <= p_now;
    -- So does what was used there: it is paid by the grants that there were.
    perform credits.pour(organization_id, pool_id, p_now) from pools
    where organization_id = p_organization_id and pool_id = any (p_to_pool_ids);
    perform credits.pour(p_organization_id, p_pool_id, p_now);
    select held_amount into strict v_held from balances where organization_id = p_organization_id and balance_id = p_pool_id;
    for v_row in
        select s.grant_id, s.left_micros, s.state
        from grant_states s join grants g on g.organization_id = s.organization_id and g.grant_id = s.grant_id
        where s.organization_id = p_organization_id and s.pool_id = p_pool_id and s.state in ('active', 'lingering') and s.left_micros > 0
        order by g.priority, g.expires_at, g.is_free desc, g.effective_at, g.created_at, g.grant_id
    loop
        exit when v_need = 0;
        v_kept := least(v_row.left_micros, v_held);
        v_held := v_held - v_kept;
        continue when v_row.state = 'lingering';
        v_take := least(v_row.left_micros - v_kept, v_need);
        continue when v_take = 0;
        v_before := 0;
        for i in 1..cardinality(v_needs) loop
            -- Rounded down to here less rounded down to the one before: the parts add up to what is taken, and none is more than it needs.
            v_part := floor(v_take::numeric * (v_before + v_needs[i]) / v_need) - floor(v_take::numeric * v_before / v_need);
            v_before := v_before + v_needs[i];
            if v_part > 0 then
                v_new := v_new || credits.move_part(p_organization_id, v_row.grant_id, p_to_pool_ids[i], v_part, p_reason, p_actor_id,
                    p_idempotency_key, p_now);
                v_needs[i] := v_needs[i] - v_part;
            end if;
        end loop;
        v_need := v_need - v_take;
    end loop;
    if v_need <> 0 then
        raise exception 'pool % has % micros less to spare than it should', p_pool_id, v_need;  -- a fault: the ledger would not balance
    end if;
    perform credits.set_pool_limit(p_organization_id, p_pool_id, -v_total);
    for i in 1..cardinality(p_shares) loop
        if p_shares[i] > 0 then
            perform credits.set_pool_limit(p_organization_id, p_to_pool_ids[i], p_shares[i]);
            perform credits.fold_pool(organization_id, pool_id, p_now) from pools
            where organization_id = p_organization_id and pool_id = p_to_pool_ids[i] and closed_at is null;
        end if;
    end loop;
    perform credits.limits_changed(p_organization_id);
    return v_new;
end $$;
comment on function credits.divide is 'Moves what a pool can spare to other pools, each its part of every grant';

-- transfer_credits: unspent credits of one pool go to another of the same organization, grant by grant in burn order; null: all that neither
-- holds nor reserved shares need. Returns the new grants.
create or replace function credits.transfer_credits(
    p_organization_id uuid, p_from_pool_id uuid, p_to_pool_id uuid, p_amount_micros bigint, p_reason text, p_created_by uuid,
    p_idempotency_key text, p_at timestamptz default null
) returns uuid[]
language plpgsql volatile security definer set search_path = credits, pg_temp as $$
declare
    v_now timestamptz := credits.lock_gate(p_organization_id, p_at);
    v_hash bytea := credits.hash_of('transfer_credits', p_from_pool_id::text, p_to_pool_id::text, p_amount_micros::text, p_reason);
    v_stored jsonb := credits.stored_outcome(p_organization_id, p_idempotency_key, v_hash, v_now);
    v_from pools;
    v_to pools;
    v_room bigint;
    v_new uuid[];
begin
    if v_stored is not null then
        return array(select jsonb_array_elements_text(v_stored -> 'grant_ids')::uuid);
    end if;
    if p_amount_micros is not null then
        perform credits.require_amount(p_amount_micros, 1);
    end if;
    select * into v_from from pools where organization_id = p_organization_id and pool_id = p_from_pool_id and closed_at is null;
    select * into v_to from pools where organization_id = p_organization_id and pool_id = p_to_pool_id and closed_at is null;
    if v_from.pool_id is null or v_to.pool_id is null then
        raise exception 'no such open pool' using errcode = 'BR404';
    end if;
    if v_from.pool_id = v_to.pool_id then
        raise exception 'credits go from one pool to another' using errcode = 'BR400';
    end if;
    if v_from.model_filter is not null and v_to.model_filter is distinct from v_from.model_filter then
        raise exception 'credits for some models only stay in pools for these models' using errcode = 'BR400';
    end if;
    perform credits.fold_pool(p_organization_id, p_from_pool_id, v_now);
    v_room := credits.room_of_pool(p_organization_id, p_from_pool_id);
    if p_amount_micros > v_room then
        raise exception 'the pool can spare %, % are asked for', credits.spoken(v_room), credits.spoken(p_amount_micros) using errcode = 'BR431';
    end if;
    v_new := credits.divide(p_organization_id, p_from_pool_id, array[p_to_pool_id], array[coalesce(p_amount_micros, v_room)], p_reason,
        p_created_by, p_idempotency_key, v_now);
    perform credits.fold_pool(p_organization_id, p_from_pool_id, v_now);
    perform credits.settle_due(p_organization_id, v_now);
    perform credits.store_outcome(p_organization_id, p_idempotency_key, v_hash, jsonb_build_object('grant_ids', to_jsonb(v_new)), v_now);
    return v_new;
end $$;
comment on function credits.transfer_credits is 'Moves unspent credits from one pool to another of the same organization; returns the new grants';

-- personal_pool: where a member's credits go, and without a member what belongs to nobody.
create or replace function credits.personal_pool(
    p_organization_id uuid, p_user_id uuid, p_model_filter text, p_now timestamptz
) returns uuid
language plpgsql volatile set search_path = credits, pg_temp as $$
declare
    v_kind text := case when p_user_id is null then 'residual' else 'personal' end;
    v_pool uuid := credits.reopen_pool(p_organization_id, v_kind, p_user_id, p_model_filter);
begin
    if v_pool is null then
        v_pool := gen_random_uuid();
        insert into pools (organization_id, pool_id, kind, owner_user_id, name, model_filter, created_at)
        values (p_organization_id, v_pool, v_kind, p_user_id, case v_kind when 'personal' then 'Personal credits' else 'Residual credits' end,
            p_model_filter, p_now);
        insert into balances (organization_id, balance_id, kind, limit_amount) values (p_organization_id, v_pool, 'pool', 0);
    end if;
    return v_pool;
end $$;
comment on function credits.personal_pool is 'A member''s personal pool, or without a member the residual one, opened where it is missing';

-- spread_over_members: what a shared pool can spare goes to its members: what is set apart for each (p_rests), then the same to each active
-- member, and what cannot be divided to the residual pool. Returns how much went there.
create or replace function credits.spread_over_members(
    p_organization_id uuid, p_pool_id uuid, p_users uuid[], p_rests bigint[], p_reason text, p_actor_id uuid, p_idempotency_key text,
    p_now timestamptz
) returns bigint
language plpgsql volatile set search_path = credits, pg_temp as $$
declare
    v_total bigint;
    v_claimed bigint;
    v_left bigint;
    v_each bigint;
    v_members uuid[];
    v_users uuid[];
    v_shares bigint[];
    v_pools uuid[] := '{}';
    v_filter text;
begin
    select greatest(0, b.limit_amount - b.used_amount - b.held_amount), p.model_filter into strict v_total, v_filter
    from pools p join balances b on b.organization_id = p.organization_id and b.balance_id = p.pool_id
    where p.organization_id = p_organization_id and p.pool_id = p_pool_id;
    v_members := array(select user_id from identity.memberships where organization_id = p_organization_id and status = 'active' order by user_id);
    select coalesce(sum(r), 0) into v_claimed from unnest(p_rests) r;
    -- Shares that are larger than the pool together get their part of it.
    select array_agg(u.user_id order by u.user_id), array_agg(u.micros order by u.user_id) into v_users, v_shares
    from (
        select coalesce(c.user_id, m.user_id) as user_id,
            coalesce(case when v_claimed <= v_total then c.rest else floor(v_total::numeric * c.rest / v_claimed)::bigint end, 0) as micros
        from unnest(p_users, p_rests) c(user_id, rest) full join unnest(v_members) m(user_id) on m.user_id = c.user_id
    ) u;
    v_left := v_total - coalesce((select sum(s) from unnest(v_shares) s), 0);
    if cardinality(v_members) > 0 then
        v_each := v_left / cardinality(v_members);
        v_shares := array(select s + case when user_id = any (v_members) then v_each else 0 end
            from unnest(v_users, v_shares) with ordinality u(user_id, s, nr) order by nr);
        v_left := v_left - v_each * cardinality(v_members);
    end if;
    if v_left > 0 then
        v_users := v_users || null::uuid;
        v_shares := v_shares || v_left;
    end if;
    for i in 1..coalesce(cardinality(v_users), 0) loop
        v_pools := v_pools || case when v_shares[i] > 0 then credits.personal_pool(p_organization_id, v_users[i], v_filter, p_now)
            else '00000000-0000-0000-0000-000000000000'::uuid end;
    end loop;
    perform credits.divide(p_organization_id, p_pool_id, v_pools, coalesce(v_shares, '{}'), p_reason, p_actor_id, p_idempotency_key, p_now);
    return v_left;
end $$;
comment on function credits.spread_over_members is 'Divides what a pool can spare among the members: what is set apart for each, then equal parts, the rest to the residual pool';

-- parts_of: what each pool paid of each booking of a request, from where in its running total, the pool that was drawn first before the others (nr).
-- What a correction took back is less than nothing; so is a refund, which is of no pool here.
create or replace function credits.parts_of(p_organization_id uuid, p_request_id uuid)
returns table (booked_at timestamptz, nr integer, pool_id uuid, start_micros bigint, micros bigint, model text, feature text, chain_id uuid)
language sql stable set search_path = credits, pg_temp as $$
    select a.booked_at, 0, a.pool_id, a.position_micros, a.charged_micros - coalesce((select sum(t.charged_micros) from ledger.attribution_takes t
            where t.organization_id = a.organization_id and t.request_id = a.request_id and t.booked_at = a.booked_at), 0)::bigint,
        a.model, a.feature, a.chain_id
    from ledger.attribution a
    where a.organization_id = p_organization_id and a.request_id = p_request_id and (a.pool_id is not null or a.kind = 2)
    union all
    select t.booked_at, 1, t.pool_id, t.position_micros, t.charged_micros, a.model, a.feature, a.chain_id
    from ledger.attribution_takes t
    join ledger.attribution a on a.organization_id = t.organization_id and a.request_id = t.request_id and a.booked_at = t.booked_at
    where t.organization_id = p_organization_id and t.request_id = p_request_id;
$$;
comment on function credits.parts_of is 'What each pool paid of each booking of a request';

-- charged_to: what one pool was charged for a request, in all that was booked of it so far.
create or replace function credits.charged_to(p_organization_id uuid, p_request_id uuid, p_pool_id uuid) returns bigint
language sql stable set search_path = credits, pg_temp as $$
    select coalesce(sum(d.micros), 0)::bigint from credits.parts_of(p_organization_id, p_request_id) d where d.pool_id = p_pool_id;
$$;
comment on function credits.charged_to is 'Micros that one pool was charged for a request';

-- settle_accounts: where the members of a closed pool spend now pays what they used beyond what was kept for them, and gets what they left. What is
-- not there is paid as credits come (set_pool_limit), and what another has used is got then. Nobody pays more than is missing, since what came into
-- the pool otherwise has paid, too; and what is missing without a debt has expired.
create or replace function credits.settle_accounts(p_organization_id uuid, p_pool_id uuid, p_now timestamptz) returns void
language plpgsql volatile set search_path = credits, pg_temp as $$
declare
    v_to uuid;
    v_micros bigint;
    v_missing bigint;
begin
    -- By pool, so that the same is left of which grant, whatever the rows' places. A fold on the way may open the pool again: then nothing is owed any more.
    for v_to in select to_pool_id from closed_accounts where organization_id = p_organization_id and pool_id = p_pool_id and rest_micros < 0 order by 1 loop
        -- What is due there belongs to the time before, as in divide.
        perform credits.fold_pool(organization_id, pool_id, p_now) from pools
        where organization_id = p_organization_id and pool_id = v_to and next_event_at <= p_now;
        select least(-rest_micros, credits.missing_in(p_organization_id, p_pool_id)) into v_micros from closed_accounts
        where organization_id = p_organization_id and pool_id = p_pool_id and to_pool_id = v_to;
        continue when not found;
        v_micros := credits.pass_on(p_organization_id, v_to, p_pool_id, v_micros, p_now);
        perform credits.pour(p_organization_id, p_pool_id, p_now);
        update closed_accounts set rest_micros = rest_micros + v_micros
        where organization_id = p_organization_id and pool_id = p_pool_id and to_pool_id = v_to;
    end loop;
    for v_to in select to_pool_id from closed_accounts where organization_id = p_organization_id and pool_id = p_pool_id and rest_micros > 0 order by 1 loop
        select rest_micros into v_micros from closed_accounts where organization_id = p_organization_id and pool_id = p_pool_id and to_pool_id = v_to;
        continue when not found;
        v_micros := credits.pass_on(p_organization_id, p_pool_id, v_to, v_micros, p_now);
        update closed_accounts set rest_micros = rest_micros - v_micros
        where organization_id = p_organization_id and pool_id = p_pool_id and to_pool_id = v_to;
        -- Where it went may have closed since, too: then it goes on at once, as nobody awaits anything there.
        perform credits.fold_pool(organization_id, pool_id, p_now) from pools
        where organization_id = p_organization_id and pool_id = v_to and closed_at is not null;
    end loop;
    v_missing := credits.missing_in(p_organization_id, p_pool_id);
    update closed_accounts a set rest_micros = -greatest(0, least(d.micros, v_missing - d.before)), is_due = false
    from (select to_pool_id, -rest_micros as micros, coalesce(sum(-rest_micros) over (order by to_pool_id rows between unbounded preceding and 1 preceding), 0) as before
          from closed_accounts where organization_id = p_organization_id and pool_id = p_pool_id and rest_micros < 0) d
    where a.organization_id = p_organization_id and a.pool_id = p_pool_id and a.to_pool_id = d.to_pool_id;
    select coalesce(-sum(rest_micros) filter (where rest_micros < 0), 0) into v_missing from closed_accounts
    where organization_id = p_organization_id and pool_id = p_pool_id;
    update closed_accounts a set rest_micros = greatest(0, least(d.micros, v_missing - d.before)), is_due = false
    from (select to_pool_id, rest_micros as micros, coalesce(sum(rest_micros) over (order by to_pool_id rows between unbounded preceding and 1 preceding), 0) as before
          from closed_accounts where organization_id = p_organization_id and pool_id = p_pool_id and rest_micros > 0) d
    where a.organization_id = p_organization_id and a.pool_id = p_pool_id and a.to_pool_id = d.to_pool_id;
    delete from closed_accounts where organization_id = p_organization_id and pool_id = p_pool_id and rest_micros = 0;
end $$;
comment on function credits.settle_accounts is 'Settles what a closed pool is owed and owes, as far as there are credits for it';

-- missing_in: what a closed pool would need to give everybody what they are still to get, and to owe nothing.
create or replace function credits.missing_in(p_organization_id uuid, p_pool_id uuid) returns bigint
language sql stable set search_path = credits, pg_temp as $$
    select greatest(0, b.used_amount + b.held_amount - b.limit_amount + coalesce((
        select sum(a.rest_micros) from closed_accounts a
        where a.organization_id = p_organization_id and a.pool_id = p_pool_id and a.rest_micros > 0), 0))::bigint
    from balances b where b.organization_id = p_organization_id and b.balance_id = p_pool_id and b.period_start = '-infinity';
$$;
comment on function credits.missing_in is 'Micros that a closed pool lacks to give everybody what they are still to get';

-- sweep_pool: what turns up in a closed pool goes where it belongs: what a hold did not use to where the hold's user spends now, which also pays for
-- what was used beyond it (settle_accounts); anything else (a schedule's grant, one that starts, a refund) as the switch itself would have divided it.
-- Returns whether holds are still open on it.
create or replace function credits.sweep_pool(p_organization_id uuid, p_pool_id uuid, p_now timestamptz) returns boolean
language plpgsql volatile set search_path = credits, pg_temp as $$
declare
    v_pool pools;
    v_over uuid[];
    v_room bigint;
    v_to uuid;
begin
    select * into strict v_pool from pools where organization_id = p_organization_id and pool_id = p_pool_id;
    if v_pool.closed_at is null then
        return false;
    end if;
    v_over := array(
        select request_id from sweeps w
        where w.organization_id = p_organization_id and w.pool_id = p_pool_id
          and not exists (select from holds h where h.organization_id = w.organization_id and h.request_id = w.request_id));
    if v_over <> '{}' or exists (select from closed_accounts where organization_id = p_organization_id and pool_id = p_pool_id and is_due) then
        with ended as (
            delete from sweeps where organization_id = p_organization_id and pool_id = p_pool_id and request_id = any (v_over)
            returning request_id, kept_micros, to_pool_id
        )
        insert into closed_accounts as a (organization_id, pool_id, to_pool_id, rest_micros)
        select p_organization_id, p_pool_id, to_pool_id, sum(kept_micros - credits.charged_to(p_organization_id, request_id, p_pool_id)) from ended group by 3
        on conflict on constraint closed_accounts_pkey do update set rest_micros = a.rest_micros + excluded.rest_micros;
        perform credits.settle_accounts(p_organization_id, p_pool_id, p_now);
    end if;
    v_room := credits.room_of_pool(p_organization_id, p_pool_id);
    if v_room > 0 and v_pool.kind = 'shared' then
        perform credits.spread_over_members(p_organization_id, p_pool_id, '{}', '{}', 'after the switch of pools', null, null, p_now);
    elsif v_room > 0 then
        select pool_id into v_to from pools
        where organization_id = p_organization_id and kind = 'shared' and model_filter is not distinct from v_pool.model_filter and closed_at is null;
        if found then
            perform credits.pass_on(p_organization_id, p_pool_id, v_to, v_room, p_now);
        else  -- credits are not shared any more: it is the owner's again
            perform credits.reopen_pool(p_organization_id, v_pool.kind, v_pool.owner_user_id, v_pool.model_filter);
        end if;
    end if;
    return exists (select from sweeps where organization_id = p_organization_id and pool_id = p_pool_id)
        or exists (select from closed_accounts where organization_id = p_organization_id and pool_id = p_pool_id and is_due);
end $$;
comment on function credits.sweep_pool is 'Sends what turns up in a closed pool to where it belongs; returns whether holds are still open on it';

-- pass_on: as much of an amount as one pool can spare goes to another.
create or replace function credits.pass_on(p_organization_id uuid, p_from_pool_id uuid, p_to_pool_id uuid, p_micros bigint, p_now timestamptz) returns bigint
language plpgsql volatile set search_path = credits, pg_temp as $$
declare
    v_micros constant bigint := least(p_micros, credits.room_of_pool(p_organization_id, p_from_pool_id));
begin
    perform credits.divide(p_organization_id, p_from_pool_id, array[p_to_pool_id], array[v_micros], 'after the switch of pools', null, null, p_now);
    return v_micros;
end $$;
comment on function credits.pass_on is 'Moves up to an amount from one pool to another, as much as the first can spare; returns how much';
