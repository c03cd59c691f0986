-- The reset of a usage period, as other credit systems know it: for scenarios. Bursar's own grants end at their expiry.

-- reset_pool: what each of some grants has left goes on as min(most, max(least, left)), in a grant of its own that ends when it would have
-- ended; the rest expires. What open holds need stays. A grant that begins at this very instant is not touched. What the pool owes is
-- forgiven first, unless it is kept: then what goes on pays it. Returns by how much the pool's limit changed, forgiveness aside.
create or replace function credits.reset_pool(
    p_organization_id uuid, p_pool_id uuid, p_grant_ids uuid[], p_least bigint[], p_most bigint[], p_keeps_debt boolean, p_key text,
    p_at timestamptz
) returns bigint
language plpgsql volatile security definer set search_path = credits, pg_temp as $$
declare
    v_now timestamptz := credits.lock_gate(p_organization_id, p_at);
    v_row record;
    v_grant grants;
    v_held bigint;
    v_kept bigint;
    v_delta bigint := 0;
begin
    perform credits.pour(p_organization_id, p_pool_id, v_now);
    if not p_keeps_debt and credits.debt_of(p_organization_id, p_pool_id) > 0 then
        perform credits.forgive_debt(p_organization_id, p_pool_id, null, 'period reset', null, p_key, p_at);
    end if;
    select held_amount into strict v_held from balances where organization_id = p_organization_id and balance_id = p_pool_id;
    for v_row in
        select g as grants, s.left_micros, s.value_left_nano_usd, b.least, b.most
        from unnest(p_grant_ids, p_least, p_most) b(grant_id, least, most)
        join grants g on g.organization_id = p_organization_id and g.grant_id = b.grant_id and g.pool_id = p_pool_id
        join grant_states s on s.organization_id = g.organization_id and s.grant_id = g.grant_id
        where g.effective_at < v_now and g.expires_at > v_now and s.state in ('active', 'spent', 'ended')
        order by g.priority, g.expires_at, g.is_free desc, g.effective_at, g.created_at, g.grant_id
    loop
        v_kept := least(v_row.left_micros, v_held);
        v_held := v_held - v_kept;
        v_grant := v_row.grants;
        v_grant.rollover_expires_at := v_grant.expires_at;
        v_grant.expires_at := v_now;
        v_grant.min_rollover_micros := v_row.least;
        v_grant.max_rollover_micros := v_row.most;
        v_delta := v_delta + credits.end_grant(v_grant, v_row.left_micros - v_kept, null, v_row.left_micros, v_row.value_left_nano_usd, v_now, v_now);
        update grant_states set state = 'active'  -- what holds need can still be spent until its own end
        where organization_id = p_organization_id and grant_id = v_grant.grant_id and state = 'lingering';
    end loop;
    perform credits.set_pool_limit(p_organization_id, p_pool_id, v_delta);
    perform credits.fold_pool(p_organization_id, p_pool_id, v_now);
    perform credits.pour(p_organization_id, p_pool_id, v_now);
    perform credits.limits_changed(p_organization_id);
    return v_delta;
end $$;
comment on function credits.reset_pool is 'Ends a usage period of a pool: its grants roll over within bounds, and what it owes is forgiven or kept';
