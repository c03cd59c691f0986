-- How events say what happened: each has a title (one line) and a text (lines), where people stand by their ids, and fields for programs.

-- as_amount: an amount as events tell it.
create or replace function credits.as_amount(p_micros bigint) returns jsonb
language sql immutable set search_path = pg_catalog, pg_temp as $$
    select jsonb_build_object('amount', trim_scale((p_micros / 1000000.0)::numeric(24, 6))::text, 'unit', 'credit');
$$;
comment on function credits.as_amount is 'An amount of micros as {amount, unit}';

-- as_amount_of: the same of what a limit counts: micros of credits, or a number of calls or tokens.
create or replace function credits.as_amount_of(p_metric text, p_amount bigint) returns jsonb
language sql immutable set search_path = credits, pg_temp as $$
    select case when p_metric = 'credits' then credits.as_amount(p_amount)
                else jsonb_build_object('amount', p_amount::text, 'unit', rtrim(p_metric, 's')) end;
$$;
comment on function credits.as_amount_of is 'An amount of what a limit counts (credits in micros, calls, tokens) as {amount, unit}';

-- spoken_amount: {amount, unit} in a sentence.
create or replace function credits.spoken_amount(p_amount jsonb) returns text
language sql immutable set search_path = pg_catalog, pg_temp as $$
    select format('%s %s%s', p_amount ->> 'amount', p_amount ->> 'unit', case when p_amount ->> 'amount' = '1' then '' else 's' end);
$$;
comment on function credits.spoken_amount is 'An {amount, unit} in words, such as 12.5 credits';

-- spoken: micros in a sentence.
create or replace function credits.spoken(p_micros bigint) returns text
language sql immutable set search_path = credits, pg_temp as $$
    select credits.spoken_amount(credits.as_amount(p_micros));
$$;
comment on function credits.spoken is 'Micros in words, such as 12.5 credits';

-- spoken_time: an instant in a sentence, by the organization's clocks.
create or replace function credits.spoken_time(p_organization_id uuid, p_at timestamptz) returns text
language sql stable set search_path = pg_catalog, pg_temp as $$
    select format('%s (%s)', to_char(p_at at time zone o.zone, 'Dy FMDD Mon YYYY, HH24:MI'), o.zone)
    from identity.organizations o where o.organization_id = p_organization_id;
$$;
comment on function credits.spoken_time is 'An instant in words, by the clocks of an organization''s zone';

-- spoken_pool: what people call a pool.
create or replace function credits.spoken_pool(p_organization_id uuid, p_pool_id uuid) returns text
language sql stable set search_path = credits, pg_temp as $$
    select coalesce(name, 'Credits') || coalesce(' of ' || outbox.public_id('usr', owner_user_id), '')
    from pools where organization_id = p_organization_id and pool_id = p_pool_id;
$$;
comment on function credits.spoken_pool is 'What people call a pool, and whose it is';

-- spoken_limit: what people call a limit.
create or replace function credits.spoken_limit(p_organization_id uuid, p_limit_id uuid) returns text
language sql stable set search_path = credits, pg_temp as $$
    select case when l.scope <> 'organization' or l.model_filter is null then initcap(l.scope)
                when starts_with(l.model_filter, '#') then 'Feature' else 'Model' end || ' cap on ' || l.metric
        || case when l.period = 'none' then '' else ' per ' || l.period end || case when starts_with(l.model_filter, '#') then ' on the feature ' || substr(l.model_filter, 2) else coalesce(' on ' || l.model_filter, '') end
        || coalesce(' of “' || coalesce(k.name, t.name, d.name) || '”', '')
    from limits l
    left join identity.api_keys k on l.scope = 'key' and k.organization_id = l.organization_id and k.api_key_id = l.scope_id
    left join identity.teams t on l.scope = 'team' and t.organization_id = l.organization_id and t.team_id = l.scope_id
    left join identity.departments d on l.scope = 'department' and d.organization_id = l.organization_id and d.department_id = l.scope_id
    where l.organization_id = p_organization_id and l.limit_id = p_limit_id;
$$;
comment on function credits.spoken_limit is 'What people call a limit, and of which key, team or department it is';

-- told: what an event says: a title, lines (those that are null are left out), the command that helps, and fields for programs.
create or replace function credits.told(p_organization_id uuid, p_title text, p_lines text[], p_next_step text, p_fields jsonb) returns jsonb
language sql stable set search_path = pg_catalog, pg_temp as $$
    select jsonb_build_object('title', p_title, 'text', to_jsonb(array_remove(p_lines, null) || ('Next: ' || s.next_step)), 'next_step', s.next_step)
        || jsonb_strip_nulls(p_fields)
    from identity.organizations o
    cross join lateral (select replace(p_next_step, 'ORG', o.slug) as next_step) s
    where o.organization_id = p_organization_id;
$$;
comment on function credits.told is 'The payload of an event: title, text and next step (ORG becomes the organization''s slug), and fields for programs';
