-- Lookups and claims across organizations. Nobody may read the schema route; these functions answer exactly one question each.
-- A claim is made only for the organization that is set, so that an injection in one tenant claims nothing for another.

-- require_tenant: whoever claims, claims for the organization that is set.
create or replace function route.require_tenant(p_organization_id uuid) returns void
language plpgsql stable set search_path = route, pg_temp as $$
begin
    if p_organization_id is distinct from nullif(current_setting('app.organization_id', true), '')::uuid then
        raise exception 'no such organization' using errcode = 'BR404';
    end if;
end $$;
comment on function route.require_tenant is 'Refuses (BR404) to claim anything for an organization other than the one that is set';
revoke all on function route.require_tenant from public;

-- ---------------------------------------------------------------------------------------------- organizations

create or replace function route.claim_slug(p_organization_id uuid, p_slug text) returns boolean
language plpgsql volatile security definer set search_path = route, pg_temp as $$
begin
    perform require_tenant(p_organization_id);
    insert into organizations (organization_id, slug) values (p_organization_id, p_slug) on conflict do nothing;
    return exists (select 1 from organizations where slug = p_slug and organization_id = p_organization_id);
end $$;
comment on function route.claim_slug is 'Takes a slug for an organization; false when another has it. Of racing claims one wins';
revoke all on function route.claim_slug from public;
grant execute on function route.claim_slug to bursar_app;

create or replace function route.find_organization(p_slug text) returns uuid
language sql stable security definer set search_path = route, pg_temp as $$
    select organization_id from organizations where slug = p_slug;
$$;
comment on function route.find_organization is 'The organization that a slug names, or null';
revoke all on function route.find_organization from public;
grant execute on function route.find_organization to bursar_app, bursar_platform;

-- ---------------------------------------------------------------------------------------------- users

create or replace function route.claim_user(p_home_organization_id uuid, p_user_id uuid, p_email_hash bytea) returns boolean
language plpgsql volatile security definer set search_path = route, pg_temp as $$
begin
    perform require_tenant(p_home_organization_id);
    insert into users (user_id, email_hash, home_organization_id) values (p_user_id, p_email_hash, p_home_organization_id)
    on conflict do nothing;
    return exists (select 1 from users where email_hash = p_email_hash and user_id = p_user_id);
end $$;
comment on function route.claim_user is 'Takes an address for a new person; false when another has it. Of racing claims one wins';
revoke all on function route.claim_user from public;
grant execute on function route.claim_user to bursar_app;

create or replace function route.find_user_by_email(p_email_hash bytea)
returns table (user_id uuid, home_organization_id uuid, default_organization_id uuid)
language sql stable security definer set search_path = route, pg_temp as $$
    select u.user_id, u.home_organization_id, u.default_organization_id from users u where u.email_hash = p_email_hash;
$$;
comment on function route.find_user_by_email is 'The person with an address (its keyed hash), without personal data';
revoke all on function route.find_user_by_email from public;
grant execute on function route.find_user_by_email to bursar_app, bursar_platform;

create or replace function route.find_user(p_user_id uuid)
returns table (user_id uuid, home_organization_id uuid, default_organization_id uuid)
language sql stable security definer set search_path = route, pg_temp as $$
    select u.user_id, u.home_organization_id, u.default_organization_id from users u where u.user_id = p_user_id;
$$;
comment on function route.find_user is 'Home and default organization of a person';
revoke all on function route.find_user from public;
grant execute on function route.find_user to bursar_app, bursar_platform;

create or replace function route.home_of_user(p_user_id uuid) returns uuid
language sql stable security definer set search_path = route, pg_temp as $$
    select home_organization_id from users where user_id = p_user_id;
$$;
comment on function route.home_of_user is 'Home organization of a person: where their personal keys and individual credits live';
revoke all on function route.home_of_user from public;
grant execute on function route.home_of_user to bursar_app, bursar_platform, bursar_money;

create or replace function route.acts_in(p_home_organization_id uuid, p_organization_id uuid) returns boolean
language sql stable security definer set search_path = route, pg_temp as $$
    select exists (
        select from users u join memberships m on m.user_id = u.user_id
        where u.home_organization_id = p_home_organization_id and m.organization_id = p_organization_id);
$$;
comment on function route.acts_in is 'True when the person whose home the first organization is belongs to the second';
revoke all on function route.acts_in from public;
grant execute on function route.acts_in to bursar_money;

create or replace function route.choose_default(p_home_organization_id uuid, p_user_id uuid, p_organization_id uuid) returns boolean
language plpgsql volatile security definer set search_path = route, pg_temp as $$
begin
    perform require_tenant(p_home_organization_id);
    update users u set default_organization_id = p_organization_id
    where u.user_id = p_user_id and u.home_organization_id = p_home_organization_id
      and (p_organization_id is null
           or exists (select 1 from memberships m where m.user_id = p_user_id and m.organization_id = p_organization_id));
    return found;
end $$;
comment on function route.choose_default is 'Sets where a person acts by default, null for the first joined; false when they do not belong there';
revoke all on function route.choose_default from public;
grant execute on function route.choose_default to bursar_app;

-- ---------------------------------------------------------------------------------------------- memberships

create or replace function route.join_organization(p_organization_id uuid, p_user_id uuid, p_joined_at timestamptz) returns void
language plpgsql volatile security definer set search_path = route, pg_temp as $$
begin
    perform require_tenant(p_organization_id);
    insert into memberships (user_id, organization_id, joined_at) values (p_user_id, p_organization_id, p_joined_at)
    on conflict (user_id, organization_id) do nothing;
end $$;
comment on function route.join_organization is 'Notes that a person is an active member of an organization';
revoke all on function route.join_organization from public;
grant execute on function route.join_organization to bursar_app;

create or replace function route.leave_organization(p_organization_id uuid, p_user_id uuid) returns void
language plpgsql volatile security definer set search_path = route, pg_temp as $$
begin
    perform require_tenant(p_organization_id);
    delete from memberships where user_id = p_user_id and organization_id = p_organization_id;
end $$;
comment on function route.leave_organization is 'Notes that a person is no active member of an organization any more';
revoke all on function route.leave_organization from public;
grant execute on function route.leave_organization to bursar_app;

-- memberships_of_user reads the tenant rows of one person in every organization they actively belong to; nothing personal is in it.
create or replace function route.memberships_of_user(p_user_id uuid)
returns table (
    organization_id uuid, slug text, name text, kind text, zone text, shows_margin boolean, status text,
    roles text[], team_id uuid, department_id uuid
)
language sql stable security definer set search_path = route, identity, pg_temp as $$
    select o.organization_id, o.slug, o.name, o.kind, o.zone, o.shows_margin, o.status, m.roles, m.team_id, m.department_id
    from route.memberships r
    join identity.memberships m on m.organization_id = r.organization_id and m.user_id = r.user_id and m.status = 'active'
    join identity.organizations o on o.organization_id = r.organization_id and o.status <> 'closed'
    where r.user_id = p_user_id
    order by m.joined_at, o.organization_id;
$$;
comment on function route.memberships_of_user is 'Where a person actively belongs, first joined first, closed organizations left out';
revoke all on function route.memberships_of_user from public;
grant execute on function route.memberships_of_user to bursar_app, bursar_platform;

-- ---------------------------------------------------------------------------------------------- keys and links

create or replace function route.claim_api_key(p_organization_id uuid, p_api_key_id uuid, p_key_hash bytea) returns boolean
language plpgsql volatile security definer set search_path = route, pg_temp as $$
begin
    perform require_tenant(p_organization_id);
    insert into api_keys (key_hash, organization_id, api_key_id) values (p_key_hash, p_organization_id, p_api_key_id)
    on conflict (key_hash) do nothing;
    return found;
end $$;
comment on function route.claim_api_key is 'Registers the hash of a key''s text; false when it is taken. Of racing claims one wins';
revoke all on function route.claim_api_key from public;
grant execute on function route.claim_api_key to bursar_app;

create or replace function route.find_api_key(p_key_hash bytea) returns table (organization_id uuid, api_key_id uuid)
language sql stable security definer set search_path = route, pg_temp as $$
    select k.organization_id, k.api_key_id from api_keys k where k.key_hash = p_key_hash;
$$;
comment on function route.find_api_key is 'Which key a presented text is, by its hash';
revoke all on function route.find_api_key from public;
grant execute on function route.find_api_key to bursar_app, bursar_platform;

create or replace function route.claim_sign_in_link(p_organization_id uuid, p_link_id uuid, p_token_hash bytea) returns boolean
language plpgsql volatile security definer set search_path = route, pg_temp as $$
begin
    perform require_tenant(p_organization_id);
    insert into sign_in_links (token_hash, organization_id, link_id) values (p_token_hash, p_organization_id, p_link_id)
    on conflict (token_hash) do nothing;
    return found;
end $$;
comment on function route.claim_sign_in_link is 'Registers the hash of a one-time link''s token; false when it is taken';
revoke all on function route.claim_sign_in_link from public;
grant execute on function route.claim_sign_in_link to bursar_app;

create or replace function route.find_sign_in_link(p_token_hash bytea) returns table (organization_id uuid, link_id uuid)
language sql stable security definer set search_path = route, pg_temp as $$
    select l.organization_id, l.link_id from sign_in_links l where l.token_hash = p_token_hash;
$$;
comment on function route.find_sign_in_link is 'Which one-time link a presented token is, by its hash';
revoke all on function route.find_sign_in_link from public;
grant execute on function route.find_sign_in_link to bursar_app;

-- open_stage: an organization with people and keys for a simulation, which rolls it back. Lists: see the record types below.
create or replace function identity.open_stage(
    p_organization_id uuid, p_zone text, p_at timestamptz, p_departments jsonb, p_teams jsonb, p_users jsonb, p_keys jsonb
) returns void
language plpgsql volatile security definer set search_path = identity, pg_temp as $$
begin
    insert into organizations (organization_id, slug, name, kind, zone, currency, is_shared_token_pool, created_at)
    values (p_organization_id, 'stage-' || replace(p_organization_id::text, '-', ''), 'Simulation', 'company', p_zone, 'USD', true, p_at);
    insert into departments (organization_id, department_id, name, created_at)
    select p_organization_id, d.id, left(d.name, 150) || ' ' || d.id, p_at from jsonb_to_recordset(p_departments) d(id uuid, name text);
    insert into teams (organization_id, team_id, name, created_at)
    select p_organization_id, t.id, left(t.name, 150) || ' ' || t.id, p_at from jsonb_to_recordset(p_teams) t(id uuid, name text);
    insert into memberships (organization_id, user_id, email, display_name, roles, team_id, department_id, joined_at)
    select p_organization_id, u.id, u.id || '@stage.invalid', left(u.name, 200), '{member}', u.team, u.department, p_at
    from jsonb_to_recordset(p_users) u(id uuid, name text, team uuid, department uuid);
    insert into api_keys (organization_id, api_key_id, original_api_key_id, user_id, name, public_id, last4, scopes, team_id, department_id, created_at)
    select p_organization_id, k.id, coalesce(k.original, k.id), k."user", left(k.name, 200), k.id::text, 'none', '{inference}', k.team, k.department, p_at
    from jsonb_to_recordset(p_keys) k(id uuid, name text, "user" uuid, team uuid, department uuid, original uuid);
end $$;
comment on function identity.open_stage is 'Makes the organization of a simulation, with its people and keys; the simulation rolls it back';
revoke all on function identity.open_stage from public;
grant execute on function identity.open_stage to bursar_simulator;
