"""The report of a run: one HTML page that needs no network, made from the files of the run folder alone; no torch."""

from asa_dist.report.page import write_report as write_report
