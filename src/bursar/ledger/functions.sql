-- ensure_partition: the month's partition of the attribution exists. Months are UTC. Returns true when it was made now.
-- When rows of that month already lie in the default partition they stay there, and the month keeps using it.
create or replace function ledger.ensure_partition(p_at timestamptz) returns boolean
language plpgsql security definer set search_path = ledger, pg_temp as $$
declare
    v_start timestamptz := date_trunc('month', p_at at time zone 'UTC') at time zone 'UTC';
    v_end timestamptz := (date_trunc('month', p_at at time zone 'UTC') + interval '1 month') at time zone 'UTC';
    v_name text := 'attribution_' || to_char(v_start at time zone 'UTC', 'YYYY_MM');
begin
    if to_regclass('ledger.' || v_name) is not null then
        return false;
    end if;
    if exists (select 1 from ledger.attribution_rest where booked_at >= v_start and booked_at < v_end) then
        return false;
    end if;
    execute format('create table ledger.%I partition of ledger.attribution for values from (%L) to (%L)', v_name, v_start, v_end);
    execute format('comment on table ledger.%I is %L', v_name, 'Attribution booked in ' || to_char(v_start at time zone 'UTC', 'YYYY-MM'));
    call tenancy.protect(format('ledger.%I', v_name)::regclass, '', 'select, insert');
    call tenancy.append_only(format('ledger.%I', v_name)::regclass);
    return true;
exception when duplicate_table then
    return false;  -- another process made it in between
end $$;
comment on function ledger.ensure_partition is 'Makes the partition of the attribution for the month of an instant';
revoke all on function ledger.ensure_partition from public;
grant execute on function ledger.ensure_partition to bursar_platform, bursar_simulator;
