-- name: add_endpoint
insert into outbox.endpoints (organization_id, endpoint_id, url, kinds, created_by)
values (%(organization_id)s, %(endpoint_id)s, %(url)s, %(kinds)s, %(created_by)s)
returning organization_id, endpoint_id, url, kinds, state, failing_since, created_at;

-- name: count_endpoints
select count(*) from outbox.endpoints where organization_id = %(organization_id)s and state <> 'removed';

-- name: endpoint
select organization_id, endpoint_id, url, kinds, state, failing_since, created_at
from outbox.endpoints
where organization_id = %(organization_id)s and endpoint_id = %(endpoint_id)s and state <> 'removed';

-- name: endpoints
select p.organization_id, p.endpoint_id, p.url, p.kinds, p.state, p.failing_since, p.created_at,
    count(d.event_id) filter (where d.state = 'pending') as pending, count(d.event_id) filter (where d.state = 'failed') as failed,
    count(d.event_id) filter (where d.state = 'delivered') as delivered
from outbox.endpoints p
left join outbox.deliveries d on d.organization_id = p.organization_id and d.endpoint_id = p.endpoint_id
where p.organization_id = %(organization_id)s and p.state <> 'removed'
group by p.organization_id, p.endpoint_id
order by p.created_at, p.endpoint_id;

-- name: end_endpoint
update outbox.endpoints set state = %(state)s, ended_at = clock_timestamp()
where organization_id = %(organization_id)s and endpoint_id = %(endpoint_id)s and state <> %(state)s and state <> 'removed'
returning endpoint_id;

-- name: enable_endpoint
update outbox.endpoints set state = 'active', ended_at = null, failing_since = null
where organization_id = %(organization_id)s and endpoint_id = %(endpoint_id)s and state = 'disabled'
returning endpoint_id;

-- name: give_up_all
update outbox.deliveries set state = 'failed', ended_at = clock_timestamp(), answer = %(answer)s
where organization_id = %(organization_id)s and endpoint_id = %(endpoint_id)s and state = 'pending';

-- name: add_secret
insert into outbox.endpoint_secrets (organization_id, secret_id, endpoint_id, sealing_key_id, nonce, ciphertext)
values (%(organization_id)s, %(secret_id)s, %(endpoint_id)s, %(sealing_key_id)s, %(nonce)s, %(ciphertext)s);

-- name: end_secrets
-- The newest goes on for a while; one that was on its way out ends now.
update outbox.endpoint_secrets s
set ends_at = case when s.ends_at = 'infinity' then clock_timestamp() + make_interval(secs => %(overlap_seconds)s) else clock_timestamp() end
where organization_id = %(organization_id)s and endpoint_id = %(endpoint_id)s and ends_at > clock_timestamp();

-- name: secrets_in_force
select organization_id, secret_id, sealing_key_id, nonce, ciphertext
from outbox.endpoint_secrets
where organization_id = %(organization_id)s and endpoint_id = %(endpoint_id)s and ends_at > clock_timestamp()
order by created_at desc, secret_id desc;

-- name: organizations_with_secrets_sealed_otherwise
select distinct organization_id from outbox.endpoint_secrets where sealing_key_id <> %(sealing_key_id)s;

-- name: secrets_sealed_otherwise
select organization_id, secret_id, sealing_key_id, nonce, ciphertext
from outbox.endpoint_secrets
where organization_id = %(organization_id)s and sealing_key_id <> %(sealing_key_id)s;

-- name: reseal_secret
update outbox.endpoint_secrets set sealing_key_id = %(sealing_key_id)s, nonce = %(nonce)s, ciphertext = %(ciphertext)s
where organization_id = %(organization_id)s and secret_id = %(secret_id)s;

-- name: post_event
select outbox.post_event(%(organization_id)s, %(kind)s, %(object_kind)s, %(object_id)s, %(payload)s);

-- name: replay_one
insert into outbox.deliveries (organization_id, endpoint_id, event_id, object_kind, object_id, sequence)
select e.organization_id, %(endpoint_id)s, e.event_id, e.object_kind, e.object_id, e.sequence
from outbox.events e
where e.organization_id = %(organization_id)s and e.event_id = %(event_id)s
on conflict (organization_id, endpoint_id, event_id) do update
set state = 'pending', attempts = 0, next_attempt_at = clock_timestamp(), first_attempt_at = null, ended_at = null
returning event_id;

-- name: replay_since
insert into outbox.deliveries (organization_id, endpoint_id, event_id, object_kind, object_id, sequence)
select e.organization_id, p.endpoint_id, e.event_id, e.object_kind, e.object_id, e.sequence
from outbox.endpoints p
join outbox.events e on e.organization_id = p.organization_id and e.posted_at >= %(since)s and outbox.wants(p.kinds, e.kind)
where p.organization_id = %(organization_id)s and p.endpoint_id = %(endpoint_id)s
  and (not %(only_failed)s or exists (
    select from outbox.deliveries d
    where d.organization_id = e.organization_id and d.endpoint_id = p.endpoint_id and d.event_id = e.event_id and d.state = 'failed'))
order by e.posted_at
on conflict (organization_id, endpoint_id, event_id) do update
set state = 'pending', attempts = 0, next_attempt_at = clock_timestamp(), first_attempt_at = null, ended_at = null
returning event_id;

-- name: deliveries
select d.event_id, e.kind, d.object_kind, d.object_id, d.sequence, d.state, d.attempts, d.answer, e.posted_at, d.next_attempt_at, d.ended_at
from outbox.deliveries d
join outbox.events e on e.organization_id = d.organization_id and e.event_id = d.event_id
where d.organization_id = %(organization_id)s and d.endpoint_id = %(endpoint_id)s
order by d.created_at desc, d.event_id
limit %(most)s;

-- name: due_deliveries
-- Of an endpoint that fails only one is tried at a time, so that it keeps nobody else waiting.
select organization_id, endpoint_id, event_id from (
    select d.organization_id, d.endpoint_id, d.event_id, d.next_attempt_at, p.failing_since,
        row_number() over (partition by d.organization_id, d.endpoint_id order by d.next_attempt_at, d.created_at) as place
    from outbox.deliveries d
    join outbox.endpoints p on p.organization_id = d.organization_id and p.endpoint_id = d.endpoint_id and p.state = 'active'
    where d.state = 'pending' and d.next_attempt_at <= clock_timestamp()
      and not exists (
        select from outbox.deliveries b
        where b.organization_id = d.organization_id and b.endpoint_id = d.endpoint_id and b.object_kind = d.object_kind
          and b.object_id = d.object_id and b.sequence < d.sequence and b.state = 'pending')
) due
where place <= case when failing_since is null then %(most_each)s else 1 end
order by next_attempt_at
limit %(most)s;

-- name: claim_delivery
-- The end of the lease is when it is due again: what whoever claimed it does not report by then, another one sends.
update outbox.deliveries d
set attempts = d.attempts + 1, next_attempt_at = clock_timestamp() + make_interval(secs => %(lease_seconds)s),
    first_attempt_at = coalesce(d.first_attempt_at, clock_timestamp())
where (d.organization_id, d.endpoint_id, d.event_id) in (
    select c.organization_id, c.endpoint_id, c.event_id from outbox.deliveries c
    where c.organization_id = %(organization_id)s and c.endpoint_id = %(endpoint_id)s and c.event_id = %(event_id)s
      and c.state = 'pending' and c.next_attempt_at <= clock_timestamp()
      and not exists (
        select from outbox.deliveries b
        where b.organization_id = c.organization_id and b.endpoint_id = c.endpoint_id and b.object_kind = c.object_kind
          and b.object_id = c.object_id and b.sequence < c.sequence and b.state = 'pending')
    for update skip locked)
returning d.attempts, d.first_attempt_at;

-- name: what_to_send
select e.event_id, e.kind, e.object_kind, e.object_id, e.sequence, e.payload, e.happened_at, p.url, p.state
from outbox.events e
join outbox.endpoints p on p.organization_id = e.organization_id and p.endpoint_id = %(endpoint_id)s
where e.organization_id = %(organization_id)s and e.event_id = %(event_id)s;

-- name: note_delivered
update outbox.deliveries set state = 'delivered', ended_at = clock_timestamp(), answer = %(answer)s
where organization_id = %(organization_id)s and endpoint_id = %(endpoint_id)s and event_id = %(event_id)s and state = 'pending';

-- name: note_working
-- What had waited for it to work again goes out now.
with working as (
    update outbox.endpoints set failing_since = null
    where organization_id = %(organization_id)s and endpoint_id = %(endpoint_id)s and failing_since is not null
    returning organization_id, endpoint_id)
update outbox.deliveries d set next_attempt_at = clock_timestamp()
from working w
where d.organization_id = w.organization_id and d.endpoint_id = w.endpoint_id and d.state = 'pending' and d.attempts > 0
  and d.next_attempt_at > clock_timestamp() + make_interval(secs => %(lease_seconds)s);

-- name: note_failed
update outbox.deliveries
set next_attempt_at = clock_timestamp() + make_interval(secs => %(wait_seconds)s), answer = %(answer)s,
    state = case when %(is_last)s then 'failed' else 'pending' end, ended_at = case when %(is_last)s then clock_timestamp() end
where organization_id = %(organization_id)s and endpoint_id = %(endpoint_id)s and event_id = %(event_id)s and state = 'pending'
  and attempts = %(attempts)s;

-- name: note_failing
update outbox.endpoints set failing_since = coalesce(failing_since, clock_timestamp())
where organization_id = %(organization_id)s and endpoint_id = %(endpoint_id)s and state = 'active'
returning failing_since;

-- name: due_mails
select organization_id, mail_id from outbox.mails
where state = 'pending' and next_attempt_at <= clock_timestamp()
order by next_attempt_at
limit %(most)s;

-- name: claim_mail
update outbox.mails m
set attempts = m.attempts + 1, next_attempt_at = clock_timestamp() + make_interval(secs => %(lease_seconds)s),
    first_attempt_at = coalesce(m.first_attempt_at, clock_timestamp())
where (m.organization_id, m.mail_id) in (
    select c.organization_id, c.mail_id from outbox.mails c
    where c.organization_id = %(organization_id)s and c.mail_id = %(mail_id)s and c.state = 'pending' and c.next_attempt_at <= clock_timestamp()
    for update skip locked)
returning m.attempts, m.first_attempt_at, m.user_id, m.address;

-- name: mail_events
select e.event_id, e.kind, e.object_kind, e.object_id, e.sequence, e.payload, e.happened_at
from outbox.mail_events j
join outbox.events e on e.organization_id = j.organization_id and e.event_id = j.event_id
where j.organization_id = %(organization_id)s and j.mail_id = %(mail_id)s
order by e.happened_at, e.object_id, e.sequence;

-- name: reader
select m.email from identity.memberships m
where m.organization_id = %(organization_id)s and m.user_id = %(user_id)s and m.status = 'active';

-- name: organization_name
select name from identity.organizations where organization_id = %(organization_id)s;

-- name: organization_slug
select slug from identity.organizations where organization_id = %(organization_id)s;

-- name: people_of
select user_id, display_name as name, email from identity.memberships where organization_id = %(organization_id)s and user_id = any (%(user_ids)s);

-- name: note_mail
update outbox.mails
set state = %(state)s, answer = %(answer)s, ended_at = case when %(state)s <> 'pending' then clock_timestamp() end,
    next_attempt_at = clock_timestamp() + make_interval(secs => %(wait_seconds)s)
where organization_id = %(organization_id)s and mail_id = %(mail_id)s and state = 'pending' and attempts = %(attempts)s;

-- name: waiting
select
    (select count(*) from outbox.deliveries where state = 'pending') as deliveries,
    (select count(*) from outbox.endpoints where state = 'active' and failing_since is not null) as failing_endpoints,
    (select coalesce(extract(epoch from clock_timestamp() - min(created_at)), 0)::bigint from outbox.deliveries where state = 'pending') as oldest_seconds,
    (select count(*) from outbox.mails where state = 'pending') as mails;

-- name: organizations_to_purge
-- Where something was told so many days ago; each asked by its own indexes.
select o.organization_id
from identity.organizations o
cross join lateral (select clock_timestamp() - make_interval(days => %(days)s) as at offset 0) b
where exists (select from outbox.deliveries d where d.organization_id = o.organization_id and d.state <> 'pending' and d.ended_at < b.at)
   or exists (select from outbox.mails m where m.organization_id = o.organization_id and m.state <> 'pending' and m.ended_at < b.at)
   or exists (
        select from outbox.events e
        where e.organization_id = o.organization_id and e.posted_at < b.at
          and exists (select from outbox.events n where n.organization_id = e.organization_id and n.object_kind = e.object_kind
                      and n.object_id = e.object_id and n.sequence > e.sequence));

-- name: purge
select outbox.purge(%(organization_id)s, %(days)s, %(most)s);
