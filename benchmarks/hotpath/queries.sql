-- name: add_organizations
insert into identity.organizations (organization_id, slug, name, kind, zone, currency, is_shared_token_pool, created_at)
select id, 'bench-' || replace(id::text, '-', ''), 'Benchmark', 'company', 'Europe/Paris', 'USD', true, clock_timestamp()
from unnest(%(organization_ids)s::uuid[]) id

-- name: add_members
insert into identity.memberships (organization_id, user_id, email, display_name, roles, joined_at)
select org, id, id || '@example.com', 'Somebody', array['member'], clock_timestamp()
from unnest(%(organization_ids)s::uuid[], %(user_ids)s::uuid[]) as m(org, id)

-- name: add_keys
insert into identity.api_keys (organization_id, api_key_id, original_api_key_id, user_id, name, public_id, last4, scopes, created_at)
select org, id, id, user_id, 'Benchmark', replace(id::text, '-', ''), 'abcd', array['inference'], clock_timestamp()
from unnest(%(organization_ids)s::uuid[], %(api_key_ids)s::uuid[], %(user_ids)s::uuid[]) as k(org, id, user_id)

-- name: open_gates
select count(credits.open_organization(id)) from unnest(%(organization_ids)s::uuid[]) id

-- name: open_pools
select count(credits.open_pool(org, id, 'shared', null, 'Shared credits'))
from unnest(%(organization_ids)s::uuid[], %(pool_ids)s::uuid[]) as p(org, id)

-- name: add_grants
select count(credits.add_grant(org, gen_random_uuid(), id, 'purchase', %(micros)s, 100::smallint, false, 0, null, null, null, null, 'opening'))
from unnest(%(organization_ids)s::uuid[], %(pool_ids)s::uuid[]) as p(org, id)

-- name: cap
select count(credits.set_limit(org, gen_random_uuid(), %(scope)s, id, 'credits', null, 'month', micros, 'stops', null))
from unnest(%(organization_ids)s::uuid[], %(ids)s::uuid[], %(micros)s::bigint[]) as c(org, id, micros)

-- name: add_places
-- Teams and departments of an organization, with its members spread over them.
with new_departments as (
    insert into identity.departments (organization_id, department_id, name, created_at)
    select %(organization_id)s, gen_random_uuid(), 'Department ' || nr, clock_timestamp() from generate_series(1, %(departments)s) nr
    returning department_id
), new_teams as (
    insert into identity.teams (organization_id, team_id, name, created_at)
    select %(organization_id)s, gen_random_uuid(), 'Team ' || nr, clock_timestamp() from generate_series(1, %(teams)s) nr
    returning team_id
), numbered as (
    select user_id, row_number() over (order by user_id) as nr from identity.memberships where organization_id = %(organization_id)s
)
update identity.memberships m set team_id = t.team_id, department_id = d.department_id
from numbered n
join (select team_id, row_number() over () as nr from new_teams) t on t.nr = 1 + n.nr %% %(teams)s
join (select department_id, row_number() over () as nr from new_departments) d on d.nr = 1 + n.nr %% %(departments)s
where m.organization_id = %(organization_id)s and m.user_id = n.user_id

-- name: places
select 'team' as scope, team_id as id from identity.teams where organization_id = %(organization_id)s
union all
select 'department', department_id from identity.departments where organization_id = %(organization_id)s

-- name: add_grants_to_pool
select count(credits.add_grant(%(organization_id)s, gen_random_uuid(), %(pool_id)s, 'purchase', %(micros)s, nr::smallint, false, 0, null,
    clock_timestamp() + make_interval(years => nr), null, null, 'grant ' || nr))
from generate_series(1, %(count)s) nr

-- name: cap_each
select count(credits.set_limit(%(organization_id)s, gen_random_uuid(), %(scope)s, id, 'credits', %(model)s, 'month', %(micros)s, 'stops', null,
    null, false, %(is_default)s))
from unnest(%(ids)s::uuid[]) id

-- name: add_plain_balances
insert into bench.balances (organization_id, balance_id, limit_micros)
select org, id, %(micros)s from unnest(%(organization_ids)s::uuid[], %(balance_ids)s::uuid[]) as b(org, id)

-- name: chains
select user_id, chain_id, leg_pool_ids[1], entry_ids,
    -- as in the binary format: microseconds since 2000
    array(select case when isfinite(s) then (extract(epoch from s) * 1000000)::bigint - 946684800000000 else -9223372036854775808 end
          from unnest(entry_starts) s)
from credits.chains where replaced_at is null and refusal is null

-- name: booked
select (select count(*) from ledger.attribution) + (select count(*) from bench.usage)

-- name: lock_balances
select balance_id, limit_micros, used_micros from bench.balances
where organization_id = %(organization_id)s and balance_id = any(%(balance_ids)s) order by balance_id for update

-- name: insert_usage
insert into bench.usage (organization_id, request_id, user_id, api_key_id, provider, model, charged_micros, provider_cost_nano_usd,
    input_tokens, output_tokens)
values (%(organization_id)s, %(request_id)s, %(user_id)s, %(api_key_id)s, %(provider)s, %(model)s, %(micros)s, %(cost)s, %(input)s, %(output)s)

-- name: take
update bench.balances set used_micros = used_micros + %(micros)s
where organization_id = %(organization_id)s and balance_id = any(%(balance_ids)s)

-- name: deduct
select bench.deduct(%(organization_id)s, %(request_id)s, %(user_id)s, %(api_key_id)s, %(balance_ids)s, %(provider)s, %(model)s, %(micros)s,
    %(cost)s, %(input)s, %(output)s)

-- name: write_floor
select bench.write_floor(%b, %b, %b, %b, %b, %b, %b, %b, %b, %b, %b, %b, %b, %b, %b, %b)

-- name: fill_ledger
-- %(rows)s rows in all, of which this writes those from first to last. One in a hundred is the hot pool's.
with payers as materialized (
    select c.organization_id, c.user_id, c.api_key_id, c.chain_id, c.leg_pool_ids[1] as pool_id, row_number() over (order by c.chain_id) - 1 as nr
    from credits.chains c where c.replaced_at is null and c.refusal is null
)
insert into ledger.attribution (organization_id, request_id, booked_at, used_at, user_id, api_key_id, provider, model, chain_id, pool_id,
    position_micros, charged_micros, hold_micros, provider_cost_nano_usd, input_tokens, output_tokens)
select p.organization_id,
    -- as UUIDv7: its time comes first
    encode(substring(int8send((extract(epoch from n.at) * 1000)::bigint) from 3) || '\x7000'::bytea || substring(uuid_send(gen_random_uuid()) from 9),
        'hex')::uuid,
    n.at, n.at, p.user_id, p.api_key_id, 'openai', 'gpt-4o-mini', p.chain_id, p.pool_id, 0, 0, 0, 12340, 120, 80
from (
    select nr, clock_timestamp() - interval '1 hour' * (1 - nr::double precision / %(rows)s) as at
    from generate_series(%(first)s::bigint, %(last)s::bigint) nr
) n
join payers p on p.nr = n.nr %% (select count(*) from payers)

-- name: backends
select pid from pg_stat_activity where application_name = %(name)s

-- name: pgledger_account
select id from pgledger_create_account(%(name)s, 'USD', allow_negative_balance => %(may_be_negative)s)

-- name: pgledger_transfer
select id from pgledger_create_transfer(%(payer)s, %(taker)s, %(amount)s)
