"""Reports of a study: `results.csv`, the closing table and the HTML page, all read from run folders.

Collecting, statistics and the table are in `qexp.results`; `study` ends a study with all of them and `dashboard` draws the page.
Import the module that is needed: only `dashboard` loads the plotting library.
"""
