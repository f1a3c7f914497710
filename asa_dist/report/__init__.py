"""The report of a run: one HTML page that needs no network, made from the files of the run folder alone.

No torch here, but for what asa_dist/inspection.py computes the curriculum of a round of UDASA with.
"""

from asa_dist.report.page import write_report as write_report
