-- name: record
insert into audit.events (
    organization_id, event_id, actor_kind, actor_id, action, object_kind, object_id,
    old_value, new_value, reason, request_id, address_hash
) values (
    %(organization_id)s, %(event_id)s, %(actor_kind)s, %(actor_id)s, %(action)s, %(object_kind)s, %(object_id)s,
    %(old_value)s, %(new_value)s, %(reason)s, %(request_id)s, %(address_hash)s
);

-- name: events
select organization_id, event_id, at, actor_kind, actor_id, action, object_kind, object_id,
       old_value, new_value, reason, request_id, address_hash
from audit.events
where organization_id = %(organization_id)s and (%(before)s::uuid is null or event_id < %(before)s)
order by event_id desc
limit %(limit)s;

-- name: events_of_object
select organization_id, event_id, at, actor_kind, actor_id, action, object_kind, object_id,
       old_value, new_value, reason, request_id, address_hash
from audit.events
where organization_id = %(organization_id)s and object_kind = %(object_kind)s and object_id = %(object_id)s
  and (%(before)s::uuid is null or event_id < %(before)s)
order by event_id desc
limit %(limit)s;

-- name: begin_round
select from_number, until_number, clock_timestamp() as sealed_at from audit.begin_round();

-- name: next_number
-- Above the write number of whatever is committed by now.
select audit.as_write_number(pg_snapshot_xmax(pg_current_snapshot()));

-- name: end_round
select audit.end_round(%(until_number)s);

-- name: sealed_columns
-- Every sealed table with its columns as they are now.
select t.table_name, array_agg(a.attname::text order by a.attnum) as column_names
from audit.sealed_tables t
join pg_attribute a on a.attrelid = to_regclass(t.table_name) and a.attnum > 0 and not a.attisdropped
group by 1 order by 1;

-- name: keys_of_table
-- Its primary key's columns, in order.
select array_agg(a.attname::text order by array_position(i.indkey::smallint[], a.attnum))
from pg_index i join pg_attribute a on a.attrelid = i.indrelid and a.attnum = any (i.indkey::smallint[])
where i.indrelid = to_regclass(%(table_name)s) and i.indisprimary;

-- name: form_of
select audit.form_of(%(table_name)s, %(column_names)s, %(form_hash)s);

-- name: forms
select form, form_hash, table_name, column_names from audit.forms order by form;

-- name: heads
-- The newest seal of each of these organizations.
select o.organization_id, s.seal_number, s.until_number, s.seal_hash
from unnest(%(organization_ids)s::uuid[]) o(organization_id)
cross join lateral (
    select seal_number, until_number, seal_hash from audit.seals s
    where s.organization_id = o.organization_id order by seal_number desc limit 1
) s;

-- name: add_seal
select audit.add_seal(
    %(organization_id)s, %(seal_number)s, %(from_number)s, %(until_number)s, %(forms)s::smallint[], %(row_counts)s::integer[], %(roots)s,
    %(marks)s, %(sealed_at)s, %(previous_hash)s, %(seal_hash)s
);

-- name: horizon
select horizon from audit.sealing;

-- name: seals
select seal_number, from_number, until_number, forms, row_counts, roots, sealed_at, previous_hash, seal_hash
from audit.seals
where organization_id = %(organization_id)s and seal_number > %(after)s
order by seal_number limit %(most)s;

-- name: first_use_of_forms
select f as form, min(from_number) as from_number
from audit.seals, unnest(forms) f where organization_id = %(organization_id)s group by 1 order by 2, 1;

-- name: marks
select marks[array_position(forms, %(form)s::smallint)] from audit.seals
where organization_id = %(organization_id)s and seal_number = %(seal_number)s;

-- name: heads_at
-- The newest seal of every organization as of a horizon, by organization.
with recursive o as (
    (select organization_id from audit.seals order by organization_id limit 1)
    union all
    select n.organization_id from o cross join lateral (
        select organization_id from audit.seals s where s.organization_id > o.organization_id order by organization_id limit 1
    ) n
)
select o.organization_id, s.seal_number, s.until_number, s.seal_hash
from o cross join lateral (
    select seal_number, until_number, seal_hash from audit.seals s
    where s.organization_id = o.organization_id order by seal_number desc limit 1
) s;

-- name: moment
select horizon, clock_timestamp() as at from audit.sealing;

-- name: last_sent
select anchor_number, anchored_at, horizon, line_hash from audit.anchors order by anchor_number desc limit 1;

-- name: add_anchor
select audit.add_anchor(%(anchor_number)s, %(anchored_at)s, %(horizon)s, %(line_hash)s);

-- name: hashes_of_seals
-- What the database has for seals that were anchored, and its newest one.
select a.organization_id, a.seal_number, s.seal_hash,
    (select max(seal_number) from audit.seals n where n.organization_id = a.organization_id) as newest
from unnest(%(organization_ids)s::uuid[], %(seal_numbers)s::integer[]) a(organization_id, seal_number)
left join audit.seals s on s.organization_id = a.organization_id and s.seal_number = a.seal_number;

-- name: sealing_lag
-- Seconds since a round of sealing covered everything up to then.
select greatest(0, coalesce(extract(epoch from clock_timestamp() - sealed_at), 0))::bigint from audit.sealing;

-- name: add_verification
select audit.add_verification(%(started_at)s, %(organizations)s, %(differences)s, %(findings)s);

-- name: last_verification
select started_at, finished_at, organizations, differences from audit.verifications order by started_at desc limit 1;

-- name: verified_since
select coalesce((select max(started_at) from audit.verifications), (select min(began_at) from audit.epochs)) as started_at, clock_timestamp() as at;

-- name: try_lock
-- One process at a time; nothing depends on it but that work is not done twice.
select pg_try_advisory_lock(%(key)s);
