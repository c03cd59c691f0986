-- Batches: requests that a provider answers later, all at once, at a lower price; and the files that they are read from and written to.
--
-- No text of a request or an answer is kept: a file goes to the provider as it comes, and what metering read of each of its lines stays here.
set local lock_timeout = '5s';

alter table gateway.providers add column batch_price_ppm integer not null default 500000
    constraint providers_batch_price check (batch_price_ppm between 1 and 1000000);
comment on column gateway.providers.batch_price_ppm is
    'Price of a kind of usage inside a batch, in millionths of its usual one, where the price list has no batch price for it; OpenAI and Anthropic bill half';

create table gateway.batch_files (
    organization_id uuid not null,
    file_id uuid not null,
    user_id uuid,
    api_key_id uuid not null,
    provider text not null,
    provider_key_id uuid,
    provider_file_id text,
    batch_id uuid,
    endpoint text not null,
    filename text not null,
    size_bytes bigint not null,
    requests jsonb,
    created_at timestamptz not null default clock_timestamp(),
    expires_at timestamptz,
    deleted_at timestamptz,
    constraint batch_files_pkey primary key (organization_id, file_id),
    constraint batch_files_provider foreign key (provider) references gateway.providers,
    constraint batch_files_read_or_written check ((requests is null) = (batch_id is not null)),
    constraint batch_files_size check (size_bytes >= 0)
);
comment on table gateway.batch_files is 'Files at providers that batches are read from (uploaded through us) or were written to (by the provider)';
comment on column gateway.batch_files.organization_id is 'Tenant';
comment on column gateway.batch_files.file_id is 'Identity; clients see file-<32 hex digits>';
comment on column gateway.batch_files.user_id is 'Who uploaded it, or whose batch wrote it; null: a service key';
comment on column gateway.batch_files.api_key_id is 'Our key it came through';
comment on column gateway.batch_files.provider is 'Where it lies';
comment on column gateway.batch_files.provider_key_id is 'Key at the provider that it was put there with, and is read with; null: the provider takes none';
comment on column gateway.batch_files.provider_file_id is 'The provider''s own id; null: the upload did not come to an end';
comment on column gateway.batch_files.batch_id is 'The batch that wrote it; null: it was uploaded';
comment on column gateway.batch_files.endpoint is 'Path that its requests are for';
comment on column gateway.batch_files.filename is 'Its name, as uploaded';
comment on column gateway.batch_files.size_bytes is 'Size as uploaded, or as the provider says';
comment on column gateway.batch_files.requests is 'What metering read of each line of an uploaded file: custom_id, model and estimate; never its text';
comment on column gateway.batch_files.created_at is 'When it was uploaded or written';
comment on column gateway.batch_files.expires_at is 'When the provider deletes it, where it says so';
comment on column gateway.batch_files.deleted_at is 'When it was deleted through us';
call tenancy.protect('gateway.batch_files', 'select, insert, update (provider_file_id, size_bytes, expires_at, deleted_at)');

create table gateway.batches (
    organization_id uuid not null,
    batch_id uuid not null,
    format text not null,
    endpoint text not null,
    user_id uuid,
    api_key_id uuid not null,
    provider text not null,
    provider_key_id uuid,
    is_own_key boolean not null,
    provider_batch_id text,
    input_file_id uuid,
    request_count integer not null,
    prices jsonb not null,
    state text not null default 'opening',
    told jsonb,
    idempotency_key text,
    body_hash bytea,
    created_at timestamptz not null default clock_timestamp(),
    ends_by timestamptz not null,
    lease_until timestamptz not null,
    next_look_at timestamptz not null,
    failed_looks integer not null default 0,
    ended_at timestamptz,
    deleted_at timestamptz,
    constraint batches_pkey primary key (organization_id, batch_id),
    constraint batches_provider foreign key (provider) references gateway.providers,
    constraint batches_input_file foreign key (organization_id, input_file_id) references gateway.batch_files,
    constraint batches_format_known check (format in ('openai', 'anthropic')),
    constraint batches_state_known check (state in ('opening', 'running', 'settling', 'ended', 'failed')),
    constraint batches_ended_when_over check ((ended_at is not null) = (state in ('ended', 'failed'))),
    constraint batches_known_to_provider check (state in ('opening', 'failed') or provider_batch_id is not null),
    constraint batches_count check (request_count > 0)
);
comment on table gateway.batches is 'Batches of requests at providers: held when they are made, settled request by request when their results are there';
comment on column gateway.batches.organization_id is 'Tenant';
comment on column gateway.batches.batch_id is 'Identity; clients see batch_<32 hex digits> or msgbatch_<32 hex digits>';
comment on column gateway.batches.format is 'Whose batch API it was made through: openai or anthropic';
comment on column gateway.batches.endpoint is 'Path that its requests are for';
comment on column gateway.batches.user_id is 'Who made it; null: a service key';
comment on column gateway.batches.api_key_id is 'Our key it was made with';
comment on column gateway.batches.provider is 'Who answers it';
comment on column gateway.batches.provider_key_id is 'Key at the provider that made it; everything later is asked with the same; null: the provider takes none';
comment on column gateway.batches.is_own_key is 'That key is the customer''s own: nothing is charged';
comment on column gateway.batches.provider_batch_id is 'The provider''s own id; null until it has answered';
comment on column gateway.batches.input_file_id is 'File that it is read from (OpenAI''s)';
comment on column gateway.batches.request_count is 'Requests in it';
comment on column gateway.batches.prices is 'Price pinned for each model: versions that are charged and that it costs, mark-up, share of the usual price';
comment on column gateway.batches.state is 'opening: held, the provider has not answered yet; running; settling: ended at the provider, results are being charged; ended; failed: the provider never took it';
comment on column gateway.batches.told is 'The provider''s last word on the whole batch; no text of a request or answer';
comment on column gateway.batches.idempotency_key is 'The client''s Idempotency-Key: the same key makes no second batch';
comment on column gateway.batches.body_hash is 'Hash of the call that made it, where it came with an idempotency key';
comment on column gateway.batches.created_at is 'When it was made';
comment on column gateway.batches.ends_by is 'When the provider gives it up';
comment on column gateway.batches.lease_until is 'Until when the holds of its requests last; renewed while it runs';
comment on column gateway.batches.next_look_at is 'When a worker looks after it next; whoever looks moves it ahead, so that two seldom look at once';
comment on column gateway.batches.failed_looks is 'Looks at the provider in a row that failed; each doubles the wait';
comment on column gateway.batches.ended_at is 'When all of it was charged or freed';
comment on column gateway.batches.deleted_at is 'When it was deleted through us';
create index batches_to_look_after on gateway.batches (organization_id, next_look_at) where ended_at is null;
create unique index batches_idempotency on gateway.batches (organization_id, idempotency_key) where idempotency_key is not null and state <> 'failed';
call tenancy.protect('gateway.batches',
    'select, insert, update (provider_batch_id, state, told, lease_until, next_look_at, failed_looks, ended_at, deleted_at)');

create table gateway.batch_requests (
    organization_id uuid not null,
    batch_id uuid not null,
    custom_id text not null,
    request_id uuid not null,
    model text not null,
    estimate integer[] not null,
    permitted integer[] not null,
    context jsonb not null,
    hold_micros bigint not null,
    state text not null default 'held',
    constraint batch_requests_pkey primary key (organization_id, batch_id, custom_id),
    constraint batch_requests_once unique (organization_id, request_id),
    constraint batch_requests_batch foreign key (organization_id, batch_id) references gateway.batches,
    constraint batch_requests_state_known check (state in ('held', 'charged', 'freed'))
) with (fillfactor = 80);
comment on table gateway.batch_requests is 'The requests of batches: each has a hold and, once answered, an attribution row of its own';
comment on column gateway.batch_requests.organization_id is 'Tenant';
comment on column gateway.batch_requests.batch_id is 'The batch';
comment on column gateway.batch_requests.custom_id is 'The client''s name of the request, unique in the batch';
comment on column gateway.batch_requests.request_id is 'Its id in holds and attribution; settling it twice books once';
comment on column gateway.batch_requests.model is 'Model as priced';
comment on column gateway.batch_requests.estimate is 'Estimated input and calls of tools, in the order of the attribution''s columns';
comment on column gateway.batch_requests.permitted is 'What the provider''s tools may use beside it, in the same order';
comment on column gateway.batch_requests.context is 'Conditions of its price, such as the size of a container';
comment on column gateway.batch_requests.hold_micros is 'What was held for it';
comment on column gateway.batch_requests.state is 'held; charged: it was answered; freed: it failed, expired or was cancelled and costs nothing. Follows what the books say';
create index batch_requests_open on gateway.batch_requests (organization_id, batch_id) where state = 'held';
call tenancy.protect('gateway.batch_requests', 'select, insert, update (state)');
