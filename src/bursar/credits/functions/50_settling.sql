-- Booking one request on its chain, the slow way: split over pools, late, or corrected.

-- spread: who pays an amount that is not held: the legs that admit the request, in order, as far as they have room. The rest is the last
-- such leg's excess (where none admits it, the last leg's), because what was used is always charged.
create or replace function credits.spread(p_chain credits.chains, p_model text, p_feature text, p_amount bigint) returns bigint[]
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
        continue when not credits.admits(p_chain.leg_filters[i], p_model, p_feature);
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
    p_chain credits.chains, p_model text, p_feature text, p_is_own_key boolean, p_used bigint[], p_calls bigint, p_tokens bigint,
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
        where credits.admits(e.filter, p_model, p_feature) and not (e.metric = 0 and p_is_own_key)
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
        perform credits.move_legs(v_chain, p_row.model, p_row.feature, v_hold.flags & 2 = 2, v_none, 0, 0, v_held, 1, v_hold.tokens);
        return;
    end if;

    v_paid := v_none;
    for i in 1..cardinality(v_none) loop  -- first what was held, leg by leg
        v_paid[i] := least(v_left, v_held[i]);
        v_left := v_left - v_paid[i];
    end loop;
    if v_left > 0 then
        v_paid := array(select p + m from unnest(v_paid, credits.spread(v_chain, p_row.model, p_row.feature, v_left)) with ordinality u(p, m, leg) order by leg);
    end if;
    perform credits.move_legs(v_chain, p_row.model, p_row.feature, p_flags & 2 = 2, v_paid, 1, p_tokens,
        v_held, case when v_hold.request_id is null then 0 else 1 end, coalesce(v_hold.tokens, 0));

    p_row.organization_id := p_organization_id; p_row.request_id := p_request_id; p_row.booked_at := p_now;
    p_row.used_at := coalesce(p_row.used_at, p_now); p_row.kind := 0; p_row.chain_id := v_chain.chain_id;
    p_row.user_id := nullif(v_chain.user_id, v_zero); p_row.api_key_id := nullif(v_chain.api_key_id, v_zero);
    p_row.team_id := v_chain.team_id; p_row.department_id := v_chain.department_id; p_row.department_name := v_chain.department_name;
    p_row.charged_micros := p_amount; p_row.hold_micros := held_micros; p_row.flags := p_flags & ~49;
    p_row := credits.draw(p_row, v_chain.leg_pool_ids, v_paid);
    p_row.write_number := audit.write_number();
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
    from ledger.attribution a where a.organization_id = p_organization_id and a.request_id = p_request_id and a.kind < 2;  -- refunds are no answer
end $$;
comment on function credits.settle_again is 'Settles a request that was booked before: corrects an estimate, or tells what was charged';

-- book_correction: book the difference (either sign) between what expiry charged by estimate and the true cost, on the same balances.
-- What was too much goes back to the legs that paid it, last first; what was too little is spread as any charge without hold. A pool that has
-- closed since settles it with where the user spends now.
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
    v_row record;
    v_is_closed boolean;
begin
    select * into strict v_first from ledger.attribution
    where organization_id = p_estimate.organization_id and request_id = p_estimate.request_id and booked_at = p_estimate.booked_at;
    select * into strict v_chain from chains where organization_id = p_estimate.organization_id and chain_id = p_estimate.chain_id;
    if v_delta > 0 then
        v_moved := credits.spread(v_chain, v_first.model, v_first.feature, v_delta);
    else
        for i in reverse cardinality(v_moved)..1 loop
            v_moved[i] := -least(v_left, p_estimate.leg_micros[i]);
            v_left := v_left + v_moved[i];
        end loop;
    end if;
    perform credits.move_legs(v_chain, v_first.model, v_first.feature, p_estimate.flags & 2 = 2, v_moved, 0, p_tokens - p_estimate.tokens,
        array_fill(0::bigint, array[cardinality(v_moved)]), 0, 0);

    -- The correction's row has the true usage; the first row keeps its estimate. Sums over both are true.
    p_row.organization_id := p_estimate.organization_id; p_row.request_id := p_estimate.request_id;
    -- A row of its own also where much happens to one request at one simulated instant.
    p_row.booked_at := greatest(p_now, (select max(booked_at) + interval '1 microsecond' from ledger.attribution
        where organization_id = p_estimate.organization_id and request_id = p_estimate.request_id));
    p_row.used_at := v_first.used_at; p_row.kind := 1; p_row.user_id := v_first.user_id; p_row.api_key_id := v_first.api_key_id;
    p_row.provider_key_id := v_first.provider_key_id; p_row.provider := v_first.provider; p_row.model := v_first.model;
    p_row.feature := v_first.feature;
    p_row.team_id := v_first.team_id; p_row.department_id := v_first.department_id; p_row.department_name := v_first.department_name;
    p_row.conversation_id := v_first.conversation_id; p_row.chain_id := v_first.chain_id; p_row.price_version_id := v_first.price_version_id;
    p_row.charged_micros := v_delta; p_row.hold_micros := 0; p_row.flags := 128 | (p_estimate.flags & 4098);
    p_row.provider_cost_nano_usd := case when p_estimate.flags & 2 = 2 then 0 else v_cost end;
    p_row.customer_cost_nano_usd := case when p_estimate.flags & 2 = 2 then v_cost else 0 end;
    p_row.requests := p_row.requests - v_first.requests;
    p_row := credits.draw(p_row, v_chain.leg_pool_ids, v_moved);
    p_row.write_number := audit.write_number();
    insert into ledger.attribution select p_row.*;

    for v_row in
        select m.pool_id, sum(m.moved)::bigint as moved
        from unnest(v_chain.leg_pool_ids, v_moved) m(pool_id, moved) group by 1 having sum(m.moved) <> 0 order by 1
    loop
        v_is_closed := credits.watch_charge(p_estimate.organization_id, v_row.pool_id, v_first.user_id, v_row.moved, p_now);
        if v_row.moved < 0 or v_is_closed then
            -- What comes back to a grant that has expired since is not spendable again; and an empty pool may have something again.
            perform credits.pour(p_estimate.organization_id, v_row.pool_id, p_now);
            perform credits.fold_in_batch(p_estimate.organization_id, v_row.pool_id, p_now);
            perform credits.limits_changed(p_estimate.organization_id);
        end if;
    end loop;
end $$;
comment on function credits.book_correction is 'Books the difference between an estimate that expiry charged and the true cost that came later';

-- attribution_of: the caller's half of an attribution row.
create or replace function credits.attribution_of(
    p_usage integer[], p_cost bigint, p_flags integer, p_provider text, p_model text, p_price_version_id uuid, p_provider_key_id uuid,
    p_conversation_id uuid, p_used_at timestamptz, p_feature text
) returns ledger.attribution
language plpgsql immutable set search_path = credits, pg_temp as $$
declare
    v_row ledger.attribution;
begin
    v_row.provider := p_provider; v_row.model := p_model; v_row.price_version_id := p_price_version_id;
    v_row.provider_key_id := p_provider_key_id; v_row.conversation_id := p_conversation_id; v_row.used_at := p_used_at;
    v_row.feature := p_feature;
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
