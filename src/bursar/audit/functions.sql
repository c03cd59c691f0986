-- Writing seals and anchors: for the worker alone, since nobody else may add to these tables.

-- begin_round: one sealing at a time; rows with a write number in [from, until) that are not there yet never will be.
create or replace function audit.begin_round(out from_number bigint, out until_number bigint)
language plpgsql volatile security definer set search_path = audit, pg_temp as $$
begin
    select s.horizon into from_number from sealing s for update;
    until_number := audit.as_write_number(pg_snapshot_xmin(pg_current_snapshot()));
end $$;
comment on function audit.begin_round is 'Locks the sealing and says which write numbers the round covers: up to the oldest running transaction';

-- end_round: the seals of a round are all written.
create or replace function audit.end_round(p_until_number bigint) returns void
language plpgsql volatile security definer set search_path = audit, pg_temp as $$
begin
    update sealing set horizon = p_until_number, sealed_at = clock_timestamp() where horizon < p_until_number;
end $$;
comment on function audit.end_round is 'Notes that every row below a write number is sealed';

create or replace function audit.add_seal(
    p_organization_id uuid, p_seal_number integer, p_from_number bigint, p_until_number bigint, p_forms smallint[], p_row_counts integer[],
    p_roots bytea[], p_marks bytea[], p_sealed_at timestamptz, p_previous_hash bytea, p_seal_hash bytea
) returns void language sql volatile security definer set search_path = audit, pg_temp as $$
    insert into seals (organization_id, seal_number, from_number, until_number, forms, row_counts, roots, marks, sealed_at, previous_hash, seal_hash)
    values (p_organization_id, p_seal_number, p_from_number, p_until_number, p_forms, p_row_counts, p_roots, p_marks, p_sealed_at,
            p_previous_hash, p_seal_hash);
$$;
comment on function audit.add_seal is 'Adds a seal to an organization''s chain';

-- form_of: the form of a table as it is now, made where it is new.
create or replace function audit.form_of(p_table_name text, p_column_names text[], p_form_hash bytea) returns smallint
language plpgsql volatile security definer set search_path = audit, pg_temp as $$
declare
    v_form smallint;
begin
    select form into v_form from forms where form_hash = p_form_hash;
    if not found then
        insert into forms (form, form_hash, table_name, column_names)
        values ((select coalesce(max(form), 0) + 1 from forms), p_form_hash, p_table_name, p_column_names) returning form into v_form;
    end if;
    return v_form;
end $$;
comment on function audit.form_of is 'The short name of a table with these columns';

create or replace function audit.add_anchor(p_anchor_number integer, p_anchored_at timestamptz, p_horizon bigint, p_line_hash bytea) returns void
language sql volatile security definer set search_path = audit, pg_temp as $$
    insert into anchors (anchor_number, anchored_at, horizon, line_hash) values (p_anchor_number, p_anchored_at, p_horizon, p_line_hash);
$$;
comment on function audit.add_anchor is 'Notes an anchor that was sent';

create or replace function audit.add_verification(p_started_at timestamptz, p_organizations integer, p_differences integer, p_findings jsonb)
returns void language sql volatile security definer set search_path = audit, pg_temp as $$
    insert into verifications (started_at, finished_at, organizations, differences, findings)
    values (p_started_at, clock_timestamp(), p_organizations, p_differences, p_findings);
$$;
comment on function audit.add_verification is 'Notes what a verification of all organizations found';

revoke all on all functions in schema audit from public;
grant execute on function audit.as_write_number, audit.write_number to bursar_app, bursar_money, bursar_platform;
grant execute on function audit.begin_round, audit.end_round, audit.add_seal, audit.form_of, audit.add_anchor, audit.add_verification
    to bursar_platform;
