"""Trees to look at: the browser's page and its server, pictures, and drawings for a terminal or a notebook."""
