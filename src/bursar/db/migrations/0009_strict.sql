-- Strict limits: under one, a call whose output has no limit of its own is held by the most that it can come to.
set local lock_timeout = '5s';

alter table credits.limits add column is_strict boolean not null default false;
alter table credits.limits add constraint limits_strict_fits check (not is_strict or (action = 'stops' and metric <> 'calls'));
comment on column credits.limits.is_strict is 'A call that names no limit of output is held by the most its model puts out, never by a guess';

alter table credits.chains add column is_strict boolean not null default false;
comment on column credits.chains.is_strict is 'Some limit in it is strict: a hold that is a guess is answered with outcome 8 where such a limit counts its model';

comment on column ledger.attribution.flags is
    'Bits: 2 customer''s own key, 4 estimated, 8 streamed, 64 booked by expiry, 128 late, 256 unpriced by policy, 512 the request named no limit of output';

-- It has one argument more now.
drop function if exists credits.set_limit(uuid, uuid, text, uuid, text, text, text, bigint, text, uuid, timestamptz);
