"""The command ``mcseg``: from its words to a run folder, and from a stopped run to a resumed one."""
