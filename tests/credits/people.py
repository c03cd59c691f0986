"""Organizations and people as identity would have them, at an instant of the test's choosing; an admin inserts them."""

INSERT_ORGANIZATION = """
    insert into identity.organizations (organization_id, slug, name, kind, zone, currency, is_shared_token_pool,
        created_at)
    values (%(org)s, %(slug)s, 'Test', 'company', %(zone)s, 'USD', true, %(now)s)"""
INSERT_DEPARTMENT = """
    insert into identity.departments (organization_id, department_id, name, created_at)
    values (%(org)s, %(id)s, %(name)s, %(now)s)"""
INSERT_TEAM = """
    insert into identity.teams (organization_id, team_id, name, created_at)
    values (%(org)s, %(id)s, %(name)s, %(now)s)"""
INSERT_MEMBER = """
    insert into identity.memberships (organization_id, user_id, email, display_name, roles, team_id, department_id,
        joined_at)
    values (%(org)s, %(id)s, %(email)s, 'Someone', '{member}', %(team)s, %(department)s, %(now)s)"""
INSERT_KEY = """
    insert into identity.api_keys (organization_id, api_key_id, original_api_key_id, user_id, name, public_id, last4,
        scopes, team_id, expires_at, created_at)
    values (%(org)s, %(id)s, %(original)s, %(user)s, 'Key', %(public)s, 'last', '{inference}', %(team)s, %(end)s,
        %(now)s)"""
