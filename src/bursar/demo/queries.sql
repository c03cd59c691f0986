-- What the simulator calls: the money functions, each dated by its last argument.

-- name: open_organization
select credits.open_organization(%(organization_id)s)

-- name: open_pool
select credits.open_pool(%(organization_id)s, %(pool_id)s, %(kind)s, %(owner_user_id)s, %(name)s, null, %(at)s)

-- name: add_grant
select credits.add_grant(%(organization_id)s, %(grant_id)s, %(pool_id)s, %(source)s, %(amount_micros)s, %(priority)s::smallint, %(is_free)s,
    %(cost_basis_nano_usd)s, null, %(expires_at)s, %(reason)s, %(created_by)s, %(idempotency_key)s, %(at)s)

-- name: allocate
select credits.allocate(%(organization_id)s, %(allocation_id)s, %(pool_id)s, %(user_id)s, %(kind)s, %(period)s, %(amount_micros)s, 'stops',
    false, %(created_by)s, %(idempotency_key)s, %(at)s)

-- name: set_limit
select credits.set_limit(%(organization_id)s, %(limit_id)s, %(scope)s, %(scope_id)s, 'credits', %(model_filter)s, %(period)s, %(amount)s,
    %(action)s, %(created_by)s, %(at)s)

-- name: ensure_partition
select ledger.ensure_partition(%(at)s)
