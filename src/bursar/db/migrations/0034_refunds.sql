-- Its result has one more column now.
drop function if exists credits.draws_of(uuid, uuid);
