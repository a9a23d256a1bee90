programs=$(ls -d /usr/lib/postgresql/*/bin | tail -n 1)
data=$1/data
# Sockets are files of this machine.
socket=$(mktemp -d)
mkdir "$data"
chown postgres "$data" "$socket"
as_postgres() { setpriv --reuid postgres --regid postgres --clear-groups "$@"; }
control() { as_postgres "$programs/pg_ctl" -D "$data" -w -t 120 "$@"; }
start() { control -l "$socket/log" -o "-c listen_addresses='' -k $socket" start; }
bench() { as_postgres pgbench -h "$socket" "$@" postgres; }
query() { as_postgres psql -h "$socket" -d postgres -AtXc "$1"; }
trap 'cat "$socket/log" >&2; control -m immediate stop || true; rm -r "$socket"' EXIT

as_postgres "$programs/initdb" --data-checksums --no-instructions -D "$data"
start
bench -i -q -s 1
bench -c 4 -j 2 -t 50 -n
# Without a clean end, it goes on from its log.
control -m immediate stop
start
test "$(query 'select count(*) from pgbench_history')" = 200
test "$(query 'select (select sum(abalance) from pgbench_accounts) = (select sum(delta) from pgbench_history)')" = t
control -m fast stop
as_postgres "$programs/pg_checksums" --check -D "$data"
