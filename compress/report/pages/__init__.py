"""Pages and pictures of reports: HTML files that fetch nothing, and SVG and PNG for cards."""

from compress.report.pages.comparison import BestRow, BestTable, comparison_page
from compress.report.pages.pictures import write_comparison_pictures, write_pictures
from compress.report.pages.run import run_page

__all__ = [
    "BestRow",
    "BestTable",
    "comparison_page",
    "run_page",
    "write_comparison_pictures",
    "write_pictures",
]
