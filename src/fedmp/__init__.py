"""fedmp."""
