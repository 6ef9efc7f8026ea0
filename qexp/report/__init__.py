"""What a study found: `results.csv`, the closing table and the HTML page, all read from run folders.

`results` collects, `statistics` says how sure a number is, `table` prints, `dashboard` draws. Import the module that
is needed: only `dashboard` loads the plotting library.
"""
