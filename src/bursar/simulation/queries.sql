-- What a simulation calls and reads. The money functions take its instant as their last argument.

-- name: open_stage
select identity.open_stage(%(organization_id)s, %(zone)s, %(at)s, %(departments)s, %(teams)s, %(users)s, %(keys)s)

-- name: open_organization
select credits.open_organization(%(organization_id)s)

-- name: open_pool
select credits.open_pool(%(organization_id)s, %(pool_id)s, %(kind)s, %(user_id)s, %(name)s, %(models)s, %(at)s)

-- name: add_grant
select credits.add_grant(%(organization_id)s, %(grant_id)s, %(pool_id)s, %(source)s, %(amount)s, %(priority)s::smallint, %(is_free)s,
    %(cost_basis)s, %(effective_at)s, %(expires_at)s, %(name)s, null, %(key)s, %(at)s)

-- name: void_grant
select credits.void_grant(%(organization_id)s, %(grant_id)s, 'voided', null, %(key)s, %(at)s)

-- name: allocate
select credits.allocate(%(organization_id)s, %(allocation_id)s, %(pool_id)s, %(user_id)s, %(kind)s, %(period)s, %(amount)s, %(when_empty)s,
    %(oversubscribe)s, null, %(key)s, %(at)s)

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
