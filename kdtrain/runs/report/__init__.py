"""`kdtrain report`: one HTML page of a run, or of several beside each other, with nothing to load from anywhere.

    run folders -> `record.py` reads them -> `summary.py`, `curves.py`, `ranking.py`, ... say what is shown
    -> `page.html` with `style.css` and `script.js` -> report.html, report.json

A run may still go, have failed, or have been written by a later version: what is not there is left out, and the page
says which command makes it. No torch is imported.
"""

from kdtrain.runs.report.write import write_report

__all__ = ["write_report"]
