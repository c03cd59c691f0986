-- The request path: which providers there are, which model is served by whom, and the keys at the providers.
--
-- Providers and routes are the operator's and the same for everybody. Provider keys are rows of an organization: a
-- customer's own keys are its rows, the platform's keys are rows of the platform's organization. So there is one table,
-- row-level security keeps a page of a customer away from the platform's keys too, and every key is sealed to its
-- organization and row.
set local lock_timeout = '5s';

create table gateway.providers (
    provider text not null,
    provider_id uuid not null,
    kind text not null,
    base_url text,
    auth text not null,
    asks_for_usage boolean not null default true,
    position integer not null,
    enabled boolean not null default true,
    created_at timestamptz not null default clock_timestamp(),
    constraint providers_pkey primary key (provider),
    constraint providers_id_once unique (provider_id),
    constraint providers_named check (provider ~ '^[a-z0-9][a-z0-9._-]{0,62}$'),
    constraint providers_kind_known check (kind in ('openai', 'anthropic', 'both')),
    constraint providers_auth_known check (auth in ('vendor', 'bearer', 'api-key', 'none')),
    constraint providers_reachable check ((base_url is null) = (provider = 'demo'))
);
comment on table gateway.providers is 'Model providers that calls can go to; the same for every organization';
comment on column gateway.providers.provider is 'Name, as in the price book';
comment on column gateway.providers.provider_id is 'Identity for the audit';
comment on column gateway.providers.kind is 'Formats that it speaks: openai (chat completions), anthropic (messages) or both';
comment on column gateway.providers.base_url is 'Where its paths begin, without a slash at the end (…/v1); null for the built-in provider demo, whose address each process knows';
comment on column gateway.providers.auth is 'How it takes its key: vendor (a bearer token for the openai format, x-api-key for anthropic), bearer, api-key (a header, Azure), none';
comment on column gateway.providers.asks_for_usage is 'Whether it takes stream_options.include_usage in streams';
comment on column gateway.providers.position is 'Where two providers serve a model name that no route decides, the lower position is called';
comment on column gateway.providers.enabled is 'Whether it is called at all';
comment on column gateway.providers.created_at is 'When it was added';
grant select on gateway.providers to bursar_app, bursar_platform, bursar_backup;
grant insert, update on gateway.providers to bursar_platform;
insert into gateway.providers (provider, provider_id, kind, auth, position)
values ('demo', '00000000-0000-7000-8000-00000000d3e0', 'both', 'none', 1000);

create table gateway.model_routes (
    model text not null,
    route_id uuid not null,
    provider text not null,
    upstream_model text not null,
    enabled boolean not null default true,
    created_at timestamptz not null default clock_timestamp(),
    constraint model_routes_pkey primary key (model),
    constraint model_routes_id_once unique (route_id),
    constraint model_routes_provider foreign key (provider) references gateway.providers,
    constraint model_routes_named check (length(model) between 1 and 200 and length(upstream_model) between 1 and 200)
);
comment on table gateway.model_routes is 'Public model names and what they stand for; a name without a route goes by its prefix or the price book';
comment on column gateway.model_routes.model is 'The name that clients ask for';
comment on column gateway.model_routes.route_id is 'Identity for the audit';
comment on column gateway.model_routes.provider is 'Provider that is called';
comment on column gateway.model_routes.upstream_model is 'The provider''s name of the model, by which it is priced too';
comment on column gateway.model_routes.enabled is 'A route that is not enabled refuses the name';
comment on column gateway.model_routes.created_at is 'When it was added';
grant select on gateway.model_routes to bursar_app, bursar_platform, bursar_backup;
grant insert, update, delete on gateway.model_routes to bursar_platform;

create table gateway.provider_keys (
    organization_id uuid not null,
    provider_key_id uuid not null,
    provider text not null,
    name text not null,
    is_own boolean not null,
    sealing_key_id text not null,
    nonce bytea not null,
    ciphertext bytea not null,
    last4 text not null,
    created_at timestamptz not null default clock_timestamp(),
    created_by uuid,
    revoked_at timestamptz,
    constraint provider_keys_pkey primary key (organization_id, provider_key_id),
    constraint provider_keys_provider foreign key (provider) references gateway.providers,
    constraint provider_keys_sealed check (octet_length(nonce) = 12 and octet_length(ciphertext) > 16),
    constraint provider_keys_last4_short check (length(last4) <= 4)
);
comment on table gateway.provider_keys is 'Keys at providers: a customer''s own, or, in the platform''s organization, the platform''s';
comment on column gateway.provider_keys.organization_id is 'Tenant';
comment on column gateway.provider_keys.provider_key_id is 'Identity; usage carries it';
comment on column gateway.provider_keys.provider is 'Provider that it opens';
comment on column gateway.provider_keys.name is 'What people call it';
comment on column gateway.provider_keys.is_own is 'The customer pays the provider itself (BYOK): its calls cost no credits. False: the platform pays';
comment on column gateway.provider_keys.sealing_key_id is 'Which sealing key, derived from a master key, encrypted it';
comment on column gateway.provider_keys.nonce is 'Nonce of AES-256-GCM, twelve random bytes';
comment on column gateway.provider_keys.ciphertext is 'The key, sealed to its organization and row: it cannot be opened in another place';
comment on column gateway.provider_keys.last4 is 'Its last four characters, to tell keys apart';
comment on column gateway.provider_keys.created_at is 'When it was entered';
comment on column gateway.provider_keys.created_by is 'The user who entered it; null: the operator''s command line';
comment on column gateway.provider_keys.revoked_at is 'Since when it is used no more; the newest key that is not revoked is used';
create index provider_keys_usable on gateway.provider_keys (organization_id, provider, created_at desc) where revoked_at is null;
call tenancy.protect('gateway.provider_keys', 'select, insert, update (sealing_key_id, nonce, ciphertext, revoked_at)');
