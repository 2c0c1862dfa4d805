"""Layouts of results for people and programs: JSON, JSON Lines, CSV, Markdown, HTML and Parquet."""
