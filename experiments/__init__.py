"""Studies: one folder each, with its question, command, table and conclusion."""
