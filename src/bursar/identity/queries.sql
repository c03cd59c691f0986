-- ------------------------------------------------------------------------------------------------ organizations

-- name: touch_limits
-- The named exception to "SQL of a capability touches lower layers only": credits must learn, in the same transaction,
-- that who may spend has changed. credits.limits_changed bumps one counter and nothing else.
select credits.limits_changed(%(organization_id)s);

-- name: touch_limits_of_key
-- A key made in its owner's home organization acts wherever the owner belongs. In organization order, as all who lock gates.
select credits.limits_changed(organization_id)
from (
    select %(organization_id)s::uuid as organization_id
    union
    select organization_id from route.memberships_of_user(%(user_id)s)
    where route.home_of_user(%(user_id)s) = %(organization_id)s
    order by organization_id
) as places;

-- name: claim_slug
select route.claim_slug(%(organization_id)s, %(slug)s);

-- name: find_organization_id
select route.find_organization(%(slug)s);

-- name: insert_organization
insert into identity.organizations (
    organization_id, slug, name, kind, zone, currency, is_shared_token_pool, shows_margin, created_at
) values (
    %(organization_id)s, %(slug)s, %(name)s, %(kind)s, %(zone)s, %(currency)s, %(is_shared_token_pool)s, %(shows_margin)s,
    coalesce(%(at)s, clock_timestamp())
)
returning *;

-- name: organization
select * from identity.organizations where organization_id = %(organization_id)s;

-- name: organizations
select * from identity.organizations
where (%(after)s::uuid is null or organization_id > %(after)s) and (%(kind)s::text is null or kind = %(kind)s)
order by organization_id
limit %(limit)s;

-- name: update_organization
update identity.organizations
set name = coalesce(%(name)s, name), zone = coalesce(%(zone)s, zone), shows_margin = coalesce(%(shows_margin)s, shows_margin)
where organization_id = %(organization_id)s
returning *;

-- name: set_pool_sharing
update identity.organizations set is_shared_token_pool = %(is_shared_token_pool)s
where organization_id = %(organization_id)s
returning *;

-- name: set_organization_status
update identity.organizations set status = %(status)s
where organization_id = %(organization_id)s and status <> 'closed'
returning *;

-- ------------------------------------------------------------------------------------------------ users

-- name: claim_user
select route.claim_user(%(home_organization_id)s, %(user_id)s, %(email_hash)s);

-- name: find_user_by_email
select * from route.find_user_by_email(%(email_hash)s);

-- name: find_user
select * from route.find_user(%(user_id)s);

-- name: home_of_user
select route.home_of_user(%(user_id)s);

-- name: choose_default
select route.choose_default(%(home_organization_id)s, %(user_id)s, %(organization_id)s);

-- ------------------------------------------------------------------------------------------------ memberships

-- name: join_organization
select route.join_organization(%(organization_id)s, %(user_id)s, %(joined_at)s);

-- name: leave_organization
select route.leave_organization(%(organization_id)s, %(user_id)s);

-- name: places_of_user
select * from route.memberships_of_user(%(user_id)s);

-- name: insert_membership
-- Who left and comes back joins anew; who is here keeps everything, and nothing is returned.
insert into identity.memberships as m (
    organization_id, user_id, email, display_name, roles, team_id, department_id, joined_at
) values (
    %(organization_id)s, %(user_id)s, %(email)s, %(display_name)s, %(roles)s, %(team_id)s, %(department_id)s,
    coalesce(%(at)s, clock_timestamp())
)
on conflict (organization_id, user_id) do update
set email = excluded.email, display_name = excluded.display_name, roles = excluded.roles, team_id = excluded.team_id,
    department_id = excluded.department_id, status = 'active', joined_at = excluded.joined_at, left_at = null
where m.status = 'left'
returning organization_id, user_id, email, display_name, roles, team_id, department_id, status, joined_at, left_at;

-- name: membership
select organization_id, user_id, email, display_name, roles, team_id, department_id, status, joined_at, left_at
from identity.memberships
where organization_id = %(organization_id)s and user_id = %(user_id)s;

-- name: membership_by_email
select organization_id, user_id, email, display_name, roles, team_id, department_id, status, joined_at, left_at
from identity.memberships
where organization_id = %(organization_id)s and email = %(email)s;

-- name: memberships
select organization_id, user_id, email, display_name, roles, team_id, department_id, status, joined_at, left_at
from identity.memberships
where organization_id = %(organization_id)s and (%(after)s::uuid is null or user_id > %(after)s)
  and (%(status)s::text is null or status = %(status)s)
order by user_id
limit %(limit)s;

-- name: lock_membership
select organization_id, user_id, email, display_name, roles, team_id, department_id, status, joined_at, left_at
from identity.memberships
where organization_id = %(organization_id)s and user_id = %(user_id)s
for no key update;

-- name: set_roles
update identity.memberships set roles = %(roles)s
where organization_id = %(organization_id)s and user_id = %(user_id)s
returning organization_id, user_id, email, display_name, roles, team_id, department_id, status, joined_at, left_at;

-- name: place_member
update identity.memberships set team_id = %(team_id)s, department_id = %(department_id)s
where organization_id = %(organization_id)s and user_id = %(user_id)s
returning organization_id, user_id, email, display_name, roles, team_id, department_id, status, joined_at, left_at;

-- name: set_membership_status
update identity.memberships
set status = %(status)s, left_at = case when %(status)s = 'left' then clock_timestamp() end
where organization_id = %(organization_id)s and user_id = %(user_id)s
returning organization_id, user_id, email, display_name, roles, team_id, department_id, status, joined_at, left_at;

-- ------------------------------------------------------------------------------------------------ teams and departments

-- name: insert_department
insert into identity.departments (organization_id, department_id, name, created_at)
values (%(organization_id)s, %(department_id)s, %(name)s, coalesce(%(at)s, clock_timestamp()))
returning *;

-- name: department
select * from identity.departments where organization_id = %(organization_id)s and department_id = %(department_id)s;

-- name: departments
select * from identity.departments
where organization_id = %(organization_id)s and (%(with_archived)s or archived_at is null)
order by lower(name), department_id;

-- name: rename_department
update identity.departments set name = %(name)s
where organization_id = %(organization_id)s and department_id = %(department_id)s
returning *;

-- name: archive_department
update identity.departments set archived_at = coalesce(archived_at, clock_timestamp())
where organization_id = %(organization_id)s and department_id = %(department_id)s
returning *;

-- name: insert_team
insert into identity.teams (organization_id, team_id, name, department_id, created_at)
values (%(organization_id)s, %(team_id)s, %(name)s, %(department_id)s, coalesce(%(at)s, clock_timestamp()))
returning *;

-- name: team
select * from identity.teams where organization_id = %(organization_id)s and team_id = %(team_id)s;

-- name: teams
select * from identity.teams
where organization_id = %(organization_id)s and (%(with_archived)s or archived_at is null)
order by lower(name), team_id;

-- name: rename_team
update identity.teams set name = %(name)s
where organization_id = %(organization_id)s and team_id = %(team_id)s
returning *;

-- name: set_team_lead
update identity.teams set lead_user_id = %(user_id)s
where organization_id = %(organization_id)s and team_id = %(team_id)s
returning *;

-- name: vacate_leads
update identity.teams set lead_user_id = null
where organization_id = %(organization_id)s and lead_user_id = %(user_id)s;

-- name: archive_team
update identity.teams set archived_at = coalesce(archived_at, clock_timestamp())
where organization_id = %(organization_id)s and team_id = %(team_id)s
returning *;

-- ------------------------------------------------------------------------------------------------ API keys

-- name: claim_api_key
select route.claim_api_key(%(organization_id)s, %(api_key_id)s, %(key_hash)s);

-- name: insert_api_key
insert into identity.api_keys (
    organization_id, api_key_id, original_api_key_id, user_id, name, public_id, last4, scopes, team_id, department_id,
    expires_at, created_at, created_by
) values (
    %(organization_id)s, %(api_key_id)s, %(original_api_key_id)s, %(user_id)s, %(name)s, %(public_id)s, %(last4)s, %(scopes)s,
    %(team_id)s, %(department_id)s, %(expires_at)s, coalesce(%(at)s, clock_timestamp()), %(created_by)s
)
returning *;

-- name: api_key
select * from identity.api_keys where organization_id = %(organization_id)s and api_key_id = %(api_key_id)s;

-- name: api_key_by_public_id
select * from identity.api_keys where organization_id = %(organization_id)s and public_id = %(public_id)s;

-- name: api_keys
select * from identity.api_keys
where organization_id = %(organization_id)s and (%(after)s::uuid is null or api_key_id > %(after)s)
  and (%(user_id)s::uuid is null or user_id = %(user_id)s)
order by api_key_id
limit %(limit)s;

-- name: lock_usable_api_key
-- Of racing rotations the second finds the key replaced.
select * from identity.api_keys
where organization_id = %(organization_id)s and api_key_id = %(api_key_id)s
  and replaced_by is null and revoked_at is null and (expires_at is null or expires_at > clock_timestamp())
for no key update;

-- name: replace_api_key
-- overlap_until null: the old text stops at this instant.
update identity.api_keys
set replaced_by = %(replaced_by)s,
    expires_at = least(expires_at, %(overlap_until)s::timestamptz),
    revoked_at = case when %(overlap_until)s::timestamptz is null then clock_timestamp() end
where organization_id = %(organization_id)s and api_key_id = %(api_key_id)s
returning *;

-- name: revoke_api_key
update identity.api_keys set revoked_at = clock_timestamp()
where organization_id = %(organization_id)s and api_key_id = %(api_key_id)s and revoked_at is null
returning *;

-- name: revoke_api_keys_of_user
update identity.api_keys set revoked_at = clock_timestamp()
where organization_id = %(organization_id)s and user_id = %(user_id)s and revoked_at is null
returning *;

-- name: note_last_use
update identity.api_keys k set last_used_at = greatest(k.last_used_at, u.used_at)
from unnest(%(api_key_ids)s::uuid[], %(used_at)s::timestamptz[]) as u (api_key_id, used_at)
where k.organization_id = %(organization_id)s and k.api_key_id = u.api_key_id;

-- ------------------------------------------------------------------------------------------------ principals

-- name: presented_key
-- The key behind a presented text, in the organization that its text names (the one that is set), with its owner's membership there.
select k.api_key_id, k.organization_id, k.user_id, k.scopes, k.team_id, k.department_id, k.expires_at,
       o.slug, o.name, o.kind, o.zone, o.shows_margin, o.status,
       coalesce(m.roles, '{}') as roles, m.team_id as member_team_id, m.department_id as member_department_id,
       k.user_id is null or m.status = 'active' as owner_is_active
from route.find_api_key(%(key_hash)s) f
join identity.api_keys k on k.organization_id = f.organization_id and k.api_key_id = f.api_key_id
join identity.organizations o on o.organization_id = k.organization_id
left join identity.memberships m on m.organization_id = k.organization_id and m.user_id = k.user_id
where k.organization_id = %(organization_id)s
  and k.revoked_at is null and (k.expires_at is null or k.expires_at > clock_timestamp());

-- ------------------------------------------------------------------------------------------------ sign-in

-- name: claim_sign_in_link
select route.claim_sign_in_link(%(organization_id)s, %(link_id)s, %(token_hash)s);

-- name: insert_sign_in_link
insert into identity.sign_in_links (organization_id, link_id, user_id, created_at, created_by, expires_at)
values (%(organization_id)s, %(link_id)s, %(user_id)s, clock_timestamp(), %(created_by)s, clock_timestamp() + %(valid_for)s)
returning *;

-- name: use_sign_in_link
-- Of racing uses one finds it unused. Who is suspended in their home organization signs in nowhere.
update identity.sign_in_links l set used_at = statement_timestamp()
from route.find_sign_in_link(%(token_hash)s) f
where l.organization_id = %(organization_id)s and l.organization_id = f.organization_id and l.link_id = f.link_id
  and l.used_at is null and l.expires_at > statement_timestamp()
  and exists (
      select 1 from identity.memberships m
      where m.organization_id = l.organization_id and m.user_id = l.user_id and m.status = 'active'
  )
returning l.*;

-- name: insert_session
insert into identity.sessions (organization_id, session_id, user_id, started_at, last_seen_at, address_hash)
values (%(organization_id)s, %(session_id)s, %(user_id)s, statement_timestamp(), statement_timestamp(), %(address_hash)s)
returning *, statement_timestamp() as read_at;

-- name: session
select s.*, statement_timestamp() as read_at from identity.sessions s
where s.organization_id = %(organization_id)s and s.session_id = %(session_id)s;

-- name: note_session_seen
update identity.sessions set last_seen_at = clock_timestamp()
where organization_id = %(organization_id)s and session_id = %(session_id)s and ended_at is null;

-- name: choose_in_session
update identity.sessions set chosen_organization_id = %(chosen_organization_id)s
where organization_id = %(organization_id)s and session_id = %(session_id)s and ended_at is null;

-- name: end_session
update identity.sessions set ended_at = clock_timestamp()
where organization_id = %(organization_id)s and session_id = %(session_id)s and ended_at is null
returning user_id;

-- name: end_sessions_of_user
update identity.sessions set ended_at = clock_timestamp()
where organization_id = %(organization_id)s and user_id = %(user_id)s and ended_at is null;
