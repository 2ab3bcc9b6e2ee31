"""Pages, tables and figures of finished runs."""
