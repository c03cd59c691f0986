-- Who there is: organizations, people, teams, departments, keys and sessions; and the audit of what they did.
set local lock_timeout = '5s';

-- ---------------------------------------------------------------------------------------------- audit

create table audit.events (
    organization_id uuid not null,
    event_id uuid not null,
    at timestamptz not null default clock_timestamp(),
    actor_kind text not null,
    actor_id uuid,
    action text not null,
    object_kind text not null,
    object_id uuid not null,
    old_value jsonb,
    new_value jsonb,
    reason text,
    request_id text,
    address_hash bytea,
    constraint events_pkey primary key (organization_id, event_id),
    constraint events_actor_known check (actor_kind in ('user', 'api_key', 'operator', 'system')),
    constraint events_actor_identified check ((actor_kind in ('user', 'api_key')) = (actor_id is not null)),
    constraint events_action_named check (action ~ '^[a-z_]+\.[a-z_]+$')
);
comment on table audit.events is 'Append-only: who did what to which object, why and from where; no personal data, no secrets';
comment on column audit.events.organization_id is 'Tenant';
comment on column audit.events.event_id is 'Identity; UUIDv7, so it sorts by time';
comment on column audit.events.at is 'When it was written, by the database''s clock';
comment on column audit.events.actor_kind is 'user, api_key, operator (command line of the installation) or system (a job)';
comment on column audit.events.actor_id is 'User or API key that acted; null for operator and system';
comment on column audit.events.action is 'object.verb in the past, such as api_key.revoked';
comment on column audit.events.object_kind is 'Kind of the object, such as membership';
comment on column audit.events.object_id is 'Identity of the object';
comment on column audit.events.old_value is 'What it was: the changed fields only, never personal data or secrets';
comment on column audit.events.new_value is 'What it became: the changed fields only, never personal data or secrets';
comment on column audit.events.reason is 'Why, in the words of who did it';
comment on column audit.events.request_id is 'X-Request-Id of the request that did it';
comment on column audit.events.address_hash is 'Keyed hash of the network address it came from';
create index events_by_object on audit.events (organization_id, object_kind, object_id, event_id);
call tenancy.protect('audit.events', 'select, insert');
call tenancy.append_only('audit.events');

-- ---------------------------------------------------------------------------------------------- routing

create table route.organizations (
    slug text not null,
    organization_id uuid not null,
    constraint organizations_pkey primary key (slug),
    constraint organizations_slug_once unique (organization_id)
);
comment on table route.organizations is 'Which organization a slug names; unique over the installation';
comment on column route.organizations.slug is 'Name in addresses, lower case';
comment on column route.organizations.organization_id is 'The organization';

create table route.users (
    user_id uuid not null,
    email_hash bytea not null,
    home_organization_id uuid not null,
    default_organization_id uuid,
    constraint users_pkey primary key (user_id),
    constraint users_email_once unique (email_hash),
    constraint users_home_once unique (home_organization_id),
    constraint users_email_hashed check (octet_length(email_hash) = 32)
);
comment on table route.users is 'Every person of the installation, without personal data';
comment on column route.users.user_id is 'Identity of the person in every organization';
comment on column route.users.email_hash is 'HMAC-SHA256 of the normalized address under a key derived from the master key';
comment on column route.users.home_organization_id is 'The person''s own organization of kind individual';
comment on column route.users.default_organization_id is 'Where the person acts unless a request chooses; null: the first one joined';

create table route.memberships (
    user_id uuid not null,
    organization_id uuid not null,
    joined_at timestamptz not null,
    constraint memberships_pkey primary key (user_id, organization_id)
);
comment on table route.memberships is 'Active memberships of a person, the home organization included: exactly the active rows of identity.memberships';
comment on column route.memberships.user_id is 'The person';
comment on column route.memberships.organization_id is 'The organization they belong to';
comment on column route.memberships.joined_at is 'Since when; the first joined company is used when nothing else is chosen';

create table route.api_keys (
    key_hash bytea not null,
    organization_id uuid not null,
    api_key_id uuid not null,
    constraint api_keys_pkey primary key (key_hash),
    constraint api_keys_hashed check (octet_length(key_hash) = 32)
);
comment on table route.api_keys is 'Which API key a presented text is';
comment on column route.api_keys.key_hash is 'SHA-256 of the whole key text; its secret is 256 random bits, so no slow hash is needed';
comment on column route.api_keys.organization_id is 'Organization in which the key was made';
comment on column route.api_keys.api_key_id is 'The key';

create table route.sign_in_links (
    token_hash bytea not null,
    organization_id uuid not null,
    link_id uuid not null,
    constraint sign_in_links_pkey primary key (token_hash),
    constraint sign_in_links_hashed check (octet_length(token_hash) = 32)
);
comment on table route.sign_in_links is 'Which one-time sign-in link a presented token is';
comment on column route.sign_in_links.token_hash is 'SHA-256 of the token''s 256 random bits';
comment on column route.sign_in_links.organization_id is 'Home organization of the person who signs in';
comment on column route.sign_in_links.link_id is 'The link';

-- ---------------------------------------------------------------------------------------------- organizations

create table identity.organizations (
    organization_id uuid not null,
    slug text not null,
    name text not null,
    kind text not null,
    zone text not null,
    currency text not null,
    is_shared_token_pool boolean not null,
    shows_margin boolean not null default false,
    status text not null default 'active',
    created_at timestamptz not null,
    constraint organizations_pkey primary key (organization_id),
    constraint organizations_slug_plain check (slug ~ '^[a-z0-9](-?[a-z0-9])+$' and length(slug) <= 63),
    constraint organizations_name_length check (length(name) between 1 and 200),
    constraint organizations_kind_known check (kind in ('company', 'individual', 'platform', 'catch_all')),
    constraint organizations_status_known check (status in ('active', 'frozen', 'closed')),
    constraint organizations_currency_iso check (currency ~ '^[A-Z]{3}$'),
    -- An unknown zone makes this raise, so that no day or month can ever fail to be cut.
    constraint organizations_zone_known check (timezone(zone, timestamptz 'epoch') is not null),
    constraint organizations_one_platform check ((kind = 'platform') = (organization_id = '00000000-0000-7000-8000-000000000001'))
);
comment on table identity.organizations is 'The tenants: companies, the platform''s own, catch-alls of a family, and one of kind individual per person';
comment on column identity.organizations.organization_id is 'Tenant; identity';
comment on column identity.organizations.slug is 'Name in addresses; unique through route.organizations';
comment on column identity.organizations.name is 'What people call it';
comment on column identity.organizations.kind is 'company, individual (one person''s home), platform (the operator''s, one per installation) or catch_all (rest of a family)';
comment on column identity.organizations.zone is 'IANA zone that cuts its days and months';
comment on column identity.organizations.currency is 'ISO 4217 currency in which money is shown';
comment on column identity.organizations.is_shared_token_pool is 'True: the balance belongs to the organization; false: each member has a balance of their own';
comment on column identity.organizations.shows_margin is 'Whether its own people with margin:read see provider cost and margin; off for resold organizations';
comment on column identity.organizations.status is 'active, frozen (reads, spends nothing) or closed (answers nobody)';
comment on column identity.organizations.created_at is 'Since when it exists';
call tenancy.protect('identity.organizations', 'select, insert, update', 'select');

-- ---------------------------------------------------------------------------------------------- departments and teams

create table identity.departments (
    organization_id uuid not null,
    department_id uuid not null,
    name text not null,
    created_at timestamptz not null,
    archived_at timestamptz,
    constraint departments_pkey primary key (organization_id, department_id),
    constraint departments_organization foreign key (organization_id) references identity.organizations (organization_id),
    constraint departments_name_length check (length(name) between 1 and 200)
);
comment on table identity.departments is 'Cost centers: on members, keys and usage';
comment on column identity.departments.organization_id is 'Tenant';
comment on column identity.departments.department_id is 'Identity; usage keeps the id and the name of its time';
comment on column identity.departments.name is 'What people call it; unique among those in use, whatever the case';
comment on column identity.departments.created_at is 'Since when it exists';
comment on column identity.departments.archived_at is 'Since when nobody new is put into it; null: in use';
create unique index departments_name_once on identity.departments (organization_id, lower(name)) where archived_at is null;
call tenancy.protect('identity.departments', 'select, insert, update', 'select');

create table identity.teams (
    organization_id uuid not null,
    team_id uuid not null,
    name text not null,
    department_id uuid,
    lead_user_id uuid,
    created_at timestamptz not null,
    archived_at timestamptz,
    constraint teams_pkey primary key (organization_id, team_id),
    constraint teams_organization foreign key (organization_id) references identity.organizations (organization_id),
    constraint teams_department foreign key (organization_id, department_id) references identity.departments (organization_id, department_id),
    constraint teams_name_length check (length(name) between 1 and 200)
);
comment on table identity.teams is 'Members who work together, with a lead';
comment on column identity.teams.organization_id is 'Tenant';
comment on column identity.teams.team_id is 'Identity';
comment on column identity.teams.name is 'What people call it; unique among those in use, whatever the case';
comment on column identity.teams.department_id is 'Department it belongs to, if any';
comment on column identity.teams.lead_user_id is 'Member who leads it; one person may lead several';
comment on column identity.teams.created_at is 'Since when it exists';
comment on column identity.teams.archived_at is 'Since when nobody new is put into it; null: in use';
create unique index teams_name_once on identity.teams (organization_id, lower(name)) where archived_at is null;
create index teams_by_lead on identity.teams (organization_id, lead_user_id);
create index teams_by_department on identity.teams (organization_id, department_id);
call tenancy.protect('identity.teams', 'select, insert, update', 'select');

-- ---------------------------------------------------------------------------------------------- memberships

create table identity.memberships (
    organization_id uuid not null,
    user_id uuid not null,
    email text not null,
    display_name text not null,
    roles text[] not null,
    team_id uuid,
    department_id uuid,
    status text not null default 'active',
    joined_at timestamptz not null,
    left_at timestamptz,
    constraint memberships_pkey primary key (organization_id, user_id),
    constraint memberships_email_once unique (organization_id, email),
    constraint memberships_organization foreign key (organization_id) references identity.organizations (organization_id),
    constraint memberships_team foreign key (organization_id, team_id) references identity.teams (organization_id, team_id),
    constraint memberships_department foreign key (organization_id, department_id)
        references identity.departments (organization_id, department_id),
    constraint memberships_email_normalized check (email = lower(email) and length(email) between 3 and 254),
    constraint memberships_name_length check (length(display_name) between 1 and 200),
    constraint memberships_status_known check (status in ('active', 'suspended', 'left')),
    constraint memberships_left_dated check ((status = 'left') = (left_at is not null)),
    constraint memberships_roles_known check (
        cardinality(roles) > 0
        and roles <@ array['system_admin', 'org_admin', 'finance', 'license_admin', 'team_lead', 'member', 'auditor']
    ),
    -- Nobody becomes system admin in an organization of their own, whatever the application is talked into.
    constraint memberships_system_admin_of_platform check (
        not 'system_admin' = any (roles) or organization_id = '00000000-0000-7000-8000-000000000001'
    )
);
comment on table identity.memberships is 'A person in an organization: the only table with personal data';
comment on column identity.memberships.organization_id is 'Tenant';
comment on column identity.memberships.user_id is 'The person; the same id in every organization';
comment on column identity.memberships.email is 'Personal: normalized address';
comment on column identity.memberships.display_name is 'Personal: what others see';
comment on column identity.memberships.roles is 'Roles here; what each may do stands in bursar.identity.roles';
comment on column identity.memberships.team_id is 'Team, if any';
comment on column identity.memberships.department_id is 'Cost center, if any';
comment on column identity.memberships.status is 'active, suspended (may do nothing for now) or left';
comment on column identity.memberships.joined_at is 'Since when; a person who comes back joins anew';
comment on column identity.memberships.left_at is 'When they left; null while they are here';
create index memberships_by_team on identity.memberships (organization_id, team_id);
create index memberships_by_department on identity.memberships (organization_id, department_id);
call tenancy.protect('identity.memberships', 'select, insert, update', 'select');

alter table identity.teams add constraint teams_lead foreign key (organization_id, lead_user_id)
    references identity.memberships (organization_id, user_id);

-- ---------------------------------------------------------------------------------------------- API keys

create table identity.api_keys (
    organization_id uuid not null,
    api_key_id uuid not null,
    original_api_key_id uuid not null,
    user_id uuid,
    name text not null,
    public_id text not null,
    last4 text not null,
    scopes text[] not null,
    team_id uuid,
    department_id uuid,
    expires_at timestamptz,
    revoked_at timestamptz,
    replaced_by uuid,
    created_at timestamptz not null,
    created_by uuid,
    last_used_at timestamptz,
    constraint api_keys_pkey primary key (organization_id, api_key_id),
    constraint api_keys_public_id_once unique (organization_id, public_id),
    constraint api_keys_member foreign key (organization_id, user_id) references identity.memberships (organization_id, user_id),
    constraint api_keys_team foreign key (organization_id, team_id) references identity.teams (organization_id, team_id),
    constraint api_keys_department foreign key (organization_id, department_id)
        references identity.departments (organization_id, department_id),
    constraint api_keys_original foreign key (organization_id, original_api_key_id)
        references identity.api_keys (organization_id, api_key_id),
    constraint api_keys_replacement foreign key (organization_id, replaced_by) references identity.api_keys (organization_id, api_key_id),
    constraint api_keys_replaced_by_another check (replaced_by <> api_key_id),
    constraint api_keys_replaced_ends check (replaced_by is null or expires_at is not null or revoked_at is not null),
    constraint api_keys_name_length check (length(name) between 1 and 200),
    constraint api_keys_last4_length check (length(last4) = 4),
    constraint api_keys_scopes_known check (cardinality(scopes) > 0 and scopes <@ array['inference', 'read', 'write'])
);
comment on table identity.api_keys is 'Credentials of people and services; the secret itself is never stored';
comment on column identity.api_keys.organization_id is 'Tenant: a company (the key acts there) or a home organization (a personal key acts where its user chooses)';
comment on column identity.api_keys.api_key_id is 'Identity';
comment on column identity.api_keys.original_api_key_id is 'First key of the chain of rotations; itself for a key that replaced none';
comment on column identity.api_keys.user_id is 'Owner; null: a service key';
comment on column identity.api_keys.name is 'What people call it';
comment on column identity.api_keys.public_id is 'Part of the text that may be shown: route of the organization and random bytes, base62';
comment on column identity.api_keys.last4 is 'Last four characters of the text, to recognize it by';
comment on column identity.api_keys.scopes is 'What it may be used for, within what its owner may: inference, read, write';
comment on column identity.api_keys.team_id is 'Team its usage counts for; null: the owner''s';
comment on column identity.api_keys.department_id is 'Department its usage counts for; null: the owner''s';
comment on column identity.api_keys.expires_at is 'When it stops by itself; after a rotation the end of the overlap';
comment on column identity.api_keys.revoked_at is 'When it was stopped for good';
comment on column identity.api_keys.replaced_by is 'Key that a rotation made in its place';
comment on column identity.api_keys.created_at is 'Since when it exists';
comment on column identity.api_keys.created_by is 'User who made it; null: the operator or the system';
comment on column identity.api_keys.last_used_at is 'Last use, some minutes late: written in batches';
create index api_keys_by_user on identity.api_keys (organization_id, user_id, created_at);
create index api_keys_by_time on identity.api_keys (organization_id, created_at, api_key_id);
call tenancy.protect('identity.api_keys', 'select, insert, update', 'select');

-- ---------------------------------------------------------------------------------------------- sign-in

create table identity.sign_in_links (
    organization_id uuid not null,
    link_id uuid not null,
    user_id uuid not null,
    created_at timestamptz not null,
    created_by uuid,
    expires_at timestamptz not null,
    used_at timestamptz,
    constraint sign_in_links_pkey primary key (organization_id, link_id),
    constraint sign_in_links_member foreign key (organization_id, user_id) references identity.memberships (organization_id, user_id),
    constraint sign_in_links_used_in_time check (used_at < expires_at)
);
comment on table identity.sign_in_links is 'One-time links by which a person signs in; rows of the person''s home organization';
comment on column identity.sign_in_links.organization_id is 'Tenant: home organization of the person';
comment on column identity.sign_in_links.link_id is 'Identity';
comment on column identity.sign_in_links.user_id is 'Who signs in by it';
comment on column identity.sign_in_links.created_at is 'When it was made';
comment on column identity.sign_in_links.created_by is 'User who made it; null: the operator';
comment on column identity.sign_in_links.expires_at is 'Until when it can be used';
comment on column identity.sign_in_links.used_at is 'When it was used; it works once';
call tenancy.protect('identity.sign_in_links', 'select, insert, update');

create table identity.sessions (
    organization_id uuid not null,
    session_id uuid not null,
    user_id uuid not null,
    started_at timestamptz not null,
    last_seen_at timestamptz not null,
    ended_at timestamptz,
    chosen_organization_id uuid,
    address_hash bytea,
    constraint sessions_pkey primary key (organization_id, session_id),
    constraint sessions_member foreign key (organization_id, user_id) references identity.memberships (organization_id, user_id)
);
comment on table identity.sessions is 'Signed-in browsers; rows of the person''s home organization';
comment on column identity.sessions.organization_id is 'Tenant: home organization of the person';
comment on column identity.sessions.session_id is 'Identity; the cookie carries it signed';
comment on column identity.sessions.user_id is 'Who is signed in';
comment on column identity.sessions.started_at is 'When they signed in; the absolute end counts from here';
comment on column identity.sessions.last_seen_at is 'Last request, at most a minute late; the idle end counts from here';
comment on column identity.sessions.ended_at is 'When it was signed out or revoked';
comment on column identity.sessions.chosen_organization_id is 'Organization chosen in this session; null: the default';
comment on column identity.sessions.address_hash is 'Keyed hash of the network address it was started from';
create index sessions_by_user on identity.sessions (organization_id, user_id) where ended_at is null;
call tenancy.protect('identity.sessions', 'select, insert, update');
