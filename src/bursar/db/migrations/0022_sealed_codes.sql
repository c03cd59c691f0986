-- Which code a grant came of is part of the record, and is sealed with it.
set local lock_timeout = '5s';

call audit.seal_rows('credits.grant_codes');
