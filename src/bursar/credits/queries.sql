-- name: open_organization
select credits.open_organization(%(organization_id)s)

-- name: open_pool
select credits.open_pool(%(organization_id)s, %(pool_id)s, %(kind)s, %(owner_user_id)s, %(name)s, %(model_filter)s)

-- name: own_pool
select pool_id from credits.pools
where organization_id = %(organization_id)s and kind in ('shared', 'individual') and model_filter is null and closed_at is null

-- name: pools
select p.pool_id, p.kind, p.owner_user_id, p.name, p.model_filter, b.limit_amount as limit_micros, b.used_amount as used_micros,
    b.held_amount as held_micros, b.excess_amount as excess_micros,
    case when isfinite(p.next_event_at) then p.next_event_at end as next_event_at, p.closed_at is not null as is_closed
from credits.pools p
join credits.balances b on b.organization_id = p.organization_id and b.balance_id = p.pool_id and b.period_start = '-infinity'
where p.organization_id = %(organization_id)s and (p.closed_at is null or %(with_unsettled)s and (b.held_amount > 0 or b.excess_amount > 0))
order by p.kind <> 'shared', p.created_at, p.pool_id

-- name: add_grant
select credits.add_grant(%(organization_id)s, %(grant_id)s, %(pool_id)s, %(source)s, %(amount_micros)s, %(priority)s::smallint, %(is_free)s,
    %(cost_basis_nano_usd)s, %(effective_at)s, %(expires_at)s, %(reason)s, %(created_by)s, %(idempotency_key)s, null,
    %(min_rollover_micros)s, %(max_rollover_micros)s, %(rollover_expires_at)s)

-- name: transfer_credits
select credits.transfer_credits(%(organization_id)s, %(from_pool_id)s, %(to_pool_id)s, %(amount_micros)s, %(reason)s, %(created_by)s,
    %(idempotency_key)s)

-- name: switch_pools
select credits.switch_pools(%(organization_id)s, %(to)s, %(created_by)s, %(idempotency_key)s)

-- name: known_switch
select exists (select from credits.commands
    where organization_id = %(organization_id)s and idempotency_key = %(key)s and kept_until > statement_timestamp())

-- name: refund_charge
select credits.refund_charge(%(organization_id)s, %(request_id)s, %(amount_micros)s, %(reason)s, %(created_by)s, %(idempotency_key)s)

-- name: add_schedule
select credits.add_schedule(%(organization_id)s, %(schedule_id)s, %(pool_id)s, %(source)s, %(amount_micros)s, %(priority)s::smallint, %(is_free)s,
    %(cost_basis_nano_usd)s, %(zone)s, %(anchor_at)s, %(unit)s, %(every)s, %(lasts)s::interval, %(is_lasting)s, %(ends_at)s,
    %(min_rollover_micros)s, %(max_rollover_micros)s, %(reason)s, %(created_by)s, %(idempotency_key)s)

-- name: cancel_schedule
select credits.cancel_schedule(%(organization_id)s, %(schedule_id)s)

-- name: schedules
select schedule_id, pool_id, source, amount_micros, unit, every, zone, anchor_at, is_lasting, min_rollover_micros, max_rollover_micros,
    case when isfinite(next_at) then next_at end as next_at, case when isfinite(ends_at) then ends_at end as ends_at, reason
from credits.grant_schedules where organization_id = %(organization_id)s
order by next_at, created_at, schedule_id

-- name: revenue_of_request
-- The rows of one request bear one time of use, which bounds the partitions.
select r.booked_at, r.revenue_nano_usd
from (select min(used_at) as used_at from ledger.attribution where organization_id = %(organization_id)s and request_id = %(request_id)s) a
cross join lateral credits.revenue_of_requests(%(organization_id)s, a.used_at, a.used_at + interval '1 microsecond', %(request_id)s) r
order by r.booked_at

-- name: refunds_of_request
-- What came back of a request to each grant, and whether it expired at once.
select e.grant_id, sum(e.amount)::bigint as refunded_micros, g.source, g.expires_at <= max(e.booked_at) as has_expired
from ledger.entries e join credits.grants g on g.organization_id = e.organization_id and g.grant_id = e.grant_id
where e.organization_id = %(organization_id)s and e.from_kind = 'usage' and e.from_id = %(request_id)s
group by e.grant_id, g.source, g.expires_at order by min(e.booked_at), e.grant_id

-- name: void_grant
select credits.void_grant(%(organization_id)s, %(grant_id)s, %(reason)s, %(created_by)s, %(idempotency_key)s)

-- name: grants
-- burns_before_next: why it burns before the next one that can be spent in its pool.
select g.grant_id, g.pool_id, g.source, g.amount_micros, s.left_micros, s.state, g.priority, g.is_free, g.cost_basis_nano_usd, g.effective_at,
    case when isfinite(g.expires_at) then g.expires_at end as expires_at, g.reason, g.created_at, g.parent_grant_id,
    case when s.state in ('active', 'lingering') then credits.burn_reason(g, lead(g) over (
        partition by g.pool_id, s.state in ('active', 'lingering')
        order by g.priority, g.expires_at, g.is_free desc, g.effective_at, g.created_at, g.grant_id)) end as burns_before_next
from credits.grants g
join credits.grant_balances s on s.organization_id = g.organization_id and s.grant_id = g.grant_id
where g.organization_id = %(organization_id)s
order by g.pool_id, g.priority, g.expires_at, g.is_free desc, g.effective_at, g.created_at, g.grant_id

-- name: allocate
select credits.allocate(%(organization_id)s, %(allocation_id)s, %(pool_id)s, %(user_id)s, %(kind)s, %(period)s, %(amount_micros)s,
    %(when_empty)s, %(oversubscribe)s, %(created_by)s, %(idempotency_key)s, null, %(carry_micros)s)

-- name: end_allocation
select credits.end_allocation(%(organization_id)s, %(allocation_id)s)

-- name: reallocate
select credits.reallocate(%(organization_id)s, %(allocation_id)s, %(to_allocation_id)s, %(amount_micros)s, %(idempotency_key)s)

-- name: allocations
-- Of a share that is renewed what counts is its period: opening is what was used and held when it began.
select a.allocation_id, a.pool_id, a.user_id, a.kind, a.period, a.amount_micros, a.when_empty, a.carry_micros,
    coalesce(p.carried_micros, 0) as carried_micros, coalesce(p.adjusted_micros, 0) as adjusted_micros,
    greatest(0, coalesce(b.used_amount, 0) - coalesce(p.opening_micros, 0)) as used_micros, coalesce(b.held_amount, 0) as held_micros,
    greatest(0, coalesce(b.limit_amount - b.used_amount - b.held_amount, a.amount_micros)) as available_micros,
    coalesce(p.period_end, case when isfinite(b.period_end) then b.period_end end) as resets_at
from credits.allocations a
left join credits.balances b on b.organization_id = a.organization_id and b.balance_id = a.allocation_id
    and b.period_start <= statement_timestamp() and b.period_end > statement_timestamp()
left join credits.allocation_periods p on p.organization_id = a.organization_id and p.allocation_id = a.allocation_id and p.period_end = a.renews_at
where a.organization_id = %(organization_id)s and a.ended_at is null
order by a.created_at, a.allocation_id

-- name: fold
-- Books what time has changed, so that what is shown is as of now.
select credits.fold(%(organization_id)s)

-- name: set_cycle
select credits.set_cycle(%(organization_id)s, %(anchor)s)

-- name: cycle
select c.zone, c.anchor, p.starts_at, p.ends_at
from credits.calendar_of(%(organization_id)s) c
cross join lateral credits.period_around('cycle', c.zone, c.anchor, statement_timestamp()) p

-- name: set_limit
select credits.set_limit(%(organization_id)s, %(limit_id)s, %(scope)s, %(scope_id)s, %(metric)s, %(model_filter)s, %(period)s, %(amount)s,
    %(action)s, %(created_by)s, null, %(is_strict)s, %(is_default)s, %(within_scope)s, %(within_id)s)

-- name: end_limit
select credits.end_limit(%(organization_id)s, %(limit_id)s)

-- name: limits
select limit_id, scope, scope_id, metric, model_filter, period, amount, action, is_strict, created_at, is_default, within_scope, within_id, balance_id
from credits.limits where organization_id = %(organization_id)s and ended_at is null
order by created_at, limit_id

-- name: is_a_priced_model
select exists (select from pricing.models where model like %(pattern)s)

-- name: metric_of_limit
-- Of a limit, or of the balance that a default counts on.
select metric from credits.limits where organization_id = %(organization_id)s and %(limit_id)s in (limit_id, balance_id)
union all
select metric from credits.counters where organization_id = %(organization_id)s and balance_id = %(limit_id)s
limit 1

-- name: raise_limit
select credits.raise_limit(%(organization_id)s, %(raise_id)s, %(limit_id)s, %(subject_id)s, %(amount)s, %(starts_at)s, %(ends_at)s, %(reason)s,
    %(created_by)s, %(idempotency_key)s)

-- name: end_raise
select credits.end_raise(%(organization_id)s, %(raise_id)s)

-- name: raises
select r.raise_id, r.balance_id, r.limit_id, r.limit_request_id, l.metric, l.scope, coalesce(l.scope_id, k.subject_id) as subject_id, r.amount,
    r.starts_at, least(r.ends_at, r.ended_at) as ends_at, r.reason, r.created_at, r.created_by,
    case when least(r.ends_at, r.ended_at) <= statement_timestamp() then 'ended' when r.starts_at <= statement_timestamp() then 'active'
         else 'scheduled' end as state
from credits.raises r
join credits.limits l on l.organization_id = r.organization_id and l.limit_id = r.limit_id
left join credits.counters k on k.organization_id = r.organization_id and k.balance_id = r.balance_id
where r.organization_id = %(organization_id)s
order by r.created_at, r.raise_id

-- name: request_raise
select credits.request_raise(%(organization_id)s, %(limit_request_id)s, %(limit_id)s, %(subject_id)s, %(user_id)s, %(amount)s, %(until_at)s,
    %(reason)s, %(idempotency_key)s)

-- name: decide_request
select credits.decide_request(%(organization_id)s, %(limit_request_id)s, %(is_approved)s, %(raise_id)s, %(amount)s, %(until_at)s, %(note)s,
    %(decided_by)s)

-- name: limit_requests
select q.limit_request_id, q.balance_id, q.limit_id, l.metric, l.period, l.model_filter, l.scope, coalesce(l.scope_id, k.subject_id) as subject_id,
    q.user_id, m.team_id, q.amount, q.until_at, q.reason, q.created_at, q.lapses_at,
    case when q.state = 'open' and q.lapses_at <= statement_timestamp() then 'lapsed' else q.state end as state,
    q.decided_at, q.decided_by, q.note, r.amount as granted_amount, r.ends_at as granted_until
from credits.limit_requests q
join credits.limits l on l.organization_id = q.organization_id and l.limit_id = q.limit_id
left join credits.counters k on k.organization_id = q.organization_id and k.balance_id = q.balance_id
left join identity.memberships m on m.organization_id = q.organization_id and m.user_id = q.user_id
left join credits.raises r on r.organization_id = q.organization_id and r.limit_request_id = q.limit_request_id
where q.organization_id = %(organization_id)s and (%(limit_request_id)s::uuid is null or q.limit_request_id = %(limit_request_id)s)
order by q.created_at, q.limit_request_id

-- name: current_chain
select credits.current_chain(%(organization_id)s, %(user_id)s, %(api_key_id)s)

-- name: chain_in_use
-- Asks without the gate: of a call that was let through, the chain is there, at most about to be replaced.
select chain_id from credits.chains
where organization_id = %(organization_id)s and user_id = coalesce(%(user_id)s, '00000000-0000-0000-0000-000000000000'::uuid)
  and api_key_id = coalesce(%(api_key_id)s, '00000000-0000-0000-0000-000000000000'::uuid) and replaced_at is null

-- name: chain
-- The pools and limits that a chain checks for a model, each with its balance now and who set it. A balance of a limit shows the limit of its
-- own, else the default that it was counted for last; of a share that is renewed what counts is its period.
select c.refusal, e.id as balance_id, e.leg, (array['credits', 'calls', 'tokens'])[e.metric + 1] as metric, b.kind, b.stops,
    coalesce(l.is_strict, false) as is_strict,
    case when s.opening_micros is null then b.limit_amount
         else s.used + s.held + b.limit_amount - b.used_amount - b.held_amount end as limit_amount,
    case when s.opening_micros is null then b.used_amount else s.used end as used_amount,
    case when s.opening_micros is null then b.held_amount else s.held end as held_amount,
    b.excess_amount,
    coalesce(l.scope, case when a.allocation_id is not null then 'user' when p.kind in ('personal', 'individual') then 'user' else 'organization' end) as scope,
    coalesce(l.scope_id, k.subject_id, a.user_id, p.owner_user_id) as scope_id,
    coalesce(l.period, a.period, 'none') as period,
    case when isfinite(b.period_end) then b.period_end when isfinite(a.renews_at) then a.renews_at end as resets_at,
    coalesce(l.created_by, a.created_by) as owner_id,
    -- Each looked up by itself, since there are many members. (Not coalesce: row-level security lets no index be used for it.)
    (select m.display_name from identity.memberships m
     where m.organization_id = c.organization_id
       and m.user_id = case when l.created_by is null then a.created_by else l.created_by end) as owner_name, o.zone, p.name as pool_name, coalesce(l.model_filter, c.leg_filters[nullif(e.leg, 0)]) as model_filter,
    l.action, l.limit_id, coalesce(l.is_default, false) as is_default, l.within_scope, coalesce(t.name, d.name) as within_name,
    coalesce(r.amount, 0)::bigint as raised_amount, r.ends_at as raised_until
from credits.chains c
join identity.organizations o on o.organization_id = c.organization_id
left join lateral unnest(c.entry_ids, c.entry_starts, c.entry_metrics, c.entry_legs, c.entry_filters)
    with ordinality e(id, start, metric, leg, filter, nr)
    on credits.admits(e.filter, %(model)s, %(feature)s) and (e.leg = 0 or credits.admits(c.leg_filters[e.leg], %(model)s, %(feature)s))
left join credits.balances b on b.organization_id = c.organization_id and b.balance_id = e.id and b.period_start = e.start
left join credits.counters k on k.organization_id = c.organization_id and k.balance_id = e.id
left join lateral (
    select l.* from credits.limits l
    where l.organization_id = c.organization_id and (l.balance_id = e.id or l.limit_id = k.limit_id)
    order by l.ended_at is not null, l.is_default, l.ended_at desc limit 1
) l on true
left join credits.allocations a on a.organization_id = c.organization_id and a.allocation_id = e.id
left join lateral (
    select ap.opening_micros, greatest(0, b.used_amount - ap.opening_micros) as used,
        least(b.held_amount, greatest(0, b.used_amount + b.held_amount - ap.opening_micros)) as held
    from credits.allocation_periods ap
    where ap.organization_id = a.organization_id and ap.allocation_id = a.allocation_id and ap.period_end = a.renews_at
) s on true
left join credits.pools p on p.organization_id = c.organization_id and (p.pool_id = e.id or p.open_part_id = e.id)
left join identity.teams t on t.organization_id = c.organization_id and l.within_scope = 'team' and t.team_id = l.within_id
left join identity.departments d on d.organization_id = c.organization_id and l.within_scope = 'department' and d.department_id = l.within_id
left join lateral (
    select sum(r.amount) as amount, min(r.ends_at) as ends_at from credits.raises r
    where r.organization_id = c.organization_id and r.balance_id = e.id and r.state = 'active' and b.kind = 'limit'
) r on true
where c.organization_id = %(organization_id)s and c.chain_id = %(chain_id)s
order by e.nr

-- name: attribution_of_request
select request_id, booked_at, used_at, kind, user_id, api_key_id, provider_key_id, provider, model, feature, team_id, department_id, department_name,
    conversation_id, chain_id, price_version_id, pool_id, position_micros, charged_micros, hold_micros, provider_cost_nano_usd,
    customer_cost_nano_usd, flags, input_tokens, cache_read_tokens, cache_write_5m_tokens, cache_write_1h_tokens, output_tokens,
    reasoning_tokens, audio_input_tokens, audio_output_tokens, image_input_tokens, image_output_tokens, images, web_searches,
    audio_milliseconds, characters, requests, file_searches, code_sessions
from ledger.attribution where organization_id = %(organization_id)s and request_id = %(request_id)s
order by booked_at, kind

-- name: burns_of_request
-- The grants behind what a request drew, in order; a stretch without grant is what none has paid yet.
with draws as (
    select d.pool_id, d.start, d.end, d.nr
    from credits.draws_of(%(organization_id)s, %(request_id)s) r
    cross join lateral unnest(r.pool_ids, r.starts, r.ends) with ordinality d(pool_id, start, "end", nr)
), paid as (
    select d.nr, d.pool_id, s.grant_id, greatest(s.start_micros, d.start) as start_micros, least(s.end_micros, d.end) as end_micros, s.reason
    from draws d
    cross join lateral (
        select b.start_micros, b.end_micros, b.grant_id, b.reason from credits.burns b
        where b.organization_id = %(organization_id)s and b.pool_id = d.pool_id and b.end_micros > d.start and b.start_micros < d.end
        union all
        select t.start_micros, t.end_micros, t.grant_id, t.reason from credits.tails(%(organization_id)s, d.pool_id) t
        where t.end_micros > d.start and t.start_micros < d.end
    ) s
)
select grant_id, start_micros, end_micros, reason
from (
    select * from paid
    union all
    select d.nr, d.pool_id, null, coalesce((select max(p.end_micros) from paid p where p.nr = d.nr), d.start), d.end, null from draws d
) burns
where end_micros > start_micros order by nr, start_micros

-- name: grants_by_id
select g.grant_id, g.pool_id, g.source, g.amount_micros, s.left_micros, s.state, g.priority, g.is_free, g.cost_basis_nano_usd, g.effective_at,
    case when isfinite(g.expires_at) then g.expires_at end as expires_at, g.reason, g.created_at, g.parent_grant_id, null::text as burns_before_next
from credits.grants g
join credits.grant_states s on s.organization_id = g.organization_id and s.grant_id = g.grant_id
where g.organization_id = %(organization_id)s and g.grant_id = any (%(grant_ids)s)

-- name: hold
select request_id, chain_id, is_sent, amount_micros, progress_micros, provider, model, feature, placed_at, lease_expires_at
from credits.holds where organization_id = %(organization_id)s and request_id = %(request_id)s

-- name: unbilled_request
select request_id, happened_at, outcome, user_id, api_key_id, provider, model, feature, wanted_micros, binding_id, detail
from credits.unbilled_requests where organization_id = %(organization_id)s and request_id = %(request_id)s

-- name: open_holds
-- Batches take a day; an old hold is one of a call (without flag 8192).
select count(*) as holds, coalesce(sum(amount_micros), 0)::bigint as held_micros,
    extract(epoch from clock_timestamp() - min(placed_at) filter (where flags & 8192 = 0))::bigint as oldest_seconds
from credits.holds

-- name: expire_holds
select credits.expire_holds(%(most)s)

-- name: expire_holds_of
select credits.expire_holds_of(%(organization_id)s)

-- name: with_commands_to_forget
-- Each organization is asked by the index.
select o.organization_id from identity.organizations o
where exists (select from credits.commands k where k.organization_id = o.organization_id and k.kept_until <= statement_timestamp())

-- name: forget_commands
select credits.forget_commands(%(organization_id)s, %(most)s)

-- name: with_holds_to_expire
select distinct organization_id from credits.holds where lease_expires_at <= clock_timestamp() order by 1

-- name: ensure_partitions
select ledger.ensure_partition(statement_timestamp() + make_interval(months => n)) from generate_series(0, %(months)s) n

-- name: organization_of_request
select organization_id from ledger.attribution
where request_id = %(request_id)s
  and (%(made_at)s::timestamptz is null
       or booked_at between %(made_at)s::timestamptz - interval '1 day' and %(made_at)s::timestamptz + interval '62 days')
union all
select organization_id from credits.holds where request_id = %(request_id)s
union all
select organization_id from credits.unbilled_requests where request_id = %(request_id)s
limit 1

-- name: reported_hold
select h.organization_id, 'held' as state, nullif(c.user_id, '00000000-0000-0000-0000-000000000000') as user_id,
    nullif(c.api_key_id, '00000000-0000-0000-0000-000000000000') as api_key_id, h.provider, h.model, h.price_version_id,
    h.conversation_id, h.placed_at, h.feature
from credits.holds h join credits.chains c on c.organization_id = h.organization_id and c.chain_id = h.chain_id
where h.organization_id = %(organization_id)s and h.request_id = %(request_id)s and h.flags & 4096 = 4096
union all
select a.organization_id, 'charged', a.user_id, a.api_key_id, a.provider, a.model, a.price_version_id, a.conversation_id, a.used_at, a.feature
from ledger.attribution a
where a.organization_id = %(organization_id)s and a.request_id = %(request_id)s and a.kind = 0 and a.flags & 4096 = 4096
union all
select u.organization_id, u.outcome, u.user_id, u.api_key_id, u.provider, u.model, null, u.conversation_id, u.happened_at, u.feature
from credits.unbilled_requests u
where u.organization_id = %(organization_id)s and u.request_id = %(request_id)s and u.outcome in ('released', 'expired')
    and not exists (select from ledger.attribution a where a.organization_id = u.organization_id and a.request_id = u.request_id)
limit 1

-- name: estimated_requests
select request_id from credits.estimates
where organization_id = (select nullif(current_setting('app.organization_id', true), '')::uuid) and request_id = any (%(request_ids)s)

-- name: open_campaign
select credits.open_campaign(%(organization_id)s, %(campaign_id)s, %(terms)s, %(created_by)s)

-- name: claim_codes
-- Hashes of new texts; a text that is taken (by chance, once in ages) claims nothing.
select count(*) from unnest(%(code_ids)s::uuid[], %(code_hashes)s::bytea[]) c(id, hash)
where route.claim_code(%(organization_id)s, c.id, c.hash)

-- name: add_codes
select credits.add_codes(%(organization_id)s, %(campaign_id)s, %(codes)s)

-- name: revoke_codes
select credits.revoke_codes(%(organization_id)s, %(campaign_id)s, %(code_id)s, %(reason)s)

-- name: find_code
select organization_id, code_id from route.find_code(%(code_hash)s)

-- name: codes
select code_id, campaign_id, hint, redemptions, created_at, revoked_at from credits.codes
where organization_id = %(organization_id)s and campaign_id = %(campaign_id)s and (%(after)s::uuid is null or code_id > %(after)s)
order by code_id limit %(limit)s

-- name: campaigns
select c.campaign_id, c.name, c.amount_micros, c.valid_from, nullif(c.valid_until, 'infinity') as valid_until, c.is_for_members, c.most_per_code,
    c.most_per_person, c.created_at, c.revoked_at,
    (select count(*) from credits.codes k where k.organization_id = c.organization_id and k.campaign_id = c.campaign_id) as codes,
    r.redemptions, r.people, r.granted_micros, b.burnt_micros
from credits.code_campaigns c
cross join lateral (
    select count(*) as redemptions, count(distinct user_id) as people, coalesce(sum(amount_micros), 0)::bigint as granted_micros
    from credits.code_redemptions r where r.organization_id = c.organization_id and r.campaign_id = c.campaign_id
) r
cross join lateral (
    -- By organization, so that each one's grants are looked at once.
    select coalesce(sum(g.burnt_micros), 0)::bigint as burnt_micros
    from (select distinct r.into_organization_id as id from credits.code_redemptions r
          where r.organization_id = c.organization_id and r.campaign_id = c.campaign_id) o
    cross join lateral (
        select sum(g.burnt_micros) as burnt_micros
        from credits.grant_balances g
        join credits.code_redemptions r on r.into_organization_id = g.organization_id and r.grant_id = g.grant_id
        where g.organization_id = o.id and r.organization_id = c.organization_id and r.campaign_id = c.campaign_id
    ) g
) b
where c.organization_id = %(organization_id)s
order by c.created_at desc, c.campaign_id

-- name: open_campaign_of_name
select c.campaign_id, array_remove(array[
        case when c.amount_micros <> %(amount_micros)s then 'amount' end,
        case when c.valid_from <> %(valid_from)s then 'valid_from' end,
        case when c.valid_until <> %(valid_until)s then 'valid_until' end,
        case when c.credits_expire_at <> %(credits_expire_at)s then 'credits_until' end,
        case when c.credits_days is distinct from coalesce(%(credits_days)s, c.credits_days) then 'credits_days' end,
        case when not coalesce(c.domain_hashes @> d.said and c.domain_hashes <@ d.said, d.said is null) then 'domain' end,
        case when c.most_per_code <> %(most_per_code)s then 'per_code' end,
        case when c.most_per_person <> %(most_per_person)s then 'per_person' end,
        case when c.most_per_domain is distinct from coalesce(%(most_per_domain)s, c.most_per_domain) then 'per_domain' end,
        case when c.most_per_organization is distinct from coalesce(%(most_per_organization)s, c.most_per_organization) then 'per_organization' end,
        case when c.most_per_day is distinct from coalesce(%(most_per_day)s, c.most_per_day) then 'per_day' end,
        case when c.most_in_all is distinct from coalesce(%(most_in_all)s, c.most_in_all) then 'in_all' end
    ], null) as other_terms
from credits.code_campaigns c
cross join (select %(domain_hashes)s::bytea[] as said) d
where c.organization_id = %(organization_id)s and c.name = %(name)s and c.revoked_at is null
order by c.created_at desc, c.campaign_id
limit 1

-- name: try_code
select route.try_code(%(subjects)s::bytea[], %(most)s, %(window)s)

-- name: forgive_try
select route.forgive_try(%(subjects)s::bytea[])

-- name: forget_tries
select route.forget_tries(%(window)s)

-- name: redeem_code
select r.redemption_id, r.code_id, r.into_organization_id, r.amount_micros, nullif(r.credits_expire_at, 'infinity') as credits_expire_at,
    r.priority, r.claimed_at, r.grant_id, c.name as campaign, k.hint, r.redemption_id <> %(redemption_id)s as is_again
from credits.redeem_code(%(organization_id)s, %(redemption_id)s, %(code_id)s, %(user_id)s, %(domain_hash)s, %(into_organization_id)s) r
join credits.code_campaigns c on c.organization_id = r.organization_id and c.campaign_id = r.campaign_id
join credits.codes k on k.organization_id = r.organization_id and k.code_id = r.code_id

-- name: grant_code
select credits.grant_code(%(organization_id)s, %(grant_id)s, %(pool_id)s, %(redemption_id)s, %(campaign)s, %(hint)s, %(amount_micros)s,
    %(priority)s::smallint, %(expires_at)s, %(created_by)s)

-- name: finish_redemption
select credits.finish_redemption(%(organization_id)s, %(redemption_id)s, %(grant_id)s)

-- name: unfinished_redemptions
-- Those of a process that ended between claim and grant; what would have expired by now is not granted any more.
select r.organization_id, r.user_id, r.redemption_id, r.code_id, r.into_organization_id, r.amount_micros,
    nullif(r.credits_expire_at, 'infinity') as credits_expire_at, r.priority, r.claimed_at, r.grant_id, c.name as campaign, k.hint,
    true as is_again
from credits.code_redemptions r
join credits.code_campaigns c on c.organization_id = r.organization_id and c.campaign_id = r.campaign_id
join credits.codes k on k.organization_id = r.organization_id and k.code_id = r.code_id
where r.grant_id is null and r.claimed_at < statement_timestamp() - %(older_than)s::interval and r.credits_expire_at > statement_timestamp()
order by r.organization_id, r.redemption_id limit %(most)s

-- name: forgive_debt
select credits.forgive_debt(%(organization_id)s, %(pool_id)s, %(amount_micros)s, %(reason)s, %(created_by)s, %(idempotency_key)s)

-- name: set_top_up
select credits.set_top_up(%(organization_id)s, %(pool_id)s, %(threshold_micros)s, %(amount_micros)s, %(ceiling_micros)s, %(most_per_hour)s,
    %(set_by)s)

-- name: end_top_up
select credits.end_top_up(%(organization_id)s, %(pool_id)s)

-- name: top_up_policies
select t.pool_id, p.name as pool, p.owner_user_id, t.threshold_micros, t.amount_micros, t.ceiling_micros, t.most_per_hour, t.state, t.declines,
    nullif(t.next_try_at, '-infinity') as next_try_at, t.set_at
from credits.top_up_policies t
join credits.pools p on p.organization_id = t.organization_id and p.pool_id = t.pool_id
where t.organization_id = %(organization_id)s
order by t.set_at, t.pool_id

-- name: top_ups
select top_up_id, pool_id, amount_micros, state, requested_at, decided_at, paid_nano_usd, reference, reason, grant_id
from credits.top_ups
where organization_id = %(organization_id)s and (%(before)s::timestamptz is null or requested_at < %(before)s)
order by requested_at desc, top_up_id limit %(limit)s

-- name: pools_to_top_up
-- Of every organization: pools that fell below their threshold, and those with a purchase that is not decided.
select t.organization_id, t.pool_id
from credits.top_up_policies t
join credits.pools p on p.organization_id = t.organization_id and p.pool_id = t.pool_id and p.closed_at is null
join credits.balances b on b.organization_id = t.organization_id and b.balance_id = t.pool_id and b.period_start = '-infinity'
where t.state = 'active' and t.next_try_at <= statement_timestamp() and b.limit_amount - b.used_amount - b.held_amount < t.threshold_micros
union
select organization_id, pool_id from credits.top_ups where state = 'pending'
order by 1, 2

-- name: begin_top_up
select t.top_up_id, t.pool_id, t.amount_micros, t.state, t.requested_at, t.decided_at, t.paid_nano_usd, t.reference, t.reason, t.grant_id
from credits.begin_top_up(%(organization_id)s, %(pool_id)s, %(top_up_id)s) t
where t.top_up_id is not null

-- name: decide_top_up
select t.top_up_id, t.pool_id, t.amount_micros, t.state, t.requested_at, t.decided_at, t.paid_nano_usd, t.reference, t.reason, t.grant_id
from credits.decide_top_up(%(organization_id)s, %(top_up_id)s, %(succeeded)s, %(paid_nano_usd)s, %(reference)s, %(reason)s) t

-- name: forecast_now
select clock_timestamp() as at, zone from identity.organizations where organization_id = %(organization_id)s

-- name: forecast_pool_use
-- What each pool paid, by local day of use before today; what further pools paid of a request is taken from the first.
with span as (
    select o.organization_id, o.zone, date_trunc('day', clock_timestamp() at time zone o.zone) as today
    from identity.organizations o where o.organization_id = %(organization_id)s
), paid as (
    select a.used_at, a.request_id, a.booked_at, a.pool_id, a.charged_micros as micros
    from span s join ledger.attribution a on a.organization_id = s.organization_id
    where a.kind in (0, 1) and a.pool_id is not null
      and a.used_at >= (s.today - interval '60 days') at time zone s.zone and a.used_at < s.today at time zone s.zone
), takes as (
    select p.used_at, p.pool_id as first_id, t.pool_id, t.charged_micros as micros
    from paid p join ledger.attribution_takes t
        on t.organization_id = %(organization_id)s and t.request_id = p.request_id and t.booked_at = p.booked_at
)
select (e.used_at at time zone s.zone)::date as day, e.pool_id, sum(e.micros)::bigint as credits
from span s cross join (
    select used_at, pool_id, micros from paid
    union all select used_at, pool_id, micros from takes
    union all select used_at, first_id, -micros from takes) e
group by 1, 2

-- name: forecast_use
-- Who used how much, by local day before today; with the filters of caps that take it.
with filters as materialized (
    select distinct model_filter from credits.limits
    where organization_id = %(organization_id)s and model_filter is not null and ended_at is null
), used as (
select (a.used_at at time zone o.zone)::date as day, a.user_id, a.api_key_id, a.team_id, a.department_id, a.model, a.feature,
    sum(a.charged_micros)::bigint as credits, count(*) filter (where a.kind = 0) as calls
from identity.organizations o join ledger.attribution a on a.organization_id = o.organization_id
where o.organization_id = %(organization_id)s and a.kind in (0, 1)
  and a.used_at >= (date_trunc('day', clock_timestamp() at time zone o.zone) - interval '60 days') at time zone o.zone
  and a.used_at < date_trunc('day', clock_timestamp() at time zone o.zone) at time zone o.zone
group by 1, 2, 3, 4, 5, 6, 7
)
select u.day, u.user_id, u.api_key_id, u.team_id, u.department_id, u.credits, u.calls,
    array(select f.model_filter from filters f where credits.admits(f.model_filter, u.model, u.feature)) as filters
from used u

-- name: forecast_grants
-- What grants have left now, as pouring now would have it: use that is not poured yet burns in the same order.
with left_now as (
    select g.pool_id, p.name as pool_name, s.left_micros, g.effective_at, case when isfinite(g.expires_at) then g.expires_at end as expires_at,
        g.priority, g.is_free, g.created_at, g.grant_id, s.state,
        b.used_amount - p.poured_micros as unpoured,
        sum(s.left_micros) filter (where s.state in ('active', 'lingering'))
            over (partition by g.pool_id order by g.priority, g.expires_at, g.is_free desc, g.effective_at, g.created_at, g.grant_id) as upto
    from credits.grants g
    join credits.grant_states s on s.organization_id = g.organization_id and s.grant_id = g.grant_id
    join credits.pools p on p.organization_id = g.organization_id and p.pool_id = g.pool_id and p.closed_at is null
    join credits.balances b on b.organization_id = p.organization_id and b.balance_id = p.pool_id and b.period_start = '-infinity'
    where g.organization_id = %(organization_id)s and s.state in ('scheduled', 'active', 'lingering')
      and g.expires_at > clock_timestamp()
)
select pool_id, pool_name, effective_at, expires_at,
    case when state = 'scheduled' then left_micros
         else least(left_micros, greatest(0, upto - unpoured))::bigint end as left_micros
from left_now
order by pool_id, priority, expires_at nulls last, is_free desc, effective_at, created_at, grant_id

-- name: forecast_budgets
-- Caps that stop and shares, with the room they have now; a cap that nobody has met in this period yet has all of it. A share whose renewal is
-- due has what it will have when somebody books that.
select o.kind, o.id, o.scope, o.scope_id, o.metric, o.period, o.model_filter,
    greatest(0, case
        when o.renews_at <= clock_timestamp() then o.amount + least(o.carry, greatest(0, r.room) + (this.nr - due.nr)::numeric * o.amount)::bigint
        when r.room is not null then r.room
        else o.amount + coalesce((
            select sum(x.amount) from credits.raises x
            where x.organization_id = %(organization_id)s and x.balance_id = o.balance_id and x.starts_at <= clock_timestamp()
              and least(x.ends_at, x.ended_at) > clock_timestamp()), 0)::bigint end) as available,
    case when o.period <> 'none' then case
        when o.renews_at > clock_timestamp() and isfinite(o.renews_at) then o.renews_at
        when isfinite(b.period_end) then b.period_end else this.ends_at end end as resets_at
from (
    select 'limit' as kind, l.limit_id as id, coalesce(l.balance_id, l.limit_id) as balance_id, l.scope, l.scope_id, l.metric, l.period,
        l.model_filter, l.amount, 0::bigint as carry, 'infinity'::timestamptz as renews_at, l.created_at
    from credits.limits l
    where l.organization_id = %(organization_id)s and l.ended_at is null and l.action <> 'warns' and l.amount is not null and not l.is_default
    union all
    select 'allocation', a.allocation_id, a.allocation_id, 'user', a.user_id, 'credits', a.period, null, a.amount_micros, a.carry_micros,
        a.renews_at, a.created_at
    from credits.allocations a where a.organization_id = %(organization_id)s and a.ended_at is null) o
cross join credits.calendar_of(%(organization_id)s) z
cross join lateral credits.period_around(o.period, z.zone, z.anchor, clock_timestamp()) this
-- Asked of every row before the condition is: what is not renewed has no date that periods could be reckoned from.
left join lateral credits.period_around(o.period, z.zone, z.anchor, case when isfinite(o.renews_at) then o.renews_at else clock_timestamp() end) due
    on isfinite(o.renews_at)
left join credits.balances b on b.organization_id = %(organization_id)s and b.balance_id = o.balance_id
    and b.period_start <= clock_timestamp() and b.period_end > clock_timestamp()
cross join lateral (select b.limit_amount - b.used_amount - b.held_amount as room) r
order by o.created_at, o.id

-- name: depart
select d.transfer_id, d.user_id, d.organization_id as home_organization_id, d.into_organization_id, d.into_kind, d.amount_micros, d.held_micros,
    d.parts, d.left_at, d.arrived_at
from credits.depart(%(organization_id)s, %(transfer_id)s, %(user_id)s, %(into_organization_id)s, %(into_kind)s, %(created_by)s) d

-- name: arrive
select credits.arrive(%(organization_id)s, %(transfer_id)s, %(user_id)s, %(from_organization_id)s, %(kind)s, %(parts)s, %(created_by)s)

-- name: note_arrival
select credits.note_arrival(%(organization_id)s, %(transfer_id)s)

-- name: departures_under_way
-- Those of a process that ended between leaving and arriving.
select transfer_id, user_id, organization_id as home_organization_id, into_organization_id, into_kind, amount_micros, held_micros, parts, left_at,
    arrived_at
from credits.departures where arrived_at is null and left_at < statement_timestamp() - %(older_than)s::interval
order by organization_id, left_at limit %(most)s

-- name: arrivals
select a.transfer_id, a.user_id, m.email, a.from_organization_id, a.amount_micros, a.arrived_at
from credits.arrivals a
left join identity.memberships m on m.organization_id = a.organization_id and m.user_id = a.user_id
where a.organization_id = %(organization_id)s
order by a.arrived_at desc, a.transfer_id
