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
