-- What a simulation calls and reads. The money functions take its instant as their last argument.

-- name: open_stage
select identity.open_stage(%(organization_id)s, %(zone)s, %(at)s, %(departments)s, %(teams)s, %(users)s, %(keys)s)

-- name: open_organization
select credits.open_organization(%(organization_id)s)

-- name: open_pool
select credits.open_pool(%(organization_id)s, %(pool_id)s, %(kind)s, %(user_id)s, %(name)s, %(models)s, %(at)s)

-- name: add_grant
select credits.add_grant(%(organization_id)s, %(grant_id)s, %(pool_id)s, %(source)s, %(amount)s, %(priority)s::smallint, %(is_free)s,
    %(cost_basis)s, %(effective_at)s, %(expires_at)s, %(name)s, null, %(key)s, %(at)s, %(least)s, %(most)s, %(rollover_expires_at)s)

-- name: add_schedule
select credits.add_schedule(%(organization_id)s, %(schedule_id)s, %(pool_id)s, %(source)s, %(amount)s, %(priority)s::smallint, %(is_free)s,
    %(cost_basis)s, %(zone)s, %(anchor)s, %(unit)s, %(every)s, null, false, %(ends_at)s, %(least)s, %(most)s, %(name)s, null, %(key)s, %(at)s)

-- name: cancel_schedule
select credits.cancel_schedule(%(organization_id)s, %(schedule_id)s, %(at)s)

-- name: reset_pool
select credits.reset_pool(%(organization_id)s, %(pool_id)s, %(grant_ids)s, %(least)s, %(most)s, %(keeps_debt)s, %(key)s, %(at)s)

-- name: refund
select credits.refund_charge(%(organization_id)s, %(request_id)s, %(amount)s, 'refunded', null, %(key)s, %(at)s)

-- name: transfer
select credits.transfer_credits(%(organization_id)s, %(from_pool_id)s, %(to_pool_id)s, %(amount)s, 'transferred', null, %(key)s, %(at)s)

-- name: void_grant
select credits.void_grant(%(organization_id)s, %(grant_id)s, 'voided', null, %(key)s, %(at)s)

-- name: allocate
select credits.allocate(%(organization_id)s, %(allocation_id)s, %(pool_id)s, %(user_id)s, %(kind)s, %(period)s, %(amount)s, %(when_empty)s,
    %(oversubscribe)s, null, %(key)s, %(at)s, %(carry)s)

-- name: end_allocation
select credits.end_allocation(%(organization_id)s, %(allocation_id)s, %(at)s)

-- name: set_limit
select credits.set_limit(%(organization_id)s, %(limit_id)s, %(scope)s, %(scope_id)s, %(metric)s, %(models)s, %(period)s, %(amount)s, %(action)s,
    null, %(at)s)

-- name: end_limit
select credits.end_limit(%(organization_id)s, %(limit_id)s, %(at)s)

-- name: expire_holds
select credits.expire_holds_of(%(organization_id)s, %(at)s)

-- name: bring_up_to_date
select credits.bring_up_to_date(%(organization_id)s, %(at)s)

-- name: open_part
select credits.told_open_part(%(organization_id)s, %(pool_id)s)

-- name: next_events
select grants_at, holds_at from credits.told_next_events(%(organization_id)s)

-- name: pool_figures
select * from credits.told_pools(%(organization_id)s)

-- name: grant_figures
select * from credits.told_grants(%(organization_id)s)

-- name: limit_figures
select * from credits.told_limits(%(organization_id)s, %(at)s)

-- name: hold_figures
select * from credits.told_holds(%(organization_id)s)

-- The past of a real organization, read by bursar_platform.

-- name: past_organization
select zone, coalesce((select anchored_at from credits.gates g where g.organization_id = o.organization_id), o.created_at) as anchored_at,
    date_trunc('month', %(since)s at time zone zone) at time zone zone as month_start
from identity.organizations o where o.organization_id = %(organization_id)s

-- name: past_people
select user_id as id, coalesce(nullif(display_name, ''), email) as name from identity.memberships where organization_id = %(organization_id)s
union all select department_id, name from identity.departments where organization_id = %(organization_id)s
union all select team_id, name from identity.teams where organization_id = %(organization_id)s
union all select api_key_id, name from identity.api_keys where organization_id = %(organization_id)s

-- name: past_rotations
select api_key_id as id, original_api_key_id as original from identity.api_keys
where organization_id = %(organization_id)s and original_api_key_id <> api_key_id

-- name: past_askers
-- Everybody who used something until the end, with team and department as they were then.
select distinct user_id, api_key_id, team_id, department_id from ledger.attribution
where organization_id = %(organization_id)s and booked_at < %(until)s
union
select distinct user_id, api_key_id, null::uuid, null::uuid from credits.unbilled_requests
where organization_id = %(organization_id)s and outcome = 'refused' and happened_at >= %(since)s and happened_at < %(until)s

-- name: past_pools
select pool_id, kind, owner_user_id, name, model_filter, created_at from credits.pools
where organization_id = %(organization_id)s and kind <> 'residual'
order by created_at, pool_id

-- name: past_grants
-- What rolled over, or came by a transfer, comes of other grants: where it is told again, those have lost it.
select g.grant_id, g.pool_id, g.source, g.amount_micros, g.priority, g.is_free, g.cost_basis_nano_usd, g.effective_at,
    case when isfinite(g.expires_at) then g.expires_at end as expires_at, g.reason, g.created_at, g.min_rollover_micros as least,
    g.max_rollover_micros as most, case when isfinite(g.rollover_expires_at) then g.rollover_expires_at end as rollover_expires_at,
    (select min(e.booked_at) from ledger.entries e
     where e.organization_id = g.organization_id and e.grant_id = g.grant_id and e.kind = 'void') as voided_at
from credits.grants g join credits.pools p on p.organization_id = g.organization_id and p.pool_id = g.pool_id
where g.organization_id = %(organization_id)s and g.created_at < %(until)s and p.kind <> 'residual'
  and g.source not in ('roll_over', 'transfer', 'refund')
order by g.created_at, g.grant_id

-- name: past_allocations
select allocation_id, pool_id, user_id, kind, period, amount_micros, carry_micros, when_empty, created_at, ended_at from credits.allocations
where organization_id = %(organization_id)s and created_at < %(until)s
order by created_at, allocation_id

-- name: past_limits
select limit_id, scope, scope_id, metric, model_filter, period, amount, action, is_default, within_scope, within_id, created_at, ended_at
from credits.limits where organization_id = %(organization_id)s and created_at < %(until)s
order by created_at, limit_id

-- name: past_movements
-- What a replay does not tell: kinds of movement between grants, and raises.
select kind from (
    select distinct kind from ledger.entries
    where organization_id = %(organization_id)s and kind not in ('grant', 'expiry', 'void', 'roll_over', 'forgiveness') and booked_at < %(until)s
    union all
    select 'raise' where exists (
        select from credits.raises
        where organization_id = %(organization_id)s and starts_at < %(until)s and least(ends_at, ended_at) > %(since)s)) k
order by kind

-- name: past_sums
-- What was used before the first instant that is told request by request, day by day.
select max(booked_at) as booked_at, user_id, api_key_id, team_id, department_id, model, feature, greatest(0, sum(charged_micros))::bigint as charged
from ledger.attribution
where organization_id = %(organization_id)s and booked_at < %(told_from)s and kind in (0, 1)
group by (booked_at at time zone %(zone)s)::date, user_id, api_key_id, team_id, department_id, model, feature
order by 1

-- name: past_corrections
select request_id, sum(charged_micros)::bigint as charged from ledger.attribution
where organization_id = %(organization_id)s and kind = 1 and booked_at >= %(told_from)s group by 1

-- name: past_requests
select request_id, booked_at, used_at, user_id, api_key_id, team_id, department_id, provider, model, feature, charged_micros, flags,
    input_tokens, cache_read_tokens, cache_write_5m_tokens, cache_write_1h_tokens, output_tokens, reasoning_tokens, audio_input_tokens,
    audio_output_tokens, image_input_tokens, image_output_tokens, images, web_searches, audio_milliseconds, characters, requests,
    file_searches, code_sessions
from ledger.attribution
where organization_id = %(organization_id)s and kind = 0 and booked_at >= %(told_from)s and booked_at < %(until)s
order by booked_at, request_id

-- name: past_refusals
select request_id, happened_at, user_id, api_key_id, model, feature, wanted_micros from credits.unbilled_requests
where organization_id = %(organization_id)s and outcome = 'refused' and happened_at >= %(since)s and happened_at < %(until)s
order by happened_at, request_id

-- name: set_past_limit
select credits.set_limit(%(organization_id)s, %(limit_id)s, %(scope)s, %(scope_id)s, %(metric)s, %(models)s, %(period)s, %(amount)s, %(action)s,
    null, %(at)s, false, %(is_default)s, %(within_scope)s, %(within_id)s)

-- name: set_cycle
select credits.set_cycle(%(organization_id)s, %(anchor)s, %(at)s)
