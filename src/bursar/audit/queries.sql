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
from audit.seals where organization_id = %(organization_id)s order by seal_number;

-- name: first_use_of_forms
select f as form, min(from_number) as from_number
from audit.seals, unnest(forms) f where organization_id = %(organization_id)s group by 1 order by 2, 1;

-- name: marks
select marks[array_position(forms, %(form)s::smallint)] from audit.seals
where organization_id = %(organization_id)s and seal_number = %(seal_number)s;

-- name: rounds
-- How far sealing is behind.
select coalesce(extract(epoch from clock_timestamp() - sealed_at), 0)::bigint from audit.sealing;
