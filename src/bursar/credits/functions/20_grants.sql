-- Grants: burn order, expiry, start, and the pools that hold them.

-- set_pool_limit: move a pool's limit by a delta; its open part follows: pool less everything reserved. What comes may be owed
-- to a closed pool, or by one (settle_accounts).
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
    if p_delta > 0 then
        with due as (
            update closed_accounts set is_due = true
            where organization_id = p_organization_id and (pool_id = p_pool_id or to_pool_id = p_pool_id and rest_micros < 0) returning pool_id
        )  -- whoever brings credits settles it then (settle_due), or folds their pool, by which the gate awaits it
        update pools set next_event_at = '-infinity' where organization_id = p_organization_id and pool_id in (select pool_id from due);
    end if;
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

-- value_upto: the money paid for the first micros of a grant; what lies between two such sums is the value of a stretch, so that no
-- rounding is ever lost: the last micro has the rest.
create or replace function credits.value_upto(p_basis bigint, p_amount bigint, p_micros bigint) returns bigint
language sql immutable parallel safe set search_path = pg_catalog, pg_temp as $$
    select floor(p_basis::numeric * p_micros / p_amount)::bigint;
$$;
comment on function credits.value_upto is 'Money paid for the first micros of a grant, nano-dollars, rounded down';

-- value_taken: the money that leaves a grant with its next micros. Complimentary credits take none along.
create or replace function credits.value_taken(p_grant credits.grants, p_left bigint, p_value_left bigint, p_take bigint) returns bigint
language sql immutable set search_path = credits, pg_temp as $$
    select case when p_take = 0 then 0 when p_take = p_left then p_value_left
        else least(p_value_left, greatest(0, p_value_left - (p_grant.cost_basis_nano_usd
            - credits.value_upto(p_grant.cost_basis_nano_usd, p_grant.amount_micros, p_grant.amount_micros - p_left + p_take)))) end;
$$;
comment on function credits.value_taken is 'Money that leaves a grant with its next micros, nano-dollars';

-- value_within: the value of the first micros of a stretch that a grant paid.
create or replace function credits.value_within(p_grant credits.grants, p_from bigint, p_length bigint, p_value bigint, p_micros bigint) returns bigint
language sql immutable set search_path = credits, pg_temp as $$
    select case when p_micros >= p_length then p_value else least(p_value,
        credits.value_upto(p_grant.cost_basis_nano_usd, p_grant.amount_micros, p_from + greatest(0, p_micros))
        - credits.value_upto(p_grant.cost_basis_nano_usd, p_grant.amount_micros, p_from)) end;
$$;
comment on function credits.value_within is 'Value of the first micros of a stretch that a grant paid, nano-dollars';

-- burn_reason: why one grant burns before the next in burn order.
create or replace function credits.burn_reason(p_grant credits.grants, p_next credits.grants) returns text
language sql immutable set search_path = credits, pg_temp as $$
    select case when p_next.grant_id is null then 'only'
        when p_grant.priority <> p_next.priority then 'priority'
        when p_grant.expires_at <> p_next.expires_at then 'expiry'
        when p_grant.is_free <> p_next.is_free then 'free_before_paid'
        when p_grant.effective_at <> p_next.effective_at then 'effective'
        when p_grant.created_at <> p_next.created_at then 'created'
        else 'id' end;
$$;
comment on function credits.burn_reason is 'Why a grant burns before the next: priority, expiry, free_before_paid, effective, created, id; only: there is no next';

-- pour: attribute a pool's use since the last pour to its active grants, in burn order; what no grant covers waits for the next one.
create or replace function credits.pour(p_organization_id uuid, p_pool_id uuid, p_at timestamptz) returns void
language plpgsql volatile set search_path = credits, pg_temp as $$
declare
    v_used bigint;
    v_poured bigint;
    v_take bigint;
    v_value bigint;
    v_grant grants;
    v_row record;
begin
    select b.used_amount, p.poured_micros into strict v_used, v_poured
    from pools p join balances b on b.organization_id = p.organization_id and b.balance_id = p.pool_id
    where p.organization_id = p_organization_id and p.pool_id = p_pool_id;
    if v_poured = v_used then
        return;
    end if;

    -- A correction may have taken use back: the last credits burnt return first, to the grants that paid them, with the money they had taken.
    while v_poured > v_used loop
        select * into strict v_row from burns
        where organization_id = p_organization_id and pool_id = p_pool_id and start_micros < v_poured order by start_micros desc limit 1;
        select * into strict v_grant from grants where organization_id = p_organization_id and grant_id = v_row.grant_id;
        v_take := least(v_poured - v_used, v_row.end_micros - v_row.start_micros);
        v_value := v_row.value_nano_usd;
        if v_take = v_row.end_micros - v_row.start_micros then
            delete from burns where organization_id = p_organization_id and pool_id = p_pool_id and start_micros = v_row.start_micros;
        else
            v_value := v_value - credits.value_within(v_grant, v_row.grant_from_micros, v_row.end_micros - v_row.start_micros, v_value,
                v_row.end_micros - v_row.start_micros - v_take);
            update burns set end_micros = end_micros - v_take, value_nano_usd = value_nano_usd - v_value
            where organization_id = p_organization_id and pool_id = p_pool_id and start_micros = v_row.start_micros;
        end if;
        -- What was so until now stays known. A stretch that was poured at this very instant was so at none.
        insert into unburns (organization_id, pool_id, taken_back_at, start_micros, end_micros, grant_id, poured_at)
        select p_organization_id, p_pool_id, p_at, v_row.end_micros - v_take, v_row.end_micros, v_row.grant_id, v_row.poured_at
        where v_row.poured_at < p_at;
        -- A grant that had ended is active again; where it has expired, the fold that follows books what came back as expired.
        update grant_states set left_micros = left_micros + v_take, value_left_nano_usd = value_left_nano_usd + v_value, ended_at = null,
            state = case when state not in ('ended', 'spent') then state when v_grant.expires_at <= p_at then 'lingering' else 'active' end
        where organization_id = p_organization_id and grant_id = v_row.grant_id;
        v_poured := v_poured - v_take;
    end loop;

    for v_row in
        select g as grants, lead(g) over burn_order as next, row_number() over burn_order as nr, s.left_micros, s.value_left_nano_usd
        from grant_states s join grants g on g.organization_id = s.organization_id and g.grant_id = s.grant_id
        where s.organization_id = p_organization_id and s.pool_id = p_pool_id and s.state in ('active', 'lingering') and s.left_micros > 0
        window burn_order as (order by g.priority, g.expires_at, g.is_free desc, g.effective_at, g.created_at, g.grant_id)
        order by nr
    loop
        exit when v_poured >= v_used;
        v_grant := v_row.grants;
        v_take := least(v_row.left_micros, v_used - v_poured);
        v_value := credits.value_taken(v_grant, v_row.left_micros, v_row.value_left_nano_usd, v_take);
        insert into burns (organization_id, pool_id, start_micros, end_micros, grant_id, poured_at, grant_from_micros, value_nano_usd, reason)
        values (p_organization_id, p_pool_id, v_poured, v_poured + v_take, v_grant.grant_id, p_at,
                v_grant.amount_micros - v_row.left_micros, v_value, credits.burn_reason(v_grant, v_row.next));
        -- One that must make up a least roll-over still has its end before it.
        update grant_states set left_micros = left_micros - v_take, value_left_nano_usd = value_left_nano_usd - v_value,
            state = case when left_micros > v_take then state when state = 'active' and v_grant.min_rollover_micros > 0 then 'spent' else 'ended' end,
            ended_at = case when left_micros = v_take and not (state = 'active' and v_grant.min_rollover_micros > 0) then p_at end
        where organization_id = p_organization_id and grant_id = v_grant.grant_id;
        v_poured := v_poured + v_take;
    end loop;
    update pools set poured_micros = v_poured where organization_id = p_organization_id and pool_id = p_pool_id;
end $$;
comment on function credits.pour is 'Pours a pool''s use since the last pour over its active grants in burn order';

-- rolls_over: of what a grant has left at its end, how much goes on.
create or replace function credits.rolls_over(p_grant credits.grants, p_left bigint) returns bigint
language sql immutable set search_path = credits, pg_temp as $$
    select case when p_grant.max_rollover_micros is null then 0
        else least(p_grant.max_rollover_micros, greatest(p_grant.min_rollover_micros, p_left)) end;
$$;
comment on function credits.rolls_over is 'How much of a grant goes on at its end: min(most, max(least, left)); without bounds nothing';

-- end_grant: what a grant has left at its end leaves it: as much as its bounds say rolls over into a grant of its own, the rest expires.
-- p_lapse: what is left now and no hold needs. p_before: what lapsed earlier, when holds that had kept the rest ended; null: this is its end.
-- Returns by how much the pool changes: less what expired, more what makes up a least roll-over.
create or replace function credits.end_grant(
    p_grant credits.grants, p_lapse bigint, p_before bigint, p_left bigint, p_value_left bigint, p_at timestamptz, p_now timestamptz
) returns bigint
language plpgsql volatile set search_path = credits, pg_temp as $$
declare
    v_rolls bigint := credits.rolls_over(p_grant, coalesce(p_before, 0) + p_lapse)
        - case when p_before is null then 0 else credits.rolls_over(p_grant, p_before) end;
    v_kept bigint;
    v_value bigint;
    v_lost_value bigint;
    v_new uuid;
begin
    if p_grant.rollover_expires_at <= p_at then
        v_rolls := 0;
    end if;
    v_kept := least(p_lapse, v_rolls);
    v_value := credits.value_taken(p_grant, p_left, p_value_left, v_kept);
    v_lost_value := credits.value_taken(p_grant, p_left - v_kept, p_value_left - v_value, p_lapse - v_kept);
    if v_rolls > 0 then
        -- Begins as its parent's id does, so that what is alike in all else burns in the parents' order; a grant may roll over several times,
        -- since resets end it before its own end, too.
        v_new := (substr(replace(p_grant.grant_id::text, '-', ''), 1, 16) || substr(md5(p_grant.grant_id::text || ' roll-over ' || (
            select count(*) from grants
            where organization_id = p_grant.organization_id and pool_id = p_grant.pool_id and parent_grant_id = p_grant.grant_id)), 17))::uuid;
        insert into grants (organization_id, grant_id, pool_id, source, amount_micros, priority, is_free, cost_basis_nano_usd, effective_at,
                            expires_at, parent_grant_id, reason, created_at, created_by)
        values (p_grant.organization_id, v_new, p_grant.pool_id, 'roll_over', v_rolls, p_grant.priority, p_grant.is_free, v_value, p_at,
                p_grant.rollover_expires_at, p_grant.grant_id, p_grant.reason, p_at, p_grant.created_by);
        insert into grant_states (organization_id, grant_id, pool_id, state, left_micros, value_left_nano_usd)
        values (p_grant.organization_id, v_new, p_grant.pool_id, 'active', v_rolls, v_value);
    end if;
    insert into ledger.entries (organization_id, entry_id, booked_at, happened_at, kind, from_kind, from_id, to_kind, to_id, amount, grant_id,
                                from_grant_id, value_nano_usd, reason)
    select p_grant.organization_id, gen_random_uuid(), p_now,
        case when p_before is null then p_grant.expires_at else p_at end,  -- what holds had kept could be paid with until now
        e.kind, e.from_kind, e.from_id, e.to_kind, e.to_id,
        e.amount, e.grant_id, e.from_grant_id, e.value, e.reason
    from (values
        ('roll_over', 'grant', p_grant.grant_id, 'grant', v_new, v_kept, v_new, p_grant.grant_id, v_value, 'rolled over'),
        ('grant', 'issuance', null, 'pool', p_grant.pool_id, v_rolls - v_kept, v_new, null, 0, 'makes up the least roll-over'),
        ('expiry', 'pool', p_grant.pool_id, 'expired', null, p_lapse - v_kept, p_grant.grant_id, null, v_lost_value, 'grant expired')
    ) e(kind, from_kind, from_id, to_kind, to_id, amount, grant_id, from_grant_id, value, reason)
    where e.amount > 0;
    update grant_states set left_micros = left_micros - p_lapse, lapsed_micros = lapsed_micros + p_lapse,
        value_left_nano_usd = value_left_nano_usd - v_value - v_lost_value,
        state = case when left_micros > p_lapse then 'lingering' else 'ended' end,
        ended_at = case when left_micros > p_lapse then null else p_at end
    where organization_id = p_grant.organization_id and grant_id = p_grant.grant_id;
    return v_rolls - p_lapse;
end $$;
comment on function credits.end_grant is 'Rolls over what a grant''s bounds say of what it has left at its end, and expires the rest';

-- expire_grants: at p_at, what grants past their end have left goes on or expires, less what open holds placed before still need.
create or replace function credits.expire_grants(p_organization_id uuid, p_pool_id uuid, p_at timestamptz, p_now timestamptz) returns void
language plpgsql volatile set search_path = credits, pg_temp as $$
declare
    v_row record;
    v_grant grants;
    v_held bigint;
    v_before bigint := 0;   -- left of the grants that burn before this one
    v_keep bigint;
    v_delta bigint := 0;
    v_one bigint;
begin
    for v_row in
        select g as grants, s.left_micros, s.value_left_nano_usd, case when s.state = 'lingering' then s.lapsed_micros end as lapsed
        from grant_states s join grants g on g.organization_id = s.organization_id and g.grant_id = s.grant_id
        where s.organization_id = p_organization_id and s.pool_id = p_pool_id and s.state in ('active', 'lingering', 'spent')
        order by g.priority, g.expires_at, g.is_free desc, g.effective_at, g.created_at, g.grant_id
    loop
        v_grant := v_row.grants;
        if v_grant.expires_at > p_at then
            v_before := v_before + v_row.left_micros;
            continue;
        end if;
        -- Holds pour after what is used; what falls into this grant stays payable until those holds end.
        select coalesce(sum(case when h.leg_micros is null then h.amount_micros else h.leg_micros[l.leg] end), 0) into v_held
        from holds h
        join chains c on c.organization_id = h.organization_id and c.chain_id = h.chain_id
        cross join lateral unnest(c.leg_pool_ids) with ordinality l(pool_id, leg)
        where h.organization_id = p_organization_id and h.placed_at < v_grant.expires_at and l.pool_id = p_pool_id
          and (h.leg_micros is not null or h.leg = l.leg);
        v_keep := least(v_row.left_micros, greatest(0, v_held - v_before));
        v_before := v_before + v_keep;
        v_one := credits.end_grant(v_grant, v_row.left_micros - v_keep, v_row.lapsed, v_row.left_micros, v_row.value_left_nano_usd, p_at, p_now);
        v_delta := v_delta + v_one;
        if v_one > 0 then
            perform credits.limits_changed(p_organization_id);  -- chains had left the pool out while it was empty
        end if;
    end loop;
    if v_delta <> 0 then
        perform credits.set_pool_limit(p_organization_id, p_pool_id, v_delta);
    end if;
end $$;
comment on function credits.expire_grants is 'Ends grants past their end: what is left rolls over or expires, keeping what holds placed before the end still need';

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
        insert into ledger.entries (organization_id, entry_id, booked_at, happened_at, kind, from_kind, from_id, to_kind, to_id, amount, grant_id, actor_id, reason,
                                    value_nano_usd)
        values (p_organization_id, gen_random_uuid(), p_now, greatest(v_row.effective_at, v_row.created_at),
                case v_row.source when 'forgiveness' then 'forgiveness' else 'grant' end, 'issuance', null, 'pool', p_pool_id,
                v_row.amount_micros, v_row.grant_id, v_row.created_by, v_row.reason, case when v_row.is_free then 0 else v_row.cost_basis_nano_usd end);
        update grant_states set state = 'active' where organization_id = p_organization_id and grant_id = v_row.grant_id;
        perform credits.set_pool_limit(p_organization_id, p_pool_id, v_row.amount_micros);
        perform credits.limits_changed(p_organization_id);  -- chains had left the pool out while it was empty
    end loop;
end $$;
comment on function credits.activate_grants is 'Makes scheduled grants spendable at their instant and books them';

-- apply_events: every time event of one pool up to p_now, each at its very instant, in order. Nothing was used between an event and now,
-- because whoever moves credits folds first. Returns when the next one is due.
create or replace function credits.apply_events(p_organization_id uuid, p_pool_id uuid, p_now timestamptz) returns timestamptz
language plpgsql volatile set search_path = credits, pg_temp as $$
declare
    v_at timestamptz;
begin
    loop
        select least(min(case s.state when 'scheduled' then g.effective_at when 'active' then g.expires_at when 'spent' then g.expires_at end),
            (select min(next_at) from grant_schedules where organization_id = p_organization_id and pool_id = p_pool_id)) into v_at
        from grant_states s join grants g on g.organization_id = s.organization_id and g.grant_id = s.grant_id
        where s.organization_id = p_organization_id and s.pool_id = p_pool_id and s.state in ('scheduled', 'active', 'spent');
        v_at := coalesce(v_at, 'infinity');
        exit when v_at > p_now;
        perform credits.pour(p_organization_id, p_pool_id, v_at);  -- use until then is paid by the grants there were until then
        perform credits.expire_grants(p_organization_id, p_pool_id, v_at, p_now);
        perform credits.make_occurrences(p_organization_id, p_pool_id, v_at);
        perform credits.activate_grants(p_organization_id, p_pool_id, v_at, p_now);
    end loop;
    if exists (select 1 from grant_states where organization_id = p_organization_id and pool_id = p_pool_id and state = 'lingering') then
        perform credits.pour(p_organization_id, p_pool_id, p_now);
        perform credits.expire_grants(p_organization_id, p_pool_id, p_now, p_now);
        -- What came back may have made a grant active again that had ended: its own end is to be awaited, or is past already.
        select least(v_at, min(g.expires_at)) into v_at
        from grant_states s join grants g on g.organization_id = s.organization_id and g.grant_id = s.grant_id
        where s.organization_id = p_organization_id and s.pool_id = p_pool_id and s.state in ('active', 'spent');
        if v_at <= p_now then
            return credits.apply_events(p_organization_id, p_pool_id, p_now);
        end if;
        if exists (select 1 from grant_states where organization_id = p_organization_id and pool_id = p_pool_id and state = 'lingering') then
            v_at := '-infinity';  -- due again in every batch until the holds that need it have ended
        end if;
    end if;
    return v_at;
end $$;
comment on function credits.apply_events is 'Applies a pool''s time events up to now: pours use, ends grants, makes those of schedules, starts grants; returns when the next is due';

-- fold_pool: apply what time has changed of one pool up to p_now, and send on what turned up in it since it closed.
create or replace function credits.fold_pool(p_organization_id uuid, p_pool_id uuid, p_now timestamptz) returns void
language plpgsql volatile set search_path = credits, pg_temp as $$
declare
    v_at timestamptz := credits.apply_events(p_organization_id, p_pool_id, p_now);
    v_was_closed constant boolean := (select closed_at is not null from pools where organization_id = p_organization_id and pool_id = p_pool_id);
    v_is_needed constant boolean := credits.sweep_pool(p_organization_id, p_pool_id, p_now);
begin
    if v_was_closed then
        v_at := credits.apply_events(p_organization_id, p_pool_id, p_now);  -- what pays its debt has ends of its own
    end if;
    -- A closed pool is due as long as open holds need its credits.
    update pools set next_event_at = case when v_is_needed then '-infinity' else v_at end
    where organization_id = p_organization_id and pool_id = p_pool_id;
    update gates set next_event_at = least(next_limit_event_at, (select min(next_event_at) from pools where organization_id = p_organization_id))
    where organization_id = p_organization_id;
end $$;
comment on function credits.fold_pool is 'Applies a pool''s time events up to now, and sends on what turned up in a closed one';

-- fold_in_batch: the same in the middle of a batch, which has not written yet what its holds used: what they leave in a closed pool goes on
-- with the next movement.
create or replace function credits.fold_in_batch(p_organization_id uuid, p_pool_id uuid, p_now timestamptz) returns void
language plpgsql volatile set search_path = credits, pg_temp as $$
declare
    v_at constant timestamptz := credits.apply_events(p_organization_id, p_pool_id, p_now);
begin
    update pools set next_event_at = case when closed_at is null then v_at else '-infinity' end
    where organization_id = p_organization_id and pool_id = p_pool_id;
    update gates set next_event_at = least(next_limit_event_at, (select min(next_event_at) from pools where organization_id = p_organization_id))
    where organization_id = p_organization_id;
end $$;
comment on function credits.fold_in_batch is 'Applies a pool''s time events up to now while a batch is decided; a closed pool is due again at once';

-- settle_due: what came may pay what is owed to closed pools, or by them. A command that brings credits does so before it ends, so that what is
-- told of them right after is theirs; a batch leaves it to the next movement. It folds pools, so nothing that a fold calls may call it.
create or replace function credits.settle_due(p_organization_id uuid, p_now timestamptz) returns void
language plpgsql volatile set search_path = credits, pg_temp as $$
declare
    v_pool uuid;
begin
    loop  -- each time less is left of what is owed
        select pool_id into v_pool from closed_accounts where organization_id = p_organization_id and is_due order by 1 limit 1;
        exit when not found;
        perform credits.fold_pool(p_organization_id, v_pool, p_now);
        assert not exists (select from closed_accounts where organization_id = p_organization_id and pool_id = v_pool and is_due),
            'a closed pool was due right after it was settled';
    end loop;
end $$;
comment on function credits.settle_due is 'Settles what closed pools owe and are owed with what came since; the gate is locked';

create or replace function credits.fold_due_pools(p_organization_id uuid, p_now timestamptz) returns void
language plpgsql volatile set search_path = credits, pg_temp as $$
declare
    v_pool uuid := '00000000-0000-0000-0000-000000000000';
begin
    loop  -- one after the other, as one may make a later one due
        select pool_id into v_pool from pools
        where organization_id = p_organization_id and next_event_at <= p_now and pool_id > v_pool order by pool_id limit 1;
        exit when not found;
        perform credits.fold_pool(p_organization_id, v_pool, p_now);
    end loop;
    perform credits.settle_due(p_organization_id, p_now);
    perform credits.fold_limits(p_organization_id, p_now);
end $$;
comment on function credits.fold_due_pools is 'Folds every pool and limit of an organization that is due; the gate is locked';

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

-- reopen_pool: the pool of a kind, owner and filter if there is or was one; a closed one is open again, and keeps what it has.
create or replace function credits.reopen_pool(p_organization_id uuid, p_kind text, p_owner_user_id uuid, p_model_filter text) returns uuid
language plpgsql volatile set search_path = credits, pg_temp as $$
declare
    v_pool pools;
begin
    select * into v_pool from pools
    where organization_id = p_organization_id and kind = p_kind and owner_user_id is not distinct from p_owner_user_id
      and model_filter is not distinct from p_model_filter
    order by closed_at desc nulls first limit 1;
    if v_pool.closed_at is not null then
        update pools set closed_at = null where organization_id = p_organization_id and pool_id = v_pool.pool_id;
        delete from sweeps where organization_id = p_organization_id and pool_id = v_pool.pool_id;
        delete from closed_accounts where organization_id = p_organization_id and pool_id = v_pool.pool_id;
        perform credits.limits_changed(p_organization_id);
    end if;
    return v_pool.pool_id;
end $$;
comment on function credits.reopen_pool is 'The pool of a kind, owner and filter, opened again where it was closed; null: there was none';

-- open_pool: the pool of a kind (and owner, and filter); the one that there is already.
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
    v_pool := credits.reopen_pool(p_organization_id, p_kind, p_owner_user_id, p_model_filter);
    if v_pool is not null then
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
comment on function credits.open_pool is 'Opens a pool of a kind, or returns the one that there is';

-- require_bounds: both bounds of a roll-over or none.
create or replace function credits.require_bounds(p_min_micros bigint, p_max_micros bigint) returns void
language plpgsql immutable set search_path = credits, pg_temp as $$
begin
    if p_min_micros is null and p_max_micros is null then
        return;
    end if;
    if p_min_micros is null or p_max_micros is null or p_min_micros > p_max_micros or p_min_micros < 0 then
        raise exception 'a roll-over has a least and a most amount, the first not above the second' using errcode = 'BR400';
    end if;
    perform credits.require_amount(p_max_micros, 0);
end $$;
comment on function credits.require_bounds is 'Refuses (BR400) bounds of a roll-over that make no sense';

-- require_paid: money paid for credits is nothing or more.
create or replace function credits.require_paid(p_cost_basis_nano_usd bigint) returns void
language plpgsql immutable set search_path = credits, pg_temp as $$
begin
    if p_cost_basis_nano_usd < 0 then
        raise exception 'the money paid for credits is not less than nothing' using errcode = 'BR400';
    end if;
end $$;
comment on function credits.require_paid is 'Refuses (BR400) a negative price of a grant';

-- await_grant: a grant that was inserted waits for its start.
create or replace function credits.await_grant(p_organization_id uuid, p_grant_id uuid) returns void
language sql volatile set search_path = credits, pg_temp as $$
    insert into grant_states (organization_id, grant_id, pool_id, state, left_micros, value_left_nano_usd)
    select organization_id, grant_id, pool_id, 'scheduled', amount_micros, case when is_free then 0 else cost_basis_nano_usd end
    from grants where organization_id = p_organization_id and grant_id = p_grant_id;
$$;
comment on function credits.await_grant is 'Lets a new grant wait for its start';

-- add_grant: credits into a pool, spendable on [effective, expires). One ledger entry when it takes effect.
create or replace function credits.add_grant(
    p_organization_id uuid, p_grant_id uuid, p_pool_id uuid, p_source text, p_amount_micros bigint, p_priority smallint,
    p_is_free boolean, p_cost_basis_nano_usd bigint, p_effective_at timestamptz, p_expires_at timestamptz, p_reason text,
    p_created_by uuid, p_idempotency_key text, p_at timestamptz default null, p_min_rollover_micros bigint default null,
    p_max_rollover_micros bigint default null, p_rollover_expires_at timestamptz default null
) returns uuid
language plpgsql volatile security definer set search_path = credits, pg_temp as $$
declare
    v_now timestamptz := credits.lock_gate(p_organization_id, p_at);
    v_hash bytea := credits.hash_of(variadic array['add_grant', p_pool_id::text, p_source, p_amount_micros::text, p_priority::text, p_is_free::text,
        p_cost_basis_nano_usd::text, extract(epoch from p_effective_at)::text, extract(epoch from p_expires_at)::text, p_reason]
        || case when p_max_rollover_micros is not null then array[p_min_rollover_micros::text, p_max_rollover_micros::text,
            extract(epoch from p_rollover_expires_at)::text] end);
    v_stored jsonb := credits.stored_outcome(p_organization_id, p_idempotency_key, v_hash, v_now);
begin
    if v_stored is not null then
        return (v_stored ->> 'grant_id')::uuid;
    end if;
    perform credits.require_amount(p_amount_micros, 1);
    -- What a pool had begun to buy was paid for: where it has closed meanwhile, that goes on to where its credits went.
    if not exists (select 1 from pools
                   where organization_id = p_organization_id and pool_id = p_pool_id and (closed_at is null or p_source = 'top_up')) then
        raise exception 'no such open pool' using errcode = 'BR404';
    end if;
    if coalesce(p_expires_at, 'infinity') <= greatest(v_now, p_effective_at) then
        raise exception 'the grant would have expired before it can be spent' using errcode = 'BR400';
    end if;
    perform credits.require_paid(p_cost_basis_nano_usd);
    perform credits.require_bounds(p_min_rollover_micros, p_max_rollover_micros);
    if p_max_rollover_micros is not null and (p_expires_at is null or coalesce(p_rollover_expires_at, 'infinity') <= p_expires_at) then
        raise exception 'what rolls over needs an expiry, and one of its own after it' using errcode = 'BR400';
    end if;
    insert into grants (organization_id, grant_id, pool_id, source, amount_micros, priority, is_free, cost_basis_nano_usd, effective_at, expires_at,
                        min_rollover_micros, max_rollover_micros, rollover_expires_at, reason, created_at, created_by)
    values (p_organization_id, p_grant_id, p_pool_id, p_source, p_amount_micros, p_priority, p_is_free, p_cost_basis_nano_usd,
            coalesce(p_effective_at, v_now), coalesce(p_expires_at, 'infinity'), p_min_rollover_micros, p_max_rollover_micros,
            coalesce(p_rollover_expires_at, 'infinity'), p_reason, v_now, p_created_by);
    perform credits.await_grant(p_organization_id, p_grant_id);
    perform credits.fold_pool(p_organization_id, p_pool_id, v_now);
    perform credits.settle_due(p_organization_id, v_now);
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
    v_value bigint;
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
        v_value := v_state.value_left_nano_usd;
    else
        select greatest(0, limit_amount - used_amount - held_amount) into strict v_room
        from balances where organization_id = p_organization_id and balance_id = v_state.pool_id;
        v_taken := case when v_state.state = 'ended' then 0 else least(v_state.left_micros, v_room) end;
        select credits.value_taken(g, v_state.left_micros, v_state.value_left_nano_usd, v_taken) into strict v_value
        from grants g where g.organization_id = p_organization_id and g.grant_id = p_grant_id;
        if v_taken > 0 then
            insert into ledger.entries (organization_id, entry_id, booked_at, happened_at, kind, from_kind, from_id, to_kind, amount,
                                        grant_id, value_nano_usd, actor_id, reason, idempotency_key)
            values (p_organization_id, gen_random_uuid(), v_now, v_now, 'void', 'pool', v_state.pool_id, 'voided', v_taken,
                    p_grant_id, v_value, p_created_by, p_reason, p_idempotency_key);
            perform credits.set_pool_limit(p_organization_id, v_state.pool_id, -v_taken);
        end if;
    end if;
    if v_taken > 0 or v_state.state = 'spent' then
        update grant_states set left_micros = left_micros - v_taken, value_left_nano_usd = value_left_nano_usd - v_value,
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
