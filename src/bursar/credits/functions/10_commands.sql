-- The money functions. Each locks the organizations' gate rows first, in organization order, then takes the one instant, then decides.
-- They belong to bursar_money and are the named composers: settle writes balances, ledger and attribution in one transaction.
set local role bursar_money;

-- Guards of every command: who asks, when it is, and what was answered before.

-- require_tenant: whoever is not a lane acts only for the organization that is set.
create or replace function credits.require_tenant(p_organization_id uuid) returns void
language plpgsql stable set search_path = credits, pg_temp as $$
begin
    if session_user in ('bursar_lane', 'bursar_simulator') then
        return;
    end if;
    if p_organization_id is distinct from nullif(current_setting('app.organization_id', true), '')::uuid then
        raise exception 'no such organization' using errcode = 'BR404';
    end if;
end $$;
comment on function credits.require_tenant is 'Refuses (BR404) to act for an organization other than the one that is set';

-- now_under_gate: the one instant of a command, after the gate is locked. Only the simulator may choose it.
create or replace function credits.now_under_gate(p_at timestamptz) returns timestamptz
language plpgsql volatile set search_path = credits, pg_temp as $$
begin
    if p_at is not null and session_user <> 'bursar_simulator' then
        raise exception 'only the simulator dates money' using errcode = 'BR403';
    end if;
    return coalesce(p_at, clock_timestamp());
end $$;
comment on function credits.now_under_gate is 'The instant of a command: the database''s clock after the locks; p_at for the simulator alone';

-- lock_gate: take one organization's gate, fold what is due, and return the instant.
create or replace function credits.lock_gate(p_organization_id uuid, p_at timestamptz) returns timestamptz
language plpgsql volatile set search_path = credits, pg_temp as $$
declare
    v_due timestamptz;
    v_now timestamptz;
begin
    perform credits.require_tenant(p_organization_id);
    select next_event_at into v_due from gates where organization_id = p_organization_id for no key update;
    if not found then
        raise exception 'no such organization' using errcode = 'BR404';
    end if;
    v_now := credits.now_under_gate(p_at);
    if v_due <= v_now then
        perform credits.fold_due_pools(p_organization_id, v_now);
    end if;
    return v_now;
end $$;
comment on function credits.lock_gate is 'Locks an organization''s gate, applies due time events and returns the instant of the command';

-- stored_outcome: the stored result of a command, null when the key is new; another body under the same key is BR422.
create or replace function credits.stored_outcome(p_organization_id uuid, p_key text, p_body_hash bytea, p_now timestamptz) returns jsonb
language plpgsql volatile set search_path = credits, pg_temp as $$
declare
    v_row commands;
begin
    if p_key is null or length(p_key) not between 1 and 255 then
        raise exception 'an idempotency key of 1 to 255 characters is needed' using errcode = 'BR400';
    end if;
    select * into v_row from commands where organization_id = p_organization_id and idempotency_key = p_key;
    if not found then
        return null;
    end if;
    if v_row.kept_until <= p_now then
        delete from commands where organization_id = p_organization_id and idempotency_key = p_key;
        return null;
    end if;
    if v_row.body_hash <> p_body_hash then
        raise exception 'this idempotency key was used with another body' using errcode = 'BR422';
    end if;
    return v_row.outcome;
end $$;
comment on function credits.stored_outcome is 'Result stored under an idempotency key; null: a new key; BR422: used with another body';

create or replace function credits.store_outcome(p_organization_id uuid, p_key text, p_body_hash bytea, p_outcome jsonb, p_now timestamptz)
returns void language sql volatile set search_path = credits, pg_temp as $$
    insert into commands (organization_id, idempotency_key, body_hash, outcome, answered_at, kept_until)
    values (p_organization_id, p_key, p_body_hash, p_outcome, p_now, p_now + interval '35 days');
$$;
comment on function credits.store_outcome is 'Keeps the result of a money command for 35 days under its key';

-- forget_commands: results that nobody may ask for any more, as many as p_most; returns how many. Under the gate, like who puts others in their place.
create or replace function credits.forget_commands(p_organization_id uuid, p_most integer) returns integer
language plpgsql volatile security definer set search_path = credits, pg_temp as $$
declare
    v_now constant timestamptz := credits.lock_gate(p_organization_id, null);
    v_gone integer;
begin
    delete from commands where organization_id = p_organization_id and idempotency_key in (
        select idempotency_key from commands
        where organization_id = p_organization_id and kept_until <= v_now order by kept_until limit p_most);
    get diagnostics v_gone = row_count;
    return v_gone;
end $$;
comment on function credits.forget_commands is 'Ends stored results whose time is over; returns how many';

-- hash_of: one hash for the arguments of a command.
create or replace function credits.hash_of(variadic p_arguments text[]) returns bytea
language sql immutable set search_path = pg_catalog, pg_temp as $$
    select sha256(convert_to(array_to_string(p_arguments, chr(31), chr(30)), 'UTF8'));
$$;
comment on function credits.hash_of is 'Hash of a command''s arguments, nulls told apart from empty texts';

-- most_micros: the largest amount of one request or command; sums of thousands of them stay far inside bigint.
create or replace function credits.most_micros() returns bigint
language sql immutable set search_path = pg_catalog, pg_temp as $$ select 1000000000000000 $$;
comment on function credits.most_micros is 'Largest amount that one request or command may name: a billion credits';

-- usage_width: how many counts of usage a request has, one for each row of pricing.kinds, in the order of the attribution's columns. It has
-- no search_path of its own, so that it is a constant wherever it stands.
create or replace function credits.usage_width() returns integer
language sql immutable parallel safe as $$ select 17 $$;
comment on function credits.usage_width is 'Counts of usage that a request has: the kinds of pricing.kinds';

-- require_amount: commands take whole amounts from p_least to the largest one.
create or replace function credits.require_amount(p_amount bigint, p_least bigint) returns void
language plpgsql immutable set search_path = credits, pg_temp as $$
begin
    if p_amount is null or p_amount not between p_least and credits.most_micros() then
        raise exception 'an amount % a billion credits is needed', case p_least when 0 then 'from 0 to' else 'above 0 and up to' end
            using errcode = 'BR400';
    end if;
end $$;
comment on function credits.require_amount is 'Refuses (BR400) an amount that is missing, too small or too large';
