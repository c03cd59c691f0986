-- What limits and shares were, and which stretches grants got back, is part of the record, and is sealed with it.
set local lock_timeout = '5s';

call audit.seal_rows('credits.limit_changes');
call audit.seal_rows('credits.share_changes');
call audit.seal_rows('credits.unburns');
