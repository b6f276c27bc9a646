"""Pages and pictures of reports: HTML files that fetch nothing, and SVG and PNG for cards."""

from compress.pages.comparison import BestRow, BestTable, comparison_page
from compress.pages.pictures import write_comparison_pictures, write_pictures
from compress.pages.run import run_page

__all__ = [
    "BestRow",
    "BestTable",
    "comparison_page",
    "run_page",
    "write_comparison_pictures",
    "write_pictures",
]
