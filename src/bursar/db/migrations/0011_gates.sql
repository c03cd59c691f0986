-- credits.take is told the versions of the organizations' limits, which move_batch has read under its locks, and reads them no more.
set local lock_timeout = '5s';

drop function if exists credits.take(
    uuid[], smallint[], uuid[], uuid[], uuid[], bigint[], bigint[], integer[], text[], uuid[], smallint[], smallint[], bigint, timestamptz);
