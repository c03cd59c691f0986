-- Reserved shares that are renewed, and the time events of limits.

-- share_size: the limit of a reserved share: its size, what refunds gave back to it, and where it is renewed what its period began with.
create or replace function credits.share_size(p_organization_id uuid, p_allocation_id uuid) returns bigint
language sql stable set search_path = credits, pg_temp as $$
    select greatest(0, a.amount_micros + a.refunded_micros + coalesce((
        select p.opening_micros + p.carried_micros + p.adjusted_micros from allocation_periods p
        where p.organization_id = a.organization_id and p.allocation_id = a.allocation_id order by p.period_start desc limit 1), 0))
    from allocations a where a.organization_id = p_organization_id and a.allocation_id = p_allocation_id;
$$;
comment on function credits.share_size is 'What the limit of a share has to be';

-- note_share: what a share is from now on, so that what it was before stays known. Renewals are known from their periods.
create or replace function credits.note_share(p_organization_id uuid, p_allocation_id uuid, p_by uuid, p_now timestamptz) returns void
language sql volatile set search_path = credits, pg_temp as $$
    insert into share_changes (organization_id, allocation_id, nr, changed_at, amount_micros, limit_micros, when_empty, carry_micros, changed_by)
    select a.organization_id, a.allocation_id,
        (select count(*) + 1 from share_changes c where c.organization_id = a.organization_id and c.allocation_id = a.allocation_id),
        p_now, a.amount_micros,
        case a.kind when 'reserved' then credits.share_size(a.organization_id, a.allocation_id) else a.amount_micros end,
        a.when_empty, a.carry_micros, p_by
    from allocations a where a.organization_id = p_organization_id and a.allocation_id = p_allocation_id;
$$;
comment on function credits.note_share is 'Keeps what a share is set to and since when';

-- await_limits: the gate wakes for the next raise that starts or ends, and the next share that is renewed.
create or replace function credits.await_limits(p_organization_id uuid) returns void
language sql volatile set search_path = credits, pg_temp as $$
    update gates g set next_limit_event_at = e.at,
        next_event_at = least(e.at, (select min(p.next_event_at) from pools p where p.organization_id = p_organization_id))
    from (select least('infinity',
            (select min(a.renews_at) from allocations a where a.organization_id = p_organization_id and a.renews_at < 'infinity'),
            (select min(case r.state when 'scheduled' then least(r.starts_at, r.ended_at) else least(r.ends_at, r.ended_at) end)
             from raises r where r.organization_id = p_organization_id and r.state <> 'ended')) as at) e
    where g.organization_id = p_organization_id;
$$;
comment on function credits.await_limits is 'Sets when the next raise starts or ends, or share is renewed';

-- begin_renewals: the first period of a new reserved share, where it has periods; it begins now, and ends when the period around now does.
create or replace function credits.begin_renewals(p_organization_id uuid, p_allocation_id uuid, p_now timestamptz) returns void
language plpgsql volatile set search_path = credits, pg_temp as $$
begin
    update allocations a set renews_at = (
        select p.ends_at from credits.calendar_of(p_organization_id) c cross join lateral credits.period_around(a.period, c.zone, c.anchor, p_now) p)
    where a.organization_id = p_organization_id and a.allocation_id = p_allocation_id and a.period <> 'none';
    if found then
        insert into allocation_periods (organization_id, allocation_id, period_start, period_end, opening_micros)
        select organization_id, allocation_id, p_now, renews_at, 0 from allocations
        where organization_id = p_organization_id and allocation_id = p_allocation_id;
        perform credits.await_limits(p_organization_id);
    end if;
end $$;
comment on function credits.begin_renewals is 'Opens the first period of a reserved share that is renewed';

-- renew_shares: every reserved share whose period is over begins the one around p_now, with what it had left as far as it carries that.
-- Nothing was used in between, so that periods which nobody looked at are passed over in one step: each of them would have added the share's
-- size to what was left before. What running requests hold counts for the period in which they began; what they free stays in the share.
create or replace function credits.renew_shares(p_organization_id uuid, p_now timestamptz) returns void
language plpgsql volatile set search_path = credits, pg_temp as $$
declare
    v_pool uuid;
    v_pools uuid[];
begin
    with due as (
        select a.allocation_id, a.pool_id, a.amount_micros, a.carry_micros, b.used_amount + b.held_amount as opening,
            greatest(this.starts_at, a.renews_at) as starts_at, this.ends_at,
            greatest(0, b.limit_amount - b.used_amount - b.held_amount) + (this.nr - first.nr)::numeric * a.amount_micros as spare
        from allocations a
        join balances b on b.organization_id = a.organization_id and b.balance_id = a.allocation_id
        cross join credits.calendar_of(p_organization_id) c
        cross join lateral credits.period_around(a.period, c.zone, c.anchor, p_now) this
        cross join lateral credits.period_around(a.period, c.zone, c.anchor, a.renews_at) first
        where a.organization_id = p_organization_id and a.renews_at <= p_now
    ), opened as (
        insert into allocation_periods (organization_id, allocation_id, period_start, period_end, opening_micros, carried_micros, lapsed_micros)
        select p_organization_id, allocation_id, starts_at, ends_at, opening, least(spare, carry_micros),
            least(spare - least(spare, carry_micros), 9223372036854775807)
        from due
    ), renewed as (
        update allocations a set renews_at = d.ends_at from due d
        where a.organization_id = p_organization_id and a.allocation_id = d.allocation_id
    ), resized as (
        update balances b set limit_amount = d.opening + d.amount_micros + least(d.spare, d.carry_micros)::bigint, excess_amount = 0
        from due d where b.organization_id = p_organization_id and b.balance_id = d.allocation_id
    )
    select array_agg(distinct pool_id order by pool_id) into v_pools from due;
    foreach v_pool in array coalesce(v_pools, '{}') loop
        perform credits.set_pool_limit(p_organization_id, v_pool, 0);
    end loop;
    if v_pools is not null then
        perform credits.limits_changed(p_organization_id);  -- chains had left the shares out while they were empty
    end if;
end $$;
comment on function credits.renew_shares is 'Renews the reserved shares whose period is over';

-- fold_limits: apply what time has changed of limits and shares until now.
create or replace function credits.fold_limits(p_organization_id uuid, p_now timestamptz) returns void
language plpgsql volatile set search_path = credits, pg_temp as $$
begin
    if (select next_limit_event_at > p_now from gates where organization_id = p_organization_id) then
        return;
    end if;
    perform credits.follow_raises(p_organization_id, p_now);
    perform credits.renew_shares(p_organization_id, p_now);
    perform credits.await_limits(p_organization_id);
end $$;
comment on function credits.fold_limits is 'Applies raises that start or end, and renewals of shares, up to now';

create or replace function credits.fold(p_organization_id uuid, p_at timestamptz default null) returns timestamptz
language sql volatile security definer set search_path = credits, pg_temp as $$
    select credits.lock_gate(p_organization_id, p_at);
$$;
comment on function credits.fold is 'Applies what time has changed of an organization''s grants, shares and limits until now, and tells the instant';

-- reallocate: give what a reserved share has left to another one of its pool, or back to the open part; null: all of it. Of a share that is
-- renewed only this period changes. Returns the micros moved.
create or replace function credits.reallocate(
    p_organization_id uuid, p_allocation_id uuid, p_to_allocation_id uuid, p_amount_micros bigint, p_idempotency_key text,
    p_at timestamptz default null
) returns bigint
language plpgsql volatile security definer set search_path = credits, pg_temp as $$
declare
    v_now timestamptz := credits.lock_gate(p_organization_id, p_at);
    v_hash bytea := credits.hash_of('reallocate', p_allocation_id::text, p_to_allocation_id::text, p_amount_micros::text);
    v_stored jsonb := credits.stored_outcome(p_organization_id, p_idempotency_key, v_hash, v_now);
    v_pool uuid;
    v_left bigint;
    v_amount bigint;
begin
    if v_stored is not null then
        return (v_stored ->> 'moved_micros')::bigint;
    end if;
    select a.pool_id, greatest(0, b.limit_amount - b.used_amount - b.held_amount) into v_pool, v_left
    from allocations a join balances b on b.organization_id = a.organization_id and b.balance_id = a.allocation_id
    where a.organization_id = p_organization_id and a.allocation_id = p_allocation_id and a.kind = 'reserved' and a.ended_at is null;
    if not found then
        raise exception 'no such reserved share' using errcode = 'BR404';
    end if;
    if p_to_allocation_id is not null and (p_to_allocation_id = p_allocation_id or not exists (
        select from allocations where organization_id = p_organization_id and allocation_id = p_to_allocation_id and pool_id = v_pool
        and kind = 'reserved' and ended_at is null)) then
        raise exception 'no such reserved share to give to' using errcode = 'BR404';
    end if;
    v_amount := coalesce(p_amount_micros, v_left);
    perform credits.require_amount(v_amount, 0);
    if v_amount > v_left then
        raise exception 'the share has % that are neither used nor held, % are asked for', credits.spoken(v_left), credits.spoken(v_amount) using errcode = 'BR460';
    end if;
    perform credits.adjust_share(p_organization_id, p_allocation_id, -v_amount, v_now);
    if p_to_allocation_id is not null then
        perform credits.adjust_share(p_organization_id, p_to_allocation_id, v_amount, v_now);
    end if;
    perform credits.set_pool_limit(p_organization_id, v_pool, 0);
    perform credits.limits_changed(p_organization_id);
    perform credits.store_outcome(p_organization_id, p_idempotency_key, v_hash, jsonb_build_object('moved_micros', v_amount), v_now);
    return v_amount;
end $$;
comment on function credits.reallocate is 'Gives what a reserved share has left to another one, or back to the open part; returns the micros moved';

-- adjust_share: a share is larger or smaller by p_delta: for good, or where it is renewed in this period.
create or replace function credits.adjust_share(p_organization_id uuid, p_allocation_id uuid, p_delta bigint, p_now timestamptz) returns void
language plpgsql volatile set search_path = credits, pg_temp as $$
begin
    update allocation_periods set adjusted_micros = adjusted_micros + p_delta
    where organization_id = p_organization_id and allocation_id = p_allocation_id and period_start <= p_now and period_end > p_now;
    if not found then
        update allocations set amount_micros = amount_micros + p_delta
        where organization_id = p_organization_id and allocation_id = p_allocation_id;
    end if;
    perform credits.set_current_limit(p_organization_id, p_allocation_id, credits.share_size(p_organization_id, p_allocation_id), p_now);
    perform credits.note_share(p_organization_id, p_allocation_id, null, p_now);
end $$;
comment on function credits.adjust_share is 'Makes a reserved share larger or smaller: a lump for good, a renewed one in this period';
