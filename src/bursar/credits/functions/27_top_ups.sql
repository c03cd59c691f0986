-- Debt and its forgiveness, and purchases that a pool makes by itself.

-- debt_of: what a pool was charged beyond everything granted; what is only held is no debt yet.
create or replace function credits.debt_of(p_organization_id uuid, p_pool_id uuid) returns bigint
language sql stable set search_path = credits, pg_temp as $$
    select greatest(0, used_amount - limit_amount) from balances
    where organization_id = p_organization_id and balance_id = p_pool_id and period_start = '-infinity';
$$;
comment on function credits.debt_of is 'Micros that a pool was charged beyond what was granted';

-- forgive_debt: book a debt, or a part of it, as forgiven: a free grant that burns at once. Returns the micros forgiven.
create or replace function credits.forgive_debt(
    p_organization_id uuid, p_pool_id uuid, p_amount_micros bigint, p_reason text, p_created_by uuid, p_idempotency_key text,
    p_at timestamptz default null
) returns bigint
language plpgsql volatile security definer set search_path = credits, pg_temp as $$
declare
    v_now timestamptz := credits.lock_gate(p_organization_id, p_at);
    v_hash bytea := credits.hash_of('forgive_debt', p_pool_id::text, p_amount_micros::text, p_reason);
    v_stored jsonb := credits.stored_outcome(p_organization_id, p_idempotency_key, v_hash, v_now);
    v_debt bigint := credits.debt_of(p_organization_id, p_pool_id);
    v_amount bigint := coalesce(p_amount_micros, v_debt);
begin
    if v_stored is not null then
        return (v_stored ->> 'forgiven_micros')::bigint;
    end if;
    if v_debt is null then
        raise exception 'no such open pool' using errcode = 'BR404';
    elsif v_amount < 1 or v_amount > v_debt then
        raise exception 'the pool owes %', credits.spoken(v_debt) using errcode = 'BR450';
    end if;
    perform credits.add_grant(p_organization_id, gen_random_uuid(), p_pool_id, 'forgiveness', v_amount, 0::smallint, true, 0, null, null,
        p_reason, p_created_by, 'forgiveness ' || sha256(convert_to(p_idempotency_key, 'UTF8'))::text, p_at);
    perform credits.pour(p_organization_id, p_pool_id, v_now);
    perform credits.store_outcome(p_organization_id, p_idempotency_key, v_hash, jsonb_build_object('forgiven_micros', v_amount), v_now);
    return v_amount;
end $$;
comment on function credits.forgive_debt is 'Forgives what a pool owes (all when no amount is given), as a booked entry; returns the micros forgiven';

-- set_top_up: when a pool buys more by itself. Setting it again also ends a stop after declines or a runaway.
create or replace function credits.set_top_up(
    p_organization_id uuid, p_pool_id uuid, p_threshold_micros bigint, p_amount_micros bigint, p_ceiling_micros bigint, p_most_per_hour integer,
    p_set_by uuid, p_at timestamptz default null
) returns void
language plpgsql volatile security definer set search_path = credits, pg_temp as $$
declare
    v_now timestamptz := credits.lock_gate(p_organization_id, p_at);
begin
    perform credits.require_amount(p_threshold_micros, 0);
    perform credits.require_amount(p_amount_micros, 1);
    perform credits.require_amount(p_ceiling_micros, 1);
    if p_ceiling_micros < p_amount_micros then
        raise exception 'the monthly ceiling is less than one purchase' using errcode = 'BR400';
    elsif not exists (select from pools where organization_id = p_organization_id and pool_id = p_pool_id and closed_at is null) then
        raise exception 'no such open pool' using errcode = 'BR404';
    end if;
    insert into top_up_policies (organization_id, pool_id, threshold_micros, amount_micros, ceiling_micros, most_per_hour, set_at, set_by)
    values (p_organization_id, p_pool_id, p_threshold_micros, p_amount_micros, p_ceiling_micros, p_most_per_hour, v_now, p_set_by)
    on conflict on constraint top_up_policies_pkey do update set threshold_micros = excluded.threshold_micros, amount_micros = excluded.amount_micros,
        ceiling_micros = excluded.ceiling_micros, most_per_hour = excluded.most_per_hour, set_at = excluded.set_at, set_by = excluded.set_by,
        state = 'active', declines = 0, next_try_at = '-infinity';
end $$;
comment on function credits.set_top_up is 'Sets when a pool buys more credits by itself';

create or replace function credits.end_top_up(p_organization_id uuid, p_pool_id uuid, p_at timestamptz default null) returns void
language plpgsql volatile security definer set search_path = credits, pg_temp as $$
begin
    perform credits.lock_gate(p_organization_id, p_at);
    update top_up_policies set state = 'ended' where organization_id = p_organization_id and pool_id = p_pool_id and state <> 'ended';
    if not found then
        raise exception 'no such policy' using errcode = 'BR404';
    end if;
end $$;
comment on function credits.end_top_up is 'Switches a pool''s automatic purchases off; an open one goes on';

-- begin_top_up: the purchase that a pool must make now: the open one, else a new one where the policy asks for it. Null: none.
-- An open one counts as bought, for the threshold as for the ceiling, and there is never a second.
create or replace function credits.begin_top_up(
    p_organization_id uuid, p_pool_id uuid, p_top_up_id uuid, p_at timestamptz default null
) returns credits.top_ups
language plpgsql volatile security definer set search_path = credits, pg_temp as $$
declare
    v_now timestamptz := credits.lock_gate(p_organization_id, p_at);
    v_policy top_up_policies;
    v_top_up top_ups;
    v_zone text;
    v_month_end timestamptz;
    v_bought bigint;
    v_hour integer;
begin
    select * into v_top_up from top_ups where organization_id = p_organization_id and pool_id = p_pool_id and state = 'pending';
    if found then
        return v_top_up;
    end if;
    select * into v_policy from top_up_policies where organization_id = p_organization_id and pool_id = p_pool_id;
    if not found or v_policy.state <> 'active' or v_policy.next_try_at > v_now or not exists (
        select from balances b join pools p on p.organization_id = b.organization_id and p.pool_id = b.balance_id and p.closed_at is null
        where b.organization_id = p_organization_id and b.balance_id = p_pool_id
          and b.limit_amount - b.used_amount - b.held_amount < v_policy.threshold_micros) then
        return null;
    end if;
    select zone into strict v_zone from identity.organizations where organization_id = p_organization_id;
    select coalesce(sum(amount_micros) filter (where requested_at >= credits.period_start('month', v_zone, v_now)), 0),
        count(*) filter (where requested_at > v_now - interval '1 hour') into v_bought, v_hour
    from top_ups where organization_id = p_organization_id and pool_id = p_pool_id and state <> 'failed'
        and requested_at >= least(credits.period_start('month', v_zone, v_now), v_now - interval '1 hour');
    if v_hour >= v_policy.most_per_hour then
        update top_up_policies set state = 'runaway' where organization_id = p_organization_id and pool_id = p_pool_id;
        perform outbox.post_event(p_organization_id, 'topup.runaway', 'pool', p_pool_id, credits.told(p_organization_id,
            format('%s: automatic purchases were stopped, too many within an hour', credits.spoken_pool(p_organization_id, p_pool_id)),
            array[format('Begun within an hour: %s, each of %s; the most allowed: %s.', v_hour,
                         credits.spoken(v_policy.amount_micros), v_policy.most_per_hour),
                  'Nothing is bought until somebody has looked at it and set the policy again.'],
            'bursar top-ups list --org ORG, then bursar top-ups set --org ORG',
            jsonb_build_object('reason', 'too many within an hour', 'purchases', v_hour, 'amount', credits.as_amount(v_policy.amount_micros))), v_now);
        return null;
    elsif v_bought + v_policy.amount_micros > v_policy.ceiling_micros then
        v_month_end := credits.period_end('month', v_zone, v_now);
        update top_up_policies set next_try_at = v_month_end where organization_id = p_organization_id and pool_id = p_pool_id;
        perform outbox.post_event(p_organization_id, 'topup.failed', 'pool', p_pool_id, credits.told(p_organization_id,
            format('%s: automatic purchases have reached the ceiling of the month', credits.spoken_pool(p_organization_id, p_pool_id)),
            array[format('%s were bought this month; %s more would pass the ceiling of %s.', credits.spoken(v_bought),
                         credits.spoken(v_policy.amount_micros),
                         credits.spoken(v_policy.ceiling_micros)),
                  format('Nothing is bought before %s.', credits.spoken_time(p_organization_id, v_month_end))],
            'bursar top-ups set --org ORG with a higher --ceiling, or bursar credits add AMOUNT --org ORG',
            jsonb_build_object('reason', 'the monthly ceiling is reached', 'bought', credits.as_amount(v_bought),
                'ceiling', credits.as_amount(v_policy.ceiling_micros), 'until', v_month_end)), v_now);
        return null;
    end if;
    insert into top_ups (organization_id, top_up_id, pool_id, amount_micros, requested_at)
    values (p_organization_id, p_top_up_id, p_pool_id, v_policy.amount_micros, v_now) returning * into v_top_up;
    perform outbox.post_event(p_organization_id, 'topup.requested', 'pool', p_pool_id, credits.told(p_organization_id,
        format('%s: %s are to be bought', credits.spoken_pool(p_organization_id, p_pool_id),
               credits.spoken(v_policy.amount_micros)),
        array[format('Less than %s were available.', credits.spoken(v_policy.threshold_micros)),
              format('With this one %s are bought this month; the ceiling is %s.',
                     credits.spoken(v_bought + v_policy.amount_micros),
                     credits.spoken(v_policy.ceiling_micros))],
        format('bursar top-ups list --org ORG; where a person pays: bursar top-ups confirm %s --org ORG', outbox.public_id('top', p_top_up_id)),
        jsonb_build_object('top_up_id', outbox.public_id('top', p_top_up_id), 'amount', credits.as_amount(v_policy.amount_micros))), v_now);
    return v_top_up;
end $$;
comment on function credits.begin_top_up is 'The purchase that a pool must make now, begun when there is none open; null: none';

-- told_top_up: what is told of a purchase that succeeded or failed.
create or replace function credits.told_top_up(p_top_up credits.top_ups) returns jsonb
language sql stable set search_path = credits, pg_temp as $$
    select credits.told(p_top_up.organization_id,
        format('%s: %s %s', credits.spoken_pool(p_top_up.organization_id, p_top_up.pool_id), credits.spoken_amount(a.amount),
               case when p_top_up.state = 'succeeded' then 'were bought' else 'could not be bought' end),
        case when p_top_up.state = 'succeeded'
             then array['Paid: ' || trim_scale(p_top_up.paid_nano_usd / 1000000000.0)::text || ' USD', 'Reference: ' || p_top_up.reference]
             else array['Reason: ' || coalesce(p_top_up.reason, 'none was given'),
                        case when p.state = 'declined' then format('It was declined %s times in a row. Nothing is bought until it is set again.', p.declines)
                             else format('The next purchase is not before %s.', credits.spoken_time(p_top_up.organization_id, p.next_try_at)) end] end,
        case when p_top_up.state = 'succeeded' then 'bursar top-ups list --org ORG'
             else 'bursar top-ups list --org ORG, then bursar top-ups set --org ORG or bursar credits add AMOUNT --org ORG' end,
        jsonb_build_object('top_up_id', outbox.public_id('top', p_top_up.top_up_id), 'amount', a.amount, 'reference', p_top_up.reference,
            'reason', p_top_up.reason))
    from top_up_policies p
    cross join lateral (select credits.as_amount(p_top_up.amount_micros) as amount) a
    where p.organization_id = p_top_up.organization_id and p.pool_id = p_top_up.pool_id;
$$;
comment on function credits.told_top_up is 'What is told of a purchase that succeeded or failed';

-- decide_top_up: an open purchase succeeded (its credits are granted) or failed (the next one waits, longer each time). Deciding the same
-- again changes nothing. One that failed may turn out to have been paid; one that succeeded does not fail any more.
create or replace function credits.decide_top_up(
    p_organization_id uuid, p_top_up_id uuid, p_succeeded boolean, p_paid_nano_usd bigint, p_reference text, p_reason text,
    p_at timestamptz default null
) returns credits.top_ups
language plpgsql volatile security definer set search_path = credits, pg_temp as $$
declare
    v_now timestamptz := credits.lock_gate(p_organization_id, p_at);
    v_top_up top_ups;
    v_grant uuid;
begin
    select * into v_top_up from top_ups where organization_id = p_organization_id and top_up_id = p_top_up_id;
    if not found then
        raise exception 'no such top-up' using errcode = 'BR404';
    elsif v_top_up.state = (case when p_succeeded then 'succeeded' else 'failed' end) then
        return v_top_up;
    elsif v_top_up.state = 'succeeded' then
        raise exception 'it succeeded at %', to_char(v_top_up.decided_at at time zone 'UTC', 'YYYY-MM-DD HH24:MI "UTC"') using errcode = 'BR451';
    end if;
    if p_succeeded then
        v_grant := credits.add_grant(p_organization_id, gen_random_uuid(), v_top_up.pool_id, 'top_up', v_top_up.amount_micros, 100::smallint, false,
            p_paid_nano_usd, null, null, p_reference, null, 'top-up ' || p_top_up_id, p_at);
        update top_up_policies set declines = 0 where organization_id = p_organization_id and pool_id = v_top_up.pool_id;
    else
        update top_up_policies set declines = declines + 1, next_try_at = v_now + interval '1 hour' * 2 ^ declines,
            state = case when declines + 1 >= 6 and state = 'active' then 'declined' else state end
        where organization_id = p_organization_id and pool_id = v_top_up.pool_id;
    end if;
    update top_ups set state = case when p_succeeded then 'succeeded' else 'failed' end, decided_at = v_now, reference = p_reference,
        reason = p_reason, grant_id = v_grant, paid_nano_usd = case when p_succeeded then p_paid_nano_usd end
    where organization_id = p_organization_id and top_up_id = p_top_up_id returning * into v_top_up;
    perform outbox.post_event(p_organization_id, case when p_succeeded then 'topup.succeeded' else 'topup.failed' end, 'pool', v_top_up.pool_id,
        credits.told_top_up(v_top_up), v_now);
    return v_top_up;
end $$;
comment on function credits.decide_top_up is 'Ends an open purchase: grants what was bought, or lets the next one wait';
