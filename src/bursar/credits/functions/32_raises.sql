-- More than a limit gives, for a time: raises, and the requests of members for them.

-- raised: what raises add to a balance's limit as it stands.
create or replace function credits.raised(p_organization_id uuid, p_balance_id uuid) returns bigint
language sql stable set search_path = credits, pg_temp as $$
    select coalesce(sum(amount), 0)::bigint from raises
    where organization_id = p_organization_id and balance_id = p_balance_id and state = 'active';
$$;
comment on function credits.raised is 'What active raises add to the limit of a balance';

-- follow_raises: raises that start and end until p_now move the limits of the periods that they start and end in. Whoever moves credits
-- folds first, so that a raise begins and ends at its very instant, also for requests that were held before.
create or replace function credits.follow_raises(p_organization_id uuid, p_now timestamptz) returns void
language plpgsql volatile set search_path = credits, pg_temp as $$
begin
    with due as (
        select raise_id, balance_id, amount, state as before, e.at as ends_at, starts_at,
            case when e.at <= p_now then 'ended' when starts_at <= p_now then 'active' else 'scheduled' end as after
        from raises cross join lateral (select least(ends_at, ended_at) as at) e
        where organization_id = p_organization_id and state <> 'ended'
    ), changed as (
        update raises r set state = d.after from due d
        where r.organization_id = p_organization_id and r.raise_id = d.raise_id and d.after <> d.before
    ), edges as (
        select balance_id, starts_at as at, amount as delta from due where before = 'scheduled' and after = 'active'
        union all
        select balance_id, ends_at, -amount from due where before = 'active' and after = 'ended'
    ), deltas as (
        select b.balance_id, b.period_start, sum(e.delta)::bigint as delta
        from edges e
        join balances b on b.organization_id = p_organization_id and b.balance_id = e.balance_id and b.period_start <= e.at and b.period_end > e.at
        group by 1, 2
    )
    update balances b set limit_amount = limit_amount + d.delta,
        excess_amount = greatest(0, used_amount + held_amount - limit_amount - d.delta)
    from deltas d
    where b.organization_id = p_organization_id and b.balance_id = d.balance_id and b.period_start = d.period_start;
end $$;
comment on function credits.follow_raises is 'Applies the starts and ends of raises up to now to the limits of their balances';

-- counter_of: the balance that a default counts on for one subject, made when it is missing.
create or replace function credits.counter_of(p_limit credits.limits, p_subject_id uuid, p_now timestamptz) returns uuid
language plpgsql volatile set search_path = credits, pg_temp as $$
declare
    v_row counters;
begin
    select * into v_row from counters
    where organization_id = p_limit.organization_id and scope = p_limit.scope and subject_id = p_subject_id and metric = p_limit.metric
      and period = p_limit.period and coalesce(model_filter, '') = coalesce(p_limit.model_filter, '') and stops = (p_limit.action <> 'warns');
    if not found then
        -- Who had a limit of their own under this default goes on where that one counted.
        select l.balance_id into v_row.balance_id from limits l
        where l.organization_id = p_limit.organization_id and l.scope = p_limit.scope and l.scope_id = p_subject_id and l.metric = p_limit.metric
          and l.period = p_limit.period and coalesce(l.model_filter, '') = coalesce(p_limit.model_filter, '')
          and (l.action = 'warns') = (p_limit.action = 'warns') and coalesce(l.ended_at, 'infinity') >= p_limit.created_at
        order by l.created_at desc, l.limit_id desc limit 1;
        v_row.balance_id := coalesce(v_row.balance_id, md5(p_limit.limit_id || ' ' || p_subject_id)::uuid);
        insert into counters (organization_id, balance_id, scope, subject_id, metric, model_filter, period, stops, limit_id, created_at)
        values (p_limit.organization_id, v_row.balance_id, p_limit.scope, p_subject_id, p_limit.metric, p_limit.model_filter, p_limit.period,
                p_limit.action <> 'warns', p_limit.limit_id, p_now);
    elsif v_row.limit_id <> p_limit.limit_id then
        update counters set limit_id = p_limit.limit_id where organization_id = p_limit.organization_id and balance_id = v_row.balance_id;
    end if;
    return v_row.balance_id;
end $$;
comment on function credits.counter_of is 'The balance on which a default counts one user, key, team or department';

-- target_of: the limit and balance that is meant by a limit, by a default and one of its subjects, or by the balance itself.
create or replace function credits.target_of(
    p_organization_id uuid, p_id uuid, p_subject_id uuid, p_now timestamptz, out limit_id uuid, out balance_id uuid, out action text
) language plpgsql volatile set search_path = credits, pg_temp as $$
#variable_conflict use_column
declare
    v_limit limits;
    v_own limits;
begin
    -- A balance stands for the limit of its own where there is one now, else for the default that it counted for.
    select l.* into v_limit from limits l
    where l.organization_id = p_organization_id and l.balance_id = p_id and l.ended_at is null and l.amount is not null;
    if not found then
        select l.* into v_limit
        from limits l
        left join counters k on k.organization_id = l.organization_id and k.limit_id = l.limit_id and k.balance_id = p_id
        where l.organization_id = p_organization_id and l.ended_at is null and l.amount is not null and (k.balance_id is not null or l.limit_id = p_id)
        order by k.balance_id limit 1;
        if v_limit.is_default and p_subject_id is null then
            select k.subject_id into p_subject_id from counters k where k.organization_id = p_organization_id and k.balance_id = p_id;
        end if;
    end if;
    if v_limit.is_default and p_subject_id is not null then
        if not exists (
            select from identity.memberships m where v_limit.scope = 'user' and m.organization_id = p_organization_id and m.user_id = p_subject_id
            union all select from identity.api_keys a where v_limit.scope = 'key' and a.organization_id = p_organization_id and a.api_key_id = p_subject_id
            union all select from identity.teams t where v_limit.scope = 'team' and t.organization_id = p_organization_id and t.team_id = p_subject_id
            union all select from identity.departments d
                where v_limit.scope = 'department' and d.organization_id = p_organization_id and d.department_id = p_subject_id) then
            raise exception 'no such member, key, team or department' using errcode = 'BR404';
        end if;
        select l.* into v_own from limits l
        where l.organization_id = p_organization_id and l.scope = v_limit.scope and l.scope_id = p_subject_id and l.metric = v_limit.metric
          and l.period = v_limit.period and l.model_filter is not distinct from v_limit.model_filter
          and (l.action = 'warns') = (v_limit.action = 'warns') and l.ended_at is null;
        if found then
            v_limit := v_own;
        else
            v_limit.balance_id := credits.counter_of(v_limit, p_subject_id, p_now);
        end if;
    end if;
    if v_limit.balance_id is null or v_limit.amount is null then
        raise exception 'no such limit' using errcode = 'BR404';
    end if;
    limit_id := v_limit.limit_id; balance_id := v_limit.balance_id; action := v_limit.action;
end $$;
comment on function credits.target_of is 'The limit and balance that an id means: of a limit, of a default for one subject, or of a balance';

-- give_raise: a raise of a balance; what it changes now is applied now. It begins now where an earlier instant is named: a period that was over
-- then would get what this one is to have, and this one lose at the end what it never got.
create or replace function credits.give_raise(
    p_organization_id uuid, p_raise_id uuid, p_balance_id uuid, p_limit_id uuid, p_limit_request_id uuid, p_amount bigint,
    p_starts_at timestamptz, p_ends_at timestamptz, p_reason text, p_created_by uuid, p_now timestamptz
) returns void
language plpgsql volatile set search_path = credits, pg_temp as $$
declare
    v_starts_at timestamptz := greatest(p_starts_at, p_now);
begin
    perform credits.require_amount(p_amount, 1);
    if p_ends_at is null or not isfinite(p_ends_at) or p_ends_at <= v_starts_at then
        raise exception 'a raise ends after it begins' using errcode = 'BR464';
    end if;
    insert into raises (organization_id, raise_id, balance_id, limit_id, limit_request_id, amount, starts_at, ends_at, reason, created_at, created_by)
    values (p_organization_id, p_raise_id, p_balance_id, p_limit_id, p_limit_request_id, p_amount, v_starts_at, p_ends_at, p_reason, p_now, p_created_by);
    perform credits.follow_raises(p_organization_id, p_now);
    perform credits.await_limits(p_organization_id);
end $$;
comment on function credits.give_raise is 'Gives a raise of a balance for a time';

-- raise_limit: more than a limit gives, on top and for a time. p_limit_id and p_subject_id as in target_of.
create or replace function credits.raise_limit(
    p_organization_id uuid, p_raise_id uuid, p_limit_id uuid, p_subject_id uuid, p_amount bigint, p_starts_at timestamptz, p_ends_at timestamptz,
    p_reason text, p_created_by uuid, p_idempotency_key text, p_at timestamptz default null
) returns uuid
language plpgsql volatile security definer set search_path = credits, pg_temp as $$
declare
    v_now timestamptz := credits.lock_gate(p_organization_id, p_at);
    v_hash bytea := credits.hash_of('raise_limit', p_limit_id::text, p_subject_id::text, p_amount::text, extract(epoch from p_starts_at)::text,
        extract(epoch from p_ends_at)::text, p_reason);
    v_stored jsonb := credits.stored_outcome(p_organization_id, p_idempotency_key, v_hash, v_now);
    v_target record;
begin
    if v_stored is not null then
        return (v_stored ->> 'raise_id')::uuid;
    end if;
    select * into v_target from credits.target_of(p_organization_id, p_limit_id, p_subject_id, v_now);
    perform credits.give_raise(p_organization_id, p_raise_id, v_target.balance_id, v_target.limit_id, null, p_amount, p_starts_at, p_ends_at,
        p_reason, p_created_by, v_now);
    perform credits.store_outcome(p_organization_id, p_idempotency_key, v_hash, jsonb_build_object('raise_id', p_raise_id), v_now);
    return p_raise_id;
end $$;
comment on function credits.raise_limit is 'Raises a limit by an amount on top for a time; it ends by itself';

create or replace function credits.end_raise(p_organization_id uuid, p_raise_id uuid, p_at timestamptz default null) returns void
language plpgsql volatile security definer set search_path = credits, pg_temp as $$
declare
    v_now timestamptz := credits.lock_gate(p_organization_id, p_at);
begin
    update raises set ended_at = v_now where organization_id = p_organization_id and raise_id = p_raise_id and state <> 'ended';
    if not found then
        raise exception 'no such raise' using errcode = 'BR404';
    end if;
    perform credits.follow_raises(p_organization_id, v_now);
    perform credits.await_limits(p_organization_id);
end $$;
comment on function credits.end_raise is 'Ends a raise before its time';

-- told_request: what is told of a request as it stands; p_raise_id: what was given, of one that was approved.
create or replace function credits.told_request(p_organization_id uuid, p_limit_request_id uuid, p_raise_id uuid) returns jsonb
language sql stable set search_path = credits, pg_temp as $$
    select credits.told(p_organization_id,
        format(case q.state when 'open' then '%s asks for %s more' else 'What %s asked for was ' || q.state || ': %s more' end, i.who,
               credits.spoken_amount(i.amount)),
        array[format('%s, until %s.', i.name, credits.spoken_time(p_organization_id, i.until_at)),
              'Asked for: ' || case when r.amount <> q.amount then credits.spoken_amount(credits.as_amount_of(l.metric, q.amount)) end,
              'Reason: ' || nullif(q.reason, ''), 'Note: ' || nullif(q.note, ''),
              case when q.state = 'open' then format('Without a decision it lapses on %s.', credits.spoken_time(p_organization_id, q.lapses_at)) end],
        case when q.state = 'open' then format('bursar caps approve %1$s --org ORG, or bursar caps deny %1$s --org ORG', i.id)
             else 'bursar caps requests --org ORG' end,
        jsonb_build_object('limit_request_id', i.id, 'user_id', i.who, 'limit_id', outbox.public_id('lim', q.limit_id), 'name', i.name,
            'is_approved', case when q.state <> 'open' then q.state = 'approved' end, 'amount', i.amount, 'until_at', i.until_at,
            'reason', q.reason, 'note', q.note))
    from limit_requests q
    join limits l on l.organization_id = q.organization_id and l.limit_id = q.limit_id
    left join raises r on r.organization_id = q.organization_id and r.raise_id = p_raise_id
    cross join lateral (
        select outbox.public_id('lrq', q.limit_request_id) as id, outbox.public_id('usr', q.user_id) as who,
            credits.spoken_limit(p_organization_id, q.limit_id) as name, credits.as_amount_of(l.metric, coalesce(r.amount, q.amount)) as amount,
            coalesce(r.ends_at, q.until_at) as until_at) i
    where q.organization_id = p_organization_id and q.limit_request_id = p_limit_request_id;
$$;
comment on function credits.told_request is 'What is told of a request for more as it stands';

-- request_raise: a member asks for more than a limit that asks gives. Nothing changes until somebody decides.
create or replace function credits.request_raise(
    p_organization_id uuid, p_limit_request_id uuid, p_limit_id uuid, p_subject_id uuid, p_user_id uuid, p_amount bigint, p_until_at timestamptz,
    p_reason text, p_idempotency_key text, p_at timestamptz default null
) returns uuid
language plpgsql volatile security definer set search_path = credits, pg_temp as $$
declare
    v_now timestamptz := credits.lock_gate(p_organization_id, p_at);
    v_hash bytea := credits.hash_of('request_raise', p_limit_id::text, p_subject_id::text, p_user_id::text, p_amount::text,
        extract(epoch from p_until_at)::text, p_reason);
    v_stored jsonb := credits.stored_outcome(p_organization_id, p_idempotency_key, v_hash, v_now);
    v_target record;
begin
    if v_stored is not null then
        return (v_stored ->> 'limit_request_id')::uuid;
    end if;
    perform credits.require_amount(p_amount, 1);
    if p_until_at is null or not isfinite(p_until_at) or p_until_at <= v_now then
        raise exception 'more can be asked for until an instant to come' using errcode = 'BR464';
    end if;
    if not exists (select from identity.memberships
                   where organization_id = p_organization_id and user_id = p_user_id and status = 'active') then
        raise exception 'no such member' using errcode = 'BR404';
    end if;
    select * into v_target from credits.target_of(p_organization_id, p_limit_id, p_subject_id, v_now);
    if v_target.action <> 'asks' then
        raise exception 'no more can be asked for on this limit' using errcode = 'BR461';
    end if;
    if exists (select from limit_requests where organization_id = p_organization_id and balance_id = v_target.balance_id and user_id = p_user_id
               and state = 'open' and lapses_at > v_now) then
        raise exception 'this was asked for already, and is not decided yet' using errcode = 'BR462';
    end if;
    -- One that lapsed makes room for the next.
    update limit_requests set state = 'denied', decided_at = lapses_at, note = 'lapsed'
    where organization_id = p_organization_id and balance_id = v_target.balance_id and user_id = p_user_id and state = 'open';
    insert into limit_requests (organization_id, limit_request_id, balance_id, limit_id, user_id, amount, until_at, reason, created_at, lapses_at)
    values (p_organization_id, p_limit_request_id, v_target.balance_id, v_target.limit_id, p_user_id, p_amount, p_until_at, p_reason, v_now,
            least(v_now + interval '14 days', p_until_at));
    perform outbox.post_event(p_organization_id, 'request.created', 'limit_request', p_limit_request_id,
        credits.told_request(p_organization_id, p_limit_request_id, null), v_now);
    perform credits.store_outcome(p_organization_id, p_idempotency_key, v_hash, jsonb_build_object('limit_request_id', p_limit_request_id), v_now);
    return p_limit_request_id;
end $$;
comment on function credits.request_raise is 'Asks for more than a limit gives, until an instant; somebody decides';

-- decide_request: approve (as asked, or another amount and end) or deny. Returns the raise; null: denied.
create or replace function credits.decide_request(
    p_organization_id uuid, p_limit_request_id uuid, p_is_approved boolean, p_raise_id uuid, p_amount bigint, p_until_at timestamptz,
    p_note text, p_decided_by uuid, p_at timestamptz default null
) returns uuid
language plpgsql volatile security definer set search_path = credits, pg_temp as $$
declare
    v_now timestamptz := credits.lock_gate(p_organization_id, p_at);
    v_row limit_requests;
begin
    select * into v_row from limit_requests where organization_id = p_organization_id and limit_request_id = p_limit_request_id;
    if not found then
        raise exception 'no such request' using errcode = 'BR404';
    end if;
    if v_row.state <> 'open' or v_row.lapses_at <= v_now then
        raise exception 'this request was decided, or has lapsed' using errcode = 'BR463';
    end if;
    update limit_requests set state = case when p_is_approved then 'approved' else 'denied' end, decided_at = v_now, decided_by = p_decided_by,
        note = p_note
    where organization_id = p_organization_id and limit_request_id = p_limit_request_id;
    if p_is_approved then
        perform credits.give_raise(p_organization_id, p_raise_id, v_row.balance_id, v_row.limit_id, p_limit_request_id,
            coalesce(p_amount, v_row.amount), null, coalesce(p_until_at, v_row.until_at), v_row.reason, p_decided_by, v_now);
    end if;
    perform outbox.post_event(p_organization_id, 'request.decided', 'limit_request', p_limit_request_id,
        credits.told_request(p_organization_id, p_limit_request_id, case when p_is_approved then p_raise_id end), v_now);
    return case when p_is_approved then p_raise_id end;
end $$;
comment on function credits.decide_request is 'Approves or denies a request for more; what is approved is a raise that ends by itself';
