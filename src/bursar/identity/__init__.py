"""Who there is and who is asking: organizations, people, teams, departments, API keys, sessions, roles.

Promises:
- A row of one organization is reached only by a transaction that acts for it; row-level security sees to that.
- A slug, an address and a key's text belong to one owner in the whole installation; of racing claims exactly one wins.
- A secret is shown once and stored as a hash. A revoked key spends nothing from the instant of the commit (the money
  functions read the key's row) and is refused everywhere within KeyCache.SECONDS; beside the gateway nothing is cached.
- A key made in a company acts in that company, whatever a request asks for. A personal key, made in its user's home
  organization, acts where the request chooses, else in the default, else in the company joined first, else at home.
- Foreign and unknown organizations answer alike: 404.
- Personal data stands in identity.memberships alone; the schema `route` holds keyed hashes.
- Whoever changes who may spend tells credits in the same transaction (`touch_limits`).

Tables: identity.organizations, departments, teams, memberships, api_keys, sign_in_links, sessions; and in the schema
`route`, through definer functions only: organizations, users, memberships, api_keys, sign_in_links.

Invariants: route.memberships holds exactly the active memberships. Every person has one home organization of kind
`individual`. The role system_admin and the kind `platform` exist in one organization, PLATFORM_ORGANIZATION_ID.
"""
