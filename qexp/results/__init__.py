"""The results of runs: names, folders, tables. Import the module that is needed."""
