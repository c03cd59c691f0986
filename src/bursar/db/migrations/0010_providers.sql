-- What the long tail of providers needs to be called, and which models an organization permits itself.
set local lock_timeout = '5s';

-- Azure wants a query behind its paths and the deployment in them; some want headers of their own; and what speaks none
-- of the formats is called through LiteLLM, in a process of its own beside each server process.
alter table gateway.providers
    add column query text not null default '',
    add column headers jsonb not null default '{}',
    add column litellm_provider text,
    drop constraint providers_kind_known,
    drop constraint providers_reachable,
    add constraint providers_kind_known check (kind in ('openai', 'anthropic', 'both', 'litellm')),
    add constraint providers_reachable check (case when kind = 'litellm' then provider <> 'demo' else (base_url is null) = (provider = 'demo') end),
    add constraint providers_litellm_named check ((litellm_provider is null) = (kind <> 'litellm')),
    add constraint providers_query_short check (length(query) <= 500),
    add constraint providers_headers_object check (jsonb_typeof(headers) = 'object');
comment on column gateway.providers.kind is 'Formats that it speaks: openai, anthropic or both; litellm: neither, it is called through the LiteLLM adapter';
comment on column gateway.providers.base_url is 'Where its paths begin, without a slash at the end (…/v1); {model} in it stands for the model called. Null for the built-in provider demo, whose address each process knows, and where LiteLLM knows it';
comment on column gateway.providers.query is 'What stands behind the question mark of every address, as api-version=2024-10-21';
comment on column gateway.providers.headers is 'Headers that every call has, by name; no secrets';
comment on column gateway.providers.litellm_provider is 'What LiteLLM calls this provider; null for those that are called directly';

create table gateway.model_rules (
    organization_id uuid not null,
    rule_id uuid not null,
    scope text not null,
    scope_id uuid not null,
    effect text not null,
    pattern text not null,
    created_at timestamptz not null default clock_timestamp(),
    created_by uuid,
    constraint model_rules_pkey primary key (organization_id, rule_id),
    constraint model_rules_once unique (organization_id, scope, scope_id, effect, pattern),
    constraint model_rules_scope_known check (scope in ('organization', 'team', 'key')),
    constraint model_rules_whole_organization check (scope <> 'organization' or scope_id = organization_id),
    constraint model_rules_effect_known check (effect in ('allow', 'deny')),
    constraint model_rules_pattern_length check (length(pattern) between 1 and 200)
);
comment on table gateway.model_rules is 'Which models an organization, a team or a key may use: what is denied is refused, and where anything is allowed, so is all else';
comment on column gateway.model_rules.organization_id is 'Tenant';
comment on column gateway.model_rules.rule_id is 'Identity; refusals name it';
comment on column gateway.model_rules.scope is 'Whose calls it is about: organization, team, key';
comment on column gateway.model_rules.scope_id is 'The organization, the team, or the first key of a chain of rotations';
comment on column gateway.model_rules.effect is 'allow or deny';
comment on column gateway.model_rules.pattern is 'The name asked for, the provider''s name of the model, or provider/model; % stands for anything';
comment on column gateway.model_rules.created_at is 'When it was made';
comment on column gateway.model_rules.created_by is 'The user who made it; null: the operator''s command line';
call tenancy.protect('gateway.model_rules', 'select, insert, delete');

create table gateway.model_aliases (
    organization_id uuid not null,
    alias text not null,
    alias_id uuid not null,
    model text not null,
    created_at timestamptz not null default clock_timestamp(),
    created_by uuid,
    constraint model_aliases_pkey primary key (organization_id, alias),
    constraint model_aliases_named check (length(alias) between 1 and 200 and length(model) between 1 and 200)
);
comment on table gateway.model_aliases is 'Model names of an organization''s own; each stands for a name that everybody can ask for';
comment on column gateway.model_aliases.organization_id is 'Tenant';
comment on column gateway.model_aliases.alias is 'The name that the organization''s clients ask for; it goes before any other meaning of the name';
comment on column gateway.model_aliases.alias_id is 'Identity for the audit';
comment on column gateway.model_aliases.model is 'The name that is asked for in its place';
comment on column gateway.model_aliases.created_at is 'When it was made';
comment on column gateway.model_aliases.created_by is 'The user who made it; null: the operator''s command line';
call tenancy.protect('gateway.model_aliases', 'select, insert, update (model), delete');
