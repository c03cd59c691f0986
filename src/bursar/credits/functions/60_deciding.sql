-- Which requests of a batch fit, and who refuses those that do not.

-- available_of: what a chain could still spend on a model and feature: over its legs the sum, under every limit.
create or replace function credits.available_of(p_organization_id uuid, p_chain_id uuid, p_model text, p_feature text) returns bigint
language sql stable set search_path = credits, pg_temp as $$
    with rooms as (
        select e.leg, min(greatest(0, b.limit_amount - b.used_amount - b.held_amount)) as room
        from chains c
        cross join lateral unnest(c.entry_ids, c.entry_starts, c.entry_metrics, c.entry_legs, c.entry_filters) e(id, start, metric, leg, filter)
        join balances b on b.organization_id = c.organization_id and b.balance_id = e.id and b.period_start = e.start
        where c.organization_id = p_organization_id and c.chain_id = p_chain_id and e.metric = 0 and b.stops
          and (e.leg = 0 or credits.admits(c.leg_filters[e.leg], p_model, p_feature))
          and credits.admits(e.filter, p_model, p_feature)
        group by e.leg
    )
    -- Two legs on one pool (a share, then the open part) are bounded by that pool too, which each leg's room has in it already.
    select least(coalesce(sum(room) filter (where leg > 0), 0)::bigint, min(room) filter (where leg = 0)) from rooms;
$$;
comment on function credits.available_of is 'Micros that a chain could still spend on a model and feature now';

-- rooms_of: available_of for many requests at once; an array by place, null where there is no chain.
create or replace function credits.rooms_of(p_organization_ids uuid[], p_chain_ids uuid[], p_models text[], p_features text[]) returns bigint[]
language plpgsql stable as $$
declare
    v_rooms bigint[];
begin
    with w as materialized (
        select u.place, u.org, u.model, u.feature, c.leg_filters, c.entry_ids, c.entry_starts, c.entry_metrics, c.entry_legs, c.entry_filters,
            credits.conditions_of(c.is_plain, c.entry_conditions, c.entry_ids) as entry_conditions
        from (select unnest(p_organization_ids) as org, unnest(p_chain_ids) as chain_id, unnest(p_models) as model,
                unnest(p_features) as feature, generate_subscripts(p_organization_ids, 1) as place) u
        left join credits.chains c on c.organization_id = u.org and c.chain_id = u.chain_id
    ), asked as materialized (  -- each balance is looked up once, whoever asks of it
        select e.org, e.id, e.start, array_agg(e.place) as places, array_agg(e.leg) as legs
        from (select w.place, w.org, w.model, w.feature, w.leg_filters, w.entry_metrics as metrics, w.entry_filters as filters, unnest(w.entry_ids) as id,
                unnest(w.entry_starts) as start, unnest(w.entry_legs) as leg, unnest(w.entry_conditions) as condition from w) e
        where case when e.condition > 0 then e.metrics[e.condition] = 0 and credits.admits(e.filters[e.condition], e.model, e.feature)
            and (e.leg = 0 or credits.admits(e.leg_filters[e.leg], e.model, e.feature)) else true end
        group by e.id, e.start, e.org
    ), rooms as (
        select e.place, e.leg, min(e.room) as room
        from (select unnest(a.places) as place, unnest(a.legs) as leg, greatest(0, b.limit_amount - b.used_amount - b.held_amount) as room
              from asked a join credits.balances b on b.organization_id = a.org and b.balance_id = a.id and b.period_start = a.start
              where b.stops) e
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

-- asks: whether an entry of a chain asks something of a request, and metric_of: what. Where its condition (entry_conditions) is 0 or null, it asks
-- credits of every request that its customer's own key does not pay; else its metric, leg and filter are looked at. Most entries are of the first kind,
-- and a batch has hundreds. They stand for their expressions, as has_room does.
create or replace function credits.asks(
    p_condition smallint, p_metrics smallint[], p_legs smallint[], p_filters text[], p_leg smallint, p_model text, p_feature text, p_flags integer
) returns boolean language sql immutable parallel safe as $$
    select case when p_condition > 0 then (p_legs[p_condition] = 0 or p_legs[p_condition] = p_leg)
            and credits.admits(p_filters[p_condition], p_model, p_feature) and not (p_metrics[p_condition] = 0 and p_flags & 2 = 2)
        else p_flags & 2 = 0 end
$$;
comment on function credits.asks is 'Whether an entry of a chain asks something of a request';

create or replace function credits.metric_of(p_condition smallint, p_metrics smallint[]) returns smallint language sql immutable parallel safe as $$
    select case when p_condition > 0 then p_metrics[p_condition] else 0::smallint end
$$;
comment on function credits.metric_of is 'What an entry of a chain asks: 0 credits, 1 calls, 2 tokens';

-- take: the one guarded update of a batch's summed demands (authorizes, extends, deductions). What does not come back is tight.
-- With p_chains, p_legs and p_outcomes, the demands go by those. Without them it finds the chains itself, in the same statement, and moves
-- something only where all is plain (is_plain): nothing is known, repeated, held already or paid by the customer's own key, and every chain
-- is current, refuses nothing and has a leg for the request. p_gates and p_versions are the organizations and their
-- limits_version, in any order: looking them up in a list costs less than 128 look-ups of rows.
-- A request that alone exceeds the balance that refused its chain last (tight_id) is hopeless: its demand is left out, so that whoever
-- retries on an empty balance makes nobody else's sum too large.
-- Returns arrays by place: chain, leg and who it is attributed to; the pool and its running total before (for deductions); the room left.
-- Lists are unnested beside each other in the select list, which costs a third of unnesting them in FROM; rows keep the order of places,
-- since each is looked up by a nested loop.
create or replace function credits.take(
    p_organization_ids uuid[], p_actions smallint[], p_request_ids uuid[], p_user_ids uuid[], p_api_key_ids uuid[], p_amounts bigint[],
    p_tokens bigint[], p_flags integer[], p_models text[], p_features text[], p_chains uuid[], p_legs smallint[], p_outcomes smallint[], p_gates uuid[],
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
            unnest(p_models) as model, unnest(p_features) as feature, unnest(p_chains) as chain_id, unnest(p_legs) as leg, unnest(p_outcomes) as outcome,
            generate_series(1, v_n) as place
    ), r as materialized (
        select w.place, w.org, w.action, w.request_id, w.amount, w.tokens, w.flags, w.model, w.feature, c.chain_id, c.team_id, c.department_id, c.department_name,
            l.leg, c.leg_pool_ids[l.leg] as pool_id, cardinality(c.leg_filters) = 1 as is_alone, c.entry_ids, c.entry_starts,
            case when not c.is_plain then c.entry_metrics end as entry_metrics, case when not c.is_plain then c.entry_legs end as entry_legs,
            case when not c.is_plain then c.entry_filters end as entry_filters,
            credits.conditions_of(c.is_plain, c.entry_conditions, c.entry_ids) as entry_conditions,
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
                c.entry_ids, c.entry_starts, c.entry_metrics, c.entry_legs, c.entry_filters, c.entry_conditions, c.is_plain, c.is_strict, c.tight_id, c.tight_start
            from credits.chains c
            where p_chains is null and c.organization_id = w.org and c.user_id = coalesce(w.user_id, v_zero)
              and c.api_key_id = coalesce(w.api_key_id, v_zero) and c.replaced_at is null
            union all
            select c.chain_id, c.limits_version, c.valid_until, c.team_id, c.department_id, c.department_name, c.refusal, c.leg_pool_ids, c.leg_filters,
                c.entry_ids, c.entry_starts, c.entry_metrics, c.entry_legs, c.entry_filters, c.entry_conditions, c.is_plain, c.is_strict, null, null
            from credits.chains c
            where p_chains is not null and c.organization_id = w.org and c.chain_id = w.chain_id
        ) c on true
        left join lateral (
            select h.request_id from credits.holds h where p_chains is null and h.organization_id = w.org and h.request_id = w.request_id
        ) h on true
        cross join lateral (
            -- first_leg costs as much as all else for a request, and where there is one leg for everything it has nothing to find
            select case when p_chains is not null then w.leg when c.is_plain or (cardinality(c.leg_filters) = 1 and c.leg_filters[1] is null)
                        then 1::smallint else credits.first_leg(c.leg_filters, w.model, w.feature) end as leg
        ) l
    ), plain as (
        select p_chains is null and bool_and(is_asked) and count(distinct request_id) = v_n as is_plain from r
    ), demand as (
        select e.place, e.org, e.action, e.id, e.start, e.metric = 0 as is_credits, e.amount
        from (
            select e.place, e.org, e.action, e.id, e.start, credits.metric_of(e.condition, e.metrics) as metric,
                case credits.metric_of(e.condition, e.metrics) when 0 then e.amount when 1 then case e.action when 2 then 0 else 1 end
                    else e.tokens end as amount
            from (
                select r.place, r.org, r.action, r.amount, r.tokens, r.flags, r.model, r.feature, r.leg, r.entry_metrics as metrics,
                    r.entry_legs as legs, r.entry_filters as filters, unnest(r.entry_ids) as id, unnest(r.entry_starts) as start,
                    unnest(r.entry_conditions) as condition
                from r
                where r.is_asked and not r.is_hopeless and (p_chains is not null or (select is_plain from plain))
            ) e
            where credits.asks(e.condition, e.metrics, e.legs, e.filters, e.leg, e.model, e.feature, e.flags)
        ) e
        where e.action <> 2 or e.amount > 0  -- an extension asks what it needs
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
    ), shared as (
        -- What all ask of leaves each of them at most so much. Most other balances have more, and need not be looked at place by place.
        select min(m.room) as room from moved m where cardinality(m.places) = (select count(*) from r where r.is_asked and not r.is_hopeless)
    ), places as (
        -- One row a place: the least room of its balances, and its pool's running total before the batch plus what earlier places drew.
        select p.place, case when bool_or(p.is_alone) then least(min(p.room), case when bool_or(p.is_asked) then (select room from shared) end) end as room,
            max(p.base) + max(p.earlier) as position
        from (
            select unnest(m.places) as place, m.room, m.base, null::bigint as earlier, null::boolean as is_alone, null::boolean as is_asked
            from moved m where m.base is not null or m.room < coalesce((select room from shared), 9223372036854775807)
            union all
            select r.place, null, null, coalesce(credits.total(case when r.action = 5 and r.is_asked and not r.is_hopeless then r.amount else 0 end) over
                (partition by r.org, r.pool_id order by r.place rows between unbounded preceding and 1 preceding), 0), r.is_alone,
                r.is_asked and not r.is_hopeless
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
    p_organization_ids uuid[], p_actions smallint[], p_amounts bigint[], p_tokens bigint[], p_flags integer[], p_models text[], p_features text[],
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
        select w.place::int, w.org, w.action, w.leg as chosen, w.flags, w.model, w.feature, w.chain_id, e.id, e.start, t.id is not null as is_tight,
            w.place = any (p_hopeless) as is_hopeless,
            case e.metric when 0 then w.amount when 1 then case w.action when 2 then 0 else 1 end else w.tokens end as amount
        from unnest(p_organization_ids, p_actions, p_amounts, p_tokens, p_flags, p_models, p_features, p_chains, p_legs, p_outcomes) with ordinality
            as w(org, action, amount, tokens, flags, model, feature, chain_id, leg, outcome, place)
        join chains c on c.organization_id = w.org and c.chain_id = w.chain_id
        left join lateral unnest(c.entry_ids, c.entry_starts, c.entry_metrics, c.entry_legs, c.entry_filters) e(id, start, metric, leg, filter)
            on (e.leg = 0 or e.leg = w.leg) and credits.admits(e.filter, w.model, w.feature) and not (e.metric = 0 and w.flags & 2 = 2)
               and (w.action <> 2 or case e.metric when 0 then w.amount when 1 then 0 else w.tokens end > 0)
        left join tight t on t.org = w.org and t.id = e.id and t.start = e.start
        where w.action in (1, 2, 5) and w.outcome = -1 and not (w.action = 2 and w.amount = 0 and w.tokens = 0)
    ), suspects as (
        select distinct place, org, flags, model, feature, chain_id from applied
        where is_tight or is_hopeless or (action in (1, 5) and chosen = 0 and flags & 2 = 0)
    ), taken as (
        select a.org, a.id, a.start, sum(a.amount) filter (where a.action <> 5)::bigint as held, sum(a.amount) filter (where a.action = 5)::bigint as used
        from applied a where a.place in (select place from suspects) and not a.is_tight and not a.is_hopeless group by 1, 2, 3
    ), touched as (
        select distinct s.org, e.id, e.start
        from suspects s join chains c on c.organization_id = s.org and c.chain_id = s.chain_id
        cross join lateral unnest(c.entry_ids, c.entry_starts, c.entry_filters) e(id, start, filter)
        where credits.admits(e.filter, s.model, s.feature)
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
            on credits.admits(e.filter, p_models[s.place], p_features[s.place])
               and (e.leg = 0 or credits.admits(c.leg_filters[e.leg], p_models[s.place], p_features[s.place]))
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
                continue when v_room is null;  -- not for this model and feature
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
