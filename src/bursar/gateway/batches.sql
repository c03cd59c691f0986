-- name: add_batch
insert into gateway.batches (
    organization_id, batch_id, format, endpoint, user_id, api_key_id, provider, provider_key_id, is_own_key, input_file_id,
    request_count, prices, idempotency_key, body_hash, created_at, ends_by, lease_until, next_look_at
) values (
    %(organization_id)s, %(batch_id)s, %(format)s, %(endpoint)s, %(user_id)s, %(api_key_id)s, %(provider)s, %(provider_key_id)s,
    %(is_own_key)s, %(input_file_id)s, %(request_count)s, %(prices)s, %(idempotency_key)s, %(body_hash)s, %(created_at)s, %(ends_by)s,
    clock_timestamp() + make_interval(secs => %(lease_seconds)s), clock_timestamp() + make_interval(secs => %(look_after_seconds)s)
)
on conflict (organization_id, idempotency_key) where idempotency_key is not null and state <> 'failed' do nothing
returning batch_id

-- name: add_batch_requests
insert into gateway.batch_requests (
    organization_id, batch_id, custom_id, request_id, model, estimate, permitted, context, hold_micros
)
select %(organization_id)s, %(batch_id)s, custom_id, request_id, model, estimate::int[], permitted::int[], context::jsonb, hold_micros
from unnest(
    %(custom_ids)s::text[], %(request_ids)s::uuid[], %(models)s::text[], %(estimates)s::text[], %(permitted)s::text[], %(contexts)s::text[],
    %(holds)s::bigint[]
) r(custom_id, request_id, model, estimate, permitted, context, hold_micros)

-- name: batch
select organization_id, batch_id, format, endpoint, user_id, api_key_id, provider, provider_key_id, is_own_key, provider_batch_id, input_file_id,
    request_count, prices, state, told, body_hash, created_at, ends_by, lease_until, failed_looks, ended_at, deleted_at
from gateway.batches
where organization_id = %(organization_id)s and batch_id = %(batch_id)s

-- name: batch_of_key
select organization_id, batch_id, format, endpoint, user_id, api_key_id, provider, provider_key_id, is_own_key, provider_batch_id, input_file_id,
    request_count, prices, state, told, body_hash, created_at, ends_by, lease_until, failed_looks, ended_at, deleted_at
from gateway.batches
where organization_id = %(organization_id)s and idempotency_key = %(idempotency_key)s and state <> 'failed'

-- name: visible_batches
-- Newest first; before and after are batches of the same list. Ids are UUIDv7 and rise with time.
select organization_id, batch_id, format, endpoint, user_id, api_key_id, provider, provider_key_id, is_own_key, provider_batch_id, input_file_id,
    request_count, prices, state, told, body_hash, created_at, ends_by, lease_until, failed_looks, ended_at, deleted_at
from gateway.batches b
where organization_id = %(organization_id)s and format = %(format)s and provider_batch_id is not null and deleted_at is null
  and (%(after)s::uuid is null or batch_id < %(after)s::uuid) and (%(before)s::uuid is null or batch_id > %(before)s::uuid)
  and (%(sees_all)s or case when %(user_id)s::uuid is not null then b.user_id = %(user_id)s::uuid
       else b.user_id is null and exists (
           select from identity.api_keys mine join identity.api_keys theirs
               on theirs.organization_id = mine.organization_id and theirs.original_api_key_id = mine.original_api_key_id
           where mine.organization_id = %(organization_id)s and mine.api_key_id = %(api_key_id)s and theirs.api_key_id = b.api_key_id) end)
order by case when %(before)s::uuid is null then batch_id end desc, batch_id
limit %(most)s

-- name: is_same_service
-- Whether two keys are one service's: the same, or rotated from the same.
select exists (
    select from identity.api_keys mine join identity.api_keys theirs
        on theirs.organization_id = mine.organization_id and theirs.original_api_key_id = mine.original_api_key_id
    where mine.organization_id = %(organization_id)s and mine.api_key_id = %(api_key_id)s and theirs.api_key_id = %(other_api_key_id)s)

-- name: due_batches
select organization_id, batch_id, provider from gateway.batches
where ended_at is null and next_look_at <= clock_timestamp()
order by next_look_at
limit %(most)s

-- name: claim_batch
-- Whoever moves the next look ahead looks now.
update gateway.batches set next_look_at = clock_timestamp() + make_interval(secs => %(seconds)s)
where organization_id = %(organization_id)s and batch_id = %(batch_id)s and ended_at is null and next_look_at <= clock_timestamp()
returning organization_id, batch_id, format, endpoint, user_id, api_key_id, provider, provider_key_id, is_own_key, provider_batch_id, input_file_id,
    request_count, prices, state, told, body_hash, created_at, ends_by, lease_until, failed_looks, ended_at, deleted_at

-- name: look_soon
-- A client waits. One whose results are being charged is looked after already.
update gateway.batches set next_look_at = least(next_look_at, clock_timestamp())
where organization_id = %(organization_id)s and batch_id = %(batch_id)s and state = 'running' and failed_looks = 0

-- name: taken_batch
-- The provider has it. One that failed meanwhile stays failed: its holds are gone.
update gateway.batches
set state = 'running', provider_batch_id = %(provider_batch_id)s, told = %(told)s, failed_looks = 0,
    next_look_at = clock_timestamp() + make_interval(secs => %(seconds)s)
where organization_id = %(organization_id)s and batch_id = %(batch_id)s and state = 'opening'

-- name: told_of_batch
update gateway.batches
set told = %(told)s, failed_looks = 0, state = case when state = 'running' and %(is_over)s then 'settling' else state end,
    next_look_at = clock_timestamp() + make_interval(secs => %(seconds)s)
where organization_id = %(organization_id)s and batch_id = %(batch_id)s and ended_at is null

-- name: failed_look
update gateway.batches
set failed_looks = failed_looks + 1, next_look_at = clock_timestamp() + make_interval(secs => %(seconds)s)
where organization_id = %(organization_id)s and batch_id = %(batch_id)s and ended_at is null

-- name: renew_batch
update gateway.batches set lease_until = clock_timestamp() + make_interval(secs => %(seconds)s)
where organization_id = %(organization_id)s and batch_id = %(batch_id)s

-- name: keep_batch
update gateway.batches set next_look_at = clock_timestamp() + make_interval(secs => %(seconds)s)
where organization_id = %(organization_id)s and batch_id = %(batch_id)s and ended_at is null

-- name: end_batch
update gateway.batches set state = %(state)s, ended_at = clock_timestamp()
where organization_id = %(organization_id)s and batch_id = %(batch_id)s and ended_at is null
returning batch_id

-- name: delete_batch
update gateway.batches set deleted_at = clock_timestamp()
where organization_id = %(organization_id)s and batch_id = %(batch_id)s and deleted_at is null

-- name: batches_of_provider_ids
-- Which ids of a provider are known, whoever's they are.
select provider_batch_id from gateway.batches where provider = %(provider)s and provider_batch_id = any (%(provider_batch_ids)s)

-- name: held_requests
select custom_id, request_id, model, estimate, permitted, context, hold_micros
from gateway.batch_requests
where organization_id = %(organization_id)s and batch_id = %(batch_id)s and state = 'held' and (%(custom_ids)s::text[] is null or custom_id = any (%(custom_ids)s))

-- name: requests_came_to
update gateway.batch_requests set state = %(state)s
where organization_id = %(organization_id)s and batch_id = %(batch_id)s and state = 'held' and custom_id = any (%(custom_ids)s)

-- name: all_requests_came_to
update gateway.batch_requests set state = %(state)s
where organization_id = %(organization_id)s and batch_id = %(batch_id)s and state = 'held'

-- name: add_batch_file
insert into gateway.batch_files (
    organization_id, file_id, user_id, api_key_id, provider, provider_key_id, provider_file_id, batch_id, endpoint, filename, size_bytes, requests,
    created_at, expires_at
) values (
    %(organization_id)s, %(file_id)s, %(user_id)s, %(api_key_id)s, %(provider)s, %(provider_key_id)s, %(provider_file_id)s, %(batch_id)s,
    %(endpoint)s, %(filename)s, %(size_bytes)s, %(requests)s, coalesce(%(created_at)s, clock_timestamp()), %(expires_at)s
)

-- name: batch_file
select organization_id, file_id, user_id, api_key_id, provider, provider_key_id, provider_file_id, batch_id, endpoint, filename, size_bytes,
    created_at, expires_at
from gateway.batch_files
where organization_id = %(organization_id)s and file_id = %(file_id)s and provider_file_id is not null and deleted_at is null

-- name: provider_file
-- Deleted or not.
select provider_file_id from gateway.batch_files where organization_id = %(organization_id)s and file_id = %(file_id)s

-- name: files_of_batch
select organization_id, file_id, user_id, api_key_id, provider, provider_key_id, provider_file_id, batch_id, endpoint, filename, size_bytes,
    created_at, expires_at
from gateway.batch_files
where organization_id = %(organization_id)s and batch_id = any (%(batch_ids)s)

-- name: requests_of_file
select requests from gateway.batch_files where organization_id = %(organization_id)s and file_id = %(file_id)s

-- name: delete_batch_file
update gateway.batch_files set deleted_at = clock_timestamp()
where organization_id = %(organization_id)s and file_id = %(file_id)s and deleted_at is null
