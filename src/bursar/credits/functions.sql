-- The money functions. Each locks the organizations' gate rows first, in organization order, then takes the one instant, then decides.
-- They belong to bursar_money and are the named composers: settle writes balances, ledger and attribution in one transaction.
set local role bursar_money;

-- ------------------------------------------------------------------------------------------------ guards

-- require_tenant: whoever is not a lane acts only for the organization that is set.
create or replace function credits.require_tenant(p_organization_id uuid) returns void
language plpgsql stable set search_path = credits, pg_temp as $$
begin
    if session_user in ('bursar_lane', 'bursar_simulator') then
        return;
    end if;
    if p_organization_id is distinct from nullif(current_setting('app.organization_id', true), '')::uuid then
        raise exception 'no such organization' using errcode = 'BR404';
    end if;
end $$;
comment on function credits.require_tenant is 'Refuses (BR404) to act for an organization other than the one that is set';

-- now_under_gate: the one instant of a command, after the gate is locked. Only the simulator may choose it.
create or replace function credits.now_under_gate(p_at timestamptz) returns timestamptz
language plpgsql volatile set search_path = credits, pg_temp as $$
begin
    if p_at is not null and session_user <> 'bursar_simulator' then
        raise exception 'only the simulator dates money' using errcode = 'BR403';
    end if;
    return coalesce(p_at, clock_timestamp());
end $$;
comment on function credits.now_under_gate is 'The instant of a command: the database''s clock after the locks; p_at for the simulator alone';

-- lock_gate: take one organization's gate, fold what is due, and return the instant.
create or replace function credits.lock_gate(p_organization_id uuid, p_at timestamptz) returns timestamptz
language plpgsql volatile set search_path = credits, pg_temp as $$
declare
    v_due timestamptz;
    v_now timestamptz;
begin
    perform credits.require_tenant(p_organization_id);
    select next_event_at into v_due from gates where organization_id = p_organization_id for no key update;
    if not found then
        raise exception 'no such organization' using errcode = 'BR404';
    end if;
    v_now := credits.now_under_gate(p_at);
    if v_due <= v_now then
        perform credits.fold_due_pools(p_organization_id, v_now);
    end if;
    return v_now;
end $$;
comment on function credits.lock_gate is 'Locks an organization''s gate, applies due time events and returns the instant of the command';

-- stored_outcome: the stored result of a command, null when the key is new; another body under the same key is BR422.
create or replace function credits.stored_outcome(p_organization_id uuid, p_key text, p_body_hash bytea, p_now timestamptz) returns jsonb
language plpgsql volatile set search_path = credits, pg_temp as $$
declare
    v_row commands;
begin
    if p_key is null or length(p_key) not between 1 and 255 then
        raise exception 'an idempotency key of 1 to 255 characters is needed' using errcode = 'BR400';
    end if;
    select * into v_row from commands where organization_id = p_organization_id and idempotency_key = p_key;
    if not found then
        return null;
    end if;
    if v_row.kept_until <= p_now then
        delete from commands where organization_id = p_organization_id and idempotency_key = p_key;
        return null;
    end if;
    if v_row.body_hash <> p_body_hash then
        raise exception 'this idempotency key was used with another body' using errcode = 'BR422';
    end if;
    return v_row.outcome;
end $$;
comment on function credits.stored_outcome is 'Result stored under an idempotency key; null: a new key; BR422: used with another body';

create or replace function credits.store_outcome(p_organization_id uuid, p_key text, p_body_hash bytea, p_outcome jsonb, p_now timestamptz)
returns void language sql volatile set search_path = credits, pg_temp as $$
    insert into commands (organization_id, idempotency_key, body_hash, outcome, answered_at, kept_until)
    values (p_organization_id, p_key, p_body_hash, p_outcome, p_now, p_now + interval '35 days');
$$;
comment on function credits.store_outcome is 'Keeps the result of a money command for 35 days under its key';

-- hash_of: one hash for the arguments of a command.
create or replace function credits.hash_of(variadic p_arguments text[]) returns bytea
language sql immutable set search_path = pg_catalog, pg_temp as $$
    select sha256(convert_to(array_to_string(p_arguments, chr(31), chr(30)), 'UTF8'));
$$;
comment on function credits.hash_of is 'Hash of a command''s arguments, nulls told apart from empty texts';

-- most_micros: the largest amount of one request or command; sums of thousands of them stay far inside bigint.
create or replace function credits.most_micros() returns bigint
language sql immutable set search_path = pg_catalog, pg_temp as $$ select 1000000000000000 $$;
comment on function credits.most_micros is 'Largest amount that one request or command may name: a billion credits';

-- usage_width: how many counts of usage a request has, one for each row of pricing.kinds, in the order of the attribution's columns. It has
-- no search_path of its own, so that it is a constant wherever it stands.
create or replace function credits.usage_width() returns integer
language sql immutable parallel safe as $$ select 17 $$;
comment on function credits.usage_width is 'Counts of usage that a request has: the kinds of pricing.kinds';

-- require_amount: commands take whole amounts from p_least to the largest one.
create or replace function credits.require_amount(p_amount bigint, p_least bigint) returns void
language plpgsql immutable set search_path = credits, pg_temp as $$
begin
    if p_amount is null or p_amount not between p_least and credits.most_micros() then
        raise exception 'an amount from % to % is needed', p_least, credits.most_micros() using errcode = 'BR400';
    end if;
end $$;
comment on function credits.require_amount is 'Refuses (BR400) an amount that is missing, too small or too large';

-- ------------------------------------------------------------------------------------------------ grants and time events

-- set_pool_limit: move a pool's limit by a delta; its open part follows: pool less everything reserved.
create or replace function credits.set_pool_limit(p_organization_id uuid, p_pool_id uuid, p_delta bigint) returns void
language plpgsql volatile set search_path = credits, pg_temp as $$
declare
    v_limit bigint;
    v_open uuid;
    v_reserved bigint;
begin
    update balances set
        limit_amount = limit_amount + p_delta,
        excess_amount = greatest(0, used_amount + held_amount - limit_amount - p_delta)
    where organization_id = p_organization_id and balance_id = p_pool_id and period_start = '-infinity'
    returning limit_amount into strict v_limit;
    select open_part_id into v_open from pools where organization_id = p_organization_id and pool_id = p_pool_id;
    if v_open is null then
        return;
    end if;
    -- What a share has used stays claimed even beyond its limit (of an ended one: 0), because the pool counts it as used too.
    select coalesce(sum(greatest(b.limit_amount, b.used_amount + b.held_amount)), 0) into v_reserved
    from allocations a
    join balances b on b.organization_id = a.organization_id and b.balance_id = a.allocation_id
    where a.organization_id = p_organization_id and a.pool_id = p_pool_id and a.kind = 'reserved';
    update balances set
        limit_amount = greatest(0, v_limit - v_reserved),
        excess_amount = greatest(0, used_amount + held_amount - greatest(0, v_limit - v_reserved))
    where organization_id = p_organization_id and balance_id = v_open and period_start = '-infinity';
end $$;
comment on function credits.set_pool_limit is 'Moves a pool''s limit and sets its open part to what no allocation reserves';

-- reopen_parts: after shares were, or are, beyond their limit: what they claim has changed, so the open parts of their pools follow.
create or replace function credits.reopen_parts(p_organization_ids uuid[], p_allocation_ids uuid[]) returns void
language plpgsql volatile set search_path = credits, pg_temp as $$
declare
    v_row record;
begin
    for v_row in
        select distinct a.organization_id, a.pool_id
        from unnest(p_organization_ids, p_allocation_ids) o(organization_id, allocation_id)
        join allocations a on a.organization_id = o.organization_id and a.allocation_id = o.allocation_id and a.kind = 'reserved'
        order by 1, 2
    loop
        perform credits.set_pool_limit(v_row.organization_id, v_row.pool_id, 0);
    end loop;
end $$;
comment on function credits.reopen_parts is 'Sets the open parts of the pools of some reserved shares anew';

-- pour: attribute a pool's use since the last pour to its active grants, in burn order; what no grant covers waits for the next one.
create or replace function credits.pour(p_organization_id uuid, p_pool_id uuid, p_at timestamptz) returns void
language plpgsql volatile set search_path = credits, pg_temp as $$
declare
    v_used bigint;
    v_poured bigint;
    v_take bigint;
    v_row record;
begin
    select b.used_amount, p.poured_micros into strict v_used, v_poured
    from pools p join balances b on b.organization_id = p.organization_id and b.balance_id = p.pool_id
    where p.organization_id = p_organization_id and p.pool_id = p_pool_id;

    -- A correction may have taken use back: the last credits burnt return first, to the grants that paid them.
    while v_poured > v_used loop
        select * into strict v_row from burns
        where organization_id = p_organization_id and pool_id = p_pool_id and end_micros = v_poured;
        v_take := least(v_poured - v_used, v_row.end_micros - v_row.start_micros);
        if v_take = v_row.end_micros - v_row.start_micros then
            delete from burns where organization_id = p_organization_id and pool_id = p_pool_id and start_micros = v_row.start_micros;
        else
            update burns set end_micros = end_micros - v_take
            where organization_id = p_organization_id and pool_id = p_pool_id and start_micros = v_row.start_micros;
        end if;
        -- A grant that had ended is active again; where it has expired, the fold that follows books what came back as expired.
        update grant_states set left_micros = left_micros + v_take, ended_at = null,
            state = case when state = 'ended' then 'active' else state end
        where organization_id = p_organization_id and grant_id = v_row.grant_id;
        v_poured := v_poured - v_take;
    end loop;

    for v_row in
        select s.grant_id, s.left_micros
        from grant_states s join grants g on g.organization_id = s.organization_id and g.grant_id = s.grant_id
        where s.organization_id = p_organization_id and s.pool_id = p_pool_id and s.state in ('active', 'lingering') and s.left_micros > 0
        order by g.priority, g.expires_at, g.is_free desc, g.effective_at, g.created_at, g.grant_id
    loop
        exit when v_poured >= v_used;
        v_take := least(v_row.left_micros, v_used - v_poured);
        insert into burns (organization_id, pool_id, start_micros, end_micros, grant_id, poured_at)
        values (p_organization_id, p_pool_id, v_poured, v_poured + v_take, v_row.grant_id, p_at);
        update grant_states set left_micros = left_micros - v_take,
            state = case when left_micros = v_take then 'ended' else state end,
            ended_at = case when left_micros = v_take then p_at end
        where organization_id = p_organization_id and grant_id = v_row.grant_id;
        v_poured := v_poured + v_take;
    end loop;
    update pools set poured_micros = v_poured where organization_id = p_organization_id and pool_id = p_pool_id;
end $$;
comment on function credits.pour is 'Pours a pool''s use since the last pour over its active grants in burn order';

-- expire_grants: at p_at, book as expired what grants past their end have left, less what open holds placed before still need.
create or replace function credits.expire_grants(p_organization_id uuid, p_pool_id uuid, p_at timestamptz, p_now timestamptz) returns void
language plpgsql volatile set search_path = credits, pg_temp as $$
declare
    v_row record;
    v_held bigint;
    v_before bigint := 0;   -- left of the grants that burn before this one
    v_keep bigint;
    v_lost bigint := 0;
begin
    for v_row in
        select s.grant_id, s.left_micros, g.expires_at
        from grant_states s join grants g on g.organization_id = s.organization_id and g.grant_id = s.grant_id
        where s.organization_id = p_organization_id and s.pool_id = p_pool_id and s.state in ('active', 'lingering')
        order by g.priority, g.expires_at, g.is_free desc, g.effective_at, g.created_at, g.grant_id
    loop
        if v_row.expires_at > p_at then
            v_before := v_before + v_row.left_micros;
            continue;
        end if;
        -- Holds pour after what is used; what falls into this grant stays payable until those holds end.
        select coalesce(sum(case when h.leg_micros is null then h.amount_micros else h.leg_micros[l.leg] end), 0) into v_held
        from holds h
        join chains c on c.organization_id = h.organization_id and c.chain_id = h.chain_id
        cross join lateral unnest(c.leg_pool_ids) with ordinality l(pool_id, leg)
        where h.organization_id = p_organization_id and h.placed_at < v_row.expires_at and l.pool_id = p_pool_id
          and (h.leg_micros is not null or h.leg = l.leg);
        v_keep := least(v_row.left_micros, greatest(0, v_held - v_before));
        if v_keep < v_row.left_micros then
            insert into ledger.entries (organization_id, entry_id, booked_at, happened_at, kind, from_kind, from_id, to_kind, amount, grant_id, reason)
            values (p_organization_id, gen_random_uuid(), p_now, v_row.expires_at, 'expiry', 'pool', p_pool_id, 'expired',
                    v_row.left_micros - v_keep, v_row.grant_id, 'grant expired');
        end if;
        v_lost := v_lost + v_row.left_micros - v_keep;
        v_before := v_before + v_keep;
        update grant_states set left_micros = v_keep,
            state = case when v_keep > 0 then 'lingering' else 'ended' end,
            ended_at = case when v_keep > 0 then null else p_at end
        where organization_id = p_organization_id and grant_id = v_row.grant_id;
    end loop;
    if v_lost > 0 then
        perform credits.set_pool_limit(p_organization_id, p_pool_id, -v_lost);
    end if;
end $$;
comment on function credits.expire_grants is 'Books what is left of expired grants, keeping what holds placed before the expiry still need';

-- activate_grants: at p_at, scheduled grants whose time has come become spendable; each is one ledger entry.
create or replace function credits.activate_grants(p_organization_id uuid, p_pool_id uuid, p_at timestamptz, p_now timestamptz) returns void
language plpgsql volatile set search_path = credits, pg_temp as $$
declare
    v_row record;
begin
    for v_row in
        select g.* from grant_states s join grants g on g.organization_id = s.organization_id and g.grant_id = s.grant_id
        where s.organization_id = p_organization_id and s.pool_id = p_pool_id and s.state = 'scheduled' and g.effective_at <= p_at
        order by g.effective_at, g.created_at, g.grant_id
    loop
        insert into ledger.entries (organization_id, entry_id, booked_at, happened_at, kind, from_kind, from_id, to_kind, to_id, amount, grant_id, actor_id, reason)
        values (p_organization_id, gen_random_uuid(), p_now, greatest(v_row.effective_at, v_row.created_at), 'grant', 'issuance', null, 'pool', p_pool_id,
                v_row.amount_micros, v_row.grant_id, v_row.created_by, v_row.reason);
        update grant_states set state = 'active' where organization_id = p_organization_id and grant_id = v_row.grant_id;
        perform credits.set_pool_limit(p_organization_id, p_pool_id, v_row.amount_micros);
        perform credits.limits_changed(p_organization_id);  -- chains had left the pool out while it was empty
    end loop;
end $$;
comment on function credits.activate_grants is 'Makes scheduled grants spendable at their instant and books them';

-- fold_pool: apply every time event of one pool up to p_now, each at its very instant, in order. Nothing was used between an
-- event and now, because whoever moves credits folds first.
create or replace function credits.fold_pool(p_organization_id uuid, p_pool_id uuid, p_now timestamptz) returns void
language plpgsql volatile set search_path = credits, pg_temp as $$
declare
    v_at timestamptz;
begin
    loop
        select min(case s.state when 'scheduled' then g.effective_at when 'active' then g.expires_at end) into v_at
        from grant_states s join grants g on g.organization_id = s.organization_id and g.grant_id = s.grant_id
        where s.organization_id = p_organization_id and s.pool_id = p_pool_id and s.state in ('scheduled', 'active');
        v_at := coalesce(v_at, 'infinity');
        exit when v_at > p_now;
        perform credits.pour(p_organization_id, p_pool_id, v_at);  -- use until then is paid by the grants there were until then
        perform credits.expire_grants(p_organization_id, p_pool_id, v_at, p_now);
        perform credits.activate_grants(p_organization_id, p_pool_id, v_at, p_now);
    end loop;
    if exists (select 1 from grant_states where organization_id = p_organization_id and pool_id = p_pool_id and state = 'lingering') then
        perform credits.pour(p_organization_id, p_pool_id, p_now);
        perform credits.expire_grants(p_organization_id, p_pool_id, p_now, p_now);
        if exists (select 1 from grant_states where organization_id = p_organization_id and pool_id = p_pool_id and state = 'lingering') then
            v_at := '-infinity';  -- due again in every batch until the holds that need it have ended
        end if;
    end if;
    update pools set next_event_at = v_at where organization_id = p_organization_id and pool_id = p_pool_id;
    update gates set next_event_at = (select coalesce(min(next_event_at), 'infinity') from pools where organization_id = p_organization_id)
    where organization_id = p_organization_id;
end $$;
comment on function credits.fold_pool is 'Applies a pool''s time events up to now: pours use, books expiries, starts grants';

create or replace function credits.fold_due_pools(p_organization_id uuid, p_now timestamptz) returns void
language plpgsql volatile set search_path = credits, pg_temp as $$
declare
    v_pool uuid;
begin
    for v_pool in
        select pool_id from pools where organization_id = p_organization_id and next_event_at <= p_now order by pool_id
    loop
        perform credits.fold_pool(p_organization_id, v_pool, p_now);
    end loop;
end $$;
comment on function credits.fold_due_pools is 'Folds every pool of an organization that is due; the gate is locked';

-- ------------------------------------------------------------------------------------------------ accounts, pools, grants

create or replace function credits.limits_changed(p_organization_id uuid) returns void
language plpgsql volatile security definer set search_path = credits, pg_temp as $$
begin
    -- A personal key acts wherever its owner belongs, so a change to it in its owner's home reaches those organizations too.
    if not coalesce(route.acts_in(nullif(current_setting('app.organization_id', true), '')::uuid, p_organization_id), false) then
        perform credits.require_tenant(p_organization_id);
    end if;
    update gates set limits_version = limits_version + 1 where organization_id = p_organization_id;
end $$;
comment on function credits.limits_changed is 'Makes every chain of an organization stale: after a change of its keys, members, teams or zone';

-- open_organization: the organization's gate. Idempotent.
create or replace function credits.open_organization(p_organization_id uuid) returns void
language plpgsql volatile security definer set search_path = credits, pg_temp as $$
begin
    perform credits.require_tenant(p_organization_id);
    insert into gates (organization_id) values (p_organization_id) on conflict do nothing;
end $$;
comment on function credits.open_organization is 'Gives an organization its gate row; calling again changes nothing';

-- open_pool: the pool of a kind (and owner, and filter); the open one if there is one already.
create or replace function credits.open_pool(
    p_organization_id uuid, p_pool_id uuid, p_kind text, p_owner_user_id uuid, p_name text, p_model_filter text default null,
    p_at timestamptz default null
) returns uuid
language plpgsql volatile security definer set search_path = credits, pg_temp as $$
declare
    v_now timestamptz := credits.lock_gate(p_organization_id, p_at);
    v_pool uuid;
    v_open uuid;
begin
    select pool_id into v_pool from pools
    where organization_id = p_organization_id and kind = p_kind and owner_user_id is not distinct from p_owner_user_id
      and model_filter is not distinct from p_model_filter and closed_at is null;
    if found then
        return v_pool;
    end if;
    if p_kind = 'shared' then
        v_open := gen_random_uuid();  -- only shared pools can be reserved from
        insert into balances (organization_id, balance_id, kind, limit_amount) values (p_organization_id, v_open, 'open', 0);
    end if;
    insert into pools (organization_id, pool_id, kind, owner_user_id, name, model_filter, open_part_id, created_at)
    values (p_organization_id, p_pool_id, p_kind, p_owner_user_id, p_name, p_model_filter, v_open, v_now);
    insert into balances (organization_id, balance_id, kind, limit_amount) values (p_organization_id, p_pool_id, 'pool', 0);
    perform credits.limits_changed(p_organization_id);
    return p_pool_id;
end $$;
comment on function credits.open_pool is 'Opens a pool of a kind, or returns the open one';

-- add_grant: credits into a pool, spendable on [effective, expires). One ledger entry when it takes effect.
create or replace function credits.add_grant(
    p_organization_id uuid, p_grant_id uuid, p_pool_id uuid, p_source text, p_amount_micros bigint, p_priority smallint,
    p_is_free boolean, p_cost_basis_nano_usd bigint, p_effective_at timestamptz, p_expires_at timestamptz, p_reason text,
    p_created_by uuid, p_idempotency_key text, p_at timestamptz default null
) returns uuid
language plpgsql volatile security definer set search_path = credits, pg_temp as $$
declare
    v_now timestamptz := credits.lock_gate(p_organization_id, p_at);
    v_hash bytea := credits.hash_of('add_grant', p_pool_id::text, p_source, p_amount_micros::text, p_priority::text, p_is_free::text,
        p_cost_basis_nano_usd::text, extract(epoch from p_effective_at)::text, extract(epoch from p_expires_at)::text, p_reason);
    v_stored jsonb := credits.stored_outcome(p_organization_id, p_idempotency_key, v_hash, v_now);
begin
    if v_stored is not null then
        return (v_stored ->> 'grant_id')::uuid;
    end if;
    perform credits.require_amount(p_amount_micros, 1);
    if not exists (select 1 from pools where organization_id = p_organization_id and pool_id = p_pool_id and closed_at is null) then
        raise exception 'no such open pool' using errcode = 'BR404';
    end if;
    if coalesce(p_expires_at, 'infinity') <= greatest(v_now, p_effective_at) then
        raise exception 'the grant would have expired before it can be spent' using errcode = 'BR400';
    end if;
    insert into grants (organization_id, grant_id, pool_id, source, amount_micros, priority, is_free, cost_basis_nano_usd,
                        effective_at, expires_at, reason, created_at, created_by)
    values (p_organization_id, p_grant_id, p_pool_id, p_source, p_amount_micros, p_priority, p_is_free, p_cost_basis_nano_usd,
            coalesce(p_effective_at, v_now), coalesce(p_expires_at, 'infinity'), p_reason, v_now, p_created_by);
    insert into grant_states (organization_id, grant_id, pool_id, state, left_micros)
    values (p_organization_id, p_grant_id, p_pool_id, 'scheduled', p_amount_micros);
    perform credits.fold_pool(p_organization_id, p_pool_id, v_now);
    perform credits.store_outcome(p_organization_id, p_idempotency_key, v_hash, jsonb_build_object('grant_id', p_grant_id), v_now);
    return p_grant_id;
end $$;
comment on function credits.add_grant is 'Adds credits to a pool; the same idempotency key adds nothing more';

-- void_grant: take back what a grant has left beyond what is held. Returns the micros taken back.
create or replace function credits.void_grant(
    p_organization_id uuid, p_grant_id uuid, p_reason text, p_created_by uuid, p_idempotency_key text, p_at timestamptz default null
) returns bigint
language plpgsql volatile security definer set search_path = credits, pg_temp as $$
declare
    v_now timestamptz := credits.lock_gate(p_organization_id, p_at);
    v_hash bytea := credits.hash_of('void_grant', p_grant_id::text, p_reason);
    v_stored jsonb := credits.stored_outcome(p_organization_id, p_idempotency_key, v_hash, v_now);
    v_state grant_states;
    v_room bigint;
    v_taken bigint;
begin
    if v_stored is not null then
        return (v_stored ->> 'voided_micros')::bigint;
    end if;
    select * into v_state from grant_states where organization_id = p_organization_id and grant_id = p_grant_id;
    if not found then
        raise exception 'no such grant' using errcode = 'BR404';
    end if;
    perform credits.pour(p_organization_id, v_state.pool_id, v_now);
    select * into v_state from grant_states where organization_id = p_organization_id and grant_id = p_grant_id;
    if v_state.state = 'scheduled' then
        v_taken := v_state.left_micros;  -- it never reached the pool: nothing to book
    else
        select greatest(0, limit_amount - used_amount - held_amount) into strict v_room
        from balances where organization_id = p_organization_id and balance_id = v_state.pool_id;
        v_taken := case when v_state.state = 'ended' then 0 else least(v_state.left_micros, v_room) end;
        if v_taken > 0 then
            insert into ledger.entries (organization_id, entry_id, booked_at, happened_at, kind, from_kind, from_id, to_kind, amount,
                                        grant_id, actor_id, reason, idempotency_key)
            values (p_organization_id, gen_random_uuid(), v_now, v_now, 'void', 'pool', v_state.pool_id, 'voided', v_taken,
                    p_grant_id, p_created_by, p_reason, p_idempotency_key);
            perform credits.set_pool_limit(p_organization_id, v_state.pool_id, -v_taken);
        end if;
    end if;
    if v_taken > 0 then
        update grant_states set left_micros = left_micros - v_taken,
            state = case when left_micros = v_taken then 'ended' else state end,
            ended_at = case when left_micros = v_taken then v_now end
        where organization_id = p_organization_id and grant_id = p_grant_id;
    end if;
    perform credits.fold_pool(p_organization_id, v_state.pool_id, v_now);  -- its next event may be another one now
    perform credits.limits_changed(p_organization_id);
    perform credits.store_outcome(p_organization_id, p_idempotency_key, v_hash, jsonb_build_object('voided_micros', v_taken), v_now);
    return v_taken;
end $$;
comment on function credits.void_grant is 'Takes back what a grant has left and no hold needs; returns the micros taken back';

-- ------------------------------------------------------------------------------------------------ allocations and limits

-- allocate: set a user's share of a shared pool. A reserved share larger than the open part is refused unless p_oversubscribe.
create or replace function credits.allocate(
    p_organization_id uuid, p_allocation_id uuid, p_pool_id uuid, p_user_id uuid, p_kind text, p_period text, p_amount_micros bigint,
    p_when_empty text, p_oversubscribe boolean, p_created_by uuid, p_idempotency_key text, p_at timestamptz default null
) returns uuid
language plpgsql volatile security definer set search_path = credits, pg_temp as $$
declare
    v_now timestamptz := credits.lock_gate(p_organization_id, p_at);
    v_hash bytea := credits.hash_of('allocate', p_pool_id::text, p_user_id::text, p_kind, p_period, p_amount_micros::text, p_when_empty,
        p_oversubscribe::text);
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
    select b.limit_amount - b.used_amount - b.held_amount into v_open_room
    from pools p join balances b on b.organization_id = p.organization_id and b.balance_id = p.open_part_id
    where p.organization_id = p_organization_id and p.pool_id = p_pool_id and p.kind = 'shared' and p.closed_at is null;
    if not found then
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
        raise exception 'the pool has % micros that no allocation reserves, % more are asked for', greatest(0, v_open_room), v_grows
            using errcode = 'BR430';
    end if;
    if v_old.allocation_id is null then
        insert into allocations (organization_id, allocation_id, pool_id, user_id, kind, period, amount_micros, when_empty, created_at, created_by)
        values (p_organization_id, v_id, p_pool_id, p_user_id, p_kind, p_period, p_amount_micros, p_when_empty, v_now, p_created_by);
        if p_kind = 'reserved' then
            insert into balances (organization_id, balance_id, kind, limit_amount)
            values (p_organization_id, v_id, 'allocation', p_amount_micros);
        end if;
    else
        update allocations set amount_micros = p_amount_micros, when_empty = p_when_empty
        where organization_id = p_organization_id and allocation_id = v_id;
        perform credits.set_current_limit(p_organization_id, v_id, p_amount_micros, v_now);
    end if;
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
    update allocations set ended_at = p_now where organization_id = p_organization_id and allocation_id = p_allocation_id and ended_at is null
    returning * into v_row;
    if not found then
        raise exception 'no such allocation' using errcode = 'BR404';
    end if;
    if v_row.kind = 'reserved' then
        -- From now on it claims what it has used and holds, and nothing can be held on it any more.
        perform credits.set_current_limit(p_organization_id, p_allocation_id, 0, p_now);
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

-- set_limit: the cap of a scope, metric, period and model filter; setting it again changes its amount.
create or replace function credits.set_limit(
    p_organization_id uuid, p_limit_id uuid, p_scope text, p_scope_id uuid, p_metric text, p_model_filter text, p_period text,
    p_amount bigint, p_action text, p_created_by uuid, p_at timestamptz default null, p_is_strict boolean default false
) returns uuid
language plpgsql volatile security definer set search_path = credits, pg_temp as $$
declare
    v_now timestamptz := credits.lock_gate(p_organization_id, p_at);
    v_id uuid;
begin
    perform credits.require_amount(p_amount, 0);
    select limit_id into v_id from limits
    where organization_id = p_organization_id and scope = p_scope and scope_id is not distinct from p_scope_id and metric = p_metric
      and period = p_period and model_filter is not distinct from p_model_filter and action = p_action and ended_at is null;
    if found then
        update limits set amount = p_amount, is_strict = p_is_strict where organization_id = p_organization_id and limit_id = v_id;
        perform credits.set_current_limit(p_organization_id, v_id, p_amount, v_now);
    else
        v_id := p_limit_id;
        insert into limits (organization_id, limit_id, scope, scope_id, metric, model_filter, period, amount, action, is_strict, created_at, created_by)
        values (p_organization_id, v_id, p_scope, p_scope_id, p_metric, p_model_filter, p_period, p_amount, p_action, p_is_strict, v_now, p_created_by);
    end if;
    perform credits.limits_changed(p_organization_id);
    return v_id;
end $$;
comment on function credits.set_limit is 'Sets a cap; with the same scope, metric, period, filter and action it changes amount and strictness';

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

-- ------------------------------------------------------------------------------------------------ chains

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

-- ------------------------------------------------------------------------------------------------ move_batch

-- spread: who pays an amount that is not held: the legs that admit the model, in order, as far as they have room. The rest is the last
-- such leg's excess (where none admits the model, the last leg's), because what was used is always charged.
create or replace function credits.spread(p_chain credits.chains, p_model text, p_amount bigint) returns bigint[]
language plpgsql volatile set search_path = credits, pg_temp as $$
declare
    v_paid bigint[] := array_fill(0::bigint, array[cardinality(p_chain.leg_pool_ids)]);
    v_left bigint := p_amount;
    v_last integer := cardinality(p_chain.leg_pool_ids);
    v_fits boolean := false;
    v_room bigint;
begin
    for i in 1..cardinality(v_paid) loop
        exit when v_left = 0;
        continue when not coalesce(p_chain.leg_filters[i] is null or p_model like p_chain.leg_filters[i], false);
        v_last := i;
        -- Two legs may draw on one pool, as a share and the open part: they never have more room together than it has.
        select min(b.limit_amount - b.used_amount - b.held_amount) into v_room
        from unnest(p_chain.entry_ids, p_chain.entry_starts, p_chain.entry_legs) e(id, start, leg)
        join balances b on b.organization_id = p_chain.organization_id and b.balance_id = e.id and b.period_start = e.start
        where e.leg = i;
        v_paid[i] := least(v_left, greatest(0, v_room));
        v_left := v_left - v_paid[i];
    end loop;
    v_paid[v_last] := v_paid[v_last] + v_left;
    return v_paid;
end $$;
comment on function credits.spread is 'Spreads an amount over the legs of a chain that have room; the rest is the last fitting leg''s excess';

-- move_legs: book on every balance of a chain what one request used, leg by leg, and what it holds no more.
create or replace function credits.move_legs(
    p_chain credits.chains, p_model text, p_is_own_key boolean, p_used bigint[], p_calls bigint, p_tokens bigint,
    p_freed bigint[], p_freed_calls bigint, p_freed_tokens bigint
) returns void
language plpgsql volatile set search_path = credits, pg_temp as $$
begin
    with entries as (
        select e.id, e.start,
            sum(case e.metric when 0 then case when e.leg = 0 then a.used else p_used[e.leg] end when 1 then p_calls else p_tokens end)::bigint as used,
            sum(case e.metric when 0 then case when e.leg = 0 then a.freed else p_freed[e.leg] end
                              when 1 then p_freed_calls else p_freed_tokens end)::bigint as freed
        from (select coalesce(sum(u.used), 0) as used, coalesce(sum(u.freed), 0) as freed from unnest(p_used, p_freed) u(used, freed)) a,
            unnest(p_chain.entry_ids, p_chain.entry_starts, p_chain.entry_metrics, p_chain.entry_legs, p_chain.entry_filters) e(id, start, metric, leg, filter)
        where (e.filter is null or p_model like e.filter) and not (e.metric = 0 and p_is_own_key)
        group by e.id, e.start
    )
    update balances b set used_amount = used_amount + e.used, held_amount = held_amount - e.freed,
        excess_amount = greatest(0, used_amount + e.used + held_amount - e.freed - limit_amount)
    from entries e where b.organization_id = p_chain.organization_id and b.balance_id = e.id and b.period_start = e.start;
    perform credits.reopen_parts(array_fill(p_chain.organization_id, array[cardinality(p_chain.entry_ids)]), p_chain.entry_ids);
end $$;
comment on function credits.move_legs is 'Books what one request used, and what it holds no more, on every balance of its chain';

-- draw: the pools that paid, each with its running total before. The first goes into the row itself, the others become takes; a pool may
-- pay on two legs (a share, then its open part).
create or replace function credits.draw(p_row ledger.attribution, p_leg_pool_ids uuid[], p_paid bigint[]) returns ledger.attribution
language plpgsql volatile set search_path = credits, pg_temp as $$
declare
    v_take record;
begin
    for v_take in
        select p.pool_id, sum(p.paid)::bigint as paid, b.used_amount - sum(p.paid)::bigint as position
        from unnest(p_leg_pool_ids, p_paid) with ordinality p(pool_id, paid, leg)
        join balances b on b.organization_id = p_row.organization_id and b.balance_id = p.pool_id and b.period_start = '-infinity'
        where p.paid <> 0 group by p.pool_id, b.used_amount order by min(p.leg)
    loop
        if p_row.pool_id is null then
            p_row.pool_id := v_take.pool_id; p_row.position_micros := v_take.position;
        else
            insert into ledger.attribution_takes (organization_id, request_id, booked_at, pool_id, position_micros, charged_micros)
            values (p_row.organization_id, p_row.request_id, p_row.booked_at, v_take.pool_id, v_take.position, v_take.paid);
        end if;
    end loop;
    return p_row;
end $$;
comment on function credits.draw is 'Names the pools that paid for an attribution row, and writes the takes of the second and later ones';

-- chain_of: the chain of a user and key as of now, built when it is missing or stale; the gate is locked.
create or replace function credits.chain_of(p_organization_id uuid, p_user_id uuid, p_api_key_id uuid, p_now timestamptz) returns uuid
language plpgsql volatile set search_path = credits, pg_temp as $$
declare
    v_chain_id uuid;
begin
    select chain_id into v_chain_id from chains
    where organization_id = p_organization_id and user_id = p_user_id and api_key_id = p_api_key_id and replaced_at is null
      and valid_until > p_now and limits_version = (select limits_version from gates where organization_id = p_organization_id);
    return coalesce(v_chain_id, credits.build_chain(p_organization_id, p_user_id, p_api_key_id, p_now));
end $$;
comment on function credits.chain_of is 'The chain of a user and key as of now';

-- book_split: the slow way to settle or release one request: its hold drew from several pools, or costs more than was held while
-- further pools could pay, or there is no hold any more. Everything else is settled set-based in move_batch.
-- Returns the outcome: 0 booked, 3 known (already booked), 4 no hold to release, 6 no pool that could pay at all.
create or replace function credits.book_split(
    p_organization_id uuid, p_request_id uuid, p_is_release boolean, p_user_id uuid, p_api_key_id uuid, p_amount bigint, p_tokens bigint,
    p_flags integer, p_row ledger.attribution, p_now timestamptz, out outcome smallint, out charged_micros bigint, out held_micros bigint
) language plpgsql volatile set search_path = credits, pg_temp as $$
declare
    v_zero constant uuid := '00000000-0000-0000-0000-000000000000';
    v_hold holds;
    v_chain_id uuid;
    v_chain chains;
    v_none bigint[];
    v_held bigint[];
    v_paid bigint[];
    v_left bigint := p_amount;
begin
    outcome := 0;
    charged_micros := p_amount;
    delete from holds where organization_id = p_organization_id and request_id = p_request_id returning * into v_hold;
    held_micros := coalesce(v_hold.amount_micros, 0);
    if v_hold.request_id is null then
        if p_is_release then
            outcome := 4;
            return;
        end if;
        select c.outcome, c.charged_micros into outcome, charged_micros
        from credits.settle_again(p_organization_id, p_request_id, p_amount, p_tokens, p_row, p_now) c;
        if outcome is not null then
            return;
        end if;
        outcome := 0;
        charged_micros := p_amount;
        p_flags := p_flags | 128;  -- late: the hold had been released, but what was used is always charged
        v_chain_id := credits.chain_of(p_organization_id, p_user_id, p_api_key_id, p_now);
        select * into strict v_chain from chains where organization_id = p_organization_id and chain_id = v_chain_id;
        if cardinality(v_chain.leg_pool_ids) = 0 then
            outcome := 6;
            return;
        end if;
    else
        select * into strict v_chain from chains where organization_id = p_organization_id and chain_id = v_hold.chain_id;
    end if;
    v_none := array_fill(0::bigint, array[cardinality(v_chain.leg_pool_ids)]);
    v_held := coalesce(v_hold.leg_micros, v_none);
    if v_hold.leg_micros is null and v_hold.amount_micros > 0 then
        v_held[v_hold.leg] := v_hold.amount_micros;
    end if;
    if p_is_release then
        perform credits.move_legs(v_chain, p_row.model, v_hold.flags & 2 = 2, v_none, 0, 0, v_held, 1, v_hold.tokens);
        return;
    end if;

    v_paid := v_none;
    for i in 1..cardinality(v_none) loop  -- first what was held, leg by leg
        v_paid[i] := least(v_left, v_held[i]);
        v_left := v_left - v_paid[i];
    end loop;
    if v_left > 0 then
        v_paid := array(select p + m from unnest(v_paid, credits.spread(v_chain, p_row.model, v_left)) with ordinality u(p, m, leg) order by leg);
    end if;
    perform credits.move_legs(v_chain, p_row.model, p_flags & 2 = 2, v_paid, 1, p_tokens,
        v_held, case when v_hold.request_id is null then 0 else 1 end, coalesce(v_hold.tokens, 0));

    p_row.organization_id := p_organization_id; p_row.request_id := p_request_id; p_row.booked_at := p_now;
    p_row.used_at := coalesce(p_row.used_at, p_now); p_row.kind := 0; p_row.chain_id := v_chain.chain_id;
    p_row.user_id := nullif(v_chain.user_id, v_zero); p_row.api_key_id := nullif(v_chain.api_key_id, v_zero);
    p_row.team_id := v_chain.team_id; p_row.department_id := v_chain.department_id; p_row.department_name := v_chain.department_name;
    p_row.charged_micros := p_amount; p_row.hold_micros := held_micros; p_row.flags := p_flags & ~49;
    p_row := credits.draw(p_row, v_chain.leg_pool_ids, v_paid);
    insert into ledger.attribution select p_row.*;
    if p_flags & 64 = 64 then
        insert into estimates (organization_id, request_id, chain_id, leg_micros, tokens, cost_nano_usd, flags, booked_at)
        values (p_organization_id, p_request_id, v_chain.chain_id, v_paid, p_tokens,
                p_row.provider_cost_nano_usd + p_row.customer_cost_nano_usd, p_flags & ~49, p_now)
        on conflict on constraint estimates_pkey do update set chain_id = excluded.chain_id, leg_micros = excluded.leg_micros,
            tokens = excluded.tokens, cost_nano_usd = excluded.cost_nano_usd, flags = excluded.flags, booked_at = excluded.booked_at;
    end if;
end $$;
comment on function credits.book_split is 'Settles or releases one request whose hold drew from several pools, or that has no hold any more';

-- settle_again: a settle whose request was booked before: by expiry as an estimate, which is corrected now (0), or finally (3).
-- A null outcome: nothing was booked yet.
create or replace function credits.settle_again(
    p_organization_id uuid, p_request_id uuid, p_amount bigint, p_tokens bigint, p_row ledger.attribution, p_now timestamptz,
    out outcome smallint, out charged_micros bigint
) language plpgsql volatile set search_path = credits, pg_temp as $$
declare
    v_estimate estimates;
begin
    delete from estimates where organization_id = p_organization_id and request_id = p_request_id returning * into v_estimate;
    if found then
        outcome := 0;
        charged_micros := case when v_estimate.flags & 2 = 2 then 0 else p_amount end;
        perform credits.book_correction(v_estimate, charged_micros, p_tokens, p_row, p_now);
        return;
    end if;
    select case when count(*) > 0 then 3 end, sum(a.charged_micros) into outcome, charged_micros
    from ledger.attribution a where a.organization_id = p_organization_id and a.request_id = p_request_id;
end $$;
comment on function credits.settle_again is 'Settles a request that was booked before: corrects an estimate, or tells what was charged';

-- book_correction: book the difference (either sign) between what expiry charged by estimate and the true cost, on the same balances.
-- What was too much goes back to the legs that paid it, last first; what was too little is spread as any charge without hold.
create or replace function credits.book_correction(
    p_estimate credits.estimates, p_amount bigint, p_tokens bigint, p_row ledger.attribution, p_now timestamptz
) returns void
language plpgsql volatile set search_path = credits, pg_temp as $$
declare
    v_first ledger.attribution;
    v_chain chains;
    v_delta bigint := p_amount - coalesce((select sum(m) from unnest(p_estimate.leg_micros) m), 0);
    v_left bigint := greatest(0, -v_delta);
    v_moved bigint[] := p_estimate.leg_micros;
    v_cost bigint := p_row.provider_cost_nano_usd + p_row.customer_cost_nano_usd - p_estimate.cost_nano_usd;
    v_pool uuid;
begin
    select * into strict v_first from ledger.attribution
    where organization_id = p_estimate.organization_id and request_id = p_estimate.request_id and booked_at = p_estimate.booked_at;
    select * into strict v_chain from chains where organization_id = p_estimate.organization_id and chain_id = p_estimate.chain_id;
    if v_delta > 0 then
        v_moved := credits.spread(v_chain, v_first.model, v_delta);
    else
        for i in reverse cardinality(v_moved)..1 loop
            v_moved[i] := -least(v_left, p_estimate.leg_micros[i]);
            v_left := v_left + v_moved[i];
        end loop;
    end if;
    perform credits.move_legs(v_chain, v_first.model, p_estimate.flags & 2 = 2, v_moved, 0, p_tokens - p_estimate.tokens,
        array_fill(0::bigint, array[cardinality(v_moved)]), 0, 0);

    -- The correction's row has the true usage; the first row keeps its estimate. Sums over both are true.
    p_row.organization_id := p_estimate.organization_id; p_row.request_id := p_estimate.request_id;
    -- A row of its own also where much happens to one request at one simulated instant.
    p_row.booked_at := greatest(p_now, (select max(booked_at) + interval '1 microsecond' from ledger.attribution
        where organization_id = p_estimate.organization_id and request_id = p_estimate.request_id));
    p_row.used_at := v_first.used_at; p_row.kind := 1; p_row.user_id := v_first.user_id; p_row.api_key_id := v_first.api_key_id;
    p_row.provider_key_id := v_first.provider_key_id; p_row.provider := v_first.provider; p_row.model := v_first.model;
    p_row.team_id := v_first.team_id; p_row.department_id := v_first.department_id; p_row.department_name := v_first.department_name;
    p_row.conversation_id := v_first.conversation_id; p_row.chain_id := v_first.chain_id; p_row.price_version_id := v_first.price_version_id;
    p_row.charged_micros := v_delta; p_row.hold_micros := 0; p_row.flags := 128 | (p_estimate.flags & 4098);
    p_row.provider_cost_nano_usd := case when p_estimate.flags & 2 = 2 then 0 else v_cost end;
    p_row.customer_cost_nano_usd := case when p_estimate.flags & 2 = 2 then v_cost else 0 end;
    p_row.requests := p_row.requests - v_first.requests;
    p_row := credits.draw(p_row, v_chain.leg_pool_ids, v_moved);
    insert into ledger.attribution select p_row.*;

    if v_delta < 0 then
        -- What comes back to a grant that has expired since is not spendable again; and an empty pool may have something again.
        for v_pool in select distinct pool_id from unnest(v_chain.leg_pool_ids, v_moved) m(pool_id, moved) where moved < 0 order by 1 loop
            perform credits.pour(p_estimate.organization_id, v_pool, p_now);
            perform credits.fold_pool(p_estimate.organization_id, v_pool, p_now);
        end loop;
        perform credits.limits_changed(p_estimate.organization_id);
    end if;
end $$;
comment on function credits.book_correction is 'Books the difference between an estimate that expiry charged and the true cost that came later';

-- attribution_of: the caller's half of an attribution row.
create or replace function credits.attribution_of(
    p_usage integer[], p_cost bigint, p_flags integer, p_provider text, p_model text, p_price_version_id uuid, p_provider_key_id uuid,
    p_conversation_id uuid, p_used_at timestamptz
) returns ledger.attribution
language plpgsql immutable set search_path = credits, pg_temp as $$
declare
    v_row ledger.attribution;
begin
    v_row.provider := p_provider; v_row.model := p_model; v_row.price_version_id := p_price_version_id;
    v_row.provider_key_id := p_provider_key_id; v_row.conversation_id := p_conversation_id; v_row.used_at := p_used_at;
    v_row.provider_cost_nano_usd := case when p_flags & 2 = 2 then 0 else p_cost end;
    v_row.customer_cost_nano_usd := case when p_flags & 2 = 2 then p_cost else 0 end;
    v_row.input_tokens := p_usage[1]; v_row.cache_read_tokens := p_usage[2]; v_row.cache_write_5m_tokens := p_usage[3];
    v_row.cache_write_1h_tokens := p_usage[4]; v_row.output_tokens := p_usage[5]; v_row.reasoning_tokens := p_usage[6];
    v_row.audio_input_tokens := p_usage[7]; v_row.audio_output_tokens := p_usage[8]; v_row.image_input_tokens := p_usage[9];
    v_row.image_output_tokens := p_usage[10]; v_row.images := p_usage[11]; v_row.web_searches := p_usage[12];
    v_row.audio_milliseconds := p_usage[13]; v_row.characters := p_usage[14]; v_row.requests := p_usage[15];
    v_row.file_searches := p_usage[16]; v_row.code_sessions := p_usage[17];
    return v_row;
end $$;
comment on function credits.attribution_of is 'Builds the caller''s half of an attribution row from the arrays of a batch';

-- available_of: what a chain could still spend on a model: over its legs the sum, under every limit.
create or replace function credits.available_of(p_organization_id uuid, p_chain_id uuid, p_model text) returns bigint
language sql stable set search_path = credits, pg_temp as $$
    with rooms as (
        select e.leg, min(greatest(0, b.limit_amount - b.used_amount - b.held_amount)) as room
        from chains c
        cross join lateral unnest(c.entry_ids, c.entry_starts, c.entry_metrics, c.entry_legs, c.entry_filters) e(id, start, metric, leg, filter)
        join balances b on b.organization_id = c.organization_id and b.balance_id = e.id and b.period_start = e.start
        where c.organization_id = p_organization_id and c.chain_id = p_chain_id and e.metric = 0 and b.stops
          and (e.leg = 0 or c.leg_filters[e.leg] is null or p_model like c.leg_filters[e.leg])
          and (e.filter is null or p_model like e.filter)
        group by e.leg
    )
    -- Two legs on one pool (a share, then the open part) are bounded by that pool too, which each leg's room has in it already.
    select least(coalesce(sum(room) filter (where leg > 0), 0)::bigint, min(room) filter (where leg = 0)) from rooms;
$$;
comment on function credits.available_of is 'Micros that a chain could still spend on a model now';

-- rooms_of: available_of for many requests at once; an array by place, null where there is no chain.
create or replace function credits.rooms_of(p_organization_ids uuid[], p_chain_ids uuid[], p_models text[]) returns bigint[]
language plpgsql stable as $$
declare
    v_rooms bigint[];
begin
    with w as materialized (
        select u.place, u.org, u.model, c.leg_filters, c.entry_ids, c.entry_starts, c.entry_metrics, c.entry_legs, c.entry_filters
        from (select unnest(p_organization_ids) as org, unnest(p_chain_ids) as chain_id, unnest(p_models) as model,
                generate_subscripts(p_organization_ids, 1) as place) u
        left join credits.chains c on c.organization_id = u.org and c.chain_id = u.chain_id
    ), rooms as (
        select e.place, e.leg, min(greatest(0, b.limit_amount - b.used_amount - b.held_amount)) as room
        from (select w.place, w.org, w.model, w.leg_filters, unnest(w.entry_ids) as id, unnest(w.entry_starts) as start,
                unnest(w.entry_metrics) as metric, unnest(w.entry_legs) as leg, unnest(w.entry_filters) as entry_filter from w) e
        join credits.balances b on b.organization_id = e.org and b.balance_id = e.id and b.period_start = e.start
        where e.metric = 0 and b.stops and (e.leg = 0 or e.leg_filters[e.leg] is null or e.model like e.leg_filters[e.leg])
          and (e.entry_filter is null or e.model like e.entry_filter)
        group by e.place, e.leg
    )
    select array_agg(p.room) into v_rooms
    from (
        select u.place, case when bool_or(u.has_chain) then
                least(coalesce(credits.total(u.room) filter (where u.leg > 0), 0), min(u.room) filter (where u.leg = 0)) end as room
        from (select place, leg, room, null::boolean as has_chain from rooms
              union all select place, null, null, entry_ids is not null from w) u
        group by u.place order by u.place
    ) p;
    return v_rooms;
end $$;
comment on function credits.rooms_of is 'Micros that each of many requests'' chains could still spend now';

-- total: the sum of micros as bigint, which sum() makes numeric of: exact, an overflow raises, and several times as fast.
create or replace aggregate credits.total(bigint) (sfunc = int8pl, stype = bigint, initcond = '0', parallel = safe);
comment on aggregate credits.total(bigint) is 'Sum of bigint as bigint';

-- is_plain_way: whether a request goes by a chain as it stands. The chain refuses nothing, and neither a limit nor time has changed it since it
-- was built; the request is neither repeated nor by expiry nor paid by the customer's own key, nor a guess where a limit is strict.
-- Like has_room it stands for its expression wherever it is called, so it has no search_path of its own.
create or replace function credits.is_plain_way(
    p_flags integer, p_refusal text, p_is_strict boolean, p_valid_until timestamptz, p_built_for bigint, p_version bigint, p_now timestamptz
) returns boolean language sql immutable parallel safe as $$
    select p_flags & 98 = 0 and (p_flags & 512 = 0 or not p_is_strict) and p_refusal is null and p_valid_until > p_now and p_built_for = p_version
$$;
comment on function credits.is_plain_way is 'Whether a request goes by a chain as it stands, which was built for these limits and this time';

-- has_room: the guard. A balance that stops takes no more than it has room for, and so nothing while there is excess, which is what it is
-- beyond its limit (balances_excess_exact).
create or replace function credits.has_room(p_stops boolean, p_used bigint, p_held bigint, p_limit bigint, p_wanted bigint)
returns boolean language sql immutable parallel safe as $$
    select not p_stops or p_used + p_held + p_wanted <= p_limit
$$;
comment on function credits.has_room is 'Whether a balance may take this much more';

-- take: the one guarded update of a batch's summed demands (authorizes, extends, deductions). What does not come back is tight.
-- With p_chains, p_legs and p_outcomes, the demands go by those. Without them it finds the chains itself, in the same statement, and moves
-- something only where all is plain (is_plain): nothing is known, repeated, held already or paid by the customer's own key, and every chain
-- is current, refuses nothing and has a leg for the model. p_gates and p_versions are the organizations and their
-- limits_version, in any order: looking them up in a list costs less than 128 look-ups of rows.
-- A request that alone exceeds the balance that refused its chain last (tight_id) is hopeless: its demand is left out, so that whoever
-- retries on an empty balance makes nobody else's sum too large.
-- Returns arrays by place: chain, leg and who it is attributed to; the pool and its running total before (for deductions); the room left.
-- Lists are unnested beside each other in the select list, which costs a third of unnesting them in FROM; rows keep the order of places,
-- since each is looked up by a nested loop.
create or replace function credits.take(
    p_organization_ids uuid[], p_actions smallint[], p_request_ids uuid[], p_user_ids uuid[], p_api_key_ids uuid[], p_amounts bigint[],
    p_tokens bigint[], p_flags integer[], p_models text[], p_chains uuid[], p_legs smallint[], p_outcomes smallint[], p_gates uuid[],
    p_versions bigint[], p_now timestamptz,
    out is_plain boolean, out chains uuid[], out legs smallint[], out teams uuid[], out departments uuid[], out department_names text[],
    out pools uuid[], out positions bigint[], out rooms bigint[],
    out tight_orgs uuid[], out tight_ids uuid[], out tight_starts timestamptz[], out hopeless integer[]
) language plpgsql volatile as $$
#variable_conflict use_column
declare
    v_zero constant uuid := '00000000-0000-0000-0000-000000000000';
    v_n constant integer := cardinality(p_request_ids);
begin
    with w as (
        select unnest(p_organization_ids) as org, unnest(p_actions) as action, unnest(p_request_ids) as request_id, unnest(p_user_ids) as user_id,
            unnest(p_api_key_ids) as api_key_id, unnest(p_amounts) as amount, unnest(p_tokens) as tokens, unnest(p_flags) as flags,
            unnest(p_models) as model, unnest(p_chains) as chain_id, unnest(p_legs) as leg, unnest(p_outcomes) as outcome,
            generate_series(1, v_n) as place
    ), r as materialized (
        select w.place, w.org, w.action, w.request_id, w.amount, w.tokens, w.flags, w.model, c.chain_id, c.team_id, c.department_id, c.department_name,
            l.leg, c.leg_pool_ids[l.leg] as pool_id, cardinality(c.leg_filters) = 1 as is_alone, c.entry_ids, c.entry_starts,
            case when not c.is_plain then c.entry_metrics end as entry_metrics, case when not c.is_plain then c.entry_legs end as entry_legs,
            case when not c.is_plain then c.entry_filters end as entry_filters,
            case when p_chains is not null then w.action in (1, 2, 5) and w.outcome = -1 and not (w.action = 2 and w.amount = 0 and w.tokens = 0)
                 else coalesce(l.leg > 0 and credits.is_plain_way(w.flags, c.refusal, c.is_strict, c.valid_until, c.limits_version,
                        p_versions[array_position(p_gates, w.org)], p_now), false) and h.request_id is null end as is_asked,
            c.tight_id is not null and coalesce((
                select not credits.has_room(b.stops, b.used_amount, b.held_amount, b.limit_amount, w.amount)
                from credits.balances b where b.organization_id = w.org and b.balance_id = c.tight_id and b.period_start = c.tight_start
            ), false) as is_hopeless
        from w
        left join lateral (
            select c.chain_id, c.limits_version, c.valid_until, c.team_id, c.department_id, c.department_name, c.refusal, c.leg_pool_ids, c.leg_filters,
                c.entry_ids, c.entry_starts, c.entry_metrics, c.entry_legs, c.entry_filters, c.is_plain, c.is_strict, c.tight_id, c.tight_start
            from credits.chains c
            where p_chains is null and c.organization_id = w.org and c.user_id = coalesce(w.user_id, v_zero)
              and c.api_key_id = coalesce(w.api_key_id, v_zero) and c.replaced_at is null
            union all
            select c.chain_id, c.limits_version, c.valid_until, c.team_id, c.department_id, c.department_name, c.refusal, c.leg_pool_ids, c.leg_filters,
                c.entry_ids, c.entry_starts, c.entry_metrics, c.entry_legs, c.entry_filters, c.is_plain, c.is_strict, null, null
            from credits.chains c
            where p_chains is not null and c.organization_id = w.org and c.chain_id = w.chain_id
        ) c on true
        left join lateral (
            select h.request_id from credits.holds h where p_chains is null and h.organization_id = w.org and h.request_id = w.request_id
        ) h on true
        cross join lateral (
            select case when p_chains is not null then w.leg when c.is_plain then 1::smallint else credits.first_leg(c.leg_filters, w.model) end as leg
        ) l
    ), plain as (
        select p_chains is null and bool_and(is_asked) and count(distinct request_id) = v_n as is_plain from r
    ), demand as (
        select e.place, e.org, e.action, e.id, e.start, coalesce(e.metric, 0) = 0 as is_credits,
            case coalesce(e.metric, 0) when 0 then e.amount when 1 then case e.action when 2 then 0 else 1 end else e.tokens end as amount
        from (
            select r.place, r.org, r.action, r.amount, r.tokens, r.flags, r.model, r.leg, unnest(r.entry_ids) as id, unnest(r.entry_starts) as start,
                unnest(r.entry_metrics) as metric, unnest(r.entry_legs) as entry_leg, unnest(r.entry_filters) as entry_filter
            from r
            where r.is_asked and not r.is_hopeless and (p_chains is not null or (select is_plain from plain))
        ) e
        where (coalesce(e.entry_leg, 0) = 0 or e.entry_leg = e.leg) and (e.entry_filter is null or e.model like e.entry_filter)
          and not (coalesce(e.metric, 0) = 0 and e.flags & 2 = 2)
          and (e.action <> 2 or case coalesce(e.metric, 0) when 0 then e.amount when 1 then 0 else e.tokens end > 0)  -- an extension asks what it needs
    ), sums as materialized (
        select org, id, start, credits.total(amount) filter (where action <> 5) as held, credits.total(amount) filter (where action = 5) as used,
            array_agg(place) filter (where is_credits) as places
        from demand group by id, start, org
    ), moved as (
        update credits.balances b set held_amount = held_amount + s.held, used_amount = used_amount + s.used,
            excess_amount = case when b.stops then 0 else greatest(0, used_amount + s.used + held_amount + s.held - limit_amount) end
        from sums s
        where b.organization_id = s.org and b.balance_id = s.id and b.period_start = s.start
          and credits.has_room(b.stops, b.used_amount, b.held_amount, b.limit_amount, s.held + s.used)
        returning b.organization_id as org, b.balance_id as id, b.period_start as start, s.places,
            case when b.stops then b.limit_amount - b.used_amount - b.held_amount end as room,
            case when b.kind = 'pool' then b.used_amount - s.used end as base
    ), tight as (
        -- NOT IN is a hashed look-up, made only where something is missing; a join of the two would compare every row with every other
        select array_agg(s.org) as orgs, array_agg(s.id) as ids, array_agg(s.start) as starts
        from sums s
        where (select count(*) from moved) < (select count(*) from sums) and (s.org, s.id, s.start) not in (select org, id, start from moved)
    ), found as (
        select array_agg(chain_id) as chains, array_agg(leg) as legs, array_agg(team_id) as teams, array_agg(department_id) as departments,
            array_agg(department_name) as names, array_agg(pool_id) as pools, array_agg(place) filter (where is_hopeless) as hopeless
        from r
    ), places as (
        -- One row a place: the least room of its balances, and its pool's running total before the batch plus what earlier places drew.
        select p.place, case when bool_or(p.is_alone) then min(p.room) end as room, max(p.base) + max(p.earlier) as position
        from (
            select unnest(m.places) as place, m.room, m.base, null::bigint as earlier, null::boolean as is_alone from moved m
            union all
            select r.place, null, null, coalesce(credits.total(case when r.action = 5 and r.is_asked and not r.is_hopeless then r.amount else 0 end) over
                (partition by r.org, r.pool_id order by r.place rows between unbounded preceding and 1 preceding), 0), r.is_alone
            from r
        ) p
        group by p.place order by p.place
    ), measured as (
        select array_agg(room) as rooms, array_agg(position) as positions from places
    )
    select plain.is_plain, found.chains, found.legs, found.teams, found.departments, found.names, found.pools, measured.positions, measured.rooms,
        tight.orgs, tight.ids, tight.starts, found.hopeless
    into is_plain, chains, legs, teams, departments, department_names, pools, positions, rooms, tight_orgs, tight_ids, tight_starts, hopeless
    from plain, found, measured, tight;
end $$;
comment on function credits.take is 'Moves the summed demands of a batch in one guarded update, and tells which balances were tight';

-- refuse: why the hopeless of a batch are refused, and whether waiting would help (then 2, else 1). Their chains are plain. As decide_tight
-- finds it: the first limit without room binds, else what is tightest on the leg; it helps to wait where only holds take all that is missing.
create or replace function credits.refuse(
    p_organization_ids uuid[], p_amounts bigint[], p_flags integer[], p_chains uuid[], p_places integer[]
) returns table (place integer, outcome smallint, detail text, binding_id uuid, available bigint)
language plpgsql stable as $$
#variable_conflict use_column
begin
    return query
    with w as (
        select h.place, p_organization_ids[h.place] as org, p_amounts[h.place] as amount, p_flags[h.place] & 16 = 16 as may_wait,
            c.entry_ids, c.entry_starts, c.entry_legs
        from (select unnest(p_places) as place) h
        join credits.chains c on c.organization_id = p_organization_ids[h.place] and c.chain_id = p_chains[h.place]
    ), entries as (
        select e.place, e.amount, e.may_wait, e.nr, e.leg = 0 as is_limit, b.balance_id, b.kind, b.stops, b.stops and b.excess_amount > 0 as is_blocked,
            b.limit_amount - b.used_amount - b.held_amount as room, b.limit_amount - b.used_amount as free
        from (select w.place, w.org, w.amount, w.may_wait, unnest(w.entry_ids) as id, unnest(w.entry_starts) as start, unnest(w.entry_legs) as leg,
                generate_subscripts(w.entry_ids, 1) as nr from w) e
        join credits.balances b on b.organization_id = e.org and b.balance_id = e.id and b.period_start = e.start
    ), found as (
        select e.place, e.amount, e.may_wait, min(greatest(0, e.room)) filter (where e.stops) as available,
            array_agg(e.balance_id order by e.nr) as ids, array_agg(e.kind order by e.nr) as kinds,
            min(e.nr) filter (where e.is_limit and e.stops and e.is_short) as limit_nr,
            (array_agg(e.nr order by e.is_blocked desc, case when e.is_blocked then -e.nr else e.room end, e.nr) filter (where not e.is_limit))[1] as leg_nr,
            coalesce(bool_and(e.is_freed_by_holds) filter (where e.is_limit and e.stops and e.is_short), true) as limits_wait,
            not bool_or(e.is_short) filter (where not e.is_limit)
                or (e.amount > 0 and bool_and(e.is_freed_by_holds) filter (where not e.is_limit)) as leg_waits
        from (select *, is_blocked or room < amount as is_short, not is_blocked and free >= amount as is_freed_by_holds from entries) e
        group by e.place, e.amount, e.may_wait
    )
    select f.place, case when f.may_wait and f.limits_wait and f.leg_waits then 2 else 1 end::smallint,
        case f.kinds[b.nr] when 'limit' then 'cap_reached' when 'allocation' then 'allocation_exhausted' else 'pool_exhausted' end,
        f.ids[b.nr], f.available
    from found f cross join lateral (select coalesce(f.limit_nr, f.leg_nr) as nr) b;
end $$;
comment on function credits.refuse is 'Verdicts on the requests of a batch that alone exceed a balance';

-- decide_tight: arrival order, one by one, in memory, for the requests that touch a balance whose summed demand did not fit.
-- What the guarded update had applied for them elsewhere is taken back, what they are granted is applied, in one update. Of the hopeless
-- it had applied nothing.
create or replace function credits.decide_tight(
    p_organization_ids uuid[], p_actions smallint[], p_amounts bigint[], p_tokens bigint[], p_flags integer[], p_models text[],
    p_chains uuid[], p_legs smallint[], p_outcomes smallint[], p_details text[], p_bindings uuid[],
    p_tight_orgs uuid[], p_tight_ids uuid[], p_tight_starts timestamptz[], p_hopeless integer[], p_now timestamptz,
    out outcomes smallint[], out details text[], out bindings uuid[], out legs smallint[],
    out split_places integer[], out split_legs smallint[], out split_micros bigint[]
) language plpgsql volatile set search_path = credits, pg_temp set plan_cache_mode = force_generic_plan set enable_seqscan = off as $$
declare
    v_suspects integer[];
    v_orgs uuid[]; v_ids uuid[]; v_starts timestamptz[]; v_kinds text[];
    v_rooms bigint[];        -- limit - used - held, without what suspects were applied
    v_frees bigint[];        -- limit - used: what open holds alone stand in the way of
    v_stops boolean[]; v_blocked boolean[];
    v_helds bigint[]; v_useds bigint[];   -- net change to apply
    v_row record;
    v_i integer; v_need bigint; v_left bigint; v_free_left bigint; v_bind integer; v_wait boolean;
    v_leg smallint; v_room bigint; v_free bigint; v_leg_bind integer; v_first_bind integer; v_first_is_empty boolean;
    v_take bigint[]; v_free_take bigint[]; v_legs_used smallint;
begin
    outcomes := p_outcomes; details := p_details; bindings := p_bindings; legs := p_legs;
    split_places := '{}'; split_legs := '{}'; split_micros := '{}';

    with tight as (select * from unnest(p_tight_orgs, p_tight_ids, p_tight_starts) t(org, id, start)),
    applied as materialized (
        select w.place::int, w.org, w.action, w.leg as chosen, w.flags, w.model, w.chain_id, e.id, e.start, t.id is not null as is_tight,
            w.place = any (p_hopeless) as is_hopeless,
            case e.metric when 0 then w.amount when 1 then case w.action when 2 then 0 else 1 end else w.tokens end as amount
        from unnest(p_organization_ids, p_actions, p_amounts, p_tokens, p_flags, p_models, p_chains, p_legs, p_outcomes) with ordinality
            as w(org, action, amount, tokens, flags, model, chain_id, leg, outcome, place)
        join chains c on c.organization_id = w.org and c.chain_id = w.chain_id
        left join lateral unnest(c.entry_ids, c.entry_starts, c.entry_metrics, c.entry_legs, c.entry_filters) e(id, start, metric, leg, filter)
            on (e.leg = 0 or e.leg = w.leg) and (e.filter is null or w.model like e.filter) and not (e.metric = 0 and w.flags & 2 = 2)
               and (w.action <> 2 or case e.metric when 0 then w.amount when 1 then 0 else w.tokens end > 0)
        left join tight t on t.org = w.org and t.id = e.id and t.start = e.start
        where w.action in (1, 2, 5) and w.outcome = -1 and not (w.action = 2 and w.amount = 0 and w.tokens = 0)
    ), suspects as (
        select distinct place, org, flags, model, chain_id from applied
        where is_tight or is_hopeless or (action in (1, 5) and chosen = 0 and flags & 2 = 0)
    ), taken as (
        select a.org, a.id, a.start, sum(a.amount) filter (where a.action <> 5)::bigint as held, sum(a.amount) filter (where a.action = 5)::bigint as used
        from applied a where a.place in (select place from suspects) and not a.is_tight and not a.is_hopeless group by 1, 2, 3
    ), touched as (
        select distinct s.org, e.id, e.start
        from suspects s join chains c on c.organization_id = s.org and c.chain_id = s.chain_id
        cross join lateral unnest(c.entry_ids, c.entry_starts, c.entry_filters) e(id, start, filter)
        where e.filter is null or s.model like e.filter
    )
    select (select array_agg(place order by place) from suspects),
        array_agg(b.organization_id), array_agg(b.balance_id), array_agg(b.period_start), array_agg(b.kind), array_agg(b.stops),
        array_agg(b.stops and b.excess_amount > 0),
        array_agg(b.limit_amount - b.used_amount - b.held_amount + coalesce(k.held, 0) + coalesce(k.used, 0)),
        array_agg(b.limit_amount - b.used_amount + coalesce(k.used, 0)),
        array_agg(-coalesce(k.held, 0)), array_agg(-coalesce(k.used, 0))
    into v_suspects, v_orgs, v_ids, v_starts, v_kinds, v_stops, v_blocked, v_rooms, v_frees, v_helds, v_useds
    from touched t
    join balances b on b.organization_id = t.org and b.balance_id = t.id and b.period_start = t.start
    left join taken k on k.org = t.org and k.id = t.id and k.start = t.start;

    for v_row in
        select s.place, p_actions[s.place] as action, p_flags[s.place] as flags, p_amounts[s.place] as amount, p_tokens[s.place] as tokens,
            p_legs[s.place] as leg, cardinality(c.leg_filters) as n_legs,
            coalesce(array_agg(e.leg order by e.nr) filter (where x.i is not null), '{}') as legs,
            coalesce(array_agg(e.metric order by e.nr) filter (where x.i is not null), '{}') as metrics,
            coalesce(array_agg(x.i::int order by e.nr) filter (where x.i is not null), '{}') as idxs
        from unnest(v_suspects) s(place)
        join chains c on c.organization_id = p_organization_ids[s.place] and c.chain_id = p_chains[s.place]
        left join lateral unnest(c.entry_ids, c.entry_starts, c.entry_metrics, c.entry_legs, c.entry_filters) with ordinality e(id, start, metric, leg, filter, nr)
            on (e.filter is null or p_models[s.place] like e.filter)
               and (e.leg = 0 or c.leg_filters[e.leg] is null or p_models[s.place] like c.leg_filters[e.leg])
               and not (e.metric = 0 and p_flags[s.place] & 2 = 2)
        left join unnest(v_orgs, v_ids, v_starts) with ordinality x(org, id, start, i)
            on x.org = p_organization_ids[s.place] and x.id = e.id and x.start = e.start
        group by s.place, c.leg_filters
        order by s.place
    loop
        v_bind := null; v_wait := true; v_left := v_row.amount; v_free_left := v_row.amount; v_legs_used := 0;
        v_first_bind := null; v_first_is_empty := false;
        v_take := array_fill(0::bigint, array[v_row.n_legs]); v_free_take := v_take;
        for k in 1..cardinality(v_row.idxs) loop  -- what must allow it whichever leg pays
            continue when v_row.legs[k] > 0;
            v_i := v_row.idxs[k];
            v_need := case v_row.metrics[k] when 0 then v_row.amount when 1 then case v_row.action when 2 then 0 else 1 end else v_row.tokens end;
            continue when v_row.action = 2 and v_need = 0;
            if v_stops[v_i] and (v_blocked[v_i] or v_rooms[v_i] < v_need) then
                v_bind := coalesce(v_bind, v_i);
                v_wait := v_wait and not v_blocked[v_i] and v_frees[v_i] >= v_need;
            end if;
        end loop;
        if v_row.flags & 2 = 0 and not (v_row.action = 2 and v_row.amount = 0) then
            for n in case v_row.action when 2 then 0 else 1 end..v_row.n_legs loop  -- an extension tries its own leg first
                continue when v_row.action = 2 and n = v_row.leg;
                v_leg := case n when 0 then v_row.leg else n end;
                v_room := null; v_free := null; v_leg_bind := null;
                for k in 1..cardinality(v_row.idxs) loop
                    continue when v_row.legs[k] <> v_leg;
                    v_i := v_row.idxs[k];
                    if v_room is null or v_blocked[v_i] or v_rooms[v_i] < v_room then
                        v_leg_bind := v_i;
                    end if;
                    v_room := least(v_room, case when v_blocked[v_i] then -1 else v_rooms[v_i] end);
                    v_free := least(v_free, v_frees[v_i]);
                end loop;
                continue when v_room is null;  -- not for this model
                if v_first_bind is null then
                    v_first_bind := v_leg_bind;
                    v_first_is_empty := v_free <= 0;
                end if;
                continue when v_room < 0;
                v_take[v_leg] := least(v_left, v_room);
                v_left := v_left - v_take[v_leg];
                v_free_take[v_leg] := least(v_free_left, greatest(0, v_free));
                v_free_left := v_free_left - v_free_take[v_leg];
                -- A share and the open part draw on one pool: what this leg takes is gone for the next.
                for k in 1..cardinality(v_row.idxs) loop
                    continue when v_row.legs[k] <> v_leg;
                    v_rooms[v_row.idxs[k]] := v_rooms[v_row.idxs[k]] - v_take[v_leg];
                    v_frees[v_row.idxs[k]] := v_frees[v_row.idxs[k]] - v_free_take[v_leg];
                end loop;
                if v_take[v_leg] > 0 or (v_row.amount = 0 and v_legs_used = 0) then
                    v_legs_used := v_legs_used + 1;
                    if v_legs_used = 1 and v_row.action <> 2 then
                        legs[v_row.place] := v_leg;
                    end if;
                end if;
                exit when v_left = 0 and v_legs_used > 0;
            end loop;
            if v_left > 0 or v_legs_used = 0 then
                v_wait := v_wait and v_free_left <= 0 and v_row.amount > 0;  -- nothing does not fit only where there is excess
                v_bind := coalesce(v_bind, v_first_bind);
            end if;
        end if;
        for k in 1..cardinality(v_row.idxs) loop
            continue when v_row.legs[k] = 0;
            v_i := v_row.idxs[k];
            v_frees[v_i] := v_frees[v_i] + v_free_take[v_row.legs[k]];  -- that was only to see whether waiting helps
            if v_bind is not null then
                v_rooms[v_i] := v_rooms[v_i] + v_take[v_row.legs[k]];
            end if;
        end loop;
        if v_bind is null and v_row.flags & 2 = 0 and v_first_bind is null and not (v_row.action = 2 and v_row.amount = 0) then
            outcomes[v_row.place] := 1;
            details[v_row.place] := 'no_pool_for_model';
            continue;
        end if;
        if v_bind is not null then
            outcomes[v_row.place] := case when v_wait and v_row.flags & 16 = 16 then 2 else 1 end;
            bindings[v_row.place] := v_ids[v_bind];
            details[v_row.place] := case v_kinds[v_bind] when 'limit' then 'cap_reached' when 'allocation' then 'allocation_exhausted' else 'pool_exhausted' end;
            update chains set tight_id = v_ids[v_bind], tight_start = v_starts[v_bind]
            where organization_id = p_organization_ids[v_row.place] and chain_id = p_chains[v_row.place] and is_plain
              and (tight_id, tight_start) is distinct from (v_ids[v_bind], v_starts[v_bind]);
            continue;
        end if;
        for k in 1..cardinality(v_row.idxs) loop
            v_i := v_row.idxs[k];
            if v_row.legs[k] > 0 then
                v_need := v_take[v_row.legs[k]];
            else
                v_need := case v_row.metrics[k] when 0 then v_row.amount when 1 then case v_row.action when 2 then 0 else 1 end else v_row.tokens end;
                v_rooms[v_i] := v_rooms[v_i] - v_need;
            end if;
            if v_row.action = 5 then
                v_useds[v_i] := v_useds[v_i] + v_need;
                v_frees[v_i] := v_frees[v_i] - v_need;
            else
                v_helds[v_i] := v_helds[v_i] + v_need;
            end if;
        end loop;
        if v_legs_used > 1 or (v_row.action = 2 and v_take[v_row.leg] < v_row.amount) then
            for l in 1..v_row.n_legs loop
                continue when v_take[l] = 0;
                split_places := split_places || v_row.place; split_legs := split_legs || l::smallint; split_micros := split_micros || v_take[l];
            end loop;
        end if;
        if v_row.action <> 2 and v_row.amount > 0 and legs[v_row.place] <> v_row.leg and v_first_is_empty then
            -- The first leg is used up for good: a rebuilt chain leaves it out, and the next call is decided set-based again.
            update chains set valid_until = least(valid_until, p_now)
            where organization_id = p_organization_ids[v_row.place] and chain_id = p_chains[v_row.place];
        end if;
    end loop;

    update balances b set held_amount = held_amount + d.held, used_amount = used_amount + d.used,
        excess_amount = case when b.stops then b.excess_amount else greatest(0, used_amount + d.used + held_amount + d.held - limit_amount) end
    from unnest(v_orgs, v_ids, v_starts, v_helds, v_useds) d(org, id, start, held, used)
    where b.organization_id = d.org and b.balance_id = d.id and b.period_start = d.start and (d.held <> 0 or d.used <> 0);
end $$;
comment on function credits.decide_tight is 'Decides one by one, in arrival order, the requests of a batch that touch a balance without room for all of them';

-- came_to_nothing: the request of an accepted command is neither held nor charged: it was released, or its lease ended before it was sent.
create or replace function credits.came_to_nothing(p_command credits.commands) returns boolean
language sql stable set search_path = credits, pg_temp as $$
    select p_command.request_id is not null and p_command.outcome ->> 'outcome' = '0'
        and not exists (select from holds h where h.organization_id = p_command.organization_id and h.request_id = p_command.request_id)
        and not exists (select from ledger.attribution a
                        where a.organization_id = p_command.organization_id and a.request_id = p_command.request_id);
$$;
comment on function credits.came_to_nothing is 'Whether the request of a stored command left nothing behind, so that its key is free again';

-- post_batch: write what move_batch decided: holds, attribution, requests that cost nothing, stored results; one insert each.
create or replace function credits.post_batch(
    p_organization_ids uuid[], p_actions smallint[], p_request_ids uuid[], p_amounts bigint[], p_tokens bigint[], p_costs bigint[],
    p_usages integer[], p_marks bigint[], p_leases integer[], p_flags integer[], p_providers text[], p_models text[],
    p_price_version_ids uuid[], p_provider_key_ids uuid[], p_conversation_ids uuid[], p_used_at timestamptz[], p_keys text[], p_body_hashes bytea[],
    p_chains uuid[], p_legs smallint[], p_outcomes smallint[], p_details text[], p_bindings uuid[], p_held bigint[], p_charged bigint[],
    p_user_ids uuid[], p_api_key_ids uuid[], p_split_places integer[], p_split_legs smallint[], p_split_micros bigint[], p_teams uuid[],
    p_departments uuid[], p_department_names text[], p_pools uuid[], p_positions bigint[], p_now timestamptz
) returns void
language plpgsql volatile as $$
declare
    v_zero constant uuid := '00000000-0000-0000-0000-000000000000';
    v_width constant integer := credits.usage_width();
    v_take_places integer[];
    v_take_pools uuid[];
    v_take_positions bigint[];
    v_take_micros bigint[];
begin
    if 1 = any (p_actions) then
        insert into credits.holds (organization_id, request_id, chain_id, is_sent, leg, leg_micros, amount_micros, tokens, floor_micros, progress_micros,
            cost_nano_usd, flags, provider, model, price_version_id, provider_key_id, conversation_id, placed_at, lease_expires_at)
        select w.org, w.request_id, w.chain_id, w.flags & 1 = 1, greatest(w.leg, 1::smallint),
            case when w.place = any (p_split_places) then (
                select array_agg(coalesce(s.micros, 0) order by n.leg)
                from generate_series(1, (select cardinality(c.leg_filters) from credits.chains c where c.organization_id = w.org and c.chain_id = w.chain_id)) n(leg)
                left join unnest(p_split_places, p_split_legs, p_split_micros) s(place, leg, micros) on s.place = w.place and s.leg = n.leg) end,
            w.amount, w.tokens, w.mark, w.mark, w.cost, w.flags & 12554, w.provider, w.model, w.price_version_id, w.provider_key_id, w.conversation_id,
            p_now, p_now + make_interval(secs => w.lease)
        from (
            select unnest(p_organization_ids) as org, unnest(p_actions) as action, unnest(p_request_ids) as request_id, unnest(p_amounts) as amount,
                unnest(p_tokens) as tokens, unnest(p_costs) as cost, unnest(p_marks) as mark, unnest(p_leases) as lease, unnest(p_flags) as flags,
                unnest(p_providers) as provider, unnest(p_models) as model, unnest(p_price_version_ids) as price_version_id,
                unnest(p_provider_key_ids) as provider_key_id, unnest(p_conversation_ids) as conversation_id, unnest(p_chains) as chain_id,
                unnest(p_legs) as leg, unnest(p_outcomes) as outcome, generate_subscripts(p_actions, 1) as place
        ) w
        where w.action = 1 and w.outcome = -1;
    end if;

    if 2 = any (p_actions) then
        -- Progress is recorded whether or not the extension was granted: what was streamed was streamed.
        update credits.holds h set amount_micros = h.amount_micros + case when w.outcome = -1 then w.amount else 0 end,
            leg_micros = case when w.outcome = -1 and (h.leg_micros is not null or w.place = any (p_split_places)) then (
                -- What was held leg by leg (without a list: all on its leg) and what the extension took, on its own leg where it did not split.
                select array_agg(coalesce(h.leg_micros[n.leg], case when h.leg_micros is null and n.leg = h.leg then h.amount_micros else 0 end)
                    + case when w.place = any (p_split_places) then coalesce(s.micros, 0) when n.leg = h.leg then w.amount else 0 end order by n.leg)
                from generate_series(1, (select cardinality(c.leg_filters) from credits.chains c where c.organization_id = h.organization_id and c.chain_id = h.chain_id)) n(leg)
                left join unnest(p_split_places, p_split_legs, p_split_micros) s(place, leg, micros) on s.place = w.place and s.leg = n.leg)
                else h.leg_micros end,
            tokens = h.tokens + case when w.outcome = -1 then w.tokens else 0 end,
            cost_nano_usd = h.cost_nano_usd + case when w.outcome = -1 then w.cost else 0 end,
            progress_micros = greatest(h.progress_micros, w.mark), is_sent = h.is_sent or w.flags & 1 = 1,
            flags = h.flags | (w.flags & 8), lease_expires_at = greatest(h.lease_expires_at, p_now + make_interval(secs => w.lease))
        from unnest(p_organization_ids, p_actions, p_request_ids, p_amounts, p_tokens, p_costs, p_marks, p_leases, p_flags, p_outcomes)
            with ordinality w(org, action, request_id, amount, tokens, cost, mark, lease, flags, outcome, place)
        where w.action = 2 and w.outcome in (-1, 1, 2) and h.organization_id = w.org and h.request_id = w.request_id;
    end if;

    if 3 = any (p_actions) or 5 = any (p_actions) then
        if p_positions is null then
            -- Each pool's running total before each draw: what it has used now, less what this and the later places of the batch drew.
            with takes as (
                select s.place, p_organization_ids[s.place] as org, c.leg_pool_ids[s.leg] as pool_id, credits.total(s.micros) as micros
                from unnest(p_split_places, p_split_legs, p_split_micros) s(place, leg, micros)
                join credits.chains c on c.organization_id = p_organization_ids[s.place] and c.chain_id = p_chains[s.place]
                where p_actions[s.place] = 5 and c.leg_pool_ids[s.leg] <> c.leg_pool_ids[p_legs[s.place]]
                group by 1, 2, 3
            ), w as materialized (
                select u.place, u.org, u.charged, u.action in (3, 5) and u.outcome = -1 and u.flags & 2 = 0 as draws, c.leg_pool_ids[u.leg] as pool_id,
                    c.user_id, c.api_key_id, c.team_id, c.department_id, c.department_name
                from (select unnest(p_organization_ids) as org, unnest(p_actions) as action, unnest(p_flags) as flags, unnest(p_chains) as chain_id,
                        unnest(p_legs) as leg, unnest(p_outcomes) as outcome, unnest(p_charged) as charged, generate_subscripts(p_actions, 1) as place) u
                left join credits.chains c on c.organization_id = u.org and c.chain_id = u.chain_id
            ), drawn as (
                select place, org, case when draws then pool_id end as pool_id, charged as micros, true as is_first from w
                union all
                select place, org, pool_id, micros, false from takes
                union all  -- what further pools took is not drawn from the first
                select t.place, t.org, c.leg_pool_ids[p_legs[t.place]], -t.micros, null
                from takes t join credits.chains c on c.organization_id = t.org and c.chain_id = p_chains[t.place]
            ), sums as (
                select place, org, pool_id, credits.total(micros) as micros, bool_or(is_first) as is_first from drawn group by place, org, pool_id
            ), positions as (
                select d.place, d.pool_id, d.micros, d.is_first,
                    b.used_amount - credits.total(d.micros) over (partition by d.org, d.pool_id order by d.place desc) as position
                from sums d left join credits.balances b on b.organization_id = d.org and b.balance_id = d.pool_id and b.period_start = '-infinity'
            ), by_place as (
                select array_agg(pool_id order by place) filter (where is_first) as pools, array_agg(position order by place) filter (where is_first) as positions,
                    array_agg(place) filter (where not is_first) as take_places, array_agg(pool_id) filter (where not is_first) as take_pools,
                    array_agg(position) filter (where not is_first) as take_positions, array_agg(micros) filter (where not is_first) as take_micros
                from positions
            ), owners as (
                select array_agg(user_id) as users, array_agg(api_key_id) as keys, array_agg(team_id) as teams, array_agg(department_id) as departments,
                    array_agg(department_name) as names
                from w
            )
            select by_place.pools, by_place.positions, by_place.take_places, by_place.take_pools, by_place.take_positions, by_place.take_micros,
                owners.users, owners.keys, owners.teams, owners.departments, owners.names
            into p_pools, p_positions, v_take_places, v_take_pools, v_take_positions, v_take_micros,
                p_user_ids, p_api_key_ids, p_teams, p_departments, p_department_names
            from by_place, owners;

            if v_take_places is not null then
                insert into ledger.attribution_takes (organization_id, request_id, booked_at, pool_id, position_micros, charged_micros)
                select p_organization_ids[t.place], p_request_ids[t.place], p_now, t.pool_id, t.position, t.micros
                from unnest(v_take_places, v_take_pools, v_take_positions, v_take_micros) t(place, pool_id, position, micros);
            end if;
        end if;

        insert into ledger.attribution (organization_id, request_id, booked_at, used_at, kind, user_id, api_key_id, provider_key_id, provider, model,
            team_id, department_id, department_name, conversation_id, chain_id, price_version_id, pool_id, position_micros, charged_micros, hold_micros,
            provider_cost_nano_usd, customer_cost_nano_usd, flags, input_tokens, cache_read_tokens, cache_write_5m_tokens, cache_write_1h_tokens,
            output_tokens, reasoning_tokens, audio_input_tokens, audio_output_tokens, image_input_tokens, image_output_tokens, images, web_searches,
            audio_milliseconds, characters, requests, file_searches, code_sessions)
        select w.org, w.request_id, p_now, coalesce(w.used_at, p_now), 0, nullif(w.user_id, v_zero), nullif(w.api_key_id, v_zero), w.provider_key_id,
            w.provider, w.model, w.team_id, w.department_id, w.department_name, w.conversation_id, w.chain_id, w.price_version_id, w.pool_id, w.position,
            w.charged, w.held, case when w.flags & 2 = 2 then 0 else w.cost end, case when w.flags & 2 = 2 then w.cost else 0 end, w.flags & ~49,
            p_usages[w.at + 1], p_usages[w.at + 2], p_usages[w.at + 3], p_usages[w.at + 4], p_usages[w.at + 5], p_usages[w.at + 6], p_usages[w.at + 7],
            p_usages[w.at + 8], p_usages[w.at + 9], p_usages[w.at + 10], p_usages[w.at + 11], p_usages[w.at + 12], p_usages[w.at + 13],
            p_usages[w.at + 14], p_usages[w.at + 15], p_usages[w.at + 16], p_usages[w.at + 17]
        from (
            select unnest(p_organization_ids) as org, unnest(p_actions) as action, unnest(p_request_ids) as request_id, unnest(p_user_ids) as user_id,
                unnest(p_api_key_ids) as api_key_id, unnest(p_costs) as cost, unnest(p_flags) as flags, unnest(p_providers) as provider,
                unnest(p_models) as model, unnest(p_price_version_ids) as price_version_id, unnest(p_provider_key_ids) as provider_key_id,
                unnest(p_conversation_ids) as conversation_id, unnest(p_used_at) as used_at, unnest(p_chains) as chain_id,
                unnest(p_outcomes) as outcome, unnest(p_held) as held, unnest(p_charged) as charged, unnest(p_teams) as team_id,
                unnest(p_departments) as department_id, unnest(p_department_names) as department_name, unnest(p_pools) as pool_id,
                unnest(p_positions) as position, generate_series(0, v_width * (cardinality(p_actions) - 1), v_width) as at
        ) w
        where w.action in (3, 5) and w.outcome = -1;

    end if;

    if 3 = any (p_actions) then
        insert into credits.estimates (organization_id, request_id, chain_id, leg_micros, tokens, cost_nano_usd, flags, booked_at)
        select w.org, w.request_id, w.chain_id,
            array(select case when n = w.leg then w.charged else 0 end
                  from credits.chains c, generate_series(1, cardinality(c.leg_filters)) n
                  where c.organization_id = w.org and c.chain_id = w.chain_id order by n),
            w.tokens, w.cost, w.flags & ~49, p_now
        from unnest(p_organization_ids, p_actions, p_request_ids, p_tokens, p_costs, p_flags, p_chains, p_legs, p_outcomes, p_charged)
            w(org, action, request_id, tokens, cost, flags, chain_id, leg, outcome, charged)
        where w.action = 3 and w.outcome = -1 and w.flags & 64 = 64
        on conflict on constraint estimates_pkey do update set chain_id = excluded.chain_id, leg_micros = excluded.leg_micros,
            tokens = excluded.tokens, cost_nano_usd = excluded.cost_nano_usd, flags = excluded.flags, booked_at = excluded.booked_at;
    end if;

    if 1 = any (p_outcomes) or 4 = any (p_actions) then
        insert into credits.unbilled_requests (organization_id, request_id, happened_at, outcome, user_id, api_key_id, provider, model, conversation_id,
            wanted_micros, binding_id, detail)
        select w.org, w.request_id, p_now,
            case when w.action <> 4 then 'refused' when w.flags & 64 = 64 then 'expired' else 'released' end,
            nullif(w.user_id, v_zero), nullif(w.api_key_id, v_zero), w.provider, w.model, w.conversation_id,
            case w.action when 4 then w.held else w.amount end, w.binding_id, w.detail
        from (
            select unnest(p_organization_ids) as org, unnest(p_actions) as action, unnest(p_request_ids) as request_id, unnest(p_user_ids) as user_id,
                unnest(p_api_key_ids) as api_key_id, unnest(p_amounts) as amount, unnest(p_flags) as flags, unnest(p_providers) as provider,
                unnest(p_models) as model, unnest(p_conversation_ids) as conversation_id, unnest(p_outcomes) as outcome,
                unnest(p_details) as detail, unnest(p_bindings) as binding_id, unnest(p_held) as held
        ) w
        where (w.action in (1, 5) and w.outcome = 1) or (w.action = 4 and w.outcome in (-1, 9))
        on conflict do nothing;
    end if;

    if array_remove(p_keys, null) <> '{}' then
        -- A released or expired request had no outcome: its key may be used again. Whatever lies under a key that was found free goes.
        delete from credits.commands k
        using unnest(p_organization_ids, p_keys, p_actions, p_request_ids, p_outcomes, p_details) w(org, key, action, request_id, outcome, detail)
        where k.organization_id = w.org and k.idempotency_key = w.key
          and (k.kept_until <= p_now or case when w.action = 4 then w.outcome in (-1, 9) and k.request_id = w.request_id
                                             else w.outcome in (-1, 1, 9) or (w.outcome = 6 and w.detail <> 'request_invalid') end);
        insert into credits.commands (organization_id, idempotency_key, body_hash, request_id, outcome, answered_at, kept_until)
        select w.org, w.key, w.body_hash, w.request_id,
            jsonb_build_object('outcome', greatest(w.outcome, 0), 'request_id', w.request_id, 'detail', w.detail, 'binding_id', w.binding_id,
                'held_micros', case w.action when 1 then w.amount when 2 then w.held + w.amount else 0 end,
                'charged_micros', case when w.action in (3, 5) then w.charged else 0 end),
            p_now, p_now + case when w.outcome in (1, 6) then interval '24 hours' else interval '35 days' end
        from unnest(p_organization_ids, p_actions, p_keys, p_body_hashes, p_request_ids, p_amounts, p_outcomes, p_details, p_bindings, p_charged, p_held)
            w(org, action, key, body_hash, request_id, amount, outcome, detail, binding_id, charged, held)
        where w.key is not null and w.action <> 4
          and (w.outcome in (-1, 1, 9) or (w.outcome = 6 and w.detail not in ('request_invalid', 'organization_unknown')));
    end if;
end $$;
comment on function credits.post_batch is 'Writes what a batch decided: holds, attribution, requests that cost nothing, stored results';

-- move_batch: decide everything that is waiting, in one call: settles and releases first, then authorizes, extends and deductions.
-- Parallel arrays, one place a request; null means none, in user and key ids the zero uuid does. The arrays of prices, provider keys,
-- conversations, instants, keys and hashes may be null as a whole.
--   p_route          the organization that routes the call (Citus); on plain PostgreSQL the arrays may name many
--   p_actions        1 authorize, 2 extend, 3 settle, 4 release, 5 deduct (authorize and settle in one)
--   p_request_ids    UUIDv7; a batch that names one twice is decided one request at a time
--   p_amounts        micros: to hold, to hold in addition (with flag 2048: in all), charged, -, charged
--   p_tokens         the same in tokens, for limits that count them
--   p_costs          provider cost in nano-dollars that the amount stands for
--   p_usages         usage_width() integers a place in the order of the attribution's columns, for settle and deduct
--   p_marks          micros: authorize: cost of the input alone; extend: cost so far
--   p_leases         seconds until an authorized or extended hold ends by itself
--   p_flags          bits: 1 sent, 2 customer's own key, 4 estimated, 8 streamed, 16 may wait, 32 repeated after an unknown answer,
--                    64 by expiry, 256 unpriced by policy, 512 the request names no limit of output (of a hold: its amount is a guess),
--                    1024 of a hold: where it would be refused for want of room nothing is final, 2048 of an extension: amount, tokens and
--                    cost are what shall be held in all, so that asking again holds nothing twice, 4096 reported by a program,
--                    8192 in a batch of the provider's
--   p_keys, p_body_hashes   idempotency key of the command and hash of its body; with a release: the key that it sets free
--   p_at             null; the simulator's instant
-- Returns one verdict a place: 0 accepted, 1 refused by a balance, 2 wait (only open holds stand in the way), 3 known: the stored
-- acceptance, 4 there is no such hold, 5 the key was used with another body, 6 not allowed at all, 7 known: the stored refusal, 8 ask again
-- with another amount, nothing was stored: a strict limit takes no guess (detail strict), or there is no room (flag 1024).
create or replace function credits.move_batch(
    p_route uuid, p_organization_ids uuid[], p_actions smallint[], p_request_ids uuid[], p_user_ids uuid[], p_api_key_ids uuid[],
    p_amounts bigint[], p_tokens bigint[], p_costs bigint[], p_usages integer[], p_marks bigint[], p_leases integer[], p_flags integer[],
    p_providers text[], p_models text[], p_price_version_ids uuid[], p_provider_key_ids uuid[], p_conversation_ids uuid[],
    p_used_at timestamptz[], p_keys text[], p_body_hashes bytea[], p_at timestamptz default null
) returns setof credits.verdict
language plpgsql volatile security definer
set search_path = credits, pg_temp set plan_cache_mode = force_generic_plan set enable_seqscan = off set enable_hashjoin = off
set enable_mergejoin = off set enable_material = off set jit = off
as $$
#variable_conflict use_column
declare
    v_zero constant uuid := '00000000-0000-0000-0000-000000000000';
    v_n constant integer := coalesce(cardinality(p_request_ids), 0);
    v_width constant integer := credits.usage_width();
    v_most constant bigint := credits.most_micros();
    v_now timestamptz;
    v_due uuid[];
    v_chains uuid[];
    v_legs smallint[];
    v_outcomes smallint[];     -- -1 undecided
    v_details text[];
    v_bindings uuid[] := array_fill(null::uuid, array[v_n]);
    v_held bigint[];
    v_charged bigint[] := p_amounts;
    v_slow integer[];
    v_stale boolean;
    v_settles boolean;
    v_demands boolean;
    v_bent boolean;
    v_lingering boolean := false;
    v_gates uuid[];            -- the organizations, and the limits_version of each
    v_versions bigint[];
    v_is_plain boolean := false;
    v_pools uuid[];
    v_positions bigint[];
    v_rooms bigint[];
    v_teams uuid[];
    v_departments uuid[];
    v_department_names text[];
    v_tight_orgs uuid[];
    v_tight_ids uuid[];
    v_tight_starts timestamptz[];
    v_hopeless integer[];
    v_split_places integer[] := '{}';
    v_split_legs smallint[] := '{}';
    v_split_micros bigint[] := '{}';
    v_over_orgs uuid[];        -- shares that were, or are, beyond their limit
    v_over_ids uuid[];
    v_row record;
    v_booked record;
begin
    if array[cardinality(p_organization_ids), cardinality(p_actions), cardinality(p_user_ids), cardinality(p_api_key_ids), cardinality(p_amounts),
             cardinality(p_tokens), cardinality(p_costs), cardinality(p_usages) / v_width, cardinality(p_marks), cardinality(p_leases),
             cardinality(p_flags), cardinality(p_providers), cardinality(p_models), coalesce(cardinality(p_price_version_ids), v_n),
             coalesce(cardinality(p_provider_key_ids), v_n), coalesce(cardinality(p_conversation_ids), v_n), coalesce(cardinality(p_used_at), v_n),
             coalesce(cardinality(p_keys), v_n), coalesce(cardinality(p_body_hashes), v_n)] <> array_fill(v_n, array[19])
       or cardinality(p_usages) % v_width <> 0 or array_position(p_usages, null) is not null or 0 > any (p_usages) then
        raise exception 'the arrays of a batch need one place a request, and % counts of usage', v_width using errcode = 'BR400';
    end if;
    if v_n = 0 then
        return;
    end if;
    -- (1) gates, in organization order: whoever moves credits does this first, so nothing can deadlock
    select array_agg(g.organization_id) filter (where g.next_event_at <> 'infinity'), array_agg(g.organization_id), array_agg(g.limits_version)
    into v_due, v_gates, v_versions
    from (select organization_id, next_event_at, limits_version from gates where organization_id = any (p_organization_ids)
          order by organization_id for no key update) g;
    -- (2) the one instant of this batch
    v_now := case when p_at is null then clock_timestamp() else credits.now_under_gate(p_at) end;
    -- (3) time events that are due
    if v_due is not null then
        for v_row in select organization_id from gates where organization_id = any (v_due) and next_event_at <= v_now order by 1 loop
            perform credits.fold_due_pools(v_row.organization_id, v_now);
            v_lingering := v_lingering or (select next_event_at = '-infinity' from gates where organization_id = v_row.organization_id);
        end loop;
        v_versions := array(select g.limits_version from unnest(v_gates) with ordinality o(id, nr)
                            join gates g on g.organization_id = o.id order by o.nr);
    end if;

    -- (6) Most batches only hold and deduct, by chains that are current: one statement finds those and moves the demands.
    if p_actions <@ array[1, 5]::smallint[] and coalesce(array_remove(p_keys, null), '{}') = '{}'
       and 0 <= all (p_amounts) and v_most >= all (p_amounts) and 0 <= all (p_tokens) and v_most >= all (p_tokens)
       and 0 <= all (p_costs) and v_most >= all (p_costs) and 0 <= all (p_marks) and v_most >= all (p_marks)
       and 0 <= all (p_flags) and (0 < all (p_leases) or not 1 = any (p_actions)) then
        select t.is_plain, t.chains, t.legs, t.teams, t.departments, t.department_names, t.pools, t.positions, t.rooms,
            t.tight_orgs, t.tight_ids, t.tight_starts, t.hopeless
        into v_is_plain, v_chains, v_legs, v_teams, v_departments, v_department_names, v_pools, v_positions, v_rooms,
            v_tight_orgs, v_tight_ids, v_tight_starts, v_hopeless
        from credits.take(p_organization_ids, p_actions, p_request_ids, p_user_ids, p_api_key_ids, p_amounts, p_tokens, p_flags, p_models,
            null, null, null, v_gates, v_versions, v_now) t;
    end if;

    if v_is_plain then
        v_outcomes := array_fill(-1::smallint, array[v_n]);
        v_details := array_fill(null::text, array[v_n]);
        v_held := array_fill(0::bigint, array[v_n]);
    else
        if (select count(distinct r) from unnest(p_request_ids) r) < v_n - cardinality(array_positions(p_request_ids, null)) then
            -- What happens to a request twice happens in order: settles and releases first, as ever, then as they arrived; each looks whether
            -- an earlier one has booked it.
            for v_row in select place::int from unnest(p_actions) with ordinality u(action, place) order by action not in (3, 4), place loop
                return query
                select v_row.place, v.outcome, v.request_id, v.held_micros, v.charged_micros, v.available_micros, v.binding_id, v.detail
                from credits.move_batch(p_route, p_organization_ids[v_row.place:v_row.place], p_actions[v_row.place:v_row.place],
                    p_request_ids[v_row.place:v_row.place], p_user_ids[v_row.place:v_row.place], p_api_key_ids[v_row.place:v_row.place],
                    p_amounts[v_row.place:v_row.place], p_tokens[v_row.place:v_row.place], p_costs[v_row.place:v_row.place],
                    p_usages[(v_row.place - 1) * v_width + 1:v_row.place * v_width], p_marks[v_row.place:v_row.place], p_leases[v_row.place:v_row.place],
                    array[p_flags[v_row.place] | 32], p_providers[v_row.place:v_row.place], p_models[v_row.place:v_row.place],
                    p_price_version_ids[v_row.place:v_row.place], p_provider_key_ids[v_row.place:v_row.place],
                    p_conversation_ids[v_row.place:v_row.place], p_used_at[v_row.place:v_row.place], p_keys[v_row.place:v_row.place],
                    p_body_hashes[v_row.place:v_row.place], p_at) v;
            end loop;
            return;
        end if;
        -- Resolve: which chain and leg each request goes by; chains that are missing or stale are built, then once more.
        for v_try in 1..2 loop
            select array_agg(r.chain_id order by r.place), array_agg(r.leg order by r.place), array_agg(r.outcome order by r.place),
                   array_agg(r.detail order by r.place), array_agg(r.held order by r.place),
                   array_agg(r.place order by r.place) filter (where r.is_slow), bool_or(r.is_stale),
                   bool_or(r.action in (3, 4)), bool_or(r.action in (1, 2, 5)), bool_or(r.is_bent)
            into v_chains, v_legs, v_outcomes, v_details, v_held, v_slow, v_stale, v_settles, v_demands, v_bent
            from (
                select w.place::int, w.action,
                    case when h.chain_id is not null then h.chain_id else c.chain_id end as chain_id,
                    case when h.chain_id is not null then h.leg
                         when cardinality(c.leg_filters) = 1 and c.leg_filters[1] is null then 1::smallint
                         else credits.first_leg(c.leg_filters, w.model) end as leg,
                    case when v.is_valid is not true then 6
                         when g.organization_id is null or (w.action = 5 and h.chain_id is not null) then 6
                         when w.action = 1 and h.chain_id is not null then 3
                         when w.action in (2, 4) and h.chain_id is null then 4
                         when w.action in (3, 4) and w.flags & 64 = 64 and (h.chain_id is null or h.lease_expires_at > v_now) then 4
                         when w.action in (1, 5) and c.refusal is not null and not (c.refusal = 'no_pool' and w.flags & 2 = 2) then 6
                         when s.is_guess_under_strict then 10  -- told as 8
                         else -1 end::smallint as outcome,
                    case when v.is_valid is not true or (w.action = 5 and h.chain_id is not null) then 'request_invalid'
                         when g.organization_id is null then 'organization_unknown'
                         when w.action in (1, 5) and h.chain_id is null and c.refusal is not null and not (c.refusal = 'no_pool' and w.flags & 2 = 2)
                             then c.refusal
                         when s.is_guess_under_strict and h.chain_id is null then 'strict' end as detail,
                    coalesce(h.amount_micros, 0) as held,
                    v.is_valid and g.organization_id is not null and (w.flags & 64 = 0 or h.lease_expires_at <= v_now) and (
                        (w.action = 3 and (h.chain_id is null or h.leg_micros is not null or (w.amount > h.amount_micros
                            and (select cardinality(hc.leg_filters) > 1 from chains hc where hc.organization_id = h.organization_id and hc.chain_id = h.chain_id))))
                        or (w.action = 4 and h.leg_micros is not null)) as is_slow,
                    w.action in (1, 5) and h.chain_id is null and g.organization_id is not null
                        and (c.chain_id is null or c.limits_version <> g.limits_version or c.valid_until <= v_now) as is_stale,
                    (h.chain_id is not null and w.action <> 1 and (h.model is distinct from w.model or (h.flags & 2) <> (w.flags & 2)))
                        or (w.flags & 2 = 2 and w.amount > 0) or (w.action = 2 and w.flags & 2048 = 2048) as is_bent
                from unnest(p_organization_ids, p_actions, p_request_ids, p_user_ids, p_api_key_ids, p_amounts, p_tokens, p_costs, p_marks, p_leases,
                        p_flags, p_models, p_keys, p_body_hashes)
                    with ordinality as w(org, action, request_id, user_id, api_key_id, amount, tokens, cost, mark, lease, flags, model, key, body_hash, place)
                cross join lateral (select w.request_id is not null and w.action between 1 and 5 and w.flags >= 0
                    and w.amount between 0 and v_most and w.tokens between 0 and v_most and w.cost between 0 and v_most and w.mark between 0 and v_most
                    and (w.action > 2 or w.lease > 0)
                    and (w.key is null or (w.body_hash is not null and length(w.key) between 1 and 255)) as is_valid) v
                left join gates g on g.organization_id = w.org
                left join holds h on h.organization_id = w.org and h.request_id = w.request_id
                left join chains c on w.action in (1, 5) and c.organization_id = w.org and c.user_id = coalesce(w.user_id, v_zero)
                    and c.api_key_id = coalesce(w.api_key_id, v_zero) and c.replaced_at is null
                cross join lateral (select case when w.action = 1 and w.flags & 512 = 512 and c.is_strict
                    then credits.is_strict_for(c, w.model, w.flags & 2 = 2) else false end as is_guess_under_strict) s
            ) r;
            exit when not v_stale;
            assert v_try = 1, 'a chain was stale right after it was built';
            for v_row in
                select distinct w.org, coalesce(w.user_id, v_zero) as user_id, coalesce(w.api_key_id, v_zero) as api_key_id
                from unnest(p_organization_ids, p_actions, p_request_ids, p_user_ids, p_api_key_ids) w(org, action, request_id, user_id, api_key_id)
                join gates g on g.organization_id = w.org
                left join holds h on h.organization_id = w.org and h.request_id = w.request_id
                left join chains c on c.organization_id = w.org and c.user_id = coalesce(w.user_id, v_zero)
                    and c.api_key_id = coalesce(w.api_key_id, v_zero) and c.replaced_at is null
                where w.action in (1, 5) and h.request_id is null
                  and (c.chain_id is null or c.limits_version <> g.limits_version or c.valid_until <= v_now)
                order by 1, 2, 3
            loop
                perform credits.build_chain(v_row.org, v_row.user_id, v_row.api_key_id, v_now);
            end loop;
        end loop;
        if v_bent then
            -- A request goes on as it was held: on its model, and at no charge where the customer's own key pays. Of what an extension wants
            -- held in all, only what is not held yet is asked for.
            select array_agg(case when t.is_own then 0 when not t.is_total then w.amount
                                  when w.amount > h.amount_micros then w.amount - h.amount_micros else 0 end order by w.place),
                array_agg(case when not t.is_total then w.tokens when w.tokens > h.tokens then w.tokens - h.tokens else 0 end order by w.place),
                array_agg(case when not t.is_total then w.cost when w.cost > h.cost_nano_usd then w.cost - h.cost_nano_usd else 0 end order by w.place),
                array_agg((w.flags & ~2) | case when t.is_own then 2 else 0 end order by w.place),
                array_agg(case when h.chain_id is null or w.action = 1 then w.model else h.model end order by w.place)
            into p_amounts, p_tokens, p_costs, p_flags, p_models
            from unnest(p_organization_ids, p_actions, p_request_ids, p_amounts, p_tokens, p_costs, p_flags, p_models) with ordinality
                w(org, action, request_id, amount, tokens, cost, flags, model, place)
            left join holds h on h.organization_id = w.org and h.request_id = w.request_id
            cross join lateral (select case when h.chain_id is null or w.action = 1 then w.flags else h.flags end & 2 = 2 as is_own,
                w.action = 2 and w.flags & 2048 = 2048 and h.chain_id is not null as is_total) t;
            v_charged := p_amounts;
        end if;
        if 'request_invalid' = any (v_details) then  -- refused already: its numbers must not reach any sum
            for v_row in select place::int from unnest(v_details) with ordinality u(detail, place) where detail = 'request_invalid' loop
                p_amounts[v_row.place] := 0;
                p_tokens[v_row.place] := 0;
            end loop;
            v_charged := p_amounts;
        end if;

        -- (5) known keys answer with their stored result; a twin in this very batch gets its elder's
        if array_remove(p_keys, null) <> '{}' then
            for v_row in
                select w.place, k.outcome, k.body_hash = w.body_hash as same,
                       first_value(w.place) over twins as elder, first_value(w.body_hash) over twins = w.body_hash as same_as_elder
                from unnest(p_organization_ids, p_keys, p_body_hashes, p_actions) with ordinality w(org, key, body_hash, action, place)
                left join commands k on k.organization_id = w.org and k.idempotency_key = w.key and k.kept_until > v_now
                    and not credits.came_to_nothing(k)
                where w.key is not null and w.action <> 4 and v_details[w.place] is distinct from 'request_invalid'
                window twins as (partition by w.org, w.key order by w.place)
                order by w.place
            loop
                if v_row.outcome is not null then
                    v_outcomes[v_row.place] := case when not v_row.same then 5 when (v_row.outcome ->> 'outcome')::int in (1, 6) then 7 else 3 end;
                    v_details[v_row.place] := v_row.outcome ->> 'detail';
                    v_bindings[v_row.place] := (v_row.outcome ->> 'binding_id')::uuid;
                    v_held[v_row.place] := coalesce((v_row.outcome ->> 'held_micros')::bigint, 0);
                    v_charged[v_row.place] := coalesce((v_row.outcome ->> 'charged_micros')::bigint, 0);
                    p_request_ids[v_row.place] := (v_row.outcome ->> 'request_id')::uuid;
                elsif v_row.elder <> v_row.place then
                    v_outcomes[v_row.place] := case when v_row.same_as_elder then 8 else 5 end;  -- 8: copied from the elder at the end
                    v_legs[v_row.place] := v_row.elder;
                end if;
            end loop;
            v_slow := array(select s from unnest(v_slow) s where v_outcomes[s] = -1);
        end if;
        -- A deduction or hold repeated after an unknown answer may have been booked the first time.
        if exists (select 1 from unnest(p_actions, p_flags) r(action, flags) where r.action in (1, 5) and r.flags & 32 = 32) then
            for v_row in
                select w.place, a.charged from unnest(p_organization_ids, p_request_ids, p_actions, p_flags) with ordinality w(org, request_id, action, flags, place)
                cross join lateral (select sum(charged_micros)::bigint as charged, count(*) as rows from ledger.attribution
                                    where organization_id = w.org and request_id = w.request_id) a
                where w.action in (1, 5) and w.flags & 32 = 32 and a.rows > 0
                  and (v_outcomes[w.place] = -1 or (v_outcomes[w.place] = 6 and v_details[w.place] <> 'request_invalid'))
            loop
                v_outcomes[v_row.place] := 3;
                v_details[v_row.place] := null;
                v_charged[v_row.place] := v_row.charged;
            end loop;
        end if;

        -- (4) settles and releases
        if v_settles then
            if v_slow is not null then
                for v_row in
                    select s.place from unnest(v_slow) s(place) order by 1
                loop
                    select * into v_booked from credits.book_split(
                        p_organization_ids[v_row.place], p_request_ids[v_row.place], p_actions[v_row.place] = 4,
                        coalesce(p_user_ids[v_row.place], v_zero), coalesce(p_api_key_ids[v_row.place], v_zero), p_amounts[v_row.place],
                        p_tokens[v_row.place], p_flags[v_row.place],
                        credits.attribution_of(p_usages[(v_row.place - 1) * v_width + 1:v_row.place * v_width], p_costs[v_row.place], p_flags[v_row.place],
                            p_providers[v_row.place], p_models[v_row.place], p_price_version_ids[v_row.place], p_provider_key_ids[v_row.place],
                            p_conversation_ids[v_row.place], p_used_at[v_row.place]),
                        v_now);
                    v_outcomes[v_row.place] := case when v_booked.outcome = 0 then 9 else v_booked.outcome end;  -- 9: accepted, booked already
                    v_charged[v_row.place] := v_booked.charged_micros;
                    v_held[v_row.place] := v_booked.held_micros;
                    if v_booked.outcome = 6 then
                        v_details[v_row.place] := 'no_pool';
                    end if;
                end loop;
            end if;
            with gone as (
                delete from holds h
                using unnest(p_organization_ids, p_request_ids, p_actions, p_amounts, p_tokens, v_outcomes, p_flags) with ordinality
                    w(org, request_id, action, amount, tokens, outcome, flags, place)
                where w.action in (3, 4) and w.outcome = -1 and h.organization_id = w.org and h.request_id = w.request_id
                returning w.place::int, h.organization_id as org, h.chain_id, h.leg, h.model, h.flags | w.flags as flags, h.amount_micros, h.tokens as held_tokens,
                    case w.action when 3 then w.amount else 0 end as charged, case w.action when 3 then w.tokens else 0 end as tokens,
                    case w.action when 3 then 1 else 0 end as calls
            ), deltas as materialized (
                select g.org, e.id, e.start,
                    sum(case e.metric when 0 then g.charged when 1 then g.calls else g.tokens end)::bigint as used,
                    sum(case e.metric when 0 then g.amount_micros when 1 then 1 else g.held_tokens end)::bigint as held
                from gone g join chains c on c.organization_id = g.org and c.chain_id = g.chain_id
                cross join lateral unnest(c.entry_ids, c.entry_starts, c.entry_metrics, c.entry_legs, c.entry_filters) e(id, start, metric, leg, filter)
                where (e.leg = 0 or e.leg = g.leg) and (e.filter is null or g.model like e.filter) and not (e.metric = 0 and g.flags & 2 = 2)
                group by 1, 2, 3
            ), moved as (
                update balances b set used_amount = used_amount + d.used, held_amount = held_amount - d.held,
                    excess_amount = greatest(0, used_amount + d.used + held_amount - d.held - limit_amount)
                from deltas d where b.organization_id = d.org and b.balance_id = d.id and b.period_start = d.start
                returning b.organization_id as org, b.balance_id as id, b.kind = 'allocation'
                    and (b.excess_amount > 0 or b.used_amount - d.used + b.held_amount + d.held > b.limit_amount) as is_over
            )
            select array_agg(org), array_agg(id) into v_over_orgs, v_over_ids from moved where is_over;
            if v_over_ids is not null then
                perform credits.reopen_parts(v_over_orgs, v_over_ids);
            end if;
            if v_lingering then
                -- What a released hold kept of an expired grant must be gone before anybody else is authorized.
                for v_row in select distinct o from unnest(p_organization_ids) o order by 1 loop
                    perform credits.fold_due_pools(v_row.o, v_now);
                end loop;
            end if;
        end if;

        -- (6) one guarded update of all summed demands: what does not come back is tight
        v_positions := null;
        v_rooms := null;
        v_hopeless := null;
        if v_demands then
            select t.rooms, t.tight_orgs, t.tight_ids, t.tight_starts into v_rooms, v_tight_orgs, v_tight_ids, v_tight_starts
            from credits.take(p_organization_ids, p_actions, p_request_ids, p_user_ids, p_api_key_ids, p_amounts, p_tokens, p_flags, p_models,
                v_chains, v_legs, v_outcomes, v_gates, v_versions, v_now) t;
            -- No leg may pay for the model: nothing was asked of any pool.
            for v_row in select place from unnest(p_actions, v_outcomes, v_legs, p_flags) with ordinality u(action, outcome, leg, flags, place)
                         where action in (1, 5) and outcome = -1 and leg = 0 and flags & 2 = 0 loop
                v_details[v_row.place] := 'no_pool_for_model';
            end loop;
        end if;
    end if;

    -- (7) only the requests that touch a tight balance are decided one by one
    if v_tight_ids is null and v_hopeless is not null then
        for v_row in select * from credits.refuse(p_organization_ids, p_amounts, p_flags, v_chains, v_hopeless) loop
            v_outcomes[v_row.place] := v_row.outcome;
            v_details[v_row.place] := v_row.detail;
            v_bindings[v_row.place] := v_row.binding_id;
            v_rooms[v_row.place] := v_row.available;
        end loop;
    elsif v_tight_ids is not null or 'no_pool_for_model' = any (v_details) then
        select t.outcomes, t.details, t.bindings, t.legs, t.split_places, t.split_legs, t.split_micros
        into v_outcomes, v_details, v_bindings, v_legs, v_split_places, v_split_legs, v_split_micros
        from credits.decide_tight(p_organization_ids, p_actions, p_amounts, p_tokens, p_flags, p_models, v_chains, v_legs, v_outcomes,
            v_details, v_bindings, coalesce(v_tight_orgs, '{}'), coalesce(v_tight_ids, '{}'), coalesce(v_tight_starts, '{}'),
            coalesce(v_hopeless, '{}'), v_now) t;
        v_positions := null;  -- measured before the refusals were taken back
        v_rooms := null;
    end if;

    if 1 = any (v_outcomes) and exists (select from unnest(p_flags) f where f & 1024 = 1024) then
        v_outcomes := array(select case when u.action = 1 and u.outcome = 1 and u.flags & 1024 = 1024 then 10 else u.outcome end
            from unnest(p_actions, v_outcomes, p_flags) with ordinality u(action, outcome, flags, place) order by u.place);
    end if;

    -- (8) what was decided, in one insert each
    perform credits.post_batch(p_organization_ids, p_actions, p_request_ids, p_amounts, p_tokens, p_costs, p_usages, p_marks, p_leases, p_flags,
        p_providers, p_models, p_price_version_ids, p_provider_key_ids, p_conversation_ids, p_used_at, p_keys, p_body_hashes,
        v_chains, v_legs, v_outcomes, v_details, v_bindings, v_held, v_charged, p_user_ids, p_api_key_ids,
        v_split_places, v_split_legs, v_split_micros, v_teams, v_departments, v_department_names, v_pools, v_positions, v_now);

    if 8 = any (v_outcomes) then
        for v_row in select place::int, elder from unnest(v_outcomes, v_legs) with ordinality u(outcome, elder, place) where outcome = 8 order by place loop
            v_held[v_row.place] := v_held[v_row.elder] + case when v_outcomes[v_row.elder] = -1 then p_amounts[v_row.elder] else 0 end;
            v_outcomes[v_row.place] := case when v_outcomes[v_row.elder] in (-1, 9) then 3 when v_outcomes[v_row.elder] in (1, 6) then 7
                else v_outcomes[v_row.elder] end;
            p_request_ids[v_row.place] := p_request_ids[v_row.elder];
            v_charged[v_row.place] := v_charged[v_row.elder];
            v_chains[v_row.place] := v_chains[v_row.elder];
            v_bindings[v_row.place] := v_bindings[v_row.elder];
            v_details[v_row.place] := v_details[v_row.elder];
        end loop;
    end if;
    if v_rooms is null then
        v_rooms := credits.rooms_of(p_organization_ids, v_chains, p_models);
    elsif array_position(v_rooms, null) is not null then
        v_rooms := array(select coalesce(u.room, u.other) from (
            select unnest(v_rooms) as room, unnest(credits.rooms_of(p_organization_ids, array(select case when r is null then c end
                from (select unnest(v_rooms) as r, unnest(v_chains) as c) m), p_models)) as other) u);
    end if;
    return query
    select w.place, case when w.outcome in (-1, 9) then 0 when w.outcome = 10 then 8 else w.outcome end::smallint, w.request_id,
        case when w.action in (1, 2) and w.outcome = -1 then w.held + w.amount when w.action in (1, 2) and w.outcome = 3 then w.held else 0 end,
        case when w.action in (3, 5) and w.outcome in (-1, 9, 3) then w.charged else 0 end,
        w.room, w.binding_id, w.detail
    from (
        select generate_series(1, v_n) as place, unnest(p_actions) as action, unnest(v_outcomes) as outcome, unnest(p_request_ids) as request_id,
            unnest(v_held) as held, unnest(p_amounts) as amount, unnest(v_charged) as charged, unnest(v_rooms) as room,
            unnest(v_bindings) as binding_id, unnest(v_details) as detail
    ) w;
end $$;
comment on function credits.move_batch is 'Decides a batch of settles, releases, authorizes, extends and deductions; one verdict a request';

-- ------------------------------------------------------------------------------------------------ expiry, and a batch of one

-- expire_holds: end at most p_most holds whose lease is over: a placed one is released; a sent one is charged, marked estimated, at its
-- last progress if it streamed and at its estimate if it did not. Returns how many ended. Run until it returns 0.
create or replace function credits.expire_holds(p_most integer default 500, p_at timestamptz default null) returns integer
language plpgsql volatile security definer set search_path = credits, pg_temp as $$
declare
    v_count integer;
    v_organizations uuid[];
begin
    -- The gates come first here too: between reading a hold's progress and charging it nothing may change.
    select array_agg(distinct o.organization_id) into v_organizations
    from (select organization_id from holds where lease_expires_at <= coalesce(p_at, clock_timestamp()) order by lease_expires_at, request_id limit p_most) o;
    perform 1 from gates where organization_id = any (v_organizations) order by organization_id for no key update;
    select count(*) filter (where v.outcome = 0) into v_count
    from (
        select array_agg(h.organization_id order by h.lease_expires_at, h.request_id) as orgs,
            array_agg(case when h.is_sent then 3 else 4 end::smallint order by h.lease_expires_at, h.request_id) as actions,
            array_agg(h.request_id order by h.lease_expires_at, h.request_id) as requests,
            array_agg(c.user_id order by h.lease_expires_at, h.request_id) as users,
            array_agg(c.api_key_id order by h.lease_expires_at, h.request_id) as keys,
            array_agg(h.charge order by h.lease_expires_at, h.request_id) as amounts,
            array_agg(h.tokens order by h.lease_expires_at, h.request_id) as tokens,
            array_agg(case when h.amount_micros = 0 then h.cost_nano_usd
                           else round(h.cost_nano_usd::numeric * h.charge / h.amount_micros)::bigint end order by h.lease_expires_at, h.request_id) as costs,
            array_agg(68 | h.flags order by h.lease_expires_at, h.request_id) as flags,
            array_agg(h.provider order by h.lease_expires_at, h.request_id) as providers,
            array_agg(h.model order by h.lease_expires_at, h.request_id) as models,
            array_agg(h.price_version_id order by h.lease_expires_at, h.request_id) as prices,
            array_agg(h.provider_key_id order by h.lease_expires_at, h.request_id) as provider_keys,
            array_agg(h.conversation_id order by h.lease_expires_at, h.request_id) as conversations,
            count(*)::int as n
        from (
            select *, case when not is_sent then 0 when flags & 8 = 8 then greatest(floor_micros, progress_micros) else amount_micros end as charge
            from holds where organization_id = any (v_organizations) and lease_expires_at <= coalesce(p_at, clock_timestamp())
            order by lease_expires_at, request_id limit p_most
        ) h join chains c on c.organization_id = h.organization_id and c.chain_id = h.chain_id
        having count(*) > 0
    ) b
    cross join lateral credits.move_batch(b.orgs[1], b.orgs, b.actions, b.requests, b.users, b.keys, b.amounts, b.tokens, b.costs,
        array(select u.count from generate_series(1, b.n) i, unnest(credits.no_usage()) with ordinality u(count, place) order by i, u.place),
        array_fill(0::bigint, array[b.n]), array_fill(0, array[b.n]), b.flags, b.providers, b.models, b.prices,
        b.provider_keys, b.conversations, array_fill(null::timestamptz, array[b.n]), array_fill(null::text, array[b.n]),
        array_fill(null::bytea, array[b.n]), p_at) v;
    return v_count;
end $$;
comment on function credits.expire_holds is 'Ends holds whose lease is over: releases what was never sent, charges what was; returns how many';

-- move_one: a batch of one, for whoever acts for the organization that is set. One alone spends most of its time on what batches share, so a
-- hold or deduction on a plain chain, which asks credits of a few balances and nothing else, is decided here by the same rules (is_plain_way,
-- has_room) without arrays; and whatever is not plain, or lacks room, by move_batch.
create or replace function credits.move_one(
    p_organization_id uuid, p_action smallint, p_request_id uuid, p_user_id uuid, p_api_key_id uuid, p_amount bigint, p_tokens bigint,
    p_cost bigint, p_usage integer[], p_mark bigint, p_lease integer, p_flags integer, p_provider text, p_model text, p_price_version_id uuid,
    p_provider_key_id uuid, p_conversation_id uuid, p_used_at timestamptz, p_key text, p_body_hash bytea, p_at timestamptz default null
) returns credits.verdict
language plpgsql volatile security definer
set search_path = credits, pg_temp set plan_cache_mode = force_generic_plan set enable_seqscan = off set enable_hashjoin = off
set enable_mergejoin = off set enable_material = off set jit = off
as $$
#variable_conflict use_column
declare
    v_zero constant uuid := '00000000-0000-0000-0000-000000000000';
    v_verdict credits.verdict;
    v_due timestamptz;
    v_version bigint;
    v_now timestamptz;
    v_used bigint;
    v_took record;
begin
    if session_user <> 'bursar_lane' then
        perform credits.require_tenant(p_organization_id);
    end if;
    if p_action in (1, 5) and p_key is null and p_flags >= 0 and p_request_id is not null and least(p_amount, p_tokens, p_cost, p_mark) >= 0
       and greatest(p_amount, p_tokens, p_cost, p_mark) <= credits.most_micros() and (p_action = 5 or p_lease > 0)
       and cardinality(p_usage) = credits.usage_width() and 0 <= all (p_usage) then
        select next_event_at, limits_version into v_due, v_version from gates where organization_id = p_organization_id for no key update;
        v_now := case when p_at is null then clock_timestamp() else credits.now_under_gate(p_at) end;
        if v_due > v_now then
            v_used := case p_action when 5 then p_amount else 0 end;
            with c as materialized (
                select c.organization_id as org, c.chain_id, c.team_id, c.department_id, c.department_name, c.leg_pool_ids[1] as pool_id,
                    c.entry_ids, c.entry_starts, cardinality(c.entry_ids) as entries
                from chains c
                where c.organization_id = p_organization_id and c.user_id = coalesce(p_user_id, v_zero)
                  and c.api_key_id = coalesce(p_api_key_id, v_zero) and c.replaced_at is null
                  and c.is_plain and c.tight_id is null
                  and credits.is_plain_way(p_flags, c.refusal, c.is_strict, c.valid_until, c.limits_version, v_version, v_now)
                  and not exists (select from holds h where h.organization_id = p_organization_id and h.request_id = p_request_id)
            ), moved as (
                update balances b set held_amount = held_amount + p_amount - v_used, used_amount = used_amount + v_used,
                    excess_amount = case when b.stops then 0 else greatest(0, used_amount + held_amount + p_amount - limit_amount) end
                from (select c.org, unnest(c.entry_ids) as id, unnest(c.entry_starts) as start from c) s
                where b.organization_id = s.org and b.balance_id = s.id and b.period_start = s.start
                  and credits.has_room(b.stops, b.used_amount, b.held_amount, b.limit_amount, p_amount)
                returning b.balance_id, b.period_start, case when b.stops then b.limit_amount - b.used_amount - b.held_amount end as room,
                    case when b.kind = 'pool' then b.used_amount - v_used end as base
            ), m as (
                select array_agg(balance_id) as ids, array_agg(period_start) as starts, min(room) as room, max(base) as base, count(*) as n from moved
            )
            select * into v_took from c, m;
            if v_took.n = v_took.entries then
                if p_action = 5 then
                    insert into ledger.attribution (organization_id, request_id, booked_at, used_at, kind, user_id, api_key_id, provider_key_id,
                        provider, model, team_id, department_id, department_name, conversation_id, chain_id, price_version_id, pool_id,
                        position_micros, charged_micros, hold_micros, provider_cost_nano_usd, customer_cost_nano_usd, flags, input_tokens,
                        cache_read_tokens, cache_write_5m_tokens, cache_write_1h_tokens, output_tokens, reasoning_tokens, audio_input_tokens,
                        audio_output_tokens, image_input_tokens, image_output_tokens, images, web_searches, audio_milliseconds, characters,
                        requests, file_searches, code_sessions)
                    values (p_organization_id, p_request_id, v_now, coalesce(p_used_at, v_now), 0, nullif(p_user_id, v_zero),
                        nullif(p_api_key_id, v_zero), p_provider_key_id, p_provider, p_model, v_took.team_id, v_took.department_id,
                        v_took.department_name, p_conversation_id, v_took.chain_id, p_price_version_id, v_took.pool_id, v_took.base, p_amount, 0,
                        p_cost, 0, p_flags & ~49, p_usage[1], p_usage[2], p_usage[3], p_usage[4], p_usage[5], p_usage[6], p_usage[7], p_usage[8],
                        p_usage[9], p_usage[10], p_usage[11], p_usage[12], p_usage[13], p_usage[14], p_usage[15], p_usage[16], p_usage[17]);
                else
                    perform credits.post_batch(array[p_organization_id], array[p_action], array[p_request_id], array[p_amount], array[p_tokens],
                        array[p_cost], p_usage, array[p_mark], array[p_lease], array[p_flags], array[p_provider], array[p_model],
                        array[p_price_version_id], array[p_provider_key_id], array[p_conversation_id], null, null, null, array[v_took.chain_id],
                        array[1::smallint], array[-1::smallint], null, null, null, null, null, null, null, null, null, null, null, null, null, null,
                        v_now);
                end if;
                return row(1, 0::smallint, p_request_id, p_amount - v_used, v_used, v_took.room, null::uuid, null::text)::credits.verdict;
            elsif v_took.n > 0 then  -- somewhere there is no room: nothing was asked yet, and move_batch finds out who refuses
                update balances b set held_amount = held_amount - p_amount + v_used, used_amount = used_amount - v_used,
                    excess_amount = greatest(0, used_amount + held_amount - p_amount - limit_amount)
                from unnest(v_took.ids, v_took.starts) s(id, start)
                where b.organization_id = p_organization_id and b.balance_id = s.id and b.period_start = s.start;
            end if;
        end if;
    end if;
    select * into strict v_verdict from credits.move_batch(p_organization_id, array[p_organization_id], array[p_action], array[p_request_id],
        array[p_user_id], array[p_api_key_id], array[p_amount], array[p_tokens], array[p_cost], p_usage, array[p_mark], array[p_lease], array[p_flags],
        array[p_provider], array[p_model], array[p_price_version_id], array[p_provider_key_id], array[p_conversation_id], array[p_used_at],
        array[p_key], array[p_body_hash], p_at);
    return v_verdict;
end $$;
comment on function credits.move_one is 'A batch of one for the organization that is set';

create or replace function credits.no_usage() returns integer[]
language sql immutable set search_path = pg_catalog, pg_temp as $$ select array[0,0,0,0,0,0,0,0,0,0,0,0,0,0,1,0,0] $$;
comment on function credits.no_usage is 'Usage of a request of which only the amount is known';

-- authorize, extend, settle, release: by name, for SQL callers; the gateway batches.
create or replace function credits.authorize(
    p_organization_id uuid, p_request_id uuid, p_user_id uuid, p_api_key_id uuid, p_amount_micros bigint, p_model text,
    p_lease_seconds integer default 600, p_idempotency_key text default null, p_at timestamptz default null
) returns credits.verdict
language sql volatile security definer set search_path = credits, pg_temp as $$
    select credits.move_one(p_organization_id, 1::smallint, p_request_id, p_user_id, p_api_key_id, p_amount_micros, 0, 0, credits.no_usage(), 0,
        p_lease_seconds, 32, null, p_model, null, null, null, null, p_idempotency_key,
        credits.hash_of('authorize', p_user_id::text, p_api_key_id::text, p_amount_micros::text, p_model), p_at);
$$;
comment on function credits.authorize is 'Holds credits for one request';

create or replace function credits.extend(
    p_organization_id uuid, p_request_id uuid, p_more_micros bigint, p_progress_micros bigint, p_lease_seconds integer default 600,
    p_at timestamptz default null
) returns credits.verdict
language sql volatile security definer set search_path = credits, pg_temp as $$
    select credits.move_one(p_organization_id, 2::smallint, p_request_id, null, null, p_more_micros, 0, 0, credits.no_usage(), p_progress_micros,
        p_lease_seconds, 1, null, null, null, null, null, null, null, null, p_at);
$$;
comment on function credits.extend is 'Holds more for a running request, marks its progress and renews its lease';

create or replace function credits.settle(
    p_organization_id uuid, p_request_id uuid, p_user_id uuid, p_api_key_id uuid, p_charged_micros bigint, p_model text,
    p_provider_cost_nano_usd bigint default 0, p_at timestamptz default null
) returns credits.verdict
language sql volatile security definer set search_path = credits, pg_temp as $$
    select credits.move_one(p_organization_id, 3::smallint, p_request_id, p_user_id, p_api_key_id, p_charged_micros, 0, p_provider_cost_nano_usd,
        credits.no_usage(), 0, 0, 0, null, p_model, null, null, null, null, null, null, p_at);
$$;
comment on function credits.settle is 'Charges a request its true cost and frees the rest of its hold';

create or replace function credits.release(p_organization_id uuid, p_request_id uuid, p_at timestamptz default null) returns credits.verdict
language sql volatile security definer set search_path = credits, pg_temp as $$
    select credits.move_one(p_organization_id, 4::smallint, p_request_id, null, null, 0, 0, 0, credits.no_usage(), 0, 0, 0, null, null, null, null,
        null, null, null, null, p_at);
$$;
comment on function credits.release is 'Frees a hold and charges nothing';

create or replace function credits.deduct(
    p_organization_id uuid, p_request_id uuid, p_user_id uuid, p_api_key_id uuid, p_charged_micros bigint, p_model text,
    p_idempotency_key text default null, p_at timestamptz default null
) returns credits.verdict
language sql volatile security definer set search_path = credits, pg_temp as $$
    select credits.move_one(p_organization_id, 5::smallint, p_request_id, p_user_id, p_api_key_id, p_charged_micros, 0, 0, credits.no_usage(), 0, 0, 32,
        null, p_model, null, null, null, null, p_idempotency_key,
        credits.hash_of('deduct', p_user_id::text, p_api_key_id::text, p_charged_micros::text, p_model), p_at);
$$;
comment on function credits.deduct is 'Authorize and settle in one: charges now or refuses';

-- ------------------------------------------------------------------------------------------------ the four functions of the billing relations

-- current_chain: what a user and key must pass as of now, built when it is missing or stale.
create or replace function credits.current_chain(p_organization_id uuid, p_user_id uuid, p_api_key_id uuid) returns uuid
language plpgsql volatile security definer set search_path = credits, pg_temp as $$
declare
    v_zero constant uuid := '00000000-0000-0000-0000-000000000000';
    v_now timestamptz := credits.lock_gate(p_organization_id, null);
begin
    return credits.chain_of(p_organization_id, coalesce(p_user_id, v_zero), coalesce(p_api_key_id, v_zero), v_now);
end $$;
comment on function credits.current_chain is 'The chain of a user and key as of now; asks, moves nothing';

create or replace function credits.has_sufficient_credits(p_organization_id uuid, p_user_id uuid, p_amount_micros bigint) returns boolean
language plpgsql volatile security definer set search_path = credits, pg_temp as $$
declare
    v_chain_id uuid := credits.current_chain(p_organization_id, p_user_id, null);
    v_chain chains;
begin
    select * into strict v_chain from chains where organization_id = p_organization_id and chain_id = v_chain_id;
    return v_chain.refusal is null and coalesce(credits.available_of(p_organization_id, v_chain.chain_id, ''), 0) >= p_amount_micros;
end $$;
comment on function credits.has_sufficient_credits is 'True when the user could spend this many micros now; asks, moves nothing';

create or replace function credits.deduct_credits(
    p_organization_id uuid, p_user_id uuid, p_amount_micros bigint, p_model text, p_idempotency_key text
) returns credits.verdict
language sql volatile security definer set search_path = credits, pg_temp as $$
    select credits.deduct(p_organization_id, gen_random_uuid(), p_user_id, null, p_amount_micros, p_model, p_idempotency_key);
$$;
comment on function credits.deduct_credits is 'Charges a user''s organization now, or refuses; thin wrapper of deduct';

create or replace function credits.add_credits_to_pool(
    p_organization_id uuid, p_pool_id uuid, p_amount_micros bigint, p_source text, p_idempotency_key text
) returns uuid
language sql volatile security definer set search_path = credits, pg_temp as $$
    select credits.add_grant(p_organization_id, gen_random_uuid(), p_pool_id, p_source, p_amount_micros, 100::smallint, false, 0, null, null, null,
        null, p_idempotency_key);
$$;
comment on function credits.add_credits_to_pool is 'Adds credits that never expire; thin wrapper of add_grant';

create or replace function credits.allocate_credits_to_user(
    p_organization_id uuid, p_user_id uuid, p_amount_micros bigint, p_idempotency_key text
) returns uuid
language sql volatile security definer set search_path = credits, pg_temp as $$
    select credits.allocate(p_organization_id, gen_random_uuid(),
        (select pool_id from pools where organization_id = p_organization_id and kind = 'shared' and model_filter is null and closed_at is null),
        p_user_id, 'reserved', 'none', p_amount_micros, 'stops', false, null, p_idempotency_key);
$$;
comment on function credits.allocate_credits_to_user is 'Reserves a share of the shared pool for a user; thin wrapper of allocate';

-- ------------------------------------------------------------------------------------------------ who may call what

revoke all on all functions in schema credits from public;
grant execute on function credits.move_batch, credits.move_one, credits.expire_holds to bursar_lane, bursar_simulator;
grant execute on function credits.open_organization, credits.open_pool, credits.add_grant, credits.void_grant, credits.allocate,
    credits.end_allocation, credits.set_limit, credits.end_limit, credits.move_one, credits.authorize, credits.extend, credits.settle,
    credits.release, credits.deduct, credits.current_chain, credits.has_sufficient_credits, credits.deduct_credits, credits.add_credits_to_pool,
    credits.allocate_credits_to_user to bursar_app, bursar_simulator;
grant execute on function credits.limits_changed to bursar_app, bursar_owner, bursar_simulator;
grant execute on function credits.available_of, credits.period_start, credits.period_end, credits.hash_of, credits.no_usage to bursar_app, bursar_platform;
