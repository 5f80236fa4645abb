"""Runs side by side over seeds, at equal steps, tokens and seconds, as tables and plots."""
