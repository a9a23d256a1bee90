cd "$1"
python3 -c '
import sqlite3
for mode in "delete", "wal":
    database = sqlite3.connect(mode)
    assert database.execute("pragma integrity_check").fetchone() == ("ok",)
    database.execute("insert into t values (100)")
    database.commit()
    assert database.execute("select count(*) from t").fetchone() == (101,)
    database.close()
'
