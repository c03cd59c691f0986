-- Periods: days, weeks and months in the organization's zone, and cycles of its subscription.

-- period_around: the period that contains p_at, with a number that grows by one from each to the next. Cycles begin at the anchor's day and
-- time of every month, each reckoned from the anchor itself, so that a month that is too short (its last day stands in) moves no other.
create or replace function credits.period_around(
    p_period text, p_zone text, p_anchor timestamptz, p_at timestamptz, out nr integer, out starts_at timestamptz, out ends_at timestamptz
) language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
    v_local timestamp := p_at at time zone p_zone;
    v_anchor timestamp := p_anchor at time zone p_zone;
    v_step interval;
begin
    if p_period = 'none' then
        nr := 0; starts_at := '-infinity'; ends_at := 'infinity';
    elsif p_period = 'cycle' then
        nr := 12 * (extract(year from v_local) - extract(year from v_anchor)) + extract(month from v_local) - extract(month from v_anchor);
        if (v_anchor + make_interval(months => nr)) at time zone p_zone > p_at then
            nr := nr - 1;
        end if;
        starts_at := (v_anchor + make_interval(months => nr)) at time zone p_zone;
        ends_at := (v_anchor + make_interval(months => nr + 1)) at time zone p_zone;
    else
        v_step := ('1 ' || p_period)::interval;
        v_local := date_trunc(p_period, v_local);
        if v_local at time zone p_zone > p_at then
            -- Where clocks fall back over midnight it comes twice and counts the second time: until then it is still the day before.
            v_local := v_local - v_step;
        end if;
        starts_at := v_local at time zone p_zone;
        ends_at := (v_local + v_step) at time zone p_zone;
        nr := case p_period when 'month' then 12 * extract(year from v_local) + extract(month from v_local)
                            when 'week' then (v_local::date - date '0001-01-01') / 7 else v_local::date - date '0001-01-01' end;
    end if;
end $$;
comment on function credits.period_around is 'Number, start and end of the day, week (from Monday), month or cycle that contains an instant';

create or replace function credits.period_start(p_period text, p_zone text, p_at timestamptz, p_anchor timestamptz default null) returns timestamptz
language sql stable set search_path = credits, pg_temp as $$ select starts_at from credits.period_around(p_period, p_zone, p_anchor, p_at) $$;
comment on function credits.period_start is 'Start of the period that contains an instant, in a zone; -infinity for none';

create or replace function credits.period_end(p_period text, p_zone text, p_at timestamptz, p_anchor timestamptz default null) returns timestamptz
language sql stable set search_path = credits, pg_temp as $$ select ends_at from credits.period_around(p_period, p_zone, p_anchor, p_at) $$;
comment on function credits.period_end is 'End of the period that contains an instant, in a zone; infinity for none';

-- calendar_of: by whose clocks an organization's periods are cut, and when its cycles begin.
create or replace function credits.calendar_of(p_organization_id uuid, out zone text, out anchor timestamptz)
language sql stable set search_path = credits, pg_temp as $$
    select o.zone, coalesce(g.anchored_at, o.created_at)
    from identity.organizations o left join gates g on g.organization_id = o.organization_id
    where o.organization_id = p_organization_id;
$$;
comment on function credits.calendar_of is 'Zone of an organization, and the instant that its cycles are reckoned from';

-- open_period: the row of a balance for the period that contains p_now, made when it is missing. A period keeps the end it began with,
-- so that a change of zone or of the cycle starts at the next boundary and gives nobody a fresh limit.
create or replace function credits.open_period(
    p_organization_id uuid, p_balance_id uuid, p_kind text, p_stops boolean, p_amount bigint, p_period text, p_zone text, p_anchor timestamptz,
    p_now timestamptz, out period_start timestamptz, out period_end timestamptz
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
    select greatest(p.starts_at, v_last), p.ends_at into open_period.period_start, open_period.period_end
    from credits.period_around(p_period, p_zone, p_anchor, p_now) p;
    insert into balances (organization_id, balance_id, period_start, period_end, kind, stops, limit_amount)
    values (p_organization_id, p_balance_id, open_period.period_start, open_period.period_end, p_kind, p_stops, p_amount);
end $$;
comment on function credits.open_period is 'Start and end of the current period of a balance, whose row is made when it is missing';

-- set_cycle: from when on cycles are reckoned; each period that has begun ends as it would have.
create or replace function credits.set_cycle(p_organization_id uuid, p_anchor timestamptz, p_at timestamptz default null) returns timestamptz
language plpgsql volatile security definer set search_path = credits, pg_temp as $$
declare
    v_now timestamptz := credits.lock_gate(p_organization_id, p_at);
    v_old timestamptz;
begin
    if not isfinite(p_anchor) then
        raise exception 'a cycle begins at some instant' using errcode = 'BR400';
    end if;
    select anchored_at into v_old from gates where organization_id = p_organization_id;
    update gates set anchored_at = p_anchor where organization_id = p_organization_id;
    perform credits.limits_changed(p_organization_id);
    return v_old;
end $$;
comment on function credits.set_cycle is 'Sets when the subscription began, from which cycles are reckoned; returns what was set before';
