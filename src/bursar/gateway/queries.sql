-- name: providers
select provider as name, provider_id, kind, base_url, auth, asks_for_usage, position, batch_price_ppm, enabled, query,
    headers, litellm_provider
from gateway.providers
order by position, provider;

-- name: provider
select provider as name, provider_id, kind, base_url, auth, asks_for_usage, position, batch_price_ppm, enabled, query,
    headers, litellm_provider
from gateway.providers
where provider = %(name)s;

-- name: put_provider
insert into gateway.providers (
    provider, provider_id, kind, base_url, auth, asks_for_usage, position, batch_price_ppm, enabled, query, headers,
    litellm_provider
) values (
    %(name)s, %(provider_id)s, %(kind)s, %(base_url)s, %(auth)s, %(asks_for_usage)s, %(position)s,
    %(batch_price_ppm)s, %(enabled)s, %(query)s, %(headers)s, %(litellm_provider)s
)
on conflict (provider) do update
set kind = excluded.kind,
    base_url = excluded.base_url,
    auth = excluded.auth,
    asks_for_usage = excluded.asks_for_usage,
    position = excluded.position,
    batch_price_ppm = excluded.batch_price_ppm,
    enabled = excluded.enabled,
    query = excluded.query,
    headers = excluded.headers,
    litellm_provider = excluded.litellm_provider
returning provider as name, provider_id, kind, base_url, auth, asks_for_usage, position, batch_price_ppm, enabled,
    query, headers, litellm_provider;

-- name: model_routes
select model, route_id, provider, upstream_model, enabled, retries,
    array(
        select f.provider || '/' || f.upstream_model
        from gateway.route_fallbacks f
        where f.model = r.model
        order by f.position
    ) as fallbacks
from gateway.model_routes r
order by model;

-- name: put_model_route
insert into gateway.model_routes (model, route_id, provider, upstream_model, enabled, retries)
values (%(model)s, %(route_id)s, %(provider)s, %(upstream_model)s, %(enabled)s, %(retries)s)
on conflict (model) do update
set provider = excluded.provider,
    upstream_model = excluded.upstream_model,
    enabled = excluded.enabled,
    retries = excluded.retries;

-- name: remove_route_fallbacks
delete from gateway.route_fallbacks
where model = %(model)s;

-- name: add_route_fallback
insert into gateway.route_fallbacks (model, position, provider, upstream_model)
values (%(model)s, %(position)s, %(provider)s, %(upstream_model)s);

-- name: add_provider_key
insert into gateway.provider_keys (
    organization_id, provider_key_id, provider, name, is_own, sealing_key_id, nonce, ciphertext, last4, created_by
) values (
    %(organization_id)s, %(provider_key_id)s, %(provider)s, %(name)s, %(is_own)s, %(sealing_key_id)s, %(nonce)s,
    %(ciphertext)s, %(last4)s, %(created_by)s
)
returning organization_id, provider_key_id, provider, name, is_own, last4, created_at, revoked_at;

-- name: provider_keys
select organization_id, provider_key_id, provider, name, is_own, last4, created_at, revoked_at
from gateway.provider_keys
where organization_id = %(organization_id)s
order by provider, created_at desc;

-- name: revoke_provider_key
update gateway.provider_keys
set revoked_at = clock_timestamp()
where organization_id = %(organization_id)s and provider_key_id = %(provider_key_id)s and revoked_at is null
returning organization_id, provider_key_id, provider, name, is_own, last4, created_at, revoked_at;

-- name: usable_provider_key
select organization_id, provider_key_id, is_own, sealing_key_id, nonce, ciphertext
from gateway.provider_keys
where organization_id = %(organization_id)s and provider = %(provider)s and revoked_at is null
order by created_at desc, provider_key_id desc
limit 1;

-- name: provider_keys_sealed_otherwise
select organization_id, provider_key_id, is_own, sealing_key_id, nonce, ciphertext
from gateway.provider_keys
where organization_id = %(organization_id)s and sealing_key_id <> %(sealing_key_id)s
for update;

-- name: organizations_with_keys_sealed_otherwise
select distinct organization_id
from gateway.provider_keys
where sealing_key_id <> %(sealing_key_id)s
order by organization_id;

-- name: reseal_provider_key
update gateway.provider_keys
set sealing_key_id = %(sealing_key_id)s, nonce = %(nonce)s, ciphertext = %(ciphertext)s
where organization_id = %(organization_id)s and provider_key_id = %(provider_key_id)s;

-- name: model_rules
select r.organization_id, r.rule_id, r.scope, r.scope_id, coalesce(t.name, k.name, o.name) as scope_name, r.effect,
    r.pattern, r.created_at, m.display_name as set_by,
    array(
        select n.api_key_id
        from identity.api_keys n
        where r.scope = 'key' and n.organization_id = r.organization_id and n.original_api_key_id = r.scope_id
    ) as keys
from gateway.model_rules r
left join identity.teams t on t.organization_id = r.organization_id and t.team_id = r.scope_id and r.scope = 'team'
left join identity.api_keys k on k.organization_id = r.organization_id and k.api_key_id = r.scope_id and r.scope = 'key'
left join identity.organizations o on o.organization_id = r.organization_id and r.scope = 'organization'
left join identity.memberships m on m.organization_id = r.organization_id and m.user_id = r.created_by
where r.organization_id = %(organization_id)s
order by array_position(array['organization', 'team', 'key'], r.scope), scope_name, r.scope_id, r.effect desc, r.pattern;

-- name: add_model_rule
insert into gateway.model_rules (organization_id, rule_id, scope, scope_id, effect, pattern, created_by)
values (
    %(organization_id)s, %(rule_id)s, %(scope)s, %(scope_id)s, %(effect)s, %(pattern)s, %(created_by)s
)
on conflict (organization_id, scope, scope_id, effect, pattern) do nothing;

-- name: remove_model_rule
delete from gateway.model_rules
where organization_id = %(organization_id)s and rule_id = %(rule_id)s;

-- name: model_aliases
select organization_id, alias, alias_id, model, created_at
from gateway.model_aliases
where organization_id = %(organization_id)s
order by alias;

-- name: put_model_alias
insert into gateway.model_aliases (organization_id, alias, alias_id, model, created_by)
values (%(organization_id)s, %(alias)s, %(alias_id)s, %(model)s, %(created_by)s)
on conflict (organization_id, alias) do update set model = excluded.model
returning organization_id, alias, alias_id, model, created_at;

-- name: remove_model_alias
delete from gateway.model_aliases
where organization_id = %(organization_id)s and alias = %(alias)s
returning organization_id, alias, alias_id, model, created_at;

-- name: remove_model_route
delete from gateway.model_routes
where model = %(model)s;

-- name: recent_outputs
-- What calls without a limit of output put out lately, oldest first; not what we counted ourselves (flag 4). The newest rows are few
-- enough to be read whole: a condition inside would search all of history where none fits.
select coalesce(api_key_id, user_id) as asker_id, model, tokens
from (
    select api_key_id, user_id, model, flags, used_at, output_tokens + audio_output_tokens + image_output_tokens as tokens
    from ledger.attribution
    where organization_id = %(organization_id)s and used_at > statement_timestamp() - make_interval(days => %(days)s)
    order by used_at desc limit %(most)s
) a
where flags & 516 = 512 and model is not null
order by used_at;

-- name: provider_key_by_id
-- Also one that was revoked since: what was begun with it can be asked for with no other.
select organization_id, provider_key_id, is_own, sealing_key_id, nonce, ciphertext
from gateway.provider_keys
where organization_id = %(organization_id)s and provider_key_id = %(provider_key_id)s;
