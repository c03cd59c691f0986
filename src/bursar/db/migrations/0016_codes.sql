-- Complimentary codes: a campaign sets what its codes give and to whom; each redemption becomes one grant into a personal balance.
set local lock_timeout = '5s';

create table credits.code_campaigns (
    organization_id uuid not null,
    campaign_id uuid not null,
    name text not null,
    amount_micros bigint not null,
    priority smallint not null default 50,
    valid_from timestamptz not null,
    valid_until timestamptz not null default 'infinity',
    credits_expire_at timestamptz not null default 'infinity',
    credits_days integer,
    is_for_members boolean not null,
    domain_hashes bytea[],
    most_per_code integer not null default 1,
    most_per_person integer not null default 1,
    most_per_domain integer,
    most_per_organization integer,
    most_per_day integer,
    most_in_all integer,
    created_at timestamptz not null,
    created_by uuid,
    revoked_at timestamptz,
    revoked_reason text,
    constraint code_campaigns_pkey primary key (organization_id, campaign_id),
    constraint code_campaigns_name_length check (length(name) between 1 and 200),
    constraint code_campaigns_amount check (amount_micros > 0),
    constraint code_campaigns_forward check (valid_until > valid_from),
    constraint code_campaigns_days check (credits_days between 1 and 3660),
    constraint code_campaigns_limits check (most_per_code > 0 and most_per_person > 0 and most_per_domain > 0 and most_per_organization > 0
                                            and most_per_day > 0 and most_in_all > 0)
);
comment on table credits.code_campaigns is 'What the codes of a campaign give, since when, until when, and how often to whom';
comment on column credits.code_campaigns.organization_id is 'Tenant: the organization the codes are for, or the platform';
comment on column credits.code_campaigns.campaign_id is 'Identity';
comment on column credits.code_campaigns.name is 'What people call it; charges made with its credits lead back to it';
comment on column credits.code_campaigns.amount_micros is 'Micros that one redemption grants';
comment on column credits.code_campaigns.priority is 'Priority of those grants; lower burns first';
comment on column credits.code_campaigns.valid_from is 'Codes can be redeemed from this instant';
comment on column credits.code_campaigns.valid_until is 'Codes can be redeemed before this instant';
comment on column credits.code_campaigns.credits_expire_at is 'The granted credits can be spent before this instant';
comment on column credits.code_campaigns.credits_days is 'The granted credits can be spent for this many days; null: only credits_expire_at counts';
comment on column credits.code_campaigns.is_for_members is 'Only for members of the organization, into their balance there; false: for everybody';
comment on column credits.code_campaigns.domain_hashes is 'Keyed hashes of the e-mail domains whose people may redeem; null: any';
comment on column credits.code_campaigns.most_per_code is 'How many people may redeem one code';
comment on column credits.code_campaigns.most_per_person is 'How many codes of the campaign one person may redeem';
comment on column credits.code_campaigns.most_per_domain is 'How many redemptions people of one e-mail domain may make; null: any number';
comment on column credits.code_campaigns.most_per_organization is 'How many redemptions may go into one organization; null: any number';
comment on column credits.code_campaigns.most_per_day is 'How many redemptions there may be on one UTC day; null: any number';
comment on column credits.code_campaigns.most_in_all is 'How many redemptions there may be in all; null: any number';
comment on column credits.code_campaigns.created_at is 'When it was made';
comment on column credits.code_campaigns.created_by is 'Who made it; null: the operator''s command line';
comment on column credits.code_campaigns.revoked_at is 'Since when none of its codes can be redeemed; what was granted stays';
comment on column credits.code_campaigns.revoked_reason is 'Why, in words';
call tenancy.protect('credits.code_campaigns', 'select', 'select, insert, update');

create table credits.codes (
    organization_id uuid not null,
    code_id uuid not null,
    campaign_id uuid not null,
    hint text not null,
    redemptions integer not null default 0,
    created_at timestamptz not null,
    revoked_at timestamptz,
    constraint codes_pkey primary key (organization_id, code_id),
    constraint codes_campaign foreign key (organization_id, campaign_id) references credits.code_campaigns,
    constraint codes_hint_short check (length(hint) <= 4),
    constraint codes_redemptions check (redemptions >= 0)
);
comment on table credits.codes is 'The codes of a campaign; their text is nowhere, its hash is in route.codes';
comment on column credits.codes.organization_id is 'Tenant';
comment on column credits.codes.code_id is 'Identity';
comment on column credits.codes.campaign_id is 'Its campaign';
comment on column credits.codes.hint is 'Last four characters of its text, to tell codes apart';
comment on column credits.codes.redemptions is 'How many people have redeemed it: a count of code_redemptions';
comment on column credits.codes.created_at is 'When it was made';
comment on column credits.codes.revoked_at is 'Since when it cannot be redeemed';
create index codes_by_campaign on credits.codes (organization_id, campaign_id, code_id);
call tenancy.protect('credits.codes', 'select', 'select, insert, update');

create table credits.code_redemptions (
    organization_id uuid not null,
    redemption_id uuid not null,
    code_id uuid not null,
    campaign_id uuid not null,
    user_id uuid not null,
    domain_hash bytea not null,
    into_organization_id uuid not null,
    amount_micros bigint not null,
    credits_expire_at timestamptz not null,
    priority smallint not null,
    claimed_at timestamptz not null,
    grant_id uuid,
    constraint code_redemptions_pkey primary key (organization_id, redemption_id),
    constraint code_redemptions_code foreign key (organization_id, code_id) references credits.codes,
    constraint code_redemptions_once unique (organization_id, code_id, user_id)
);
comment on table credits.code_redemptions is 'Who redeemed which code, and the grant that came of it';
comment on column credits.code_redemptions.organization_id is 'Tenant: that of the code';
comment on column credits.code_redemptions.redemption_id is 'Identity; the grant''s idempotency key names it';
comment on column credits.code_redemptions.code_id is 'The code';
comment on column credits.code_redemptions.campaign_id is 'Its campaign';
comment on column credits.code_redemptions.user_id is 'Who redeemed it';
comment on column credits.code_redemptions.domain_hash is 'Keyed hash of their e-mail domain then';
comment on column credits.code_redemptions.into_organization_id is 'Organization in which their personal balance is: a company, or their own home';
comment on column credits.code_redemptions.amount_micros is 'Micros granted';
comment on column credits.code_redemptions.credits_expire_at is 'Until when they can be spent';
comment on column credits.code_redemptions.priority is 'Priority of the grant';
comment on column credits.code_redemptions.claimed_at is 'When';
comment on column credits.code_redemptions.grant_id is 'The grant in that organization; null: not booked yet, which is done again until it is';
create index code_redemptions_by_campaign on credits.code_redemptions (organization_id, campaign_id, user_id);
create index code_redemptions_unfinished on credits.code_redemptions (organization_id, claimed_at) where grant_id is null;
call tenancy.protect('credits.code_redemptions', 'select', 'select, insert, update');

create table credits.grant_codes (
    organization_id uuid not null,
    grant_id uuid not null,
    redemption_id uuid not null,
    campaign text not null,
    hint text not null,
    constraint grant_codes_pkey primary key (organization_id, grant_id),
    constraint grant_codes_grant foreign key (organization_id, grant_id) references credits.grants
);
comment on table credits.grant_codes is 'The code that a grant came of: so every charge that the grant pays leads back to it';
comment on column credits.grant_codes.organization_id is 'Tenant: that of the grant';
comment on column credits.grant_codes.grant_id is 'The grant';
comment on column credits.grant_codes.redemption_id is 'The redemption, in the organization of the code';
comment on column credits.grant_codes.campaign is 'Its campaign''s name';
comment on column credits.grant_codes.hint is 'Last four characters of the code';
call tenancy.protect('credits.grant_codes', 'select', 'select, insert');
call tenancy.append_only('credits.grant_codes');

create table route.codes (
    code_hash bytea not null,
    organization_id uuid not null,
    code_id uuid not null,
    constraint codes_pkey primary key (code_hash),
    constraint codes_hashed check (octet_length(code_hash) = 32)
);
comment on table route.codes is 'Which code a presented text is';
comment on column route.codes.code_hash is 'SHA-256 of the normalized text, which has 100 random bits: no slow hash is needed';
comment on column route.codes.organization_id is 'Organization of the code';
comment on column route.codes.code_id is 'The code';

create table route.code_tries (
    subject_hash bytea not null,
    tried_at timestamptz[] not null,
    constraint code_tries_pkey primary key (subject_hash),
    constraint code_tries_hashed check (octet_length(subject_hash) = 32)
);
comment on table route.code_tries is 'Tries to redeem a code within the last hour that did not succeed, by person and by network address';
comment on column route.code_tries.subject_hash is 'Keyed hash of the person''s id or of the address';
comment on column route.code_tries.tried_at is 'When, oldest first';
