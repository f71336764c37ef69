"""Text, tables and charts as values, and their renderers."""
