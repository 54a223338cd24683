"""What a run measured, shown four ways: on the console, as JSON, as one HTML file, as plots.

Everything here reads the results of `octavo.core.results` and nothing else. HTML and plots need
the optional extra `report`, and say so when it is missing.
"""

from octavo.reports.changes import print_fusions, print_swaps
from octavo.reports.console import print_comparison, print_layers, print_report, print_trials
from octavo.reports.headline import headline
from octavo.reports.html import write_html
from octavo.reports.jsonfile import SCHEMA_VERSION, write_json
from octavo.reports.plots import write_plots

__all__ = [
    "SCHEMA_VERSION",
    "headline",
    "print_comparison",
    "print_fusions",
    "print_layers",
    "print_report",
    "print_swaps",
    "print_trials",
    "write_html",
    "write_json",
    "write_plots",
]
