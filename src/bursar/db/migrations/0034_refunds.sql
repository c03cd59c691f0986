-- Its result has one more column now.
set local lock_timeout = '5s';
drop function if exists credits.draws_of(uuid, uuid);
