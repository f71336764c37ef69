"""Text, tables and charts as data, and their renderers."""
