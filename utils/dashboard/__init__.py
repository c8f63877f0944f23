"""The dashboard: its service (no page), what it shows, and the page itself."""
