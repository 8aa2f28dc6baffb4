"""The paper's tables: rows, their runs, results and statistics."""
