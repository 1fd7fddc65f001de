"""A recipe and the run of it: steps in a line, engines in a fan, then verify, bench, eval and one
report. Every other package is called from here, and none calls back.
"""
