-- The price book: what a model costs and since when, for everybody; and what one organization pays instead.
--
-- Unit prices are bigint nano-dollars for as many of a kind as vendors quote it by (kinds.per): a million tokens, a
-- thousand searches, one image, one hour. So $0.000001 per million tokens is exact (1000), the dearest price of our
-- lists is far below the limit of 9.2 billion dollars, and nothing needs numeric or float. Sums are taken over the
-- common denominator of all `per` and rounded once, in bursar.pricing.prices.
--
-- Rows of versions, rates, overrides, mark-ups and policies are never changed: a new price is a new row that takes
-- effect at an instant. A correction of the same instant has the next revision; the highest one counts.
set local lock_timeout = '5s';

-- The book of the platform: the same for all organizations, written by the platform's operator.

create table pricing.book (
    only_row boolean primary key default true check (only_row),
    revision bigint not null default 1
);
comment on table pricing.book is 'One row. Its revision rises with every change of anything in this schema, so that caches know';
comment on column pricing.book.only_row is 'Always true';
comment on column pricing.book.revision is 'Rises by one with each change; the row is the lock of all changes too';
insert into pricing.book default values;

create table pricing.kinds (
    kind text primary key,
    position smallint not null unique,
    per bigint not null check (per > 0),
    unit text not null
);
comment on table pricing.kinds is 'The canonical kinds of usage, in the order of the columns of the attribution row, and the unit in which each is priced';
comment on column pricing.kinds.kind is 'Name of the kind, and of its column in ledger.attribution';
comment on column pricing.kinds.position is 'Place in arrays of counts, from 1';
comment on column pricing.kinds.per is 'A unit price is for this many';
comment on column pricing.kinds.unit is 'The same in words, as price files name it';
insert into pricing.kinds (position, kind, per, unit) values
    (1, 'input_tokens', 1000000, '1M tokens'),
    (2, 'cache_read_tokens', 1000000, '1M tokens'),
    (3, 'cache_write_5m_tokens', 1000000, '1M tokens'),
    (4, 'cache_write_1h_tokens', 1000000, '1M tokens'),
    (5, 'output_tokens', 1000000, '1M tokens'),
    (6, 'reasoning_tokens', 1000000, '1M tokens'),
    (7, 'audio_input_tokens', 1000000, '1M tokens'),
    (8, 'audio_output_tokens', 1000000, '1M tokens'),
    (9, 'image_input_tokens', 1000000, '1M tokens'),
    (10, 'image_output_tokens', 1000000, '1M tokens'),
    (11, 'images', 1, 'image'),
    (12, 'web_searches', 1000, '1K searches'),
    (13, 'audio_milliseconds', 3600000, 'hour'),
    (14, 'characters', 1000000, '1M characters'),
    (15, 'requests', 1, 'request');

create table pricing.lists (
    list_name text primary key check (list_name ~ '^[a-z0-9][a-z0-9._-]{0,62}$'),
    rank smallint not null,
    title text not null
);
comment on table pricing.lists is 'Price lists that stand side by side: the shipped ones and the operator''s own';
comment on column pricing.lists.list_name is 'Name of the list';
comment on column pricing.lists.rank is 'Where two lists price a model, the higher rank counts; names decide ties';
comment on column pricing.lists.title is 'What the list is, for people';

create table pricing.imports (
    import_id uuid primary key,
    list_name text not null references pricing.lists,
    list_version text not null,
    list_date date,
    digest bytea not null,
    effective_from timestamptz not null,
    added integer not null,
    changed integer not null,
    unchanged integer not null,
    not_represented jsonb not null,
    imported_at timestamptz not null default now(),
    imported_by uuid
);
comment on table pricing.imports is 'Each import that brought something new; append-only';
comment on column pricing.imports.import_id is 'Identity';
comment on column pricing.imports.list_name is 'The list';
comment on column pricing.imports.list_version is 'Version of the list as its source names it';
comment on column pricing.imports.list_date is 'Date of the list; of genai-prices, which has none, the newest price change that it dates';
comment on column pricing.imports.digest is 'SHA-256 of the list''s contents in canonical form: the same list again changes nothing';
comment on column pricing.imports.effective_from is 'From when changed prices of known models count';
comment on column pricing.imports.added is 'Models priced for the first time by this list';
comment on column pricing.imports.changed is 'Models whose price changed';
comment on column pricing.imports.unchanged is 'Models whose price stayed';
comment on column pricing.imports.not_represented is 'What the list says and this book cannot hold: {unit or reason: [provider/model, ...]}';
comment on column pricing.imports.imported_at is 'When';
comment on column pricing.imports.imported_by is 'The user who did it; null: the operator''s command line, or the program itself';

create table pricing.providers (
    list_name text not null references pricing.lists,
    provider text not null,
    position integer not null,
    rule jsonb,
    fallbacks text[] not null default '{}',
    primary key (list_name, provider)
);
comment on table pricing.providers is 'Providers of a list, and how to know them';
comment on column pricing.providers.list_name is 'The list';
comment on column pricing.providers.provider is 'Name of the provider';
comment on column pricing.providers.position is 'The first provider whose rule fits is meant';
comment on column pricing.providers.rule is 'Rule for other names of it, as in bursar.pricing.models; null when only its own name';
comment on column pricing.providers.fallbacks is 'Providers whose models it resells: their price counts where it has none';

create table pricing.models (
    list_name text not null,
    provider text not null,
    model text not null,
    position integer not null,
    rule jsonb not null,
    context_window bigint,
    primary key (list_name, provider, model),
    constraint models_provider foreign key (list_name, provider) references pricing.providers (list_name, provider)
);
comment on table pricing.models is 'Models of a list, and which names mean them (gpt-4o-2024-08-06 is gpt-4o)';
comment on column pricing.models.list_name is 'The list';
comment on column pricing.models.provider is 'The provider';
comment on column pricing.models.model is 'The model, as it is priced';
comment on column pricing.models.position is 'Within a provider the first model whose rule fits is meant';
comment on column pricing.models.rule is 'Rule for its names, as in bursar.pricing.models';
comment on column pricing.models.context_window is 'Longest input in tokens, where the list tells';

create table pricing.versions (
    price_version_id uuid primary key,
    list_name text not null references pricing.lists,
    provider text not null,
    model text not null,
    effective_from timestamptz not null,
    revision integer not null,
    withdrawn boolean not null,
    source text not null,
    import_id uuid not null references pricing.imports,
    constraint versions_one_per_instant unique (list_name, provider, model, effective_from, revision),
    constraint versions_begin_at_an_instant check (isfinite(effective_from) and revision > 0)
);
create index versions_by_model on pricing.versions (provider, model, effective_from);
comment on table pricing.versions is 'A price of a model, from an instant on until the next version of the same list; append-only';
comment on column pricing.versions.price_version_id is 'Identity, kept by every request that it priced';
comment on column pricing.versions.list_name is 'The list that says so';
comment on column pricing.versions.provider is 'The provider';
comment on column pricing.versions.model is 'The model';
comment on column pricing.versions.effective_from is 'First instant at which it counts; 1970 means that the list knows no earlier price';
comment on column pricing.versions.revision is 'Of several versions of one instant the highest counts';
comment on column pricing.versions.withdrawn is 'True: from here on this list has no price for the model';
comment on column pricing.versions.source is 'Where the price was read';
comment on column pricing.versions.import_id is 'The import that brought it';

create table pricing.rates (
    price_version_id uuid not null references pricing.versions,
    place smallint not null,
    kind text not null references pricing.kinds,
    above_input_tokens bigint not null default 0,
    condition jsonb not null default '{}',
    price_nano_usd bigint not null,
    minimum bigint not null default 0,
    free boolean not null default false,
    primary key (price_version_id, place, kind, above_input_tokens),
    constraint standard_price_has_no_condition check ((place = 0) = (condition = '{}'::jsonb)),
    constraint rates_are_not_negative check (price_nano_usd >= 0 and above_input_tokens >= 0 and minimum >= 0 and place >= 0),
    constraint zero_is_said_to_be_free check ((price_nano_usd = 0) = free)
);
comment on table pricing.rates is 'Unit prices of a version: one row per kind, long-context tier and condition; append-only';
comment on column pricing.rates.price_version_id is 'The version';
comment on column pricing.rates.place is '0: the standard price; above: conditional prices, of which for each kind the first that holds counts';
comment on column pricing.rates.kind is 'The kind that is priced';
comment on column pricing.rates.above_input_tokens is 'Counts for the whole request when its input, cached or not, is longer than this';
comment on column pricing.rates.condition is 'What the request must have asked for: {"service_tier": "flex"}, {"size": "1024x1024", "quality": "hd"}; utc_time is a time of day';
comment on column pricing.rates.price_nano_usd is 'Nano-dollars for kinds.per of the kind';
comment on column pricing.rates.minimum is 'A count above zero is billed as at least this many';
comment on column pricing.rates.free is 'A price of zero is meant';

-- What one organization pays: written by the platform's operator, read by the organization itself.

create table pricing.overrides (
    organization_id uuid not null,
    price_version_id uuid not null,
    provider text not null,
    model_pattern text not null,
    effective_from timestamptz not null,
    revision integer not null,
    withdrawn boolean not null,
    reason text not null,
    created_at timestamptz not null default now(),
    created_by uuid,
    constraint overrides_pkey primary key (organization_id, price_version_id),
    constraint overrides_one_per_instant unique (organization_id, provider, model_pattern, effective_from, revision),
    constraint overrides_organization foreign key (organization_id) references identity.organizations (organization_id),
    constraint overrides_begin_at_an_instant check (isfinite(effective_from) and revision > 0)
);
comment on table pricing.overrides is 'A price of its own for one organization, charged in place of list price and mark-up; append-only';
comment on column pricing.overrides.organization_id is 'The tenant';
comment on column pricing.overrides.price_version_id is 'Identity, kept by every request that it priced';
comment on column pricing.overrides.provider is 'The provider, or * for all';
comment on column pricing.overrides.model_pattern is 'The model, a beginning of names ending in *, or * for all; the most exact pattern counts';
comment on column pricing.overrides.effective_from is 'First instant at which it counts';
comment on column pricing.overrides.revision is 'Of several of one instant the highest counts';
comment on column pricing.overrides.withdrawn is 'True: from here on this pattern has no price of its own';
comment on column pricing.overrides.reason is 'Why, for people';
comment on column pricing.overrides.created_at is 'When it was agreed';
comment on column pricing.overrides.created_by is 'The user who did it; null: the operator''s command line';

create table pricing.override_rates (
    organization_id uuid not null,
    price_version_id uuid not null,
    place smallint not null,
    kind text not null references pricing.kinds,
    above_input_tokens bigint not null default 0,
    condition jsonb not null default '{}',
    price_nano_usd bigint not null,
    minimum bigint not null default 0,
    free boolean not null default false,
    constraint override_rates_pkey primary key (organization_id, price_version_id, place, kind, above_input_tokens),
    constraint override_rates_override foreign key (organization_id, price_version_id)
        references pricing.overrides (organization_id, price_version_id),
    constraint standard_price_has_no_condition check ((place = 0) = (condition = '{}'::jsonb)),
    constraint rates_are_not_negative check (price_nano_usd >= 0 and above_input_tokens >= 0 and minimum >= 0 and place >= 0),
    constraint zero_is_said_to_be_free check ((price_nano_usd = 0) = free)
);
comment on table pricing.override_rates is 'Unit prices of an override, in the form of pricing.rates; append-only';
comment on column pricing.override_rates.organization_id is 'The tenant';
comment on column pricing.override_rates.price_version_id is 'The override';
comment on column pricing.override_rates.place is 'As in pricing.rates';
comment on column pricing.override_rates.kind is 'The kind that is priced';
comment on column pricing.override_rates.above_input_tokens is 'As in pricing.rates';
comment on column pricing.override_rates.condition is 'As in pricing.rates';
comment on column pricing.override_rates.price_nano_usd is 'Nano-dollars for kinds.per of the kind';
comment on column pricing.override_rates.minimum is 'As in pricing.rates';
comment on column pricing.override_rates.free is 'A price of zero is meant';

create table pricing.markups (
    organization_id uuid not null,
    markup_id uuid not null,
    provider text not null,
    model_pattern text not null,
    markup_ppm bigint,
    effective_from timestamptz not null,
    revision integer not null,
    reason text not null,
    created_at timestamptz not null default now(),
    created_by uuid,
    constraint markups_pkey primary key (organization_id, markup_id),
    constraint markups_one_per_instant unique (organization_id, provider, model_pattern, effective_from, revision),
    constraint markups_organization foreign key (organization_id) references identity.organizations (organization_id),
    constraint markup_is_never_nothing check (markup_ppm between 1 and 1000000000),
    constraint markups_begin_at_an_instant check (isfinite(effective_from) and revision > 0)
);
comment on table pricing.markups is 'What an organization is charged as a multiple of the provider''s list price; append-only';
comment on column pricing.markups.organization_id is 'The tenant';
comment on column pricing.markups.markup_id is 'Identity';
comment on column pricing.markups.provider is 'The provider, or * for all';
comment on column pricing.markups.model_pattern is 'The model, a beginning of names ending in *, or * for all; the most exact pattern counts';
comment on column pricing.markups.markup_ppm is 'Parts per million: 1000000 is the list price, 1200000 a fifth more; null: this pattern has no mark-up any more';
comment on column pricing.markups.effective_from is 'First instant at which it counts';
comment on column pricing.markups.revision is 'Of several of one instant the highest counts';
comment on column pricing.markups.reason is 'Why, for people';
comment on column pricing.markups.created_at is 'When it was agreed';
comment on column pricing.markups.created_by is 'The user who did it; null: the operator''s command line';

create table pricing.policies (
    organization_id uuid not null,
    policy_id uuid not null,
    unknown_model text not null check (unknown_model in ('refuse', 'pass', 'fallback')),
    fallback_provider text,
    fallback_model text,
    effective_from timestamptz not null,
    revision integer not null,
    reason text not null,
    created_at timestamptz not null default now(),
    created_by uuid,
    constraint policies_pkey primary key (organization_id, policy_id),
    constraint policies_one_per_instant unique (organization_id, effective_from, revision),
    constraint policies_organization foreign key (organization_id) references identity.organizations (organization_id),
    constraint a_fallback_names_its_price check ((unknown_model = 'fallback') = (fallback_provider is not null and fallback_model is not null)),
    constraint policies_begin_at_an_instant check (isfinite(effective_from) and revision > 0)
);
comment on table pricing.policies is 'What happens to a request for a model without a price; without a row it is refused; append-only';
comment on column pricing.policies.organization_id is 'The tenant';
comment on column pricing.policies.policy_id is 'Identity';
comment on column pricing.policies.unknown_model is 'refuse; pass: charged nothing and recorded as unpriced; fallback: priced as the named model';
comment on column pricing.policies.fallback_provider is 'Provider of the model whose price is taken';
comment on column pricing.policies.fallback_model is 'Model whose price is taken';
comment on column pricing.policies.effective_from is 'First instant at which it counts';
comment on column pricing.policies.revision is 'Of several of one instant the highest counts';
comment on column pricing.policies.reason is 'Why, for people';
comment on column pricing.policies.created_at is 'When it was decided';
comment on column pricing.policies.created_by is 'The user who did it; null: the operator''s command line';

-- Who may do what. Prices are the operator's: an organization reads its own and cannot write them, whatever the query.

grant select on pricing.book, pricing.kinds, pricing.lists, pricing.imports, pricing.providers, pricing.models, pricing.versions, pricing.rates
    to bursar_app, bursar_platform, bursar_backup;
grant update on pricing.book to bursar_platform;
grant insert, update on pricing.lists to bursar_platform;
grant insert, update, delete on pricing.providers, pricing.models to bursar_platform;
grant insert on pricing.imports, pricing.versions, pricing.rates to bursar_platform;
call tenancy.append_only('pricing.imports');
call tenancy.append_only('pricing.versions');
call tenancy.append_only('pricing.rates');

call tenancy.protect('pricing.overrides', 'select');
call tenancy.protect('pricing.override_rates', 'select');
call tenancy.protect('pricing.markups', 'select');
call tenancy.protect('pricing.policies', 'select');
call tenancy.append_only('pricing.overrides');
call tenancy.append_only('pricing.override_rates');
call tenancy.append_only('pricing.markups');
call tenancy.append_only('pricing.policies');
grant insert on pricing.overrides, pricing.override_rates, pricing.markups, pricing.policies to bursar_platform;
create policy platform_sets_prices on pricing.overrides for insert to bursar_platform with check (true);
create policy platform_sets_prices on pricing.override_rates for insert to bursar_platform with check (true);
create policy platform_sets_prices on pricing.markups for insert to bursar_platform with check (true);
create policy platform_sets_prices on pricing.policies for insert to bursar_platform with check (true);

-- What the operator does to an organization's prices is in that organization's audit, in the same transaction.
grant insert on audit.events to bursar_platform;
create policy platform_records on audit.events for insert to bursar_platform with check (true);
