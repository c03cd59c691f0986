-- Reading the price book. These run with the caller's rights.

-- rates_of: the unit prices of a version as [[place, kind, above_input_tokens, condition, price_nano_usd, minimum, free], ...].
create or replace function pricing.rates_of(p_price_version_id uuid) returns jsonb
language sql stable set search_path = pricing, pg_temp as $$
    select coalesce(jsonb_agg(jsonb_build_array(place, kind, above_input_tokens, condition, price_nano_usd, minimum, free)
                              order by place, kind, above_input_tokens), '[]')
    from rates
    where price_version_id = p_price_version_id;
$$;
comment on function pricing.rates_of is 'Unit prices of a version of the book, as arrays of place, kind, threshold, condition, nano-dollars, minimum, free';

create or replace function pricing.override_rates_of(p_organization_id uuid, p_price_version_id uuid) returns jsonb
language sql stable set search_path = pricing, pg_temp as $$
    select coalesce(jsonb_agg(jsonb_build_array(place, kind, above_input_tokens, condition, price_nano_usd, minimum, free)
                              order by place, kind, above_input_tokens), '[]')
    from override_rates
    where organization_id = p_organization_id and price_version_id = p_price_version_id;
$$;
comment on function pricing.override_rates_of is 'Unit prices of an organization''s override, in the form of pricing.rates_of';

-- versions_at: for each list and model the one version in force at an instant.
create or replace function pricing.versions_at(p_at timestamptz) returns setof pricing.versions
language sql stable set search_path = pricing, pg_temp as $$
    select current_version.*
    from (
        select distinct on (list_name, provider, model) v.*
        from versions v
        where v.effective_from <= p_at
        order by list_name, provider, model, effective_from desc, revision desc
    ) current_version
    where not current_version.withdrawn;
$$;
comment on function pricing.versions_at is 'For each list and model the version in force at an instant';

-- prices_at: for each model the one version that counts at an instant: of the list with the highest rank.
create or replace function pricing.prices_at(p_at timestamptz) returns setof pricing.versions
language sql stable set search_path = pricing, pg_temp as $$
    select distinct on (v.provider, v.model) v.*
    from versions_at(p_at) v
    join lists l on l.list_name = v.list_name
    order by v.provider, v.model, l.rank desc, l.list_name;
$$;
comment on function pricing.prices_at is 'For each model the version that counts at an instant, of all lists the one with the highest rank';
