-- The outbox: what happened and is to be told, and what was told to whom.
set local lock_timeout = '5s';

create schema outbox;
comment on schema outbox is 'Events for people and programs: written with the deed, told by e-mail and signed webhooks';
grant usage on schema outbox to bursar_app, bursar_platform, bursar_money, bursar_backup;

create table outbox.events (
    organization_id uuid not null,
    event_id uuid not null,
    kind text not null,
    object_kind text not null,
    object_id uuid not null,
    sequence bigint not null,
    payload jsonb not null,
    happened_at timestamptz not null,
    posted_at timestamptz not null default clock_timestamp(),
    constraint events_pkey primary key (organization_id, event_id),
    constraint events_in_order unique (organization_id, object_kind, object_id, sequence),
    constraint events_kind_named check (kind ~ '^[a-z_]+\.[a-z_]+$'),
    constraint events_object_named check (object_kind ~ '^[a-z_]+$'),
    constraint events_sequence_positive check (sequence > 0),
    constraint events_payload_object check (jsonb_typeof(payload) = 'object')
);
comment on table outbox.events is 'Append-only: what happened and is to be told; written in the transaction of the deed';
comment on column outbox.events.organization_id is 'Tenant';
comment on column outbox.events.event_id is 'Identity; receivers of webhooks see it as webhook-id';
comment on column outbox.events.kind is 'object.what, such as pool.low, limit.reached, grant.expired';
comment on column outbox.events.object_kind is 'Kind of the object it happened to, such as pool';
comment on column outbox.events.object_id is 'Identity of the object';
comment on column outbox.events.sequence is 'Number among the events of that object: 1, 2, 3 … without gaps';
comment on column outbox.events.payload is 'What is told; amounts as texts with their unit, no secrets, people by their ids';
comment on column outbox.events.happened_at is 'When it happened, by the instant of the deed';
comment on column outbox.events.posted_at is 'When it was written, by the database''s clock';
create index events_by_time on outbox.events (organization_id, posted_at desc);
call tenancy.protect('outbox.events', 'select, insert', 'select, insert');
call tenancy.append_only('outbox.events');

create table outbox.endpoints (
    organization_id uuid not null,
    endpoint_id uuid not null,
    url text not null,
    kinds text[] not null,
    state text not null default 'active',
    failing_since timestamptz,
    created_at timestamptz not null default clock_timestamp(),
    created_by uuid,
    ended_at timestamptz,
    constraint endpoints_pkey primary key (organization_id, endpoint_id),
    constraint endpoints_url_length check (length(url) between 8 and 2000),
    constraint endpoints_kinds_named check (cardinality(kinds) > 0 and array_to_string(kinds, ' ') ~ '^[a-z_.* ]+$'),
    constraint endpoints_state_known check (state in ('active', 'disabled', 'removed')),
    constraint endpoints_ended_dated check ((state = 'active') = (ended_at is null))
);
comment on table outbox.endpoints is 'Webhooks: addresses of an organization''s own programs that events are sent to';
comment on column outbox.endpoints.organization_id is 'Tenant';
comment on column outbox.endpoints.endpoint_id is 'Identity';
comment on column outbox.endpoints.url is 'Where events are posted';
comment on column outbox.endpoints.kinds is 'Which kinds: * for all, pool.* for all of an object, or a kind';
comment on column outbox.endpoints.state is 'active; disabled: it failed for too long, or said that it is gone; removed';
comment on column outbox.endpoints.failing_since is 'First failure since the last success; null: the last attempt succeeded';
comment on column outbox.endpoints.created_at is 'When it was added';
comment on column outbox.endpoints.created_by is 'User who added it; null: the operator';
comment on column outbox.endpoints.ended_at is 'When it was disabled or removed';
call tenancy.protect('outbox.endpoints', 'select, insert, update (kinds, state, failing_since, ended_at)', 'select');

create table outbox.endpoint_secrets (
    organization_id uuid not null,
    secret_id uuid not null,
    endpoint_id uuid not null,
    sealing_key_id text not null,
    nonce bytea not null,
    ciphertext bytea not null,
    created_at timestamptz not null default clock_timestamp(),
    ends_at timestamptz not null default 'infinity',
    constraint endpoint_secrets_pkey primary key (organization_id, secret_id),
    constraint endpoint_secrets_endpoint foreign key (organization_id, endpoint_id) references outbox.endpoints (organization_id, endpoint_id),
    constraint endpoint_secrets_sealed check (octet_length(nonce) = 12 and octet_length(ciphertext) > 16)
);
comment on table outbox.endpoint_secrets is 'What webhooks are signed with: one secret of an endpoint, two while it is being rotated';
comment on column outbox.endpoint_secrets.organization_id is 'Tenant';
comment on column outbox.endpoint_secrets.secret_id is 'Identity';
comment on column outbox.endpoint_secrets.endpoint_id is 'The endpoint';
comment on column outbox.endpoint_secrets.sealing_key_id is 'Which sealing key, derived from a master key, encrypted it';
comment on column outbox.endpoint_secrets.nonce is 'Nonce of AES-256-GCM, twelve random bytes';
comment on column outbox.endpoint_secrets.ciphertext is 'The secret, sealed to its organization and row: it cannot be opened in another place';
comment on column outbox.endpoint_secrets.created_at is 'When it was made';
comment on column outbox.endpoint_secrets.ends_at is 'Until when it signs; infinity: no newer one has taken its place';
create index endpoint_secrets_by_endpoint on outbox.endpoint_secrets (organization_id, endpoint_id, created_at desc);
call tenancy.protect('outbox.endpoint_secrets', 'select, insert, update (ends_at, sealing_key_id, nonce, ciphertext)');

create table outbox.deliveries (
    organization_id uuid not null,
    endpoint_id uuid not null,
    event_id uuid not null,
    object_kind text not null,
    object_id uuid not null,
    sequence bigint not null,
    state text not null default 'pending',
    attempts integer not null default 0,
    next_attempt_at timestamptz not null default clock_timestamp(),
    first_attempt_at timestamptz,
    ended_at timestamptz,
    answer text,
    created_at timestamptz not null default clock_timestamp(),
    constraint deliveries_pkey primary key (organization_id, endpoint_id, event_id),
    constraint deliveries_endpoint foreign key (organization_id, endpoint_id) references outbox.endpoints (organization_id, endpoint_id),
    constraint deliveries_state_known check (state in ('pending', 'delivered', 'failed')),
    constraint deliveries_ended_dated check ((state = 'pending') = (ended_at is null)),
    constraint deliveries_attempts check (attempts >= 0)
) with (fillfactor = 70);
comment on table outbox.deliveries is 'One event to one webhook: what is still to be sent, and what became of it';
comment on column outbox.deliveries.organization_id is 'Tenant';
comment on column outbox.deliveries.endpoint_id is 'Where it goes';
comment on column outbox.deliveries.event_id is 'What goes there';
comment on column outbox.deliveries.object_kind is 'As in the event; an endpoint gets the events of one object in their order';
comment on column outbox.deliveries.object_id is 'As in the event';
comment on column outbox.deliveries.sequence is 'As in the event';
comment on column outbox.deliveries.state is 'pending, delivered, or failed after three days of attempts';
comment on column outbox.deliveries.attempts is 'How often it was sent';
comment on column outbox.deliveries.next_attempt_at is 'When it is due; while it is being sent, the end of the lease of who sends it';
comment on column outbox.deliveries.first_attempt_at is 'When it was first sent; the three days count from here';
comment on column outbox.deliveries.ended_at is 'When it was delivered or given up';
comment on column outbox.deliveries.answer is 'What came of the last attempt: a status, or why there was none';
comment on column outbox.deliveries.created_at is 'When it was decided that it goes there';
create index deliveries_pending on outbox.deliveries (organization_id, next_attempt_at) where state = 'pending';
create index deliveries_in_order on outbox.deliveries (organization_id, endpoint_id, object_kind, object_id, sequence) where state = 'pending';
create index deliveries_by_time on outbox.deliveries (organization_id, endpoint_id, created_at desc);
call tenancy.protect('outbox.deliveries',
    'select, insert, update (state, attempts, next_attempt_at, first_attempt_at, ended_at, answer)', 'select, insert');

create table outbox.mails (
    organization_id uuid not null,
    mail_id uuid not null,
    user_id uuid,
    address text,
    state text not null default 'pending',
    attempts integer not null default 0,
    next_attempt_at timestamptz not null,
    first_attempt_at timestamptz,
    ended_at timestamptz,
    answer text,
    created_at timestamptz not null default clock_timestamp(),
    constraint mails_pkey primary key (organization_id, mail_id),
    constraint mails_one_reader check ((user_id is null) <> (address is null)),
    constraint mails_state_known check (state in ('pending', 'sent', 'failed', 'dropped')),
    constraint mails_ended_dated check ((state = 'pending') = (ended_at is null)),
    constraint mails_attempts check (attempts >= 0)
) with (fillfactor = 70);
comment on table outbox.mails is 'E-mails to be sent: one reader, one or more events that were collected for them';
comment on column outbox.mails.organization_id is 'Tenant';
comment on column outbox.mails.mail_id is 'Identity; part of its Message-ID';
comment on column outbox.mails.user_id is 'The member who gets it, at the address that they have when it is sent';
comment on column outbox.mails.address is 'Personal: the address it goes to, where it is no member''s';
comment on column outbox.mails.state is 'pending, sent, failed after three days or by a final answer, dropped: the member has left, or there is no mail server';
comment on column outbox.mails.attempts is 'How often it was handed to the mail server; while 0, further events may join it';
comment on column outbox.mails.next_attempt_at is 'When it is due: the end of collecting; while it is being sent, the end of the lease of who sends it';
comment on column outbox.mails.first_attempt_at is 'When it was first handed over';
comment on column outbox.mails.ended_at is 'When it was sent or given up';
comment on column outbox.mails.answer is 'What the mail server said last';
comment on column outbox.mails.created_at is 'When its first event came';
create index mails_pending on outbox.mails (organization_id, next_attempt_at) where state = 'pending';
create index mails_collecting on outbox.mails (organization_id, user_id, address) where state = 'pending' and attempts = 0;
call tenancy.protect('outbox.mails',
    'select, insert, update (state, attempts, next_attempt_at, first_attempt_at, ended_at, answer)', 'select, insert, update');

create table outbox.mail_events (
    organization_id uuid not null,
    mail_id uuid not null,
    event_id uuid not null,
    constraint mail_events_pkey primary key (organization_id, mail_id, event_id),
    constraint mail_events_mail foreign key (organization_id, mail_id) references outbox.mails (organization_id, mail_id)
);
comment on table outbox.mail_events is 'Which events an e-mail tells';
comment on column outbox.mail_events.organization_id is 'Tenant';
comment on column outbox.mail_events.mail_id is 'The e-mail';
comment on column outbox.mail_events.event_id is 'The event';
call tenancy.protect('outbox.mail_events', 'select, insert', 'select, insert');
