-- What a request was charged in a pool before that closed counts among what it may use there; what it owes a closed pool stays noted until it is paid.
set local lock_timeout = '5s';

comment on column credits.sweeps.kept_micros is
    'What it was charged there and still held when the pool closed, or was charged until a correction: how it differs in the end is settled';

alter table credits.sweeps add column owed_micros bigint;
comment on column credits.sweeps.owed_micros is
    'What to_pool_id still owes the closed pool (negative: the pool owes it); 0: credits have come that may pay it; null: to be settled when the hold has ended';
create index sweeps_owed on credits.sweeps (organization_id, pool_id) where owed_micros is not null;
comment on column credits.sweeps.to_pool_id is 'The pool that gets what it frees, or pays for what it used beyond what it held';

-- Its result is another one now.
drop function if exists credits.pass_on(uuid, uuid, uuid, bigint, timestamptz);
-- Its argument is another one now.
drop function if exists credits.watch_charge(uuid, uuid, uuid, uuid, bigint, timestamptz);
