-- Grants that come again: a schedule's occurrences are time events of its pool, each a grant of its own.

-- occurrence_at: when occurrence p_number comes: so many units after the anchor by the clocks of the zone, always counted from the anchor.
-- A day that the month does not have is its last one; a time that the clocks skip is as much later, one that comes twice is the second.
create or replace function credits.occurrence_at(p_anchor_at timestamptz, p_zone text, p_unit text, p_every integer, p_number integer)
returns timestamptz language sql stable set search_path = pg_catalog, pg_temp as $$
    select case p_number when 0 then p_anchor_at
        else ((p_anchor_at at time zone p_zone) + (p_number::bigint * p_every || ' ' || p_unit)::interval) at time zone p_zone end;
$$;
comment on function credits.occurrence_at is 'When an occurrence of a schedule comes; number 0 is the anchor';

-- add_schedule: grants of one kind again and again, from the first occurrence that is not past. p_lasts: how long each can be spent; null:
-- until the next one comes, or for ever where p_is_lasting.
create or replace function credits.add_schedule(
    p_organization_id uuid, p_schedule_id uuid, p_pool_id uuid, p_source text, p_amount_micros bigint, p_priority smallint, p_is_free boolean,
    p_cost_basis_nano_usd bigint, p_zone text, p_anchor_at timestamptz, p_unit text, p_every integer, p_lasts interval, p_is_lasting boolean,
    p_ends_at timestamptz, p_min_rollover_micros bigint, p_max_rollover_micros bigint, p_reason text, p_created_by uuid,
    p_idempotency_key text, p_at timestamptz default null
) returns uuid
language plpgsql volatile security definer set search_path = credits, pg_temp as $$
declare
    v_now timestamptz := credits.lock_gate(p_organization_id, p_at);
    v_hash bytea := credits.hash_of('add_schedule', p_pool_id::text, p_source, p_amount_micros::text, p_priority::text, p_is_free::text,
        p_cost_basis_nano_usd::text, p_zone, extract(epoch from p_anchor_at)::text, p_unit, p_every::text, p_lasts::text, p_is_lasting::text,
        extract(epoch from p_ends_at)::text, p_min_rollover_micros::text, p_max_rollover_micros::text, p_reason);
    v_stored jsonb := credits.stored_outcome(p_organization_id, p_idempotency_key, v_hash, v_now);
    v_anchor timestamptz := coalesce(p_anchor_at, v_now);
    v_number integer;
    v_next timestamptz;
begin
    if v_stored is not null then
        return (v_stored ->> 'schedule_id')::uuid;
    end if;
    perform credits.require_amount(p_amount_micros, 1);
    perform credits.require_bounds(p_min_rollover_micros, p_max_rollover_micros);
    perform credits.require_paid(p_cost_basis_nano_usd);
    if not exists (select 1 from pools where organization_id = p_organization_id and pool_id = p_pool_id and closed_at is null) then
        raise exception 'no such open pool' using errcode = 'BR404';
    end if;
    if not exists (select 1 from pg_catalog.pg_timezone_names where name = p_zone) then
        raise exception 'no such time zone: %', p_zone using errcode = 'BR400';
    end if;
    if p_unit is null or p_unit not in ('day', 'week', 'month', 'year') or p_every is null or p_every not between 1 and 1000 then
        raise exception 'a schedule goes by 1 to 1000 days, weeks, months or years' using errcode = 'BR400';
    end if;
    -- An end beyond what there are instants for would fail whoever moves credits next, when the grant comes.
    if p_lasts <= interval '0' or p_lasts > interval '1000 years' or (p_is_lasting and (p_lasts is not null or p_max_rollover_micros is not null)) then
        raise exception 'its grants last for ever, or for some time up to 1000 years, after which they may roll over' using errcode = 'BR400';
    end if;
    if v_anchor not between v_now - interval '50 years' and v_now + interval '50 years' then
        raise exception 'the anchor is more than 50 years away' using errcode = 'BR400';
    end if;
    -- No unit is longer than this, so the number is not too large; a few steps lead to the first that is not past.
    v_number := greatest(0, floor(extract(epoch from v_now - v_anchor)
        / (p_every * case p_unit when 'day' then 90000 when 'week' then 608400 when 'month' then 2682000 else 31626000 end)) - 1);
    loop
        v_next := credits.occurrence_at(v_anchor, p_zone, p_unit, p_every, v_number);
        exit when v_next >= v_now;
        v_number := v_number + 1;
    end loop;
    if v_next >= coalesce(p_ends_at, 'infinity') then
        raise exception 'the schedule would end before its first grant' using errcode = 'BR400';
    end if;
    insert into grant_schedules (organization_id, schedule_id, pool_id, source, amount_micros, priority, is_free, cost_basis_nano_usd, zone,
        anchor_at, unit, every, lasts, is_lasting, ends_at, min_rollover_micros, max_rollover_micros, next_number, next_at, reason, created_at, created_by)
    values (p_organization_id, p_schedule_id, p_pool_id, p_source, p_amount_micros, p_priority, p_is_free, p_cost_basis_nano_usd, p_zone,
        v_anchor, p_unit, p_every, p_lasts, p_is_lasting, coalesce(p_ends_at, 'infinity'), p_min_rollover_micros, p_max_rollover_micros,
        v_number, v_next, p_reason, v_now, p_created_by);
    perform credits.fold_pool(p_organization_id, p_pool_id, v_now);
    perform credits.settle_due(p_organization_id, v_now);
    perform credits.store_outcome(p_organization_id, p_idempotency_key, v_hash, jsonb_build_object('schedule_id', p_schedule_id), v_now);
    return p_schedule_id;
end $$;
comment on function credits.add_schedule is 'Grants that come again every so many days, weeks, months or years; the same idempotency key adds nothing more';

-- cancel_schedule: no occurrence from now on. What was granted stays.
create or replace function credits.cancel_schedule(p_organization_id uuid, p_schedule_id uuid, p_at timestamptz default null) returns void
language plpgsql volatile security definer set search_path = credits, pg_temp as $$
declare
    v_now timestamptz := credits.lock_gate(p_organization_id, p_at);
    v_pool uuid;
begin
    update grant_schedules set ends_at = least(ends_at, v_now), next_at = 'infinity'
    where organization_id = p_organization_id and schedule_id = p_schedule_id returning pool_id into v_pool;
    if not found then
        raise exception 'no such schedule' using errcode = 'BR404';
    end if;
    perform credits.fold_pool(p_organization_id, v_pool, v_now);
end $$;
comment on function credits.cancel_schedule is 'Ends a schedule now; calling again changes nothing';

-- make_occurrences: the grants of a pool's schedules that come at p_at. They bear this instant, however late it is noticed.
create or replace function credits.make_occurrences(p_organization_id uuid, p_pool_id uuid, p_at timestamptz) returns void
language plpgsql volatile set search_path = credits, pg_temp as $$
declare
    v_row grant_schedules;
    v_grant uuid;
    v_end timestamptz;
    v_rolled_end timestamptz;
    v_next timestamptz;
begin
    for v_row in
        select * from grant_schedules
        where organization_id = p_organization_id and pool_id = p_pool_id and next_at <= p_at order by next_at, schedule_id
    loop
        v_grant := md5(v_row.schedule_id::text || ' ' || v_row.next_number)::uuid;
        v_next := credits.occurrence_at(v_row.anchor_at, v_row.zone, v_row.unit, v_row.every, v_row.next_number + 1);
        v_end := case when v_row.is_lasting then 'infinity'
            when v_row.lasts is null then v_next
            else ((v_row.next_at at time zone v_row.zone) + v_row.lasts) at time zone v_row.zone end;
        v_rolled_end := case when v_row.is_lasting then 'infinity'
            when v_row.lasts is null then credits.occurrence_at(v_row.anchor_at, v_row.zone, v_row.unit, v_row.every, v_row.next_number + 2)
            else ((v_end at time zone v_row.zone) + v_row.lasts) at time zone v_row.zone end;
        if v_end > v_row.next_at then  -- where a zone left a whole day out, two occurrences fall on one instant, and the first has no time
            insert into grants (organization_id, grant_id, pool_id, source, amount_micros, priority, is_free, cost_basis_nano_usd, effective_at,
                expires_at, min_rollover_micros, max_rollover_micros, rollover_expires_at, schedule_id, reason, created_at, created_by)
            values (p_organization_id, v_grant, p_pool_id, v_row.source, v_row.amount_micros, v_row.priority, v_row.is_free,
                v_row.cost_basis_nano_usd, v_row.next_at, v_end, v_row.min_rollover_micros, v_row.max_rollover_micros, v_rolled_end,
                v_row.schedule_id, v_row.reason, v_row.next_at, v_row.created_by);
            perform credits.await_grant(p_organization_id, v_grant);
        end if;
        update grant_schedules set next_number = v_row.next_number + 1, next_at = case when v_next < ends_at then v_next else 'infinity' end
        where organization_id = p_organization_id and schedule_id = v_row.schedule_id;
    end loop;
end $$;
comment on function credits.make_occurrences is 'Makes the grants that a pool''s schedules bring at an instant';
