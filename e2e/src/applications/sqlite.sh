cd "$1"
python3 -c '
import sqlite3
for mode in "delete", "wal":
    database = sqlite3.connect(mode)
    database.execute("pragma journal_mode = " + mode)
    database.execute("create table t(a)")
    for i in range(100):
        database.execute("insert into t values (?)", (i,))
        database.commit()
    assert database.execute("pragma integrity_check").fetchone() == ("ok",)
    database.close()
'
