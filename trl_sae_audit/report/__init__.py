"""One HTML file that shows what a run taught, or what data would teach: `write_report`."""

from .page import write_report

__all__ = ["write_report"]
