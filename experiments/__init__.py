"""The programs: they turn options into ready objects, watch a run, write and read its folder."""
