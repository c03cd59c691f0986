-- The runner's records (records.sql). Read as bursar_owner.

-- name: has_records
select to_regclass('db.installation') is not null;

-- name: has_epochs
select to_regprocedure('audit.begin_epoch()') is not null;

-- name: migrations
select migration_number, title, checksum from db.applied_migrations order by migration_number;

-- name: files
select path, checksum from db.applied_files;

-- name: add_migration
insert into db.applied_migrations (migration_number, title, checksum)
values (%(migration_number)s, %(title)s, %(checksum)s);

-- name: set_file
insert into db.applied_files (path, checksum) values (%(path)s, %(checksum)s)
on conflict (path) do update set checksum = excluded.checksum, applied_at = clock_timestamp();

-- name: fingerprint
select fingerprint from db.installation;

-- name: add_fingerprint
insert into db.installation (fingerprint) values (%(fingerprint)s);
