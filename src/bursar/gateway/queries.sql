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
