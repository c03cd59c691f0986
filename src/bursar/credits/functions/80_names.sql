-- A batch of one, and the names that other systems know.

-- expire_holds: end at most p_most holds whose lease is over: a placed one is released; a sent one is charged, marked estimated, at its
-- last progress if it streamed and at its estimate if it did not. Returns how many ended. Run until it returns 0.
create or replace function credits.expire_holds(p_most integer default 500, p_at timestamptz default null) returns integer
language plpgsql volatile security definer set search_path = credits, pg_temp as $$
declare
    v_organizations uuid[];
begin
    -- The gates come first here too: between reading a hold's progress and charging it nothing may change.
    select array_agg(distinct o.organization_id) into v_organizations
    from (select organization_id from holds where lease_expires_at <= coalesce(p_at, clock_timestamp()) order by lease_expires_at, request_id limit p_most) o;
    perform 1 from gates where organization_id = any (v_organizations) order by organization_id for no key update;
    return credits.end_holds(v_organizations, p_most, p_at);
end $$;
comment on function credits.expire_holds is 'Ends holds whose lease is over: releases what was never sent, charges what was; returns how many';

-- expire_holds_of: as expire_holds, of one organization: a simulated instant ends nobody else's holds and waits for no other gate, and one whose
-- holds cannot be ended keeps no other waiting.
create or replace function credits.expire_holds_of(p_organization_id uuid, p_at timestamptz default null) returns integer
language plpgsql volatile security definer set search_path = credits, pg_temp as $$
begin
    perform credits.lock_gate(p_organization_id, p_at);
    return credits.end_holds(array[p_organization_id], null, p_at);
end $$;
comment on function credits.expire_holds_of is 'Ends the holds of one organization whose lease is over';

-- end_holds: what expire_holds does, of organizations whose gates are locked.
create or replace function credits.end_holds(p_organization_ids uuid[], p_most integer, p_at timestamptz) returns integer
language plpgsql volatile set search_path = credits, pg_temp as $$
declare
    v_count integer;
begin
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
            array_agg(h.feature order by h.lease_expires_at, h.request_id) as features,
            count(*)::int as n
        from (
            select *, case when not is_sent then 0 when flags & 8 = 8 then greatest(floor_micros, progress_micros) else amount_micros end as charge
            from holds where organization_id = any (p_organization_ids) and lease_expires_at <= coalesce(p_at, clock_timestamp())
            order by lease_expires_at, request_id limit p_most
        ) h join chains c on c.organization_id = h.organization_id and c.chain_id = h.chain_id
        having count(*) > 0
    ) b
    cross join lateral credits.move_batch(b.orgs[1], b.orgs, b.actions, b.requests, b.users, b.keys, b.amounts, b.tokens, b.costs,
        array(select u.count from generate_series(1, b.n) i, unnest(credits.no_usage()) with ordinality u(count, place) order by i, u.place),
        array_fill(0::bigint, array[b.n]), array_fill(0, array[b.n]), b.flags, b.providers, b.models, b.prices,
        b.provider_keys, b.conversations, array_fill(null::timestamptz, array[b.n]), array_fill(null::text, array[b.n]),
        array_fill(null::bytea, array[b.n]), b.features, p_at) v;
    return v_count;
end $$;
comment on function credits.end_holds is 'Ends at most so many holds, whose lease is over, of some organizations';

-- move_one: a batch of one, for whoever acts for the organization that is set. One alone spends most of its time on what batches share, so a
-- hold or deduction on a plain chain, which asks credits of a few balances and nothing else, is decided here by the same rules (is_plain_way,
-- has_room) without arrays; so is the settle of a hold that is on a plain chain and goes on as it was placed. Whatever is not plain, or lacks
-- room, or has an idempotency key under which anything lies, goes to move_batch.
create or replace function credits.move_one(
    p_organization_id uuid, p_action smallint, p_request_id uuid, p_user_id uuid, p_api_key_id uuid, p_amount bigint, p_tokens bigint,
    p_cost bigint, p_usage integer[], p_mark bigint, p_lease integer, p_flags integer, p_provider text, p_model text, p_price_version_id uuid,
    p_provider_key_id uuid, p_conversation_id uuid, p_used_at timestamptz, p_key text, p_body_hash bytea, p_feature text, p_at timestamptz default null
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
    if p_action in (1, 3, 5) and (p_key is null or (p_body_hash is not null and length(p_key) between 1 and 255)) and p_flags >= 0 and p_request_id is not null and least(p_amount, p_tokens, p_cost, p_mark) >= 0
       and greatest(p_amount, p_tokens, p_cost, p_mark) <= credits.most_micros() and (p_action > 1 or p_lease > 0)
       and cardinality(p_usage) = credits.usage_width() and 0 <= all (p_usage) then
        select next_event_at, limits_version into v_due, v_version from gates where organization_id = p_organization_id for no key update;
        v_now := case when p_at is null then clock_timestamp() else credits.now_under_gate(p_at) end;
        if v_due > v_now and p_key is not null
           and exists (select from commands k where k.organization_id = p_organization_id and k.idempotency_key = p_key) then
            v_due := '-infinity';  -- whether it is the same command is looked at there
        end if;
        if v_due > v_now and p_action = 3 then
            with gone as materialized (
                delete from holds h
                using chains c
                where h.organization_id = p_organization_id and h.request_id = p_request_id and (h.flags | p_flags) & 66 = 0
                  and h.model is not distinct from p_model and h.feature is not distinct from p_feature and c.organization_id = h.organization_id and c.chain_id = h.chain_id and c.is_plain
                returning h.amount_micros as held, c.organization_id as org, c.chain_id, c.user_id, c.api_key_id, c.team_id, c.department_id,
                    c.department_name, c.leg_pool_ids[1] as pool_id, c.entry_ids, c.entry_starts
            ), moved as (
                update balances b set used_amount = used_amount + p_amount, held_amount = held_amount - s.held,
                    excess_amount = greatest(0, used_amount + p_amount + held_amount - s.held - limit_amount)
                from (select g.org, g.held, unnest(g.entry_ids) as id, unnest(g.entry_starts) as start from gone g) s
                where b.organization_id = s.org and b.balance_id = s.id and b.period_start = s.start
                returning b.organization_id as org, b.balance_id as id, case when b.kind = 'pool' then b.used_amount - p_amount end as base,
                    case when b.stops then greatest(0, b.limit_amount - b.used_amount - b.held_amount) end as room,
                    b.kind = 'allocation' and (b.excess_amount > 0 or b.used_amount - p_amount + b.held_amount + s.held > b.limit_amount) as is_over
            ), m as (
                select min(room) as room, max(base) as base, array_agg(org) filter (where is_over) as over_orgs,
                    array_agg(id) filter (where is_over) as over_ids
                from moved
            )
            select * into v_took from gone, m;
            if found then
                if v_took.over_ids is not null then
                    perform credits.reopen_parts(v_took.over_orgs, v_took.over_ids);
                end if;
                v_used := p_amount;
            end if;
        elsif v_due > v_now then
            v_used := case p_action when 5 then p_amount else 0 end;
            with c as materialized (
                select 0::bigint as held, c.organization_id as org, c.chain_id, c.user_id, c.api_key_id, c.team_id, c.department_id,
                    c.department_name, c.leg_pool_ids[1] as pool_id, c.entry_ids, c.entry_starts, cardinality(c.entry_ids) as entries
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
            if v_took.n < v_took.entries then  -- somewhere there is no room: nothing was asked yet, and move_batch finds out who refuses
                update balances b set held_amount = held_amount - p_amount + v_used, used_amount = used_amount - v_used,
                    excess_amount = greatest(0, used_amount + held_amount - p_amount - limit_amount)
                from unnest(v_took.ids, v_took.starts) s(id, start)
                where b.organization_id = p_organization_id and b.balance_id = s.id and b.period_start = s.start;
                v_used := null;
            elsif not found then
                v_used := null;
            end if;
        end if;
    end if;
    if v_used is null then
        select * into strict v_verdict from credits.move_batch(p_organization_id, array[p_organization_id], array[p_action], array[p_request_id],
            array[p_user_id], array[p_api_key_id], array[p_amount], array[p_tokens], array[p_cost], p_usage, array[p_mark], array[p_lease],
            array[p_flags], array[p_provider], array[p_model], array[p_price_version_id], array[p_provider_key_id], array[p_conversation_id],
            array[p_used_at], array[p_key], array[p_body_hash], array[p_feature], p_at);
        return v_verdict;
    end if;
    if p_action = 1 then
        perform credits.post_batch(array[p_organization_id], array[p_action], array[p_request_id], array[p_amount], array[p_tokens],
            array[p_cost], p_usage, array[p_mark], array[p_lease], array[p_flags], array[p_provider], array[p_model],
            array[p_price_version_id], array[p_provider_key_id], array[p_conversation_id], null, array[p_key], array[p_body_hash],
            array[v_took.chain_id], array[1::smallint], array[-1::smallint], null, null, null, null, null, null, null, null, null, null, null,
            null, null, null, array[p_feature], v_now);
        return row(1, 0::smallint, p_request_id, p_amount, 0, v_took.room, null::uuid, null::text)::credits.verdict;
    end if;
    insert into ledger.attribution (organization_id, request_id, booked_at, used_at, kind, user_id, api_key_id, provider_key_id, provider, model,
        team_id, department_id, department_name, conversation_id, chain_id, price_version_id, pool_id, position_micros, charged_micros, hold_micros,
        provider_cost_nano_usd, customer_cost_nano_usd, flags, input_tokens, cache_read_tokens, cache_write_5m_tokens, cache_write_1h_tokens,
        output_tokens, reasoning_tokens, audio_input_tokens, audio_output_tokens, image_input_tokens, image_output_tokens, images, web_searches,
        audio_milliseconds, characters, requests, file_searches, code_sessions, feature)
    values (p_organization_id, p_request_id, v_now, coalesce(p_used_at, v_now), 0, nullif(v_took.user_id, v_zero), nullif(v_took.api_key_id, v_zero),
        p_provider_key_id, p_provider, p_model, v_took.team_id, v_took.department_id, v_took.department_name, p_conversation_id, v_took.chain_id,
        p_price_version_id, v_took.pool_id, v_took.base, p_amount, v_took.held, p_cost, 0, p_flags & ~49, p_usage[1], p_usage[2], p_usage[3],
        p_usage[4], p_usage[5], p_usage[6], p_usage[7], p_usage[8], p_usage[9], p_usage[10], p_usage[11], p_usage[12], p_usage[13], p_usage[14],
        p_usage[15], p_usage[16], p_usage[17], p_feature);
    if p_key is not null then
        insert into commands (organization_id, idempotency_key, body_hash, request_id, outcome, answered_at, kept_until)
        values (p_organization_id, p_key, p_body_hash, p_request_id,
            jsonb_build_object('outcome', 0, 'request_id', p_request_id, 'detail', null, 'binding_id', null, 'held_micros', 0, 'charged_micros', p_amount),
            v_now, v_now + interval '35 days');
    end if;
    return row(1, 0::smallint, p_request_id, 0, p_amount, v_took.room, null::uuid, null::text)::credits.verdict;
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
        credits.hash_of('authorize', p_user_id::text, p_api_key_id::text, p_amount_micros::text, p_model), null, p_at);
$$;
comment on function credits.authorize is 'Holds credits for one request';

create or replace function credits.extend(
    p_organization_id uuid, p_request_id uuid, p_more_micros bigint, p_progress_micros bigint, p_lease_seconds integer default 600,
    p_at timestamptz default null
) returns credits.verdict
language sql volatile security definer set search_path = credits, pg_temp as $$
    select credits.move_one(p_organization_id, 2::smallint, p_request_id, null, null, p_more_micros, 0, 0, credits.no_usage(), p_progress_micros,
        p_lease_seconds, 1, null, null, null, null, null, null, null, null, null, p_at);
$$;
comment on function credits.extend is 'Holds more for a running request, marks its progress and renews its lease';

create or replace function credits.settle(
    p_organization_id uuid, p_request_id uuid, p_user_id uuid, p_api_key_id uuid, p_charged_micros bigint, p_model text,
    p_provider_cost_nano_usd bigint default 0, p_at timestamptz default null
) returns credits.verdict
language sql volatile security definer set search_path = credits, pg_temp as $$
    select credits.move_one(p_organization_id, 3::smallint, p_request_id, p_user_id, p_api_key_id, p_charged_micros, 0, p_provider_cost_nano_usd,
        credits.no_usage(), 0, 0, 0, null, p_model, null, null, null, null, null, null, null, p_at);
$$;
comment on function credits.settle is 'Charges a request its true cost and frees the rest of its hold';

create or replace function credits.release(p_organization_id uuid, p_request_id uuid, p_at timestamptz default null) returns credits.verdict
language sql volatile security definer set search_path = credits, pg_temp as $$
    select credits.move_one(p_organization_id, 4::smallint, p_request_id, null, null, 0, 0, 0, credits.no_usage(), 0, 0, 0, null, null, null, null,
        null, null, null, null, null, p_at);
$$;
comment on function credits.release is 'Frees a hold and charges nothing';

create or replace function credits.deduct(
    p_organization_id uuid, p_request_id uuid, p_user_id uuid, p_api_key_id uuid, p_charged_micros bigint, p_model text,
    p_idempotency_key text default null, p_at timestamptz default null
) returns credits.verdict
language sql volatile security definer set search_path = credits, pg_temp as $$
    select credits.move_one(p_organization_id, 5::smallint, p_request_id, p_user_id, p_api_key_id, p_charged_micros, 0, 0, credits.no_usage(), 0, 0, 32,
        null, p_model, null, null, null, null, p_idempotency_key,
        credits.hash_of('deduct', p_user_id::text, p_api_key_id::text, p_charged_micros::text, p_model), null, p_at);
$$;
comment on function credits.deduct is 'Authorize and settle in one: charges now or refuses';

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
    return v_chain.refusal is null and coalesce(credits.available_of(p_organization_id, v_chain.chain_id, '', null), 0) >= p_amount_micros;
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
