-- What the contenders of the benchmark use: tables as an application has them, a function written for one deduction,
-- and the cost floor of a batch. No row-level security, no partitions, one index each: everything in their favor.
create schema bench;

create table bench.balances (
    organization_id uuid not null,
    balance_id uuid not null,
    limit_micros bigint not null,
    used_micros bigint not null default 0,
    primary key (organization_id, balance_id),
    check (used_micros <= limit_micros)
) with (fillfactor = 40, autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_cost_delay = 0);

create table bench.usage (
    organization_id uuid not null,
    request_id uuid not null,
    used_at timestamptz not null default clock_timestamp(),
    user_id uuid not null,
    api_key_id uuid not null,
    provider text not null,
    model text not null,
    charged_micros bigint not null,
    provider_cost_nano_usd bigint not null,
    input_tokens integer not null,
    output_tokens integer not null,
    primary key (organization_id, request_id)
);

-- deduct: one deduction in one call, as somebody would write it who writes functions.
create function bench.deduct(
    p_organization_id uuid, p_request_id uuid, p_user_id uuid, p_api_key_id uuid, p_balance_ids uuid[], p_provider text, p_model text,
    p_micros bigint, p_cost bigint, p_input integer, p_output integer
) returns boolean language plpgsql as $$
declare
    v_moved integer;
begin
    perform 1 from bench.balances where organization_id = p_organization_id and balance_id = any (p_balance_ids)
    order by balance_id for no key update;
    update bench.balances set used_micros = used_micros + p_micros
    where organization_id = p_organization_id and balance_id = any (p_balance_ids) and used_micros + p_micros <= limit_micros;
    get diagnostics v_moved = row_count;
    if v_moved < cardinality(p_balance_ids) then
        raise exception 'not enough credits' using errcode = 'BR402';
    end if;
    insert into bench.usage (organization_id, request_id, user_id, api_key_id, provider, model, charged_micros, provider_cost_nano_usd,
        input_tokens, output_tokens)
    values (p_organization_id, p_request_id, p_user_id, p_api_key_id, p_provider, p_model, p_micros, p_cost, p_input, p_output);
    return true;
end $$;

-- write_floor: the rows that a batch of deductions cannot avoid writing, and nothing else: no decision, no look-up. The attribution rows
-- and the summed balance rows come ready from outside; the tables, columns and indexes are the real ones.
create function bench.write_floor(
    p_organization_ids uuid[], p_request_ids uuid[], p_user_ids uuid[], p_api_key_ids uuid[], p_chain_ids uuid[], p_pool_ids uuid[],
    p_positions bigint[], p_amounts bigint[], p_costs bigint[], p_usages integer[], p_providers text[], p_models text[],
    p_balance_orgs uuid[], p_balance_ids uuid[], p_balance_starts timestamptz[], p_balance_sums bigint[]
) returns integer language plpgsql
set plan_cache_mode = force_generic_plan set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off as $$
declare
    v_now constant timestamptz := clock_timestamp();
begin
    update credits.balances b set used_amount = used_amount + s.amount
    from (
        select unnest(p_balance_orgs) as org, unnest(p_balance_ids) as id, unnest(p_balance_starts) as start, unnest(p_balance_sums) as amount
    ) s
    where b.organization_id = s.org and b.balance_id = s.id and b.period_start = s.start;
    insert into ledger.attribution (organization_id, request_id, booked_at, used_at, kind, user_id, api_key_id, provider, model, chain_id,
        pool_id, position_micros, charged_micros, hold_micros, provider_cost_nano_usd, customer_cost_nano_usd, flags, input_tokens,
        cache_read_tokens, cache_write_5m_tokens, cache_write_1h_tokens, output_tokens, reasoning_tokens, audio_input_tokens,
        audio_output_tokens, image_input_tokens, image_output_tokens, images, web_searches, audio_milliseconds, characters, requests,
        file_searches, code_sessions)
    select w.org, w.request_id, v_now, v_now, 0, w.user_id, w.api_key_id, w.provider, w.model, w.chain_id, w.pool_id, w.position, w.amount, 0,
        w.cost, 0, 0, p_usages[w.at + 1], p_usages[w.at + 2], p_usages[w.at + 3], p_usages[w.at + 4], p_usages[w.at + 5], p_usages[w.at + 6],
        p_usages[w.at + 7], p_usages[w.at + 8], p_usages[w.at + 9], p_usages[w.at + 10], p_usages[w.at + 11], p_usages[w.at + 12],
        p_usages[w.at + 13], p_usages[w.at + 14], p_usages[w.at + 15], p_usages[w.at + 16], p_usages[w.at + 17]
    from (
        select unnest(p_organization_ids) as org, unnest(p_request_ids) as request_id, unnest(p_user_ids) as user_id,
            unnest(p_api_key_ids) as api_key_id, unnest(p_chain_ids) as chain_id, unnest(p_pool_ids) as pool_id, unnest(p_positions) as position,
            unnest(p_amounts) as amount, unnest(p_costs) as cost, unnest(p_providers) as provider, unnest(p_models) as model,
            generate_series(0, 17 * (cardinality(p_amounts) - 1), 17) as at
    ) w;
    return cardinality(p_request_ids);
end $$;
