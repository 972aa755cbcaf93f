"""What a run leaves behind for people: image grids, one self-contained HTML page, a model card."""

from aegpo.report.analysis import write_analysis
from aegpo.report.card import model_card, shown_pictures, write_model_card
from aegpo.report.html import write_report
from aegpo.report.images import save_grid, save_picture
from aegpo.report.records import inside, read_metrics

__all__ = [
    "inside",
    "model_card",
    "read_metrics",
    "save_grid",
    "save_picture",
    "shown_pictures",
    "write_analysis",
    "write_model_card",
    "write_report",
]
