-- The batch: settles, extensions and holds decided by one call.

-- came_to_nothing: the request of an accepted command is neither held nor charged: it was released, or its lease ended before it was sent.
create or replace function credits.came_to_nothing(p_command credits.commands) returns boolean
language sql stable set search_path = credits, pg_temp as $$
    select p_command.request_id is not null and p_command.outcome ->> 'outcome' = '0'
        and not exists (select from holds h where h.organization_id = p_command.organization_id and h.request_id = p_command.request_id)
        and not exists (select from ledger.attribution a
                        where a.organization_id = p_command.organization_id and a.request_id = p_command.request_id);
$$;
comment on function credits.came_to_nothing is 'Whether the request of a stored command left nothing behind, so that its key is free again';

-- are_new: nothing is stored under the keys of a batch, and none comes twice: its requests can be decided like those without keys.
create or replace function credits.are_new(p_organization_ids uuid[], p_keys text[], p_body_hashes bytea[]) returns boolean
language plpgsql stable as $$
begin
    return (
        select count(*) = count(distinct w.key) and bool_and(w.body_hash is not null and length(w.key) between 1 and 255
            and not exists (select from credits.commands k where k.organization_id = w.org and k.idempotency_key = w.key))
        from (select unnest(p_organization_ids) as org, unnest(p_keys) as key, unnest(p_body_hashes) as body_hash) w
        where w.key is not null
    );
end $$;
comment on function credits.are_new is 'Whether nothing is stored under the idempotency keys of a batch, which are all different';

-- post_batch: write what move_batch decided: holds, attribution, requests that cost nothing, stored results; one insert each.
create or replace function credits.post_batch(
    p_organization_ids uuid[], p_actions smallint[], p_request_ids uuid[], p_amounts bigint[], p_tokens bigint[], p_costs bigint[],
    p_usages integer[], p_marks bigint[], p_leases integer[], p_flags integer[], p_providers text[], p_models text[],
    p_price_version_ids uuid[], p_provider_key_ids uuid[], p_conversation_ids uuid[], p_used_at timestamptz[], p_keys text[], p_body_hashes bytea[],
    p_chains uuid[], p_legs smallint[], p_outcomes smallint[], p_details text[], p_bindings uuid[], p_held bigint[], p_charged bigint[],
    p_user_ids uuid[], p_api_key_ids uuid[], p_split_places integer[], p_split_legs smallint[], p_split_micros bigint[], p_teams uuid[],
    p_departments uuid[], p_department_names text[], p_pools uuid[], p_positions bigint[], p_features text[], p_now timestamptz
) returns void
language plpgsql volatile as $$
declare
    v_zero constant uuid := '00000000-0000-0000-0000-000000000000';
    v_width constant integer := credits.usage_width();
    v_take_places integer[];
    v_take_pools uuid[];
    v_take_positions bigint[];
    v_take_micros bigint[];
    v_row record;
begin
    if 1 = any (p_actions) then
        insert into credits.holds (organization_id, request_id, chain_id, is_sent, leg, leg_micros, amount_micros, tokens, floor_micros, progress_micros,
            cost_nano_usd, flags, provider, model, price_version_id, provider_key_id, conversation_id, placed_at, lease_expires_at, feature)
        select w.org, w.request_id, w.chain_id, w.flags & 1 = 1, greatest(w.leg, 1::smallint),
            case when w.place = any (p_split_places) then (
                select array_agg(coalesce(s.micros, 0) order by n.leg)
                from generate_series(1, (select cardinality(c.leg_filters) from credits.chains c where c.organization_id = w.org and c.chain_id = w.chain_id)) n(leg)
                left join unnest(p_split_places, p_split_legs, p_split_micros) s(place, leg, micros) on s.place = w.place and s.leg = n.leg) end,
            w.amount, w.tokens, w.mark, w.mark, w.cost, w.flags & 12554, w.provider, w.model, w.price_version_id, w.provider_key_id, w.conversation_id,
            p_now, p_now + make_interval(secs => w.lease), w.feature
        from (
            select unnest(p_organization_ids) as org, unnest(p_actions) as action, unnest(p_request_ids) as request_id, unnest(p_amounts) as amount,
                unnest(p_tokens) as tokens, unnest(p_costs) as cost, unnest(p_marks) as mark, unnest(p_leases) as lease, unnest(p_flags) as flags,
                unnest(p_providers) as provider, unnest(p_models) as model, unnest(p_price_version_ids) as price_version_id,
                unnest(p_provider_key_ids) as provider_key_id, unnest(p_conversation_ids) as conversation_id, unnest(p_chains) as chain_id,
                unnest(p_legs) as leg, unnest(p_outcomes) as outcome, unnest(p_features) as feature, generate_subscripts(p_actions, 1) as place
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
            audio_milliseconds, characters, requests, file_searches, code_sessions, feature)
        select w.org, w.request_id, p_now, coalesce(w.used_at, p_now), 0, nullif(w.user_id, v_zero), nullif(w.api_key_id, v_zero), w.provider_key_id,
            w.provider, w.model, w.team_id, w.department_id, w.department_name, w.conversation_id, w.chain_id, w.price_version_id, w.pool_id, w.position,
            w.charged, w.held, case when w.flags & 2 = 2 then 0 else w.cost end, case when w.flags & 2 = 2 then w.cost else 0 end, w.flags & ~49,
            p_usages[w.at + 1], p_usages[w.at + 2], p_usages[w.at + 3], p_usages[w.at + 4], p_usages[w.at + 5], p_usages[w.at + 6], p_usages[w.at + 7],
            p_usages[w.at + 8], p_usages[w.at + 9], p_usages[w.at + 10], p_usages[w.at + 11], p_usages[w.at + 12], p_usages[w.at + 13],
            p_usages[w.at + 14], p_usages[w.at + 15], p_usages[w.at + 16], p_usages[w.at + 17], w.feature
        from (
            select unnest(p_organization_ids) as org, unnest(p_actions) as action, unnest(p_request_ids) as request_id, unnest(p_user_ids) as user_id,
                unnest(p_api_key_ids) as api_key_id, unnest(p_costs) as cost, unnest(p_flags) as flags, unnest(p_providers) as provider,
                unnest(p_models) as model, unnest(p_price_version_ids) as price_version_id, unnest(p_provider_key_ids) as provider_key_id,
                unnest(p_conversation_ids) as conversation_id, unnest(p_used_at) as used_at, unnest(p_chains) as chain_id,
                unnest(p_outcomes) as outcome, unnest(p_held) as held, unnest(p_charged) as charged, unnest(p_teams) as team_id,
                unnest(p_departments) as department_id, unnest(p_department_names) as department_name, unnest(p_pools) as pool_id,
                unnest(p_positions) as position, unnest(p_features) as feature, generate_series(0, v_width * (cardinality(p_actions) - 1), v_width) as at
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
            wanted_micros, binding_id, detail, feature)
        select w.org, w.request_id, p_now,
            case when w.action <> 4 then 'refused' when w.flags & 64 = 64 then 'expired' else 'released' end,
            nullif(w.user_id, v_zero), nullif(w.api_key_id, v_zero), w.provider, w.model, w.conversation_id,
            case w.action when 4 then w.held else w.amount end, w.binding_id, w.detail, w.feature
        from (
            select unnest(p_organization_ids) as org, unnest(p_actions) as action, unnest(p_request_ids) as request_id, unnest(p_user_ids) as user_id,
                unnest(p_api_key_ids) as api_key_id, unnest(p_amounts) as amount, unnest(p_flags) as flags, unnest(p_providers) as provider,
                unnest(p_models) as model, unnest(p_conversation_ids) as conversation_id, unnest(p_outcomes) as outcome,
                unnest(p_details) as detail, unnest(p_bindings) as binding_id, unnest(p_held) as held, unnest(p_features) as feature
        ) w
        where (w.action in (1, 5) and w.outcome = 1) or (w.action = 4 and w.outcome in (-1, 9))
        on conflict do nothing;
    end if;

    if array_remove(p_keys, null) <> '{}' then
        -- A released or expired request had no outcome: its key may be used again. Whatever lies under a key that was found free goes.
        -- Each key is looked up by itself (offset 0 keeps it so): a plan made while there were few commands would read them all ever after.
        for v_row in
            select w.org, w.key
            from unnest(p_organization_ids, p_keys, p_actions, p_request_ids, p_outcomes, p_details) w(org, key, action, request_id, outcome, detail)
            cross join lateral (
                select c.kept_until, c.request_id from credits.commands c
                where c.organization_id = w.org and c.idempotency_key = w.key offset 0
            ) k
            where k.kept_until <= p_now or case when w.action = 4 then w.outcome in (-1, 9) and k.request_id = w.request_id
                                                else w.outcome in (-1, 1, 9) or (w.outcome = 6 and w.detail <> 'request_invalid') end
        loop
            delete from credits.commands where organization_id = v_row.org and idempotency_key = v_row.key;
        end loop;
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
-- conversations, instants, keys, hashes and features may be null as a whole.
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
--   p_features       what the request is for, which filters by feature go by
--   p_at             null; the simulator's instant
-- Returns one verdict a place: 0 accepted, 1 refused by a balance, 2 wait (only open holds stand in the way), 3 known: the stored
-- acceptance, 4 there is no such hold, 5 the key was used with another body, 6 not allowed at all, 7 known: the stored refusal, 8 ask again
-- with another amount, nothing was stored: a strict limit takes no guess (detail strict), or there is no room (flag 1024).
create or replace function credits.move_batch(
    p_route uuid, p_organization_ids uuid[], p_actions smallint[], p_request_ids uuid[], p_user_ids uuid[], p_api_key_ids uuid[],
    p_amounts bigint[], p_tokens bigint[], p_costs bigint[], p_usages integer[], p_marks bigint[], p_leases integer[], p_flags integer[],
    p_providers text[], p_models text[], p_price_version_ids uuid[], p_provider_key_ids uuid[], p_conversation_ids uuid[],
    p_used_at timestamptz[], p_keys text[], p_body_hashes bytea[], p_features text[], p_at timestamptz default null
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
             coalesce(cardinality(p_keys), v_n), coalesce(cardinality(p_body_hashes), v_n),
             coalesce(cardinality(p_features), v_n)] <> array_fill(v_n, array[20])
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
    if p_actions <@ array[1, 5]::smallint[]
       and (coalesce(array_remove(p_keys, null), '{}') = '{}' or credits.are_new(p_organization_ids, p_keys, p_body_hashes))
       and 0 <= all (p_amounts) and v_most >= all (p_amounts) and 0 <= all (p_tokens) and v_most >= all (p_tokens)
       and 0 <= all (p_costs) and v_most >= all (p_costs) and 0 <= all (p_marks) and v_most >= all (p_marks)
       and 0 <= all (p_flags) and (0 < all (p_leases) or not 1 = any (p_actions)) then
        select t.is_plain, t.chains, t.legs, t.teams, t.departments, t.department_names, t.pools, t.positions, t.rooms,
            t.tight_orgs, t.tight_ids, t.tight_starts, t.hopeless
        into v_is_plain, v_chains, v_legs, v_teams, v_departments, v_department_names, v_pools, v_positions, v_rooms,
            v_tight_orgs, v_tight_ids, v_tight_starts, v_hopeless
        from credits.take(p_organization_ids, p_actions, p_request_ids, p_user_ids, p_api_key_ids, p_amounts, p_tokens, p_flags, p_models,
            p_features, null, null, null, v_gates, v_versions, v_now) t;
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
                    p_body_hashes[v_row.place:v_row.place], p_features[v_row.place:v_row.place], p_at) v;
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
                         else credits.first_leg(c.leg_filters, w.model, w.feature) end as leg,
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
                    (h.chain_id is not null and w.action <> 1 and (h.model is distinct from w.model or h.feature is distinct from w.feature
                        or (h.flags & 2) <> (w.flags & 2)))
                        or (w.flags & 2 = 2 and w.amount > 0) or (w.action = 2 and w.flags & 2048 = 2048) as is_bent
                from unnest(p_organization_ids, p_actions, p_request_ids, p_user_ids, p_api_key_ids, p_amounts, p_tokens, p_costs, p_marks, p_leases,
                        p_flags, p_models, p_keys, p_body_hashes, p_features)
                    with ordinality as w(org, action, request_id, user_id, api_key_id, amount, tokens, cost, mark, lease, flags, model, key, body_hash,
                        feature, place)
                cross join lateral (select w.request_id is not null and w.action between 1 and 5 and w.flags >= 0
                    and w.amount between 0 and v_most and w.tokens between 0 and v_most and w.cost between 0 and v_most and w.mark between 0 and v_most
                    and (w.action > 2 or w.lease > 0)
                    and (w.key is null or (w.body_hash is not null and length(w.key) between 1 and 255)) as is_valid) v
                left join gates g on g.organization_id = w.org
                left join holds h on h.organization_id = w.org and h.request_id = w.request_id
                left join chains c on w.action in (1, 5) and c.organization_id = w.org and c.user_id = coalesce(w.user_id, v_zero)
                    and c.api_key_id = coalesce(w.api_key_id, v_zero) and c.replaced_at is null
                cross join lateral (select case when w.action = 1 and w.flags & 512 = 512 and c.is_strict
                    then credits.is_strict_for(c, w.model, w.feature, w.flags & 2 = 2) else false end as is_guess_under_strict) s
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
            -- A request goes on as it was held: on its model, for its feature, and at no charge where the customer's own key pays. Of what an extension wants
            -- held in all, only what is not held yet is asked for.
            select array_agg(case when t.is_own then 0 when not t.is_total then w.amount
                                  when w.amount > h.amount_micros then w.amount - h.amount_micros else 0 end order by w.place),
                array_agg(case when not t.is_total then w.tokens when w.tokens > h.tokens then w.tokens - h.tokens else 0 end order by w.place),
                array_agg(case when not t.is_total then w.cost when w.cost > h.cost_nano_usd then w.cost - h.cost_nano_usd else 0 end order by w.place),
                array_agg((w.flags & ~2) | case when t.is_own then 2 else 0 end order by w.place),
                array_agg(case when h.chain_id is null or w.action = 1 then w.model else h.model end order by w.place),
                array_agg(case when h.chain_id is null or w.action = 1 then w.feature else h.feature end order by w.place)
            into p_amounts, p_tokens, p_costs, p_flags, p_models, p_features
            from unnest(p_organization_ids, p_actions, p_request_ids, p_amounts, p_tokens, p_costs, p_flags, p_models, p_features) with ordinality
                w(org, action, request_id, amount, tokens, cost, flags, model, feature, place)
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
                left join lateral (
                    select k.outcome, k.body_hash from commands k
                    where k.organization_id = w.org and k.idempotency_key = w.key and k.kept_until > v_now and not credits.came_to_nothing(k)
                    offset 0  -- as in post_batch
                ) k on true
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
                                    where organization_id = w.org and request_id = w.request_id and kind < 2) a
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
                            p_conversation_ids[v_row.place], p_used_at[v_row.place], p_features[v_row.place]),
                        v_now);
                    v_outcomes[v_row.place] := case when v_booked.outcome = 0 then 9 else v_booked.outcome end;  -- 9: accepted, booked already
                    v_charged[v_row.place] := v_booked.charged_micros;
                    v_held[v_row.place] := v_booked.held_micros;
                    if v_booked.outcome = 6 then
                        v_details[v_row.place] := 'no_pool';
                    end if;
                end loop;
                -- What a correction gave back to an expired grant may linger for holds that end in this very batch.
                v_lingering := v_lingering or exists (select from gates where organization_id = any (p_organization_ids) and next_event_at = '-infinity');
            end if;
            with gone as (
                delete from holds h
                using unnest(p_organization_ids, p_request_ids, p_actions, p_amounts, p_tokens, v_outcomes, p_flags)
                    w(org, request_id, action, amount, tokens, outcome, flags)
                where w.action in (3, 4) and w.outcome = -1 and h.organization_id = w.org and h.request_id = w.request_id
                returning h.organization_id as org, h.chain_id, h.leg, h.model, h.feature, h.flags | w.flags as flags, h.amount_micros, h.tokens as held_tokens,
                    case w.action when 3 then w.amount else 0 end as charged, case w.action when 3 then w.tokens else 0 end as tokens,
                    case w.action when 3 then 1 else 0 end as calls
            ), asked as (
                select e.org, e.id, e.start,
                    case e.metric when 0 then e.charged when 1 then e.calls else e.tokens end as used,
                    case e.metric when 0 then e.amount_micros when 1 then 1 else e.held_tokens end as held
                from (
                    select e.*, credits.metric_of(e.condition, e.metrics) as metric
                    from (
                        select g.*, c.entry_metrics as metrics, c.entry_legs as legs, c.entry_filters as filters,
                            unnest(c.entry_ids) as id, unnest(c.entry_starts) as start,
                            unnest(credits.conditions_of(c.is_plain, c.entry_conditions, c.entry_ids)) as condition
                        from gone g join chains c on c.organization_id = g.org and c.chain_id = g.chain_id
                    ) e
                    where credits.asks(e.condition, e.metrics, e.legs, e.filters, e.leg, e.model, e.feature, e.flags)
                ) e
            ), deltas as materialized (
                select org, id, start, credits.total(used) as used, credits.total(held) as held
                from asked group by id, start, org
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
                for v_row in
                    select organization_id, pool_id from pools where next_event_at <= v_now and organization_id = any (p_organization_ids) order by 1, 2
                loop
                    perform credits.fold_in_batch(v_row.organization_id, v_row.pool_id, v_now);
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
                p_features, v_chains, v_legs, v_outcomes, v_gates, v_versions, v_now) t;
            -- No leg may pay for the request: nothing was asked of any pool.
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
        from credits.decide_tight(p_organization_ids, p_actions, p_amounts, p_tokens, p_flags, p_models, p_features, v_chains, v_legs, v_outcomes,
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
        v_split_places, v_split_legs, v_split_micros, v_teams, v_departments, v_department_names, v_pools, v_positions, p_features, v_now);

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
        v_rooms := credits.rooms_of(p_organization_ids, v_chains, p_models, p_features);
    elsif array_position(v_rooms, null) is not null then
        v_rooms := array(select coalesce(u.room, u.other) from (
            select unnest(v_rooms) as room, unnest(credits.rooms_of(p_organization_ids, array(select case when r is null then c end
                from (select unnest(v_rooms) as r, unnest(v_chains) as c) m), p_models, p_features)) as other) u);
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
