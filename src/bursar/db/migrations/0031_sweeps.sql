-- What a request was charged in a pool before that closed counts among what it may use there.
set local lock_timeout = '5s';

comment on column credits.sweeps.kept_micros is
    'What it was charged there and still held when the pool closed, or was charged until a correction: how it differs in the end is settled';

-- Its argument is another one now.
drop function if exists credits.watch_charge(uuid, uuid, uuid, uuid, bigint, timestamptz);
