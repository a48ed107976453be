"""What a study says: views, figures, tables, one page."""
