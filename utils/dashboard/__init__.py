"""The dashboard: its service (without a page), its views, and the page."""
