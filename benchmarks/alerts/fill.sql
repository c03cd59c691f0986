-- name: without_guards
set session_replication_role = replica

-- name: organizations
insert into identity.organizations (organization_id, slug, name, kind, zone, currency, is_shared_token_pool, created_at)
select bench.org(o), 'o' || o, 'O' || o, 'company', 'UTC', 'USD', true, now() from generate_series(1, %(organizations)s) o

-- name: gates
insert into credits.gates (organization_id) select bench.org(o) from generate_series(1, %(organizations)s) o

-- name: pools
insert into credits.pools (organization_id, pool_id, kind, name, created_at)
select bench.org(o), bench.id(o, 0), 'shared', 'Shared credits', now() from generate_series(1, %(organizations)s) o

-- name: grants
insert into credits.grants (organization_id, grant_id, pool_id, source, amount_micros, effective_at, created_at)
select bench.org(o), bench.id(o, -1), bench.id(o, 0), 'purchase', 1000000000, now(), now() from generate_series(1, %(organizations)s) o

-- name: grant_states
insert into credits.grant_states (organization_id, grant_id, pool_id, state, left_micros)
select bench.org(o), bench.id(o, -1), bench.id(o, 0), 'active', 1000000000 from generate_series(1, %(organizations)s) o

-- name: pool_balances
insert into credits.balances (organization_id, balance_id, kind, limit_amount, used_amount)
select bench.org(o), bench.id(o, 0), 'pool', 1000000000, (random() * 900000000)::bigint from generate_series(1, %(organizations)s) o

-- name: limits
insert into credits.limits (organization_id, limit_id, balance_id, scope, scope_id, period, amount, created_at)
select bench.org(o), bench.id(o, m), bench.id(o, m), 'user', bench.id(o, m), 'day', 1000000, now()
from generate_series(1, %(organizations)s) o, generate_series(1, %(members)s) m

-- name: limit_balances
-- Every tenth cap is more than half used.
insert into credits.balances (organization_id, balance_id, period_start, period_end, kind, limit_amount, used_amount)
select bench.org(o), bench.id(o, m), date_trunc('day', now()), date_trunc('day', now()) + interval '1 day', 'limit', 1000000,
    case when m %% 10 = 0 then 500000 + (random() * 490000)::bigint else (random() * 450000)::bigint end
from generate_series(1, %(organizations)s) o, generate_series(1, %(members)s) m

-- name: chains
insert into credits.chains (organization_id, chain_id, user_id, api_key_id, limits_version, valid_until, leg_pool_ids, leg_filters, entry_ids,
    entry_starts, entry_metrics, entry_legs, entry_filters, is_plain, built_at)
select bench.org(o), bench.id(o, m), bench.id(o, m), bench.id(o, m), 1, 'infinity', array[bench.id(o, 0)], array[null::text],
    array[bench.id(o, m), bench.id(o, 0)], array[date_trunc('day', now()), '-infinity'], array[0, 0]::smallint[], array[0, 1]::smallint[],
    array[null, null]::text[], true, now()
from generate_series(1, %(organizations)s) o, generate_series(1, %(members)s) m

-- name: told
-- As if everything that is reached now had been told: what a look costs that finds nothing new.
insert into alerts.reached (organization_id, rule_id, balance_id, period_start, level, limit_amount, used_amount)
select c.organization_id, c.rule_id, c.balance_id, c.period_start::timestamptz, c.level, c.limit_amount, c.used_amount
from (select array_agg(organization_id) as o, array_agg(balance_id) as b, array_agg(period_start) as p from credits.balances) w
cross join lateral alerts.crossed(w.o, w.b, w.p, now()) c

-- name: requests
-- Evenly over the seconds before now, of members drawn from all.
insert into ledger.attribution (organization_id, request_id, booked_at, used_at, user_id, chain_id, pool_id, charged_micros, hold_micros,
    provider_cost_nano_usd)
select bench.org(o), gen_random_uuid(), t, t, bench.id(o, m), bench.id(o, m), bench.id(o, 0), 0, 0, 0
from (select 1 + floor(random() * %(drawn_from)s)::integer as o, 1 + floor(random() * %(members)s)::integer as m,
        clock_timestamp() - random() * make_interval(secs => %(seconds)s) as t
      from generate_series(1, %(requests)s)) r
