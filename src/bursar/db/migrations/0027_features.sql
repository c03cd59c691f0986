-- What requests are for: pools and limits may be for a feature, as they may be for models.
set local lock_timeout = '5s';

alter table credits.holds add column feature text;
comment on column credits.holds.feature is 'What it is for, in a word: chat, images, or as a program names it; null: not named';
alter table ledger.attribution add column feature text;
comment on column ledger.attribution.feature is 'What it was for, in a word: chat, images, or as a program names it; null: not named';
alter table credits.unbilled_requests add column feature text;
comment on column credits.unbilled_requests.feature is 'What it was for, as in attribution';

comment on column credits.pools.model_filter is
    'What it may pay for: a LIKE pattern of models, or after # of features; null: everything. Restricted pools are tried first';
comment on column credits.limits.model_filter is 'What it counts: a LIKE pattern of models, or after # of features; null: everything';
comment on column credits.chains.leg_filters is 'What each leg may pay for: a LIKE pattern of models, or after # of features; null: everything';
comment on column credits.chains.entry_filters is 'What the entry counts: a LIKE pattern of models, or after # of features; null: everything';

-- These take the feature too.
drop function if exists credits.move_batch(
    uuid, uuid[], smallint[], uuid[], uuid[], uuid[], bigint[], bigint[], bigint[], integer[], bigint[], integer[], integer[], text[], text[],
    uuid[], uuid[], uuid[], timestamptz[], text[], bytea[], timestamptz);
drop function if exists credits.move_one(
    uuid, smallint, uuid, uuid, uuid, bigint, bigint, bigint, integer[], bigint, integer, integer, text, text, uuid, uuid, uuid, timestamptz,
    text, bytea, timestamptz);
drop function if exists credits.post_batch(
    uuid[], smallint[], uuid[], bigint[], bigint[], bigint[], integer[], bigint[], integer[], integer[], text[], text[], uuid[], uuid[], uuid[],
    timestamptz[], text[], bytea[], uuid[], smallint[], smallint[], text[], uuid[], bigint[], bigint[], uuid[], uuid[], integer[], smallint[],
    bigint[], uuid[], uuid[], text[], uuid[], bigint[], timestamptz);
drop function if exists credits.take(
    uuid[], smallint[], uuid[], uuid[], uuid[], bigint[], bigint[], integer[], text[], uuid[], smallint[], smallint[], uuid[], bigint[],
    timestamptz);
drop function if exists credits.decide_tight(
    uuid[], smallint[], bigint[], bigint[], integer[], text[], uuid[], smallint[], smallint[], text[], uuid[], uuid[], uuid[], timestamptz[],
    integer[], timestamptz);
drop function if exists credits.rooms_of(uuid[], uuid[], text[]);
drop function if exists credits.available_of(uuid, uuid, text);
drop function if exists credits.first_leg(text[], text);
drop function if exists credits.is_strict_for(credits.chains, text, boolean);
drop function if exists credits.spread(credits.chains, text, bigint);
drop function if exists credits.move_legs(credits.chains, text, boolean, bigint[], bigint, bigint, bigint[], bigint, bigint);
drop function if exists credits.attribution_of(integer[], bigint, integer, text, text, uuid, uuid, uuid, timestamptz);
drop function if exists credits.give_room_back(uuid, uuid, text, uuid[], bigint[], bigint[], timestamptz, timestamptz);
