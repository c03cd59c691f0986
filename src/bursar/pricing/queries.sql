-- name: revision
select revision from pricing.book;

-- name: change_book
-- Locks the book for this transaction; the instant is taken after the lock.
update pricing.book set revision = revision + 1 returning clock_timestamp();

-- name: lock_book
select clock_timestamp() from pricing.book for update;

-- name: present
select clock_timestamp();

-- name: lists
select list_name, rank from pricing.lists order by rank desc, list_name;

-- name: provider_names_of_list
select provider, position, rule, fallbacks from pricing.providers where list_name = %(list_name)s order by position;

-- name: model_names_of_list
select provider, model, position, rule, context_window from pricing.models where list_name = %(list_name)s
order by provider, position;

-- name: versions_of_model
select price_version_id, list_name, provider, model, effective_from, revision, withdrawn, source,
       pricing.rates_of(price_version_id) as rates
from pricing.versions
where provider = %(provider)s and model = %(model)s
order by effective_from, revision;

-- name: versions_of_list
select v.price_version_id, v.list_name, v.provider, v.model, v.effective_from, v.revision, v.withdrawn, v.source,
       coalesce(r.rates, '[]') as rates
from pricing.versions v
left join (
    select price_version_id,
           jsonb_agg(jsonb_build_array(place, kind, above_input_tokens, condition, price_nano_usd, minimum, free)
                     order by place, kind, above_input_tokens) as rates
    from pricing.rates
    group by price_version_id
) r on r.price_version_id = v.price_version_id
where v.list_name = %(list_name)s
order by v.provider, v.model, v.effective_from, v.revision;

-- name: version
select v.price_version_id, v.list_name, v.provider, v.model, v.effective_from, v.revision, v.withdrawn, v.source,
       pricing.rates_of(v.price_version_id) as rates
from pricing.versions v
where v.price_version_id = %(price_version_id)s;

-- name: override_version
select o.price_version_id, 'override' as list_name, o.provider, o.model_pattern as model, o.effective_from, o.revision,
       o.withdrawn, o.reason as source, pricing.override_rates_of(o.organization_id, o.price_version_id) as rates
from pricing.overrides o
where o.price_version_id = %(price_version_id)s;

-- name: prices_in_force
select v.price_version_id, v.list_name, v.provider, v.model, v.effective_from, v.revision, v.withdrawn, v.source,
       pricing.rates_of(v.price_version_id) as rates
from pricing.prices_at(%(at)s) v
where (%(provider)s::text is null or v.provider = %(provider)s)
  and (%(like)s::text is null or v.model like %(like)s)
order by v.provider, v.model;

-- name: instants_of_list
select provider, model, effective_from, max(revision) as revision
from pricing.versions
where list_name = %(list_name)s
group by provider, model, effective_from;

-- name: known_models
select distinct provider, model from pricing.versions;

-- name: newest_import
select list_version from pricing.imports where list_name = %(list_name)s order by import_id desc limit 1;

-- name: add_list
insert into pricing.lists (list_name, rank, title) values (%(list_name)s, %(rank)s, %(title)s)
on conflict (list_name) do update set rank = excluded.rank, title = excluded.title
where (lists.rank, lists.title) is distinct from (excluded.rank, excluded.title);

-- name: add_import
insert into pricing.imports (
    import_id, list_name, list_version, list_date, digest, effective_from, added, changed, unchanged, not_represented, imported_by
) values (
    %(import_id)s, %(list_name)s, %(list_version)s, %(list_date)s, %(digest)s, %(effective_from)s, %(added)s, %(changed)s,
    %(unchanged)s, %(not_represented)s, %(imported_by)s
);

-- name: remove_model_names
delete from pricing.models where list_name = %(list_name)s;

-- name: remove_provider_names
delete from pricing.providers where list_name = %(list_name)s;

-- name: copy_provider_names
copy pricing.providers (list_name, provider, position, rule, fallbacks) from stdin;

-- name: copy_model_names
copy pricing.models (list_name, provider, model, position, rule, context_window) from stdin;

-- name: copy_versions
copy pricing.versions (price_version_id, list_name, provider, model, effective_from, revision, withdrawn, source, import_id) from stdin;

-- name: copy_rates
copy pricing.rates (price_version_id, place, kind, above_input_tokens, condition, price_nano_usd, minimum, free) from stdin;

-- name: overrides
select price_version_id, 'override' as list_name, provider, model_pattern as model, effective_from, revision, withdrawn,
       reason as source, pricing.override_rates_of(organization_id, price_version_id) as rates
from pricing.overrides
where organization_id = %(organization_id)s
order by effective_from, revision;

-- name: markups
select markup_id, provider, model_pattern, markup_ppm, effective_from, revision, reason
from pricing.markups
where organization_id = %(organization_id)s
order by effective_from, revision;

-- name: policies
select policy_id, unknown_model, fallback_provider, fallback_model, effective_from, revision, reason
from pricing.policies
where organization_id = %(organization_id)s
order by effective_from, revision;

-- name: add_override
insert into pricing.overrides (
    organization_id, price_version_id, provider, model_pattern, effective_from, revision, withdrawn, reason, created_by
)
select %(organization_id)s, %(price_version_id)s, %(provider)s, %(model_pattern)s, %(effective_from)s,
       coalesce(max(revision), 0) + 1, %(withdrawn)s, %(reason)s, %(created_by)s
from pricing.overrides
where organization_id = %(organization_id)s and provider = %(provider)s and model_pattern = %(model_pattern)s
  and effective_from = %(effective_from)s
returning revision;

-- name: add_override_rate
insert into pricing.override_rates (
    organization_id, price_version_id, place, kind, above_input_tokens, condition, price_nano_usd, minimum, free
) values (
    %(organization_id)s, %(price_version_id)s, %(place)s, %(kind)s, %(above_input_tokens)s, %(condition)s,
    %(price_nano_usd)s, %(minimum)s, %(free)s
);

-- name: add_markup
insert into pricing.markups (
    organization_id, markup_id, provider, model_pattern, markup_ppm, effective_from, revision, reason, created_by
)
select %(organization_id)s, %(markup_id)s, %(provider)s, %(model_pattern)s, %(markup_ppm)s, %(effective_from)s,
       coalesce(max(revision), 0) + 1, %(reason)s, %(created_by)s
from pricing.markups
where organization_id = %(organization_id)s and provider = %(provider)s and model_pattern = %(model_pattern)s
  and effective_from = %(effective_from)s
returning revision;

-- name: add_policy
insert into pricing.policies (
    organization_id, policy_id, unknown_model, fallback_provider, fallback_model, effective_from, revision, reason, created_by
)
select %(organization_id)s, %(policy_id)s, %(unknown_model)s, %(fallback_provider)s, %(fallback_model)s, %(effective_from)s,
       coalesce(max(revision), 0) + 1, %(reason)s, %(created_by)s
from pricing.policies
where organization_id = %(organization_id)s and effective_from = %(effective_from)s
returning revision;
