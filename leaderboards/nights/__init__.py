"""One night's board against the last: regressions, their report, the files of both. Others call `compare`."""
