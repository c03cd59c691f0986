-- People who bring their credits into an organization: what left their home, and what arrived.
set local lock_timeout = '5s';

create table credits.departures (
    organization_id uuid not null,
    transfer_id uuid not null,
    user_id uuid not null,
    into_organization_id uuid not null,
    into_kind text not null,
    amount_micros bigint not null,
    held_micros bigint not null,
    parts jsonb not null,
    left_at timestamptz not null,
    arrived_at timestamptz,
    constraint departures_pkey primary key (organization_id, transfer_id),
    constraint departures_kind_known check (into_kind in ('personal', 'shared')),
    constraint departures_amounts check (amount_micros >= 0 and held_micros >= 0)
);
comment on table credits.departures is 'Credits that left a person''s home for an organization; done when they have arrived there';
comment on column credits.departures.organization_id is 'Tenant: the home';
comment on column credits.departures.transfer_id is 'Identity of the move in both organizations';
comment on column credits.departures.user_id is 'The person';
comment on column credits.departures.into_organization_id is 'Where to';
comment on column credits.departures.into_kind is 'Into their personal balance there, or the shared one';
comment on column credits.departures.amount_micros is 'Micros that left';
comment on column credits.departures.held_micros is 'Micros that running requests held: they stayed';
comment on column credits.departures.parts is 'What of each grant left: all that its grant there needs';
comment on column credits.departures.left_at is 'When they left';
comment on column credits.departures.arrived_at is 'When they had arrived; null: not yet, which is tried again until they have';
create index departures_under_way on credits.departures (organization_id, left_at) where arrived_at is null;
call tenancy.protect('credits.departures', 'select', 'select, insert, update');

create table credits.arrivals (
    organization_id uuid not null,
    transfer_id uuid not null,
    user_id uuid not null,
    from_organization_id uuid not null,
    amount_micros bigint not null,
    arrived_at timestamptz not null,
    constraint arrivals_pkey primary key (organization_id, transfer_id),
    constraint arrivals_amount check (amount_micros >= 0)
);
comment on table credits.arrivals is 'Credits that a person brought along; where they came from is where their history is';
comment on column credits.arrivals.organization_id is 'Tenant: the organization that they came into';
comment on column credits.arrivals.transfer_id is 'Identity of the move in both organizations';
comment on column credits.arrivals.user_id is 'The person';
comment on column credits.arrivals.from_organization_id is 'Their home';
comment on column credits.arrivals.amount_micros is 'Micros that arrived';
comment on column credits.arrivals.arrived_at is 'When';
call tenancy.protect('credits.arrivals', 'select', 'select, insert');
call tenancy.append_only('credits.arrivals');
call audit.seal_rows('credits.arrivals');
